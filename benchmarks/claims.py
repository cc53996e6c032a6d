"""The experiments behind `benchmarks.convergence`: each returns its curves and its claims."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

import memmeta as mm
from benchmarks.fits import Claim, Fit, geometric, over_seeds, slope
from benchmarks.problems_quadratic import Family
from benchmarks.problems_softmax import Heads
from memmeta.hypergradient import Scheduled, implicit, unrolled
from memmeta.linear_solve import cg, neumann
from memmeta.warm_start import WarmStart

ROUNDING = 1e-10


class Experiment(NamedTuple):
    """What one experiment found.

    Attributes:
        title: of its picture.
        axes: labels of its axes.
        curves: name -> (x, y) with y [seeds, points], for the picture and the JSON file.
        claims: its lines of the table.
        lines: other figures to print.
    """

    title: str
    axes: tuple[str, str]
    curves: dict[str, tuple[np.ndarray, np.ndarray]]
    claims: list[Claim]
    lines: tuple[str, ...] = ()


Step = mm.MetaStep | WarmStart


def compiled(function: Callable, *arguments: Any, quick: bool = False) -> Any:
    """The result of one compiled call; a quick run saves its seconds in the compiler."""
    options = {"xla_backend_optimization_level": 0} if quick else {}
    return jax.jit(function).lower(*arguments).compile(options)(*arguments)


def meta_step(
    problem: mm.Problem, inner: int, estimator: Any, rate: Any, warm: int = 0, fast: bool = False
) -> Step:
    """Gradient descent inside and outside; `warm` tasks remembered."""
    solver = mm.accelerated() if fast else mm.gradient_descent()
    step = mm.make_meta_step(problem, mm.InnerLoop(solver, inner), estimator, optax.sgd(rate))
    return WarmStart(step, warm) if warm else step


def trajectory(
    step: Step, theta: Array, tasks: Any, measure: Callable[[Array], Array], count: int
) -> tuple[Array, Any]:
    """‖∇F(θ_k)‖² of every outer iteration, and the mean report of each."""
    warm = isinstance(step, WarmStart)
    numbers = jnp.arange(jax.tree.leaves(tasks)[0].shape[0])

    def body(state: Any, _: None) -> tuple[Any, tuple]:
        theta = (state.meta if warm else state).meta_params
        if isinstance(step, WarmStart):
            state, metrics = step.update(state, tasks, numbers)
        else:
            state, metrics = step.update(state, tasks)
        return state, (jnp.sum(measure(theta) ** 2), metrics.report)

    _, found = jax.lax.scan(body, step.init(theta), length=count)
    return found


def run(
    make: Callable[[mm.Problem, Array], Step],
    family: Family,
    keys: Array,
    count: int,
    tasks: int,
    quick: bool = False,
) -> tuple[np.ndarray, Any]:
    """`trajectory` on the quadratic family, vmapped over seeds; the outer rate is 1/L_F."""

    def one(key: Array) -> tuple[Array, Any]:
        drawn = family.sample(key, tasks)
        step = make(family.problem(), 1 / family.smoothness)
        start = jnp.zeros_like(family.coupling)
        return trajectory(step, start, drawn, lambda t: family.gradient(t, drawn), count)

    squares, report = compiled(jax.vmap(one), keys, quick=quick)
    return np.asarray(squares), report


def ill_conditioned(dim: int) -> Family:
    """Meta-curvatures β² spread as a power law: progress is sublinear over the range shown."""
    return Family(jnp.linspace(1.0, 10.0, dim), 1.0 / jnp.arange(1, dim + 1) ** 0.75, convex=False)


def deterministic(keys: Array, quick: bool) -> Experiment:
    """All tasks each iteration: cold, warm and tightening, then 10,000 dimensions."""
    count = 300 if quick else 1500
    family = Family(jnp.linspace(1.0, 4.0, 40), jnp.ones(40))

    def tightening(problem: mm.Problem, rate: Array) -> Step:
        schedule = Scheduled(lambda t: implicit(cg(5), tolerance=(0.9 if quick else 0.97) ** t))
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
    claims = []
    for name in ("warm, K = CG = 3", "cold, tightening tolerance"):
        last = over_seeds(np.log10(found[name][:, -1]))
        claims.append(
            Claim(f"exact: log10 ‖∇F‖² at the end, {name}", "≤ -10", last, last.high <= -10)
        )
    biased = over_seeds(np.log10(found["cold, K = CG = 5"][:, -1]))
    claims.append(
        Claim("biased: log10 ‖∇F‖² at the end, cold, K = CG = 5", "> -10", biased, biased.low > -10)
    )
    for dim, seeds in () if quick else ((1000, keys), (10_000, keys[:2])):
        wide = ill_conditioned(dim, convex=False)
        name = f"warm, not convex, dimension {dim:,}"
        squares, _ = run(
            lambda p, r: meta_step(p, 3, implicit(cg(3)), r, warm=4), wide, seeds, 200, 4
        )
        mean = np.cumsum(squares, axis=1) / np.arange(1, 201)
        at = np.unique(np.geomspace(20, 200, 12).astype(int)) - 1
        fit = slope(at + 1.0, mean[:, at])
        found[name] = squares
        claims.append(
            Claim(f"rate: mean_(j≤k) ‖∇F‖² ∝ k^p, {name}", "p ≤ -1, or near", fit, fit.value < -0.9)
        )
    curves = {name: (np.arange(1, y.shape[1] + 1), y) for name, y in found.items()}
    title = "Deterministic: all tasks each iteration"
    return Experiment(title, ("outer iterations k", "‖∇F‖²"), curves, claims)


def stochastic(keys: Array, quick: bool) -> Experiment:
    """|B| tasks drawn anew each iteration: 1/k down to a floor, and the floor falls as 1/|B|."""
    family = Family(jnp.linspace(1.0, 3.0, 20), jnp.ones(20))
    sizes = (1, 16) if quick else (1, 4, 16, 64, 256)
    pool, count = (256, 300) if quick else (1024, 800)
    problem, rate = family.problem(), 0.2 / family.smoothness

    def one(key: Array, size: int) -> Array:
        tasks = family.sample(key, pool)
        step = mm.make_meta_step(
            problem, mm.InnerLoop(mm.accelerated(), 15), implicit(cg(8)), optax.sgd(rate)
        )

        def body(state: Any, key: Array) -> tuple[Any, Array]:
            square = jnp.sum(family.gradient(state.meta_params, tasks) ** 2)
            drawn = jax.random.randint(key, (size,), 0, pool)
            batch = jax.tree.map(lambda leaf: leaf[drawn], tasks)
            return step.update(state, batch)[0], square

        draws = jax.random.split(jax.random.fold_in(key, 1), count)
        return jax.lax.scan(body, step.init(3 * jnp.ones(family.spectrum.size)), draws)[1]

    found = {
        s: np.asarray(compiled(jax.vmap(lambda k, s=s: one(k, s)), keys, quick=quick))
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
    return Experiment("Stochastic: |B| fresh tasks each iteration", ("k", "‖∇F‖²"), curves, claims)


def error_against_steps(keys: Array, quick: bool) -> Experiment:
    """The hypergradient's error against K (exact linear solve) and against CG steps (exact φ)."""
    conditions = np.array([10.0, 100.0] if quick else [10.0, 30.0, 100.0, 300.0])
    dim, most = 200, 1000 if quick else 3000
    products = list(range(4, 41, 12 if quick else 4))

    def one(key: Array, condition: Array) -> dict[str, Array]:
        family = Family(jnp.linspace(1.0, condition, dim), jnp.ones(dim))
        inner = inner_errors(key, family, most)
        return inner | {"CG": linear_errors(key, family, products)}

    over_conditions = jax.vmap(jax.vmap(one, (0, None)), (None, 0))
    errors = compiled(over_conditions, keys, jnp.asarray(conditions), quick=quick)
    curves, claims, rates = {}, [], {}
    for name, found in errors.items():
        y = np.asarray(found)
        x = np.asarray(products) if name == "CG" else np.arange(1, most + 1)
        low = 1e-11 if name == "CG" else 1e-6
        rates[name] = [geometric(x, row, low, 0.3) for row in y]
        curves |= {f"{name}, κ = {c:g}": (x, row) for c, row in zip(conditions, y, strict=True)}
    root = np.sqrt(conditions)
    theory = {
        "gradient descent": -np.log1p(-1 / conditions),
        "accelerated": -np.log1p(-1 / root) / 2,
        "CG": np.log((root + 1) / (root - 1)),
    }
    for name, power in (("gradient descent", -1.0), ("accelerated", -0.5), ("CG", -0.5)):
        measured = np.stack(rates[name], axis=1)
        ratio = over_seeds((measured / theory[name]).min(axis=1))
        claims.append(
            Claim(f"{name}: rate / theory's rate, worst κ", "≥ 1", ratio, ratio.high >= 0.99)
        )
        fit = slope(conditions, measured)
        close = fit.low - 0.15 <= power <= fit.high + 0.15
        claims.append(Claim(f"{name}: rate ∝ κ^p", f"p = {power:g} (± 0.15)", fit, close))
    axes = ("K, or CG steps", "‖∇̂F − ∇F‖")
    return Experiment("Hypergradient error: geometric in K and in CG steps", axes, curves, claims)


def inner_errors(key: Array, family: Family, most: int) -> dict[str, Array]:
    """‖∇̂F − ∇F‖ after each of `most` inner steps, the linear system solved exactly."""
    task = jax.tree.map(lambda leaf: leaf[0], family.sample(key, 1))
    theta, problem = jnp.ones(family.spectrum.size), family.problem()
    exact = family.gradient(theta, jax.tree.map(lambda leaf: leaf[None], task))
    context = problem.embed(theta, task)

    def errors(solver: Any) -> Array:
        loop = mm.InnerLoop(solver, 1)

        def body(state: Any, _: None) -> tuple[Any, Array]:
            state = loop.advance(problem, state, context, 1)
            slope = jax.grad(lambda phi: problem.outer_loss(phi, context)[0])(state.params)
            v = family.product(task, slope, -1)
            return state, jnp.linalg.norm(family.coupling * v - exact)

        start = loop.start(problem, problem.init(theta), context)
        return jax.lax.scan(body, start, length=most)[1]

    return {
        "gradient descent": errors(mm.gradient_descent()),
        "accelerated": errors(mm.accelerated()),
    }


def linear_errors(key: Array, family: Family, products: list[int]) -> Array:
    """‖∇̂F − ∇F‖ after some numbers of CG steps, at the exact φ*."""
    task = jax.tree.map(lambda leaf: leaf[0], family.sample(key, 1))
    best = family.product(task, family.coupling * jnp.ones(family.spectrum.size), -1)
    slope = jax.grad(lambda phi: family.residual_loss(phi - task.target))(best)
    exact = family.product(task, slope, -1)

    def error(steps: int) -> Array:
        v = cg(steps)(lambda x: family.product(task, x), slope).value
        return jnp.linalg.norm(family.coupling * (v - exact))

    return jnp.stack([error(steps) for steps in products])


class Method(NamedTuple):
    """A method of the comparison, and its products (gradients, HVPs, mixed) per task and step."""

    make: Callable[[mm.Problem, Array], Step]
    products: int


def methods(tasks: int) -> dict[str, list[Method]]:
    """The comparators, each with the settings it may choose from."""

    def cold(k: int) -> Method:
        return Method(lambda p, r: meta_step(p, k, implicit(cg(k)), r, fast=True), 2 * k + 1)

    def itd(k: int) -> Method:  # a gradient forth; a Hessian-vector and a mixed product back
        return Method(lambda p, r: meta_step(p, k, unrolled(), r, fast=True), 3 * k)

    def amigo(k: int) -> Method:  # one product more: the warm start's residual
        def make(problem: mm.Problem, rate: Array) -> Step:
            return meta_step(problem, k, implicit(cg(k)), rate, warm=tasks, fast=True)

        return Method(make, 2 * k + 2)

    def soba(scale: float) -> Method:
        def make(problem: mm.Problem, rate: Array) -> Step:
            return meta_step(problem, 1, implicit(neumann(1, rate=0.1)), scale * rate, warm=tasks)

        return Method(make, 3)

    return {
        "memory_reduced": [cold(k) for k in (10, 20, 40)],
        "ITD / MAML": [itd(k) for k in (10, 20, 40)],
        "AmIGO-type warm starts": [amigo(k) for k in (1, 4)],
        "SOBA-type single loop": [soba(s) for s in (1.0, 0.3)],
    }


def complexity(keys: Array, quick: bool) -> Experiment:
    """Gradients and Hessian-vector products needed to reach ‖∇F‖² ≤ ε, for every method."""
    count, tasks = (400, 4) if quick else (3000, 8)
    family = ill_conditioned(40, convex=True)
    levels = np.geomspace(0.3, 1e-2 if quick else 1e-4, 8)
    curves, claims, lines = {}, [], []
    chosen = methods(tasks)
    if quick:
        chosen = {name: chosen[name] for name in ("memory_reduced", "SOBA-type single loop")}
    for name, settings in chosen.items():
        needed = []
        for setting in settings[-1:] if quick else settings:
            squares, _ = run(setting.make, family, keys, count, tasks, quick)
            relative = np.minimum.accumulate(squares / squares[:, :1], axis=1)
            reached = relative[:, None, :] <= levels[:, None]
            first = np.where(reached.any(axis=2), reached.argmax(axis=2) + 1, np.inf)
            needed.append(first * setting.products)
        best = np.min(needed, axis=0)
        met = np.isfinite(best).all(axis=0)
        if met.sum() < 2:
            lines.append(f"{name:24} reaches no two of the levels")
            continue
        curves[name] = (levels[met], best[:, met])
        last = best[:, met][:, -1]
        lines.append(
            f"{name:24} ε = {levels[met][-1]:.1g} after {np.median(last):.0f} products a task"
        )
        fit = slope(levels[met], best[:, met])
        claims.append(
            Claim(f"products to reach ε ∝ ε^-p, {name}", "p ≤ 1", negated(fit), -fit.low <= 1)
        )
    axes = ("ε, relative to the start", "gradients + Hessian-vector products a task")
    return Experiment("Complexity", axes, curves, claims, tuple(lines))


def negated(fit: Fit) -> Fit:
    return Fit(-fit.value, -fit.high, -fit.low)


def memory(keys: Array, quick: bool) -> Experiment:
    """Compiled temporary memory of one meta-step against K, in 10,000 dimensions."""
    dim, tasks = (1000, 4) if quick else (10_000, 8)
    family = Family(jnp.linspace(1.0, 10.0, dim), jnp.ones(dim))
    steps = np.array([20, 200] if quick else [2, 20, 200, 2000])
    drawn = jax.eval_shape(lambda: family.sample(keys[0], tasks))
    theta = jnp.zeros(dim)

    def temporary(step: Step) -> float:
        extra = (jax.ShapeDtypeStruct((tasks,), jnp.int32),) if isinstance(step, WarmStart) else ()
        compiled = step.compiled.lower(step.init(theta), drawn, *extra).compile()
        return compiled.memory_analysis().temp_size_in_bytes / 1e6

    quadratic = family.problem()

    def bent(phi: Array, context: Any) -> Array:
        # reverse mode stores no iterate of a linear map, and that of a quadratic is one
        return quadratic.inner_loss(phi, context) + jnp.sum(jnp.logaddexp(phi, -phi))

    problem = replace(quadratic, inner_loss=bent, smoothness=lambda c: jnp.asarray(11.0))

    def at(k: int) -> dict[str, Step]:
        return {
            "memory_reduced": meta_step(problem, k, implicit(cg(20)), 0.1),
            "warm starts (AmIGO, SOBA)": meta_step(problem, k, implicit(cg(20)), 0.1, warm=tasks),
            "ITD / MAML": meta_step(problem, k, unrolled(), 0.1),
        }

    found = {name: [temporary(at(int(k))[name]) for k in steps] for name in at(1)}
    claims = []
    for name, power in (("memory_reduced", 0), ("warm starts (AmIGO, SOBA)", 0), ("ITD / MAML", 1)):
        y = np.array(found[name])
        fit = over_seeds(np.polyfit(np.log(steps[-2:]), np.log(y[-2:]), 1)[:1])
        good = abs(fit.value - power) < 0.15
        claims.append(Claim(f"memory ∝ K^p, {name}", f"p = {power} (± 0.15)", fit, good))
    warm = at(1)["warm starts (AmIGO, SOBA)"]
    assert isinstance(warm, WarmStart)
    kept = warm.memory_bytes(warm.init(theta)) / 1e6
    lines = [
        f"{name:26} MB at K = {steps.tolist()}: {np.round(y, 2).tolist()}"
        for name, y in found.items()
    ]
    lines.append(f"warm starts keep {kept:.2f} MB more between steps ({tasks} tasks, {dim:,} each)")
    curves = {name: (steps, np.array(y)[None]) for name, y in found.items()}
    title = f"Memory of a meta-step, dimension {dim:,}"
    return Experiment(title, ("inner steps K", "MB"), curves, claims, tuple(lines))


def softmax_heads(keys: Array, quick: bool) -> Experiment:
    """The same on softmax heads, with the rigorous certificate beside the true error."""
    count, tasks, heads = (20 if quick else 300), 4, Heads()
    problem = heads.problem()

    def one(key: Array, step: Step) -> tuple[Array, Any]:
        drawn = heads.sample(key, tasks)
        return trajectory(step, heads.start(key), drawn, lambda t: heads.gradient(t, drawn), count)

    def tight(key: Array) -> tuple[Array, Array]:
        """True error in θ of one task against ‖X‖ times the bound in feature space."""
        drawn = heads.sample(key, 1)
        step = meta_step(problem, 30, implicit(cg(5)), 0.1, fast=True)
        theta = heads.start(key)
        found, metrics = step.gradient(step.init(theta), drawn)
        inputs = jnp.concatenate([drawn.support_inputs[0], drawn.query_inputs[0]])
        bound = jnp.linalg.norm(inputs, 2) * metrics.report.error_bound
        return jnp.linalg.norm(found - heads.gradient(theta, drawn)), bound

    made = {
        "cold, K = CG = 5": meta_step(problem, 5, implicit(cg(5)), 0.3, fast=True),
        "warm, K = CG = 5": meta_step(problem, 5, implicit(cg(5)), 0.3, warm=tasks, fast=True),
    }
    found = {
        name: np.asarray(compiled(jax.vmap(lambda k, s=step: one(k, s)), keys, quick=quick)[0])
        for name, step in made.items()
    }
    many = jax.random.split(keys[0], 32 if quick else 256)
    error, bound = map(np.asarray, compiled(jax.vmap(tight), many, quick=quick))
    covered = over_seeds((bound >= error).astype(float))
    ratio = float(np.median(bound / error))
    gap = over_seeds(np.log10(found["warm, K = CG = 5"][:, -1] / found["cold, K = CG = 5"][:, -1]))
    claims = [
        Claim("softmax: share of errors under the bound", "= 1", covered, covered.value == 1),
        Claim("softmax: log10 of warm / cold ‖∇F‖² at the end", "< 0", gap, gap.high < 0),
    ]
    lines = (f"softmax: median of bound / true error over {len(many)} problems: {ratio:.3g}",)
    curves = {name: (np.arange(1, count + 1), y) for name, y in found.items()}
    return Experiment("Softmax heads", ("k", "‖∇F‖²"), curves, claims, lines)


def on_demand(keys: Array, quick: bool) -> Experiment:
    """A tightening tolerance against fixed K, at equal numbers of products."""
    count, tasks, round_steps = (200 if quick else 1000), 8, 5
    family = Family(jnp.linspace(1.0, 20.0, 40), jnp.ones(40))

    def tightening(problem: mm.Problem, rate: Array) -> Step:
        schedule = Scheduled(lambda t: implicit(cg(5), tolerance=0.1 / (1.0 + t) ** 2))
        return meta_step(problem, 1000, schedule, rate)

    curves: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    squares, report = run(tightening, family, keys, count, tasks, quick)
    steps = np.asarray(report.inner_steps)
    products = (steps + 5 * (steps / round_steps + 1) + 1).mean(axis=0).cumsum()
    curves["tolerance 0.1 / (1 + k)²"] = (products, squares)
    for k in (20,) if quick else (5, 10, 20, 40):
        y, _ = run(
            lambda p, r, k=k: meta_step(p, k, implicit(cg(k)), r), family, keys, count, 8, quick
        )
        curves[f"fixed K = CG = {k}"] = ((2 * k + 1) * np.arange(1, count + 1), y)
    budget = min(curves[name][0][-1] for name in curves if "= 5" not in name)
    at = {n: np.array([np.interp(budget, x, row) for row in y]) for n, (x, y) in curves.items()}
    best = np.min([at[n] for n in at if n.startswith("fixed")], axis=0)
    gain = over_seeds(np.log10(at["tolerance 0.1 / (1 + k)²"] / best))
    claims = [
        Claim("log10 of ‖∇F‖², tolerance / best fixed K, equal cost", "≤ 0", gain, gain.low <= 0)
    ]
    lines = tuple(
        f"{name:26} ‖∇F‖² after {budget:.0f} products a task: {np.median(y):.2g}"
        for name, y in at.items()
    )
    axes = ("gradients + Hessian-vector products a task", "‖∇F‖²")
    return Experiment("Accuracy on demand", axes, curves, claims, lines)


EXPERIMENTS: dict[str, Callable[[Array, bool], Experiment]] = {
    "deterministic": deterministic,
    "stochastic": stochastic,
    "error": error_against_steps,
    "complexity": complexity,
    "memory": memory,
    "softmax": softmax_heads,
    "on_demand": on_demand,
}
"""All of them, in the order of the table."""

QUICK = ["deterministic", "stochastic", "error", "memory"]
"""Those that a quick run takes, unless told otherwise."""
