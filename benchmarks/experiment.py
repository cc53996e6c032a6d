"""What the experiments of `benchmarks.convergence` share: what they return, and how they run."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

import memmeta as mm
from benchmarks.fits import Claim
from benchmarks.problems_quadratic import Family
from memmeta.warm_start import WarmStart


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
    options: dict[str, Any] = {"xla_backend_optimization_level": 0} if quick else {}
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


def ill_conditioned(dim: int, convex: bool) -> Family:
    """Meta-curvatures (β/d)² spread as a power law: progress is sublinear over the range shown.

    A θ with entries of unit size reaches the targets, so that F(θ₀) − min F, and with it the
    theorem's 2 L_F (F(θ₀) − min F) / k, does not grow with the dimension.
    """
    spectrum, coupling = jnp.linspace(1.0, 10.0, dim), jnp.arange(1.0, dim + 1) ** -0.75
    return Family(spectrum, coupling, convex, scale=coupling / spectrum)


class Method(NamedTuple):
    """A method of the comparison, and its products (gradients, HVPs, mixed) per task and step."""

    make: Callable[[mm.Problem, Array], Step]
    products: int
