r"""A cheap estimate of the error of an implicit hypergradient, at no second solve."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from memmeta import trees
from memmeta.problem import Context, Params, Problem, Scalar


class Lagrangian(NamedTuple):
    r"""The derivatives of f − ⟨∇_φ g, v⟩ at φ̂, and how they change along δ.

    Attributes:
        context: ∂_c f − ∂²_cφ g · v, the implicit hypergradient in the context.
        params: ∂_φ f − ∂²_φφ g · v, what the linear solver left over.
        context_change: directional derivative of `context` along δ.
        params_change: directional derivative of `params` along δ.
    """

    context: Context
    params: Params
    context_change: Context
    params_change: Params


def lagrangian(
    problem: Problem, params: Params, v: Params, delta: Params, context: Context
) -> Lagrangian:
    """One pass, forward over reverse over forward, for all that is needed after the solve.

    Args:
        problem: both losses are used.
        params: φ̂.
        v: the linear system's solution.
        delta: δ, the estimated step from φ̂ to φ*, up to its sign.
        context: of one task.

    Returns:
        The four derivatives.
    """

    def slopes(params: Params) -> tuple[Params, Context]:
        def difference(params: Params, context: Context) -> Scalar:
            # forward over reverse of ⟨∇_φ g, v⟩, without the memory of a second reverse pass
            along = jax.jvp(lambda p: problem.inner_loss(p, context), (params,), (v,))[1]
            return problem.outer_loss(params, context)[0] - along

        return jax.grad(difference, argnums=(0, 1))(params, context)

    (left, hypergradient), (left_change, change) = jax.jvp(slopes, (params,), (delta,))
    return Lagrangian(hypergradient, left, change, left_change)


def error_estimate(found: Lagrangian, mixed: Context, v: Params, curvature: Scalar) -> Scalar:
    r"""Estimate ‖∇̂F − ∇F‖ in the context.

    With δ = ∇_φ g / μ̂ for the distance to the inner solution,
    $$\|d_\delta(\partial_c f - \partial^2_{c\phi} g\, v)\|
      + \frac{\|\partial^2_{c\phi} g\, v\|}{\|v\| \, \hat\mu}
      \big(\|d_\delta(\partial_\phi f - \partial^2_{\phi\phi} g\, v)\| + \|r\|\big)$$

    The first term is the inner loop's error at fixed v, the second that of v, through the inner
    loop and through the linear solver's residual r. An estimate: μ̂ may be too large where it was
    only met and not given, and ∂²_cφ g may act more strongly than along v.

    Args:
        found: see `Lagrangian`, along δ.
        mixed: ∂²_cφ g · v.
        v: the linear system's solution.
        curvature: μ̂.

    Returns:
        The estimate; infinite where μ̂ is not positive, or not known.

    Source: first-order expansion of the error in Pedregosa (ICML 2016), Theorem 1.
    """
    length = trees.norm(v)
    coupling = trees.norm(mixed) / jnp.where(length > 0, length, 1)
    left = trees.norm(found.params_change) + trees.norm(found.params)
    known = (curvature > 0) & jnp.isfinite(curvature)
    estimate = trees.norm(found.context_change) + coupling * left / jnp.where(known, curvature, 1)
    return jnp.where(known & jnp.isfinite(estimate), estimate, jnp.inf)
