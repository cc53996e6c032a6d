"""Claims of cost: steps for an accuracy, products for an accuracy, memory."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import memmeta as mm
from benchmarks.convergence.experiment import (
    LONGER,
    Experiment,
    Footprint,
    Make,
    evaluated,
    fixed,
    flat,
    footprints,
    ill_conditioned,
    megabytes,
    meta_step,
    run,
)
from benchmarks.convergence.fits import Claim, Fit, geometric, over_seeds, slope
from benchmarks.problems.quadratic import Family
from memmeta.hypergradient import implicit, unrolled
from memmeta.linear_solve import cg, neumann
from memmeta.meta import WarmStart


def error_against_steps(keys: Array, quick: bool) -> Experiment:
    """The hypergradient's error against K (exact linear solve) and against CG steps (exact φ)."""
    conditions = np.array([10.0, 100.0] if quick else [10.0, 30.0, 100.0, 300.0])
    dim, most = 200, 1000 if quick else 3000
    products = list(range(4, 41, 12 if quick else 4))

    def one(key: Array, condition: Array) -> dict[str, Array]:
        family = Family(jnp.linspace(1.0, condition, dim), jnp.ones(dim))
        inner = inner_errors(key, family, most)
        return inner | {"CG": linear_errors(key, family, products)}

    everywhere = jax.vmap(jax.vmap(one, (0, None)), (None, 0))
    errors = evaluated(everywhere, keys, jnp.asarray(conditions), quick=quick)
    curves: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    claims, rates = [], {}
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
        text = f"{name}: rate / theory's rate, worst κ"
        claims.append(Claim(text, "≥ 1", ratio, ratio.high >= 0.99))
        fit = slope(conditions, measured)
        close = fit.low - 0.15 <= power <= fit.high + 0.15
        claims.append(Claim(f"{name}: rate ∝ κ^p", f"p = {power:g} (± 0.15)", fit, close))
    kinds = error_footprints(Family(jnp.linspace(1.0, 10.0, dim), jnp.ones(dim)))
    claims.append(flat(kinds, "error"))
    memory = {name: kinds[name.split(",")[0]] for name in curves}
    title = "Hypergradient error: geometric in K and in CG steps"
    return Experiment(title, ("K, or CG steps", "‖∇̂F − ∇F‖"), curves, claims, memory=memory)


def error_footprints(family: Family) -> dict[str, Footprint]:
    """The memory of a meta-step against inner steps of two kinds, and against CG steps."""

    def inner(fast: bool) -> Make:
        return lambda problem, rate: meta_step(problem, 30, implicit(cg(20)), rate, fast=fast)

    found = footprints({"gradient descent": inner(False), "accelerated": inner(True)}, family, 1)
    drawn = jax.eval_shape(lambda: family.sample(jax.random.key(0), 1))
    theta, steps = jnp.zeros_like(family.coupling), (4, 4 * LONGER)
    made = [meta_step(family.problem(), 30, implicit(cg(count)), 0.1) for count in steps]
    small, large = (megabytes(step, theta, drawn) for step in made)
    return found | {"CG": Footprint(steps, (small, large))}


def inner_errors(key: Array, family: Family, most: int) -> dict[str, Array]:
    """‖∇̂F − ∇F‖ after each of `most` inner steps, the linear system solved exactly."""
    task = jax.tree.map(lambda leaf: leaf[0], family.sample(key, 1))
    theta, problem = jnp.ones(family.spectrum.size), family.problem()
    exact = family.gradient(theta, jax.tree.map(lambda leaf: leaf[None], task))
    context = problem.embed(theta, task)

    def errors(solver: Any) -> Array:
        loop = mm.InnerLoop(solver, 1)

        def body(state: Any, _: None) -> tuple[Any, Array]:
            state = loop.advance(problem, state, context, jax.random.key(0), 1)
            slope = jax.grad(lambda phi: problem.outer_loss(phi, context)[0])(state.params)
            v = family.product(task, slope, -1)
            return state, jnp.linalg.norm(family.coupling * v - exact)

        start = loop.start(problem, problem.init(theta), context)
        return jax.lax.scan(body, start, length=most)[1]

    return {
        "gradient descent": errors(mm.inner.gradient_descent()),
        "accelerated": errors(mm.inner.accelerated()),
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


def methods(tasks: int) -> dict[str, list[tuple[Make, int]]]:
    """The comparators, each with the settings it may choose from.

    A setting is how to make its step, and the products that it takes of each task: gradients,
    Hessian-vector and mixed products.
    """

    def soba(scale: float) -> Make:
        estimator = implicit(neumann(1, rate=0.1))
        return lambda problem, rate: meta_step(problem, 1, estimator, scale * rate, warm=tasks)

    itd = lambda k: lambda p, r: meta_step(p, k, unrolled(), r, fast=True)  # noqa: E731
    several = (10, 20, 40)
    return {
        "memory_reduced": [(fixed(k, fast=True), 2 * k + 1) for k in several],
        # a gradient on the way there; a Hessian-vector and a mixed product on the way back
        "ITD / MAML": [(itd(k), 3 * k) for k in several],
        # one product more than memory_reduced: the residual at the remembered v
        "AmIGO-type warm starts": [(fixed(k, tasks, fast=True), 2 * k + 2) for k in (1, 4)],
        "SOBA-type single loop": [(soba(scale), 3) for scale in (1.0, 0.3)],
    }


def complexity(keys: Array, quick: bool) -> Experiment:
    """Gradients and Hessian-vector products needed to reach ‖∇F‖² ≤ ε, for every method."""
    count, tasks = (400, 4) if quick else (3000, 8)
    family = ill_conditioned(40, convex=True)
    levels = np.geomspace(0.3, 1e-2 if quick else 1e-4, 8)
    curves, claims, lines = {}, [], []
    memory: dict[str, Footprint] = {}
    chosen = methods(tasks)
    if quick:
        chosen = {name: chosen[name] for name in ("memory_reduced", "SOBA-type single loop")}
    for name, settings in chosen.items():
        needed = []
        for make, products in settings[-1:] if quick else settings:
            squares, _ = run(make, family, keys, count, tasks, quick)
            relative = np.minimum.accumulate(squares / squares[:, :1], axis=1)
            reached = relative[:, None, :] <= levels[:, None]
            first = np.where(reached.any(axis=2), reached.argmax(axis=2) + 1, np.inf)
            needed.append(first * products)
        best = np.min(needed, axis=0)
        met = np.isfinite(best).all(axis=0)
        if met.sum() < 2:
            lines.append(f"{name:24} reaches no two of the levels")
            continue
        curves[name] = (levels[met], best[:, met])
        memory |= footprints({name: settings[-1][0]}, family, tasks)
        last = best[:, met][:, -1]
        after = f"after {np.median(last):.0f} products a task"
        lines.append(f"{name:24} ε = {levels[met][-1]:.1g} {after}")
        fit = slope(levels[met], best[:, met])
        text = f"products to reach ε ∝ ε^-p, {name}"
        claims.append(Claim(text, "p ≤ 1", negated(fit), -fit.low <= 1))
    claims.append(flat({n: m for n, m in memory.items() if "ITD" not in n}, "complexity"))
    axes = ("ε, relative to the start", "gradients + Hessian-vector products a task")
    return Experiment("Complexity", axes, curves, claims, tuple(lines), memory)


def negated(fit: Fit) -> Fit:
    return Fit(-fit.value, -fit.high, -fit.low)


def memory(keys: Array, quick: bool) -> Experiment:
    """Compiled temporary memory of one meta-step against K, in 10,000 dimensions."""
    dim, tasks = (1000, 4) if quick else (10_000, 8)
    family = Family(jnp.linspace(1.0, 10.0, dim), jnp.ones(dim))
    steps = np.array([20, 200] if quick else [2, 20, 200, 2000])
    drawn, theta = jax.eval_shape(lambda: family.sample(keys[0], tasks)), jnp.zeros(dim)
    quadratic = family.problem()

    def not_quadratic(phi: Array, context: Any) -> Array:
        # reverse mode stores no iterate of a linear map, and a gradient step on a quadratic is one
        return quadratic.inner_loss(phi, context) + jnp.sum(jnp.logaddexp(phi, -phi))

    bound = lambda context: jnp.asarray(11.0)  # noqa: E731
    problem = replace(quadratic, inner_loss=not_quadratic, smoothness=bound)
    made: dict[str, tuple[Any, int, int]] = {  # estimator, tasks remembered, expected exponent
        "memory_reduced": (implicit(cg(20)), 0, 0),
        "warm starts (AmIGO, SOBA)": (implicit(cg(20)), tasks, 0),
        "ITD / MAML": (unrolled(), 0, 1),
    }
    found, claims, lines = {}, [], []
    for name, (estimator, warm, power) in made.items():
        at = [meta_step(problem, int(k), estimator, 0.1, warm=warm) for k in steps]
        y = found[name] = np.array([megabytes(step, theta, drawn) for step in at])
        fit = over_seeds(np.polyfit(np.log(steps[-2:]), np.log(y[-2:]), 1)[:1])
        good = abs(fit.value - power) < 0.15
        claims.append(Claim(f"memory ∝ K^p, {name}", f"p = {power} (± 0.15)", fit, good))
        lines.append(f"{name:26} MB at K = {steps.tolist()}: {np.round(y, 2).tolist()}")
        if isinstance(at[0], WarmStart):
            kept = at[0].memory_bytes(at[0].init(theta, drawn)) / 1e6
    lines.append(f"warm starts keep {kept:.2f} MB more between steps ({tasks} tasks, {dim:,} each)")
    curves = {name: (steps, y[None]) for name, y in found.items()}
    title = f"Memory of a meta-step, dimension {dim:,}"
    return Experiment(title, ("inner steps K", "MB"), curves, claims, tuple(lines))
