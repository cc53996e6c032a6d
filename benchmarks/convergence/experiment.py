"""How the experiments of `benchmarks.convergence.claims` are run, and what they return."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

import memmeta as mm
from benchmarks.convergence.fits import Claim, over_seeds
from benchmarks.harness.programs import compiled, temporary_megabytes
from benchmarks.problems.quadratic import Family
from memmeta.hypergradient import implicit, scheduled
from memmeta.linear_solve import cg
from memmeta.meta import WarmStart


class Footprint(NamedTuple):
    """Temporary memory of one meta-step, as compiled, at two lengths of the inner loop."""

    steps: tuple[int, int]  # of the curve (or of CG, where it is against them), `LONGER` times them
    megabytes: tuple[float, float]  # at each

    def __str__(self) -> str:
        small, large = (f"{size:.3g}" for size in self.megabytes)
        return f"{small} MB at {self.steps[0]} steps, {large} at {self.steps[1]}"


class Experiment(NamedTuple):
    """What one experiment found: its panel of the picture and its lines of the table."""

    title: str
    axes: tuple[str, str]
    curves: dict[str, tuple[np.ndarray, np.ndarray]]  # name -> (x, y), y [seeds, points]
    claims: list[Claim]
    lines: tuple[str, ...] = ()  # other figures to print
    memory: Mapping[str, Footprint] = MappingProxyType({})  # by the names of curves


Step = mm.MetaStep | WarmStart
Make = Callable[[mm.Problem, Array], Step]
"""The meta-step of a problem at an outer rate."""

LONGER = 100
"""How many times longer an inner loop is made to see whether memory grows with it."""


def evaluated(function: Callable, *arguments: Any, quick: bool = False) -> Any:
    """The result of one compiled call; a quick run saves its seconds in the compiler."""
    return compiled(function, *arguments, quick=quick)(*arguments)


def meta_step(
    problem: mm.Problem,
    inner: int,
    estimator: Any,
    rate: Any,
    warm: int = 0,
    fast: bool = False,
    decay: float = 0.0,
) -> Step:
    """Gradient descent inside, and outside on F + decay/2 ‖θ‖²; `warm` tasks remembered."""
    solver = mm.inner.accelerated() if fast else mm.inner.gradient_descent()
    outer = optax.sgd(rate)
    outer = optax.chain(optax.add_decayed_weights(decay), outer) if decay else outer
    step = mm.make_meta_step(problem, mm.InnerLoop(solver, inner), estimator, outer, report="full")
    return WarmStart(step, warm) if warm else step


def fixed(k: int, warm: int = 0, fast: bool = False) -> Make:
    """K inner steps and as many of conjugate gradients."""
    return lambda problem, rate: meta_step(problem, k, implicit(cg(k)), rate, warm, fast)


def tightening(tolerance: Callable[[Array], Array], most: int, warm: int = 0) -> Make:
    """At meta-step t both loops stop at a tolerance, after at most so many inner steps."""

    def make(problem: mm.Problem, rate: Array) -> Step:
        estimator = scheduled(lambda t: implicit(tolerance=tolerance(t)))
        return meta_step(problem, most, estimator, rate, warm)

    return make


def begun(step: Step, theta: Any, tasks: Any) -> Any:
    """The state before the first meta-step."""
    return step.init(theta, tasks) if isinstance(step, WarmStart) else step.init(theta)


def megabytes(step: Step, theta: Any, tasks: Any) -> float:
    """What one compiled meta-step needs beside its arguments and results."""
    count = jax.tree.leaves(tasks)[0].shape[0]
    numbers = (jax.ShapeDtypeStruct((count,), jnp.int32),) if isinstance(step, WarmStart) else ()
    return temporary_megabytes(compiled(step.compiled, begun(step, theta, tasks), tasks, *numbers))


def footprint(step: Step, theta: Any, tasks: Any) -> Footprint:
    """The memory of a step as it is, and with an inner loop `LONGER` times as long."""
    cold = step.step if isinstance(step, WarmStart) else step
    steps = cold.inner.steps
    long = replace(cold, inner=replace(cold.inner, steps=LONGER * steps))
    longer = replace(step, step=long) if isinstance(step, WarmStart) else long
    sizes = (megabytes(step, theta, tasks), megabytes(longer, theta, tasks))
    return Footprint((steps, LONGER * steps), sizes)


def footprints(methods: dict[str, Make], family: Family, tasks: int) -> dict[str, Footprint]:
    """The same for methods that `run` takes, at this number of tasks."""
    drawn = jax.eval_shape(lambda: family.sample(jax.random.key(0), tasks))
    theta, rate = jnp.zeros_like(family.coupling), 1 / family.smoothness
    return {n: footprint(make(family.problem(), rate), theta, drawn) for n, make in methods.items()}


def flat(memory: Mapping[str, Footprint], where: str) -> Claim:
    """That no inner loop `LONGER` times as long takes more memory."""
    growth = max(found.megabytes[1] / found.megabytes[0] for found in memory.values())
    name = f"memory: largest growth from K to {LONGER} K, {where}"
    return Claim(name, "= 1 (± 0.02)", over_seeds(np.array([growth])), abs(growth - 1) < 0.02)


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

    _, found = jax.lax.scan(body, begun(step, theta, tasks), length=count)
    return found


def run(
    make: Make, family: Family, keys: Array, count: int, tasks: int, quick: bool = False
) -> tuple[np.ndarray, Any]:
    """`trajectory` on the quadratic family, vmapped over seeds; the outer rate is 1/L_F."""

    def one(key: Array) -> tuple[Array, Any]:
        drawn = family.sample(key, tasks)
        step = make(family.problem(), 1 / family.smoothness)
        start = jnp.zeros_like(family.coupling)
        return trajectory(step, start, drawn, lambda t: family.gradient(t, drawn), count)

    squares, report = evaluated(jax.vmap(one), keys, quick=quick)
    return np.asarray(squares), report


def ill_conditioned(dim: int, convex: bool) -> Family:
    """Meta-curvatures (β/d)² spread as a power law: progress is sublinear over the range shown.

    A θ with entries of unit size reaches the targets, so that F(θ₀) − min F, and with it the
    theorem's 2 L_F (F(θ₀) − min F) / k, does not grow with the dimension.
    """
    spectrum, coupling = jnp.linspace(1.0, 10.0, dim), jnp.arange(1.0, dim + 1) ** -0.75
    return Family(spectrum, coupling, convex, scale=coupling / spectrum)
