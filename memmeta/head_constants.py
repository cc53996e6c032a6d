r"""The constants of a linear head in closed form, for rigorous certificates in feature space.

The context is c = (X, X_query), the features of a task; the losses are those of
`memmeta.linear_head`. With s_i the weight of a support sample, e_i = ‖∂ℓ_i/∂z_i‖ at φ̂ (for softmax
‖p_i − y_i‖), δ the radius, w = ‖W‖₂ + δ, a bound on ‖∂²ℓ_i/∂z_i²‖ called a, and its Lipschitz
constant t:

    softmax:  a = 1/2,  t = √6/9          squared:  a = 1,  t = 0

Derived in docs/theory.md, section "Linear heads".
"""

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from memmeta import trees
from memmeta.linear_head import (
    HeadContext,
    HeadParams,
    as_values,
    augmented,
    present,
    shares,
    squared_norm_bound,
    stacked,
)
from memmeta.problem import Constants, Deviations, Problem, Scalar

SOFTMAX = (0.5, 6**0.5 / 9)
SQUARED = (1.0, 0.0)

FAR = 60.0
"""A reach beyond which e^R says nothing more."""


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
    """A problem of `linear_head.softmax_problem`, able to certify its hypergradients.

    Any other inner loss may stand in it that adds to the cross-entropy a quadratic penalty of at
    least `strong_convexity`/2 · ‖Φ‖².
    """
    deviations = partial(_deviations, SOFTMAX)
    return replace(problem, constants=softmax_constants, deviations=deviations)


def with_squared_constants(problem: Problem) -> Problem:
    """The same for a problem of `linear_head.squared_problem`."""
    deviations = partial(_deviations, SQUARED)
    return replace(problem, constants=squared_constants, deviations=deviations)


class _Samples(NamedTuple):
    """The support or the query examples of one task at φ̂.

    Attributes:
        features: X̃.
        length: ‖x̃_i‖.
        shares: s_i, which add up to 1; zero for padding.
        logits: z_i.
        slopes: ∂ℓ_i/∂z_i.
    """

    features: Float[Array, "n augmented"]
    length: Float[Array, " n"]
    shares: Float[Array, " n"]
    logits: Float[Array, "n ways"]
    slopes: Float[Array, "n ways"]


def _samples(
    features: Array, targets: Array, weights: Array, matrix: Array, caps: tuple
) -> _Samples:
    features = augmented(features)
    logits = features @ matrix.astype(features.dtype)
    predicted = jax.nn.softmax(logits) if caps == SOFTMAX else logits
    slopes = predicted - as_values(targets, matrix.shape[1], features.dtype)
    length = jnp.linalg.norm(features, axis=1)
    return _Samples(features, length, shares(weights, features.dtype), logits, slopes)


def _support_and_query(
    params: HeadParams, context: HeadContext, caps: tuple
) -> tuple[_Samples, _Samples]:
    matrix = stacked(params)
    support = (context.support_features, context.support_targets, context.weights)
    query = (context.query_features, context.query_targets, present(context.query_targets))
    return _samples(*support, matrix, caps), _samples(*query, matrix, caps)


def _curvature(samples: _Samples) -> Scalar:
    """λmax(Σ s_i x̃_i x̃_iᵀ)."""
    return squared_norm_bound(samples.features * jnp.sqrt(samples.shares)[:, None])


def _constants(
    params: HeadParams, radius: Scalar, context: HeadContext, caps: tuple[float, float]
) -> Constants:
    a, t = caps
    support, query = _support_and_query(params, context, caps)
    radius = radius.astype(support.length.dtype)
    kernel = jnp.sqrt(squared_norm_bound(stacked(params)[:-1])).astype(radius.dtype) + radius  # w
    error, query_error = (jnp.linalg.norm(x.slopes, axis=1) for x in (support, query))
    length, share = support.length, support.shares
    return Constants(
        outer_context=trees.norm(query.shares * (query_error + a * kernel * query.length)),
        outer_params=a * _curvature(query),
        mixed=trees.norm(share * (2 * a * length + t * kernel * length**2)),
        hessian=t * jnp.max(length) * _curvature(support),
        coupling=trees.norm(share * (error + a * length * radius + a * kernel * length)),
        embedding=jnp.ones_like(kernel),
    )


def _deviations(
    caps: tuple[float, float],
    problem: Problem,
    params: HeadParams,
    solution: HeadParams,
    radius: Scalar,
    context: HeadContext,
) -> Deviations:
    r"""The same changes, bounded together for the v̂ at hand.

    $$E = \min\big(\|[s_i \partial\ell_i]\| + \|[s_i d_i]\|, \sqrt{2 s_{\max} g}\big), \quad
      w = \min(\|\hat W\| + \delta, \sqrt{2 g/\mu}), \quad
      \|M^* {H^*}^{-1}\| \le \frac E\mu + \frac w2 \sqrt{\frac{a s_{\max}}\mu}$$
    $$\|M^* {H^*}^{-1} \Delta H \hat v\| \le \Big(\frac E{\sqrt\mu} + w \sqrt{a s_{\max}}\Big)
      \Big(\sum_i s_i \, 4 \sinh^2 \frac{R_i}2 \, u_i^\top D_i u_i\Big)^{1/2}, \qquad
      u_i = \hat V^\top \tilde x_i, \quad R_i = \sqrt2 \|\tilde x_i\| \delta$$

    with d_i a bound on the change of ∂ℓ_i and D_i = ∂²ℓ_i/∂z_i² at φ̂. Derived in docs/theory.md,
    section "Linear heads".
    """
    assert problem.strong_convexity is not None
    a, t = caps
    support, query = _support_and_query(params, context, caps)
    dtype = support.length.dtype
    mu, value = problem.strong_convexity(context), problem.inner_loss(params, context)
    mu, value, radius = (x.astype(dtype) for x in (jnp.where(mu > 0, mu, 1), value, radius))
    matrix, direction = (stacked(x).astype(dtype) for x in (params, solution))
    heaviest = jnp.max(support.shares)
    moved, query_moved = _moved(support, radius, caps), _moved(query, radius, caps)

    kernel = jnp.sqrt(
        jnp.minimum((squared_norm_bound(matrix[:-1]) ** 0.5 + radius) ** 2, 2 * value / mu)
    )
    errors = jnp.sqrt(squared_norm_bound(support.shares[:, None] * support.slopes))
    errors = jnp.minimum(
        errors + trees.norm(support.shares * moved), jnp.sqrt(2 * heaviest * value)
    )
    bent = kernel * jnp.sqrt(a * heaviest)
    sensitivity = errors / mu + bent / (2 * jnp.sqrt(mu))

    along = support.features @ direction  # u
    curved = _curved(support, along, caps)
    size = jnp.linalg.norm(along, axis=1)
    change = jnp.minimum(t * support.length * radius, a) * size  # of D_i u_i
    turned = jnp.sqrt(_curvature(support) * jnp.sum(support.shares * change**2))  # ‖ΔH v̂‖
    energy = jnp.minimum(_energy(support, along, curved, radius, caps), turned / jnp.sqrt(mu))
    hessian = jnp.minimum(sensitivity * turned, (errors / jnp.sqrt(mu) + bent) * energy)

    across = jnp.sqrt(squared_norm_bound(direction[:-1])) * moved + kernel * change
    query_errors = jnp.linalg.norm(query.slopes, axis=1)
    steepness = _curvature(query)
    spread = jnp.sqrt(steepness * jnp.sum(query.shares * query_moved**2))
    return Deviations(
        outer_context=trees.norm(query.shares * (query_errors * radius + kernel * query_moved)),
        outer_params=jnp.minimum(a * steepness * radius, spread),
        mixed=trees.norm(support.shares * (across + radius * jnp.linalg.norm(curved, axis=1))),
        hessian=hessian,
        sensitivity=sensitivity,
        embedding=jnp.ones_like(mu),
    )


def _moved(samples: _Samples, radius: Scalar, caps: tuple[float, float]) -> Float[Array, " n"]:
    """d_i: how far ∂ℓ_i can be from where it is at φ̂; two probabilities differ by at most √2."""
    moved = caps[0] * samples.length * radius
    return jnp.minimum(moved, 2**0.5) if caps == SOFTMAX else moved


def _curved(samples: _Samples, along: Array, caps: tuple[float, float]) -> Array:
    """D_i u_i at φ̂."""
    if caps != SOFTMAX:
        return along
    p = jax.nn.softmax(samples.logits)
    return p * (along - jnp.sum(p * along, axis=1, keepdims=True))


def _energy(
    samples: _Samples, along: Array, curved: Array, radius: Scalar, caps: tuple[float, float]
) -> Scalar:
    """ΔH v̂ in the norm of H*⁻¹: D_i changes by a factor of at most e^R, R as two logits differ."""
    if caps != SOFTMAX:
        return jnp.zeros_like(radius)
    reach = 2**0.5 * samples.length * radius
    size = jnp.sum(along**2, axis=1)
    squares = jnp.sum(along * curved, axis=1) + 4 * jnp.finfo(size.dtype).eps * size
    growth = 2 * jnp.sinh(jnp.minimum(reach, FAR) / 2)
    found = jnp.sqrt(jnp.sum(samples.shares * growth**2 * squares))
    return jnp.where(jnp.max(reach) < FAR, found, jnp.inf)
