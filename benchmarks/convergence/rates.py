"""Claims of convergence: deterministic, stochastic, softmax heads, accuracy on demand."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

import memmeta as mm
from benchmarks.convergence.experiment import (
    Experiment,
    Footprint,
    Step,
    evaluated,
    flat,
    footprint,
    footprints,
    ill_conditioned,
    meta_step,
    run,
    trajectory,
)
from benchmarks.convergence.fits import Claim, over_seeds, slope
from benchmarks.problems.quadratic import Family
from benchmarks.problems.softmax import Heads
from memmeta.hypergradient import implicit, scheduled
from memmeta.linear_solve import cg


def deterministic(keys: Array, quick: bool) -> Experiment:
    """All tasks each iteration: cold, warm and tightening, then 10,000 dimensions."""
    count = 300 if quick else 1500
    family = Family(jnp.linspace(1.0, 4.0, 40), jnp.ones(40))

    def tightening(problem: mm.Problem, rate: Array) -> Step:
        schedule = scheduled(lambda t: implicit(cg(5), tolerance=(0.9 if quick else 0.97) ** t))
        return meta_step(problem, 400, schedule, rate)

    methods: dict[str, Callable] = {
        "cold, K = CG = 5": lambda p, r: meta_step(p, 5, implicit(cg(5)), r),
        "cold, K = CG = 20": lambda p, r: meta_step(p, 20, implicit(cg(20)), r),
        "warm, K = CG = 3": lambda p, r: meta_step(p, 3, implicit(cg(3)), r, warm=8),
        "cold, tightening tolerance": tightening,
    }
    if quick:
        del methods["cold, K = CG = 20"]
    found = {n: run(make, family, keys, count, 8, quick)[0] for n, make in methods.items()}
    claims, memory = [], footprints(methods, family, 8)
    for name in ("warm, K = CG = 3", "cold, tightening tolerance"):
        last = over_seeds(np.log10(found[name][:, -1]))
        claims.append(
            Claim(f"exact: log10 ‖∇F‖² at the end, {name}", "≤ -10", last, last.high <= -10)
        )
    biased = over_seeds(np.log10(found["cold, K = CG = 5"][:, -1]))
    claims.append(
        Claim("biased: log10 ‖∇F‖² at the end, cold, K = CG = 5", "> -10", biased, biased.low > -10)
    )
    for dim, seeds in () if quick else ((1000, keys), (10_000, keys[:3])):
        wide = ill_conditioned(dim, convex=False)
        name = f"warm, not convex, dimension {dim:,}"

        def warm(problem: mm.Problem, rate: Array) -> Step:
            return meta_step(problem, 3, implicit(cg(3)), rate, warm=4)

        squares, report = run(warm, wide, seeds, 1000, 4)
        memory |= footprints({name: warm}, wide, 4)
        at = np.unique(np.geomspace(50, 1000, 12).astype(int)) - 1
        fit = slope(at + 1.0, squares[:, at])
        found[name] = squares
        claims.append(Claim(f"rate: ‖∇F‖² ∝ k^p, {name}", "p ≤ -1", fit, fit.high <= -1))
        share = over_seeds(share_of_theorem(wide, seeds, squares, report))
        claims.append(Claim(f"theorem: largest share used, {name}", "≤ 1", share, share.value <= 1))
    claims.append(flat(memory, "deterministic"))
    curves = {name: (np.arange(1, y.shape[1] + 1), y) for name, y in found.items()}
    title = "Deterministic: all tasks each iteration"
    return Experiment(title, ("outer iterations k", "‖∇F‖²"), curves, claims, memory=memory)


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
    problem, rate = family.problem(), 0.2 / family.smoothness

    def made(size: int) -> mm.MetaStep:
        return mm.make_meta_step(
            problem,
            mm.InnerLoop(mm.inner.accelerated(), 15),
            implicit(cg(8)),
            optax.sgd(rate),
            task_chunk=min(size, 16),
        )

    def one(key: Array, size: int) -> Array:
        tasks, step = family.sample(key, pool), made(size)

        def body(state: Any, key: Array) -> tuple[Any, Array]:
            square = jnp.sum(family.gradient(state.meta_params, tasks) ** 2)
            drawn = jax.random.randint(key, (size,), 0, pool)
            batch = jax.tree.map(lambda leaf: leaf[drawn], tasks)
            return step.update(state, batch)[0], square

        draws = jax.random.split(jax.random.fold_in(key, 1), count)
        return jax.lax.scan(body, step.init(3 * jnp.ones(family.spectrum.size)), draws)[1]

    found = {
        s: np.asarray(evaluated(jax.vmap(lambda k, s=s: one(k, s)), keys, quick=quick))
        for s in sizes
    }
    floors = np.stack([found[s][:, count // 2 :].mean(axis=1) for s in sizes], axis=1)
    fit = slope(np.array(sizes), floors)
    steps = np.arange(1, count + 1)
    excess = found[sizes[-1]].cumsum(axis=1) / steps - floors[:, -1:]
    at = np.unique(np.geomspace(count // 8, count // 2, 10).astype(int)) - 1
    approach = slope(at + 1.0, np.maximum(excess[:, at], 1e-300))
    claims = [
        Claim("floor of ‖∇F‖² ∝ |B|^p", "p = -1", fit, fit.low <= -1 <= fit.high),
        Claim(
            f"mean_(j≤k) ‖∇F‖² − floor ∝ k^p, |B| = {sizes[-1]}",
            "p ≤ -1, or near",
            approach,
            approach.value < -0.9,
        ),
    ]
    curves = {f"|B| = {s}": (steps, found[s]) for s in sizes}
    theta = jnp.zeros(family.spectrum.size)
    memory = {f"|B| = {s}": footprint(made(s), theta, family.sample(keys[0], s)) for s in sizes}
    claims.append(flat(memory, "stochastic"))
    title = "Stochastic: |B| fresh tasks each iteration, in chunks of at most 16"
    return Experiment(title, ("k", "‖∇F‖²"), curves, claims, memory=memory)


def softmax_heads(keys: Array, quick: bool) -> Experiment:
    """The same on softmax heads, with the rigorous certificate beside the true error."""
    count, tasks, heads = (60 if quick else 800), 4, Heads(decay=0.1)
    rate = 0.7  # the curvature of F + λ/2 ‖θ‖² is at most 1.4 at the minima found
    problem = heads.problem()

    def one(key: Array, step: Step) -> tuple[Array, Any]:
        drawn = heads.sample(key, tasks)
        return trajectory(step, heads.start(key), drawn, lambda t: heads.gradient(t, drawn), count)

    made = {
        f"{name}, K = CG = 5": meta_step(
            problem, 5, implicit(cg(5)), rate, kept, fast=True, decay=heads.decay
        )
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
    memory = {
        name: footprint(step, heads.start(keys[0]), heads.sample(keys[0], tasks))
        for name, step in made.items()
    }
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
    heads = Heads()
    step = mm.make_meta_step(
        heads.problem(), mm.InnerLoop(steps=30), implicit(cg(5)), optax.identity()
    )

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
    count, tasks, round_steps = (200 if quick else 2000), 8, 5
    family = Family(jnp.linspace(1.0, 20.0, 40), jnp.ones(40))
    schedules: dict[str, tuple[Callable, int]] = {
        "tolerance 0.5 · 0.995^k": (lambda t: 0.5 * 0.995**t, 0),
        "the same, warm": (lambda t: 0.5 * 0.995**t, tasks),
        "tolerance 0.1 / (1 + k)²": (lambda t: 0.1 / (1.0 + t) ** 2, 0),
    }
    first = next(iter(schedules))
    memory: dict[str, Footprint] = {}
    curves: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, (at_step, warm) in schedules.items():

        def make(
            problem: mm.Problem, rate: Array, at_step: Any = at_step, warm: int = warm
        ) -> Step:
            schedule = scheduled(lambda t: implicit(cg(5), tolerance=at_step(t)))
            return meta_step(problem, 1000, schedule, rate, warm=warm)

        squares, report = run(make, family, keys, count, tasks, quick)
        memory |= footprints({name: make}, family, tasks)
        steps = np.asarray(report.inner_steps)
        products = (steps + 5 * (steps / round_steps + 1) + 1).mean(axis=0).cumsum()
        curves[name] = (products, squares)
    budget = curves[first][0][-1]
    for k in (20,) if quick else (10, 20, 40, 80, 160):
        made = int(np.ceil(budget / (2 * k + 1)))
        name = f"fixed K = CG = {k}"

        def fixed(problem: mm.Problem, rate: Array, k: int = k) -> Step:
            return meta_step(problem, k, implicit(cg(k)), rate)

        y, _ = run(fixed, family, keys, made, tasks, quick)
        memory |= footprints({name: fixed}, family, tasks)
        curves[name] = ((2 * k + 1) * np.arange(1, made + 1), y)
    claims, lines = [flat(memory, "on demand")], []
    for cost in (budget / 100, budget / 10, budget):
        at = {n: np.array([np.interp(cost, x, row) for row in y]) for n, (x, y) in curves.items()}
        best = np.min([at[n] for n in at if n.startswith("fixed")], axis=0)
        gain = over_seeds(np.log10(at[first] / best))
        name = f"log10 of ‖∇F‖², tolerance / best fixed K, {cost:.0f} products each"
        claims.append(Claim(name, "≤ 0", gain, gain.low <= 0))
        lines += [
            f"{name:26} ‖∇F‖² after {cost:.0f} products a task: {np.median(y):.2g}"
            for name, y in at.items()
        ]
    axes = ("gradients + Hessian-vector products a task", "‖∇F‖²")
    return Experiment("Accuracy on demand", axes, curves, claims, tuple(lines), memory)
