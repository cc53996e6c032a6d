r"""What all recipes share: derivatives on one draw of the data, and a meta-step made of a rule."""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from memmeta._shared import checks
from memmeta.hypergradient import per_task
from memmeta.hypergradient._estimator import TaskRule, TaskStart
from memmeta.hypergradient._structural_zeros import losses_seen
from memmeta.inner import InnerLoop, InnerState
from memmeta.inner._views import View
from memmeta.linear_solve._solution import dot
from memmeta.meta import WarmStart, make_meta_step
from memmeta.problem import Context, Params, Problem, Scalar, SplitContext, products

OUTER = 2**31 - 5
"""What keeps the draws of the hypergradient apart from those of φ."""


class Outer(NamedTuple):
    """f and its derivatives at a point.

    Attributes:
        loss: f.
        aux: its auxiliary output.
        params: ∂_φ f.
        context: ∂_c f.
    """

    loss: Scalar
    aux: PyTree
    params: Params
    context: Context


def outer_at(problem: Problem, params: Params, context: SplitContext) -> Outer:
    """f, aux, ∂_φ f and ∂_c f at φ."""

    def outer_loss(params: Params, active: Context) -> tuple[Scalar, Any]:
        return problem.outer_loss(params, context.at(active))

    loss, pull_back, aux = jax.vjp(outer_loss, params, context.active, has_aux=True)
    return Outer(loss, aux, *pull_back(jnp.ones_like(loss)))


class Directions(NamedTuple):
    r"""The three directions of Dagréou et al. (2022), equations 4 to 6, in the context c for θ.

    Attributes:
        params: D_φ = ∇_φ g.
        solution: D_v = ∂²_φφ g v − ∂_φ f; this code's v solves [∂²_φφ g] v = ∂_φ f, theirs is −v.
        context: D_c = ∂_c f − ∂²_cφ g v.
    """

    params: Params
    solution: Params
    context: Context


def directions(
    problem: Problem, params: Params, v: Params, context: SplitContext
) -> tuple[Directions, Outer]:
    """All three at one point (φ, v), with one gradient, one product each, and one gradient of f."""
    inner, outer = products(problem, params, v, context), outer_at(problem, params, context)
    return Directions(
        inner.gradient,
        jax.tree.map(jnp.subtract, inner.hessian, outer.params),
        jax.tree.map(jnp.subtract, outer.context, inner.mixed),
    ), outer


def moved(x: PyTree, rate: float, direction: PyTree) -> PyTree:
    """x − rate · direction."""
    return jax.tree.map(lambda x, d: x - jnp.asarray(rate, x.dtype) * d, x, direction)


def stepped(
    problem: Problem, inner: InnerLoop, state: InnerState, direction: Params, begin: TaskStart
) -> InnerState:
    """One inner step along a direction that is known already, by the inner solver."""
    known = replace(problem, inner_loss=lambda params, context: dot(direction, params))
    return replace(inner, view=None).advance(known, state, begin.context.whole, begin.key, 1)


def made(
    problem: Problem,
    rule: TaskRule,
    name: str,
    optimizer: optax.GradientTransformation,
    *,
    rate: float,
    steps: int,
    view: View | None,
    size: int,
) -> WarmStart:
    """The meta-step: plain steps φ ← φ − rate · ∇_φ g on draws, a rule, and an outer optimiser."""
    checks.positive("rate", rate)
    loop = InnerLoop(optax.sgd(rate), steps, view=view)
    estimator = per_task(rule, name, losses_seen)
    # a step on a few rows does not read all of them to see whether they are finite
    step = make_meta_step(problem, loop, estimator, optimizer, check_tasks=view is None)
    return WarmStart(step, size)
