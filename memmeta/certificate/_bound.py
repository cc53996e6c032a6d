r"""How wrong an implicit hypergradient can be, from what was measured at φ̂.

φ̂ and v̂ may come from any inner solver and any linear solver, stopped however early. The derivation
is in docs/theory.md.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from memmeta._shared import trees
from memmeta.certificate._estimate import Certificate
from memmeta.problem import (
    Context,
    Deviations,
    Params,
    Problem,
    Scalar,
    hessian_product,
)


class Constants(NamedTuple):
    r"""How fast the derivatives of one task's losses can change, in Euclidean and operator norms.

    Each holds for every φ within a radius of a given point; see `deviations_from`.

    Attributes:
        outer_context: Lipschitz constant of ∂_c f in φ.
        outer_params: Lipschitz constant of ∂_φ f in φ.
        mixed: Lipschitz constant of ∂²_cφ g in φ.
        hessian: Lipschitz constant of ∂²_φφ g in φ.
        coupling: bound on ‖∂²_cφ g‖.
        embedding: bound on ‖∂c/∂θ‖, to bound errors of the gradient in θ; 1 for errors in c.
    """

    outer_context: Scalar
    outer_params: Scalar
    mixed: Scalar
    hessian: Scalar
    coupling: Scalar
    embedding: Scalar


class Measured(NamedTuple):
    """What is measured of one task at φ̂ and v̂.

    Attributes:
        gradient: ‖∇_φ g(φ̂)‖.
        residual: ‖∂_φ f − (∂²_φφ g) v̂‖, undamped and absolute.
        solution: v̂.
    """

    gradient: Scalar
    residual: Scalar
    solution: Params


def distance_bound(gradient: Scalar, strong_convexity: Scalar) -> Scalar:
    r"""How far φ̂ can be from the minimiser of a strongly convex function.

    $$\|\hat\phi - \phi^*\| \le \|\nabla_\phi g(\hat\phi)\| / \mu$$

    Infinite for μ = 0.
    """
    return _divided(gradient, strong_convexity)


def deviations_from(
    constants: Callable[[Params, Scalar, Context], Constants],
) -> Callable[[Problem, Params, Params, Scalar, Context], Deviations]:
    r"""`Structure.deviations` from Lipschitz constants, by products of norms.

    $$\|\Delta \partial_c f\| \le L_{cf} \delta, \quad
      \|\Delta \partial_\phi f\| \le L_{\phi f} \delta, \quad
      \|\Delta M \hat v\| \le L_{c\phi} \delta \|\hat v\|, \quad
      \|M^* {H^*}^{-1}\| \le C_{c\phi} / \mu$$

    Args:
        constants: (φ̂, radius δ, context) -> `Constants` valid within that distance of φ̂.

    Returns:
        What `Structure.deviations` asks for; the problem it is given needs `strong_convexity`.

    Example:
        >>> of_a_square = deviations_from(
        ...     lambda phi, radius, c: Constants(*map(jnp.float32, (0.0, 1.0, 0.0, 0.0, 1.0, 1.0)))
        ... )
    """

    def deviations(
        problem: Problem, params: Params, solution: Params, radius: Scalar, context: Context
    ) -> Deviations:
        assert problem.strong_convexity is not None
        found = constants(params, radius, context)
        mu = problem.strong_convexity(context).astype(radius.dtype)
        sensitivity = _divided(found.coupling, mu)
        along = radius * trees.norm(solution)
        return Deviations(
            outer_context=found.outer_context * radius,
            outer_params=found.outer_params * radius,
            mixed=found.mixed * along,
            hessian=sensitivity * found.hessian * along,
            sensitivity=sensitivity,
            embedding=found.embedding,
        )

    return deviations


def bound(deviations: Deviations, distance: Scalar, residual: Scalar) -> Certificate:
    r"""The rigorous bound from what can have changed between φ̂ and φ*.

    $$\|\hat\nabla F_i - \nabla F_i\| \le \|\Delta \partial_c f\| + \|\Delta M \hat v\| +
      \|M^* {H^*}^{-1} \Delta H \hat v\| + \|M^* {H^*}^{-1}\| \,
      (\|\Delta \partial_\phi f\| + \|r\|)$$

    times `deviations.embedding`. Derived in docs/theory.md, section "Certificate".

    Args:
        deviations: valid for every φ* within the distance.
        distance: bound on ‖φ̂ − φ*‖; where it is not finite nothing is promised.
        residual: ‖r‖.

    Returns:
        The certificate, rigorous up to rounding.
    """
    d = deviations
    inner = d.outer_context + d.mixed + d.hessian + d.sensitivity * d.outer_params
    # r = 0 and an infinite distance together promise nothing either
    possible = jnp.isfinite(distance)
    inner = jnp.where(possible, d.embedding * inner, jnp.inf)
    linear = jnp.where(possible, d.embedding * d.sensitivity * residual, jnp.inf)
    return Certificate(_inf_for_nan(inner), _inf_for_nan(linear), distance, jnp.bool_(True))


def measure(problem: Problem, params: Params, solution: Params, context: Context) -> Measured:
    """‖∇_φ g‖, ‖r‖ and ‖v̂‖ at φ̂ and v̂; arguments as for `certify`."""
    gradient, product = hessian_product(problem, params, context)
    outer = jax.grad(lambda phi: problem.outer_loss(phi, context)[0])(params)
    residual = jax.tree.map(jnp.subtract, outer, product(solution))
    return Measured(trees.norm(gradient), trees.norm(residual), solution)


def _divided(numerator: Scalar, mu: Scalar) -> Scalar:
    return jnp.where(mu > 0, numerator / jnp.where(mu > 0, mu, 1), jnp.inf)


def _inf_for_nan(value: Array) -> Array:
    return jnp.where(jnp.isnan(value), jnp.inf, value)
