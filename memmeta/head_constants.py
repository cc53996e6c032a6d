r"""The constants of a linear head in closed form, for rigorous certificates in feature space.

The context is c = (X, X_query), the features of a task; the losses are those of
`memmeta.linear_head`. With s_i the weight of a support sample, e_i = ‖∂ℓ_i/∂z_i‖ at φ̂ (for softmax
‖p_i − y_i‖), δ the radius, w = ‖W‖₂ + δ, a bound on ‖∂²ℓ_i/∂z_i²‖ called a, and its Lipschitz
constant t:

    softmax:  a = 1/2,  t = √6/9          squared:  a = 1,  t = 0

Derived in docs/theory.md, section "Linear heads".
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from memmeta import trees
from memmeta.linear_head import (
    HeadContext,
    HeadParams,
    augmented,
    largest_eigenvalue_bound,
    stacked,
)
from memmeta.problem import Constants, Problem, Scalar

SOFTMAX = (0.5, 6**0.5 / 9)
SQUARED = (1.0, 0.0)


def softmax_constants(params: HeadParams, radius: Scalar, context: HeadContext) -> Constants:
    r"""Constants of `softmax_inner_loss` and `softmax_outer_loss` within a radius of φ̂.

    $$C_{c\phi}^2 = \sum_i s_i^2 (e_i + a \|\tilde x_i\| \delta + a w \|\tilde x_i\|)^2, \qquad
      L_{c\phi}^2 = \sum_i s_i^2 (2 a \|\tilde x_i\| + t w \|\tilde x_i\|^2)^2$$
    $$L_{\phi\phi} = t \max_i \|\tilde x_i\| \, \lambda_{\max}(\textstyle\sum_i s_i \tilde x_i
      \tilde x_i^\top), \qquad
      L_{\phi f} = \tfrac{a}{m} \lambda_{\max}(\tilde X_q^\top \tilde X_q), \qquad
      L_{cf}^2 = \tfrac1{m^2} \sum_j (e_j + a w \|\tilde x_j\|)^2$$

    They do not contain the ridge, which is linear in φ and free of the features.

    Args:
        params: φ̂.
        radius: δ, how far from φ̂ they must hold.
        context: of one task, with integer targets.

    Returns:
        The constants; `embedding` is 1, so errors are bounded in feature space.

    Example:
        >>> context = HeadContext(jnp.eye(2), jnp.arange(2), jnp.eye(2), jnp.arange(2))
        >>> params = {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}
        >>> found = softmax_constants(params, jnp.float32(0.1), context)
        >>> 0.3 < float(found.coupling) < 1
        True
    """
    return _constants(params, radius, context, SOFTMAX)


def squared_constants(params: HeadParams, radius: Scalar, context: HeadContext) -> Constants:
    """The same for `squared_inner_loss` and `squared_outer_loss`."""
    return _constants(params, radius, context, SQUARED)


def with_softmax_constants(problem: Problem) -> Problem:
    """A problem of `linear_head.softmax_problem`, able to certify its hypergradients."""
    return replace(problem, constants=softmax_constants)


def with_squared_constants(problem: Problem) -> Problem:
    """A problem of `linear_head.squared_problem`, able to certify its hypergradients."""
    return replace(problem, constants=squared_constants)


def _constants(
    params: HeadParams, radius: Scalar, context: HeadContext, caps: tuple[float, float]
) -> Constants:
    a, t = caps
    support, query = augmented(context.support_features), augmented(context.query_features)
    shares = jnp.full_like(support[:, 0], 1 / support.shape[0])
    if context.support_weights is not None:
        weights = context.support_weights.astype(support.dtype)
        shares = weights / jnp.maximum(jnp.sum(weights), jnp.finfo(weights.dtype).tiny)
    matrix = stacked(params).astype(support.dtype)
    radius = radius.astype(support.dtype)
    kernel = jnp.sqrt(_largest(matrix[:-1])) + radius  # w
    length, query_length = jnp.linalg.norm(support, axis=1), jnp.linalg.norm(query, axis=1)
    error = _errors(support @ matrix, context.support_targets, caps)
    query_error = _errors(query @ matrix, context.query_targets, caps)
    curvature = _largest(support * jnp.sqrt(shares)[:, None])
    return Constants(
        outer_context=_norm((query_error + a * kernel * query_length) / query.shape[0]),
        outer_params=a * _largest(query) / query.shape[0],
        mixed=_norm(shares * (2 * a * length + t * kernel * length**2)),
        hessian=t * jnp.max(length) * curvature,
        coupling=_norm(shares * (error + a * length * radius + a * kernel * length)),
        embedding=jnp.ones_like(kernel),
    )


def _norm(vector: Float[Array, " n"]) -> Scalar:
    return trees.norm(vector)


def _largest(matrix: Float[Array, "n m"]) -> Scalar:
    """A bound from above on ‖matrix‖₂²."""
    small = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    return largest_eigenvalue_bound(jnp.matmul(small, small.T, precision=jax.lax.Precision.HIGHEST))


def _errors(
    logits: Float[Array, "n ways"], targets: Array, caps: tuple[float, float]
) -> Float[Array, " n"]:
    """‖∂ℓ_i/∂z_i‖ of every sample."""
    if not trees.is_inexact(targets):
        targets = jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype)
    predicted = jax.nn.softmax(logits) if caps == SOFTMAX else logits
    return jnp.linalg.norm(predicted - targets.astype(logits.dtype), axis=-1)
