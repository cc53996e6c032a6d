"""Claims of convergence: deterministic, stochastic, softmax heads, accuracy on demand."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

import memmeta as mm
from benchmarks.convergence.experiment import (
    Experiment,
    Step,
    evaluated,
    fixed,
    flat,
    footprint,
    footprints,
    ill_conditioned,
    meta_step,
    run,
    tightening,
    trajectory,
)
from benchmarks.convergence.fits import Claim, over_seeds, slope
from benchmarks.problems.quadratic import Family
from benchmarks.problems.softmax import Heads
from memmeta.hypergradient import implicit
from memmeta.linear_solve import cg


def deterministic(keys: Array, quick: bool) -> Experiment:
    """All tasks each iteration: cold, warm and tightening, then 10,000 dimensions."""
    family = Family(jnp.linspace(1.0, 4.0, 40), jnp.ones(40))
    methods = {
        "cold, K = CG = 5": fixed(5),
        "cold, K = CG = 20": fixed(20),
        "warm, K = CG = 3": fixed(3, warm=8),
        "cold, tightening tolerance": tightening(lambda t: (0.9 if quick else 0.97) ** t, 400),
    }
    if quick:
        del methods["cold, K = CG = 20"]
    count = 300 if quick else 1500
    found = {n: run(make, family, keys, count, 8, quick)[0] for n, make in methods.items()}
    ends = {name: over_seeds(np.log10(squares[:, -1])) for name, squares in found.items()}
    claims, memory = [], footprints(methods, family, 8)
    for name in ("warm, K = CG = 3", "cold, tightening tolerance"):
        text = f"exact: log10 ‖∇F‖² at the end, {name}"
        claims.append(Claim(text, "≤ -10", ends[name], ends[name].high <= -10))
    text, biased = "biased: log10 ‖∇F‖² at the end, cold, K = CG = 5", ends["cold, K = CG = 5"]
    claims.append(Claim(text, "> -10", biased, biased.low > -10))
    for dim, seeds in () if quick else ((1000, keys), (10_000, keys[:3])):
        name = f"warm, not convex, dimension {dim:,}"
        found[name], more = in_many_dimensions(name, dim, seeds)
        claims += more
        memory |= footprints({name: fixed(3, warm=4)}, ill_conditioned(dim, convex=False), 4)
    claims.append(flat(memory, "deterministic"))
    curves = {name: (np.arange(1, y.shape[1] + 1), y) for name, y in found.items()}
    title = "Deterministic: all tasks each iteration"
    return Experiment(title, ("outer iterations k", "‖∇F‖²"), curves, claims, memory=memory)


def in_many_dimensions(name: str, dim: int, keys: Array) -> tuple[np.ndarray, list[Claim]]:
    """Warm starts on a problem that is not convex: ‖∇F‖², its rate and the theorem's bound."""
    family = ill_conditioned(dim, convex=False)
    squares, report = run(fixed(3, warm=4), family, keys, 1000, 4)
    at = np.unique(np.geomspace(50, 1000, 12).astype(int)) - 1
    fit = slope(at + 1.0, squares[:, at])
    share = over_seeds(share_of_theorem(family, keys, squares, report))
    return squares, [
        Claim(f"rate: ‖∇F‖² ∝ k^p, {name}", "p ≤ -1", fit, fit.high <= -1),
        Claim(f"theorem: largest share used, {name}", "≤ 1", share, share.value <= 1),
    ]


def share_of_theorem(family: Family, keys: Array, squares: np.ndarray, report: Any) -> np.ndarray:
    """mean ‖∇F‖² / (2 L_F F(θ₀)/k + mean certificate²), the largest over k, for every seed."""
    start = jnp.zeros_like(family.coupling)
    losses = np.array([family.loss(start, family.sample(key, 4)) for key in keys])
    bias = np.cumsum(np.asarray(report.error_bound) ** 2, axis=1)
    promised = 2 * float(family.smoothness) * losses[:, None] + bias
    return np.max(np.cumsum(squares, axis=1) / promised, axis=1)


def stochastic(keys: Array, quick: bool) -> Experiment:
    """|B| tasks drawn anew each iteration: 1/k down to a floor, and the floor falls as 1/|B|."""
    family = Family(jnp.linspace(1.0, 3.0, 20), jnp.ones(20))
    sizes = (1, 16) if quick else (1, 4, 16, 64, 256)
    pool, count = (256, 300) if quick else (1024, 800)
    made = {size: step_of_batch(family, size) for size in sizes}
    found = {s: drawn_anew(step, family, keys, s, pool, count, quick) for s, step in made.items()}
    floors = np.stack([found[s][:, count // 2 :].mean(axis=1) for s in sizes], axis=1)
    fit = slope(np.array(sizes), floors)
    steps = np.arange(1, count + 1)
    excess = found[sizes[-1]].cumsum(axis=1) / steps - floors[:, -1:]
    at = np.unique(np.geomspace(count // 8, count // 2, 10).astype(int)) - 1
    near = slope(at + 1.0, np.maximum(excess[:, at], 1e-300))
    name = f"mean_(j≤k) ‖∇F‖² − floor ∝ k^p, |B| = {sizes[-1]}"
    claims = [
        Claim("floor of ‖∇F‖² ∝ |B|^p", "p = -1", fit, fit.low <= -1 <= fit.high),
        Claim(name, "p ≤ -1, or near", near, near.value < -0.9),
    ]
    curves = {f"|B| = {s}": (steps, found[s]) for s in sizes}
    theta, one = jnp.zeros(family.spectrum.size), keys[0]
    memory = {f"|B| = {s}": footprint(made[s], theta, family.sample(one, s)) for s in sizes}
    claims.append(flat(memory, "stochastic"))
    title = "Stochastic: |B| fresh tasks each iteration, in chunks of at most 16"
    return Experiment(title, ("k", "‖∇F‖²"), curves, claims, memory=memory)


def step_of_batch(family: Family, size: int) -> mm.MetaStep:
    """The paper's method at a fifth of the outer rate 1/L_F."""
    inner, outer = mm.InnerLoop(mm.inner.accelerated(), 15), optax.sgd(0.2 / family.smoothness)
    parts = (family.problem(), inner, implicit(cg(8)), outer)
    return mm.make_meta_step(*parts, task_chunk=min(size, 16), report="full")


def drawn_anew(
    step: mm.MetaStep, family: Family, keys: Array, size: int, pool: int, count: int, quick: bool
) -> np.ndarray:
    """‖∇F(θ_k)‖² over a pool of tasks, of which each meta-step draws `size` at random."""

    def one(key: Array) -> Array:
        tasks = family.sample(key, pool)

        def body(state: Any, key: Array) -> tuple[Any, Array]:
            square = jnp.sum(family.gradient(state.meta_params, tasks) ** 2)
            drawn = jax.random.randint(key, (size,), 0, pool)
            batch = jax.tree.map(lambda leaf: leaf[drawn], tasks)
            return step.update(state, batch)[0], square

        draws = jax.random.split(jax.random.fold_in(key, 1), count)
        return jax.lax.scan(body, step.init(3 * jnp.ones(family.spectrum.size)), draws)[1]

    return np.asarray(evaluated(jax.vmap(one), keys, quick=quick))


def softmax_heads(keys: Array, quick: bool) -> Experiment:
    """The same on softmax heads, with the rigorous certificate beside the true error."""
    count, tasks, heads = (60 if quick else 800), 4, Heads(decay=0.1)
    rate = 0.7  # the curvature of F + λ/2 ‖θ‖² is at most 1.4 at the minima found
    problem = heads.problem()

    def one(key: Array, step: Step) -> tuple[Array, Any]:
        drawn = heads.sample(key, tasks)
        return trajectory(step, heads.start(key), drawn, lambda t: heads.gradient(t, drawn), count)

    made = {
        f"{name}, K = CG = 5": meta_step(problem, 5, implicit(cg(5)), rate, kept, True, heads.decay)
        for name, kept in (("cold", 0), ("warm", tasks))
    }
    found = {
        name: np.asarray(evaluated(jax.vmap(lambda k, s=step: one(k, s)), keys, quick=quick)[0])
        for name, step in made.items()
    }
    cold, warm = (over_seeds(np.log10(squares[:, -1])) for squares in found.values())
    at = np.unique(np.geomspace(count // 20, count // 2, 12).astype(int)) - 1
    fit = slope(at + 1.0, found["warm, K = CG = 5"][:, at])
    error, bound = softmax_errors(keys[0], 32 if quick else 256)
    covered = over_seeds((bound >= error).astype(float))
    drawn, start = heads.sample(keys[0], tasks), heads.start(keys[0])
    memory = {name: footprint(step, start, drawn) for name, step in made.items()}
    exact, limit = ("< cold", cold.low) if quick else ("≤ -10", -10)
    claims = [
        Claim("exact: log10 ‖∇F‖² at the end, softmax, warm", exact, warm, warm.high <= limit),
        Claim("biased: log10 ‖∇F‖² at the end, softmax, cold", "> -10", cold, cold.low > -10),
        Claim("rate: ‖∇F‖² ∝ k^p, softmax, warm", "p ≤ -1", fit, fit.high <= -1),
        Claim("softmax: share of errors under the bound", "= 1", covered, covered.value == 1),
        flat(memory, "softmax"),
    ]
    ratio = float(np.median(bound / error))
    lines = (f"softmax: median of bound / true error over {error.size} problems: {ratio:.3g}",)
    curves = {name: (np.arange(1, count + 1), y) for name, y in found.items()}
    return Experiment("Softmax heads", ("k", "‖∇F‖²"), curves, claims, lines, memory)


def softmax_errors(key: Array, count: int) -> tuple[np.ndarray, np.ndarray]:
    """True errors in θ of single tasks, and ‖X‖ times the bounds in feature space."""
    heads, inner = Heads(), mm.InnerLoop(steps=30)
    parts = (heads.problem(), inner, implicit(cg(5)), optax.identity())
    step = mm.make_meta_step(*parts, report="full")

    def one(key: Array) -> tuple[Array, Array]:
        drawn, theta = heads.sample(key, 1), heads.start(key)
        found, metrics = step.gradient(step.init(theta), drawn)
        inputs = jnp.concatenate([drawn.support_inputs[0], drawn.query_inputs[0]])
        bound = jnp.linalg.norm(inputs, 2) * metrics.report.error_bound
        return jnp.linalg.norm(found - heads.gradient(theta, drawn)), bound

    error, bound = evaluated(jax.vmap(one), jax.random.split(key, count))
    return np.asarray(error), np.asarray(bound)


def on_demand(keys: Array, quick: bool) -> Experiment:
    """Tightening tolerances against fixed K, at equal numbers of products."""
    count, tasks = (200 if quick else 2000), 8
    family = Family(jnp.linspace(1.0, 20.0, 40), jnp.ones(40))
    slowly, fast = (lambda t: 0.5 * 0.995**t), (lambda t: 0.1 / (1.0 + t) ** 2)
    methods = {
        "tolerance 0.5 · 0.995^k": tightening(slowly, 1000),
        "the same, warm": tightening(slowly, 1000, warm=tasks),
        "tolerance 0.1 / (1 + k)²": tightening(fast, 1000),
    }
    curves: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, make in methods.items():
        squares, report = run(make, family, keys, count, tasks, quick)
        steps = np.asarray(report.inner_steps)
        products = (steps + np.asarray(report.linear_iterations)).mean(axis=0).cumsum()
        curves[name] = (products, squares)
    first = next(iter(methods))
    budget = curves[first][0][-1]
    for k in (20,) if quick else (10, 20, 40, 80, 160):
        name, number = f"fixed K = CG = {k}", int(np.ceil(budget / (2 * k + 1)))
        methods[name] = fixed(k)
        y, _ = run(methods[name], family, keys, number, tasks, quick)
        curves[name] = ((2 * k + 1) * np.arange(1, number + 1), y)
    memory = footprints(methods, family, tasks)
    claims, lines = [flat(memory, "on demand")], []
    for cost in (budget / 100, budget / 10, budget):
        at = {n: np.array([np.interp(cost, x, row) for row in y]) for n, (x, y) in curves.items()}
        best = np.min([at[n] for n in at if n.startswith("fixed")], axis=0)
        gain = over_seeds(np.log10(at[first] / best))
        name = f"log10 of ‖∇F‖², tolerance / best fixed K, {cost:.0f} products each"
        claims.append(Claim(name, "≤ 0", gain, gain.low <= 0))
        after = f"‖∇F‖² after {cost:.0f} products a task"
        lines += [f"{name:26} {after}: {np.median(y):.2g}" for name, y in at.items()]
    axes = ("gradients + Hessian-vector products a task", "‖∇F‖²")
    return Experiment("Accuracy on demand", axes, curves, claims, tuple(lines), memory)
