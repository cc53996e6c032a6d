r"""A cheap estimate of the error of an implicit hypergradient, at no second solve."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from memmeta import trees
from memmeta.problem import Context, Params, Problem, Scalar


class Slopes(NamedTuple):
    r"""The derivatives of f − ⟨∇_φ g, v⟩ at a point.

    Attributes:
        params: ∂_φ f − ∂²_φφ g · v, what the linear solver left over.
        context: ∂_c f − ∂²_cφ g · v, the implicit hypergradient in the context.
    """

    params: Params
    context: Context


def slopes(
    problem: Problem, params: Params, v: Params, outer: tuple[Params, Context], context: Context
) -> Slopes:
    """The derivatives at φ̂: one mixed product.

    Args:
        problem: its inner loss is used.
        params: φ̂.
        v: the linear system's solution.
        outer: ∂_φ f and ∂_c f at φ̂.
        context: of one task.
    """
    both = lambda p: jax.grad(problem.inner_loss, argnums=(0, 1))(p, context)  # noqa: E731
    products = jax.jvp(both, (params,), (v,))[1]
    return Slopes(*jax.tree.map(jnp.subtract, outer, products))


def slopes_here_and_there(
    problem: Problem,
    params: Params,
    v: Params,
    delta: Params,
    outer: tuple[Params, Context],
    context: Context,
) -> tuple[Slopes, Slopes]:
    """The derivatives at φ̂ and at φ̂ − δ: two mixed products and a gradient of f.

    Args:
        problem: both losses are used.
        params: φ̂.
        v: the linear system's solution.
        delta: δ.
        outer: ∂_φ f and ∂_c f at φ̂, which are known by then.
        context: of one task.
    """
    here = slopes(problem, params, v, outer, context)
    moved = jax.tree.map(jnp.subtract, params, delta)
    # each pass begins when the one before is done, and takes its memory
    moved, here = jax.lax.optimization_barrier((moved, here))
    outer = jax.grad(lambda p, c: problem.outer_loss(p, c)[0], argnums=(0, 1))(moved, context)
    moved, outer = jax.lax.optimization_barrier((moved, outer))
    return here, slopes(problem, moved, v, outer, context)


def error_estimate(
    here: Slopes, there: Slopes, mixed: Context, v: Params, curvature: Scalar
) -> Scalar:
    r"""Estimate ‖∇̂F − ∇F‖ in the context, from a second look at φ̂ − δ.

    With δ = ∇_φ g / μ̂ for the way to the inner solution, and Δ for the change from φ̂ to φ̂ − δ,
    $$\|\Delta(\partial_c f - \partial^2_{c\phi} g\, v)\|
      + \frac{\|\partial^2_{c\phi} g\, v\|}{\|v\| \, \hat\mu}
      \big(\|\Delta(\partial_\phi f - \partial^2_{\phi\phi} g\, v)\| + \|r\|\big)$$

    The first term is the inner loop's error at fixed v, the second that of v, through the inner
    loop and through the linear solver's residual r. An estimate: μ̂ may be too large where it was
    only met and not given, and ∂²_cφ g may act more strongly than along v.

    Args:
        here: `slopes` at φ̂; its `params` is r.
        there: `slopes` at φ̂ − δ.
        mixed: ∂²_cφ g · v at φ̂.
        v: the linear system's solution.
        curvature: μ̂.

    Returns:
        The estimate; infinite where μ̂ is not positive, or not known.

    Source: first-order expansion of the error in Pedregosa (ICML 2016), Theorem 1.
    """
    change = jax.tree.map(jnp.subtract, there, here)
    known = (curvature > 0) & jnp.isfinite(curvature)
    length = trees.norm(v)
    coupling = trees.norm(mixed) / jnp.where(length > 0, length, 1)
    left = (trees.norm(change.params) + trees.norm(here.params)) / jnp.where(known, curvature, 1)
    estimate = trees.norm(change.context) + coupling * left
    return jnp.where(known & jnp.isfinite(estimate), estimate, jnp.inf)
