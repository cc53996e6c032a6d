r"""How much a linear head's derivatives can change, in closed form: rigorous certificates.

The context is c = (X, X_query), the features of a task; the losses are those of
`memmeta.few_shot`. With s_i the weight of a support sample, e_i = ‖∂ℓ_i/∂z_i‖ at φ̂ (for softmax
‖p_i − y_i‖), δ the radius, w = ‖W‖₂ + δ, a bound on ‖∂²ℓ_i/∂z_i²‖ called a, and its Lipschitz
constant t:

    softmax:  a = 1/2,  t = √6/9          squared:  a = 1,  t = 0

Derived in docs/theory.md, section "Linear heads".
"""

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from memmeta._shared import trees
from memmeta.few_shot._curvature import squared_norm_bound
from memmeta.few_shot._examples import as_values, classes_of, present, shares
from memmeta.few_shot._head import HeadContext, HeadParams, augmented
from memmeta.problem import Deviations, Problem, Scalar, stacked

Caps: TypeAlias = tuple[float, float]
"""(a, t): bounds on ‖∂²ℓ_i/∂z_i²‖ and on its Lipschitz constant."""
SOFTMAX: Caps = (0.5, 6**0.5 / 9)
SQUARED: Caps = (1.0, 0.0)

FAR = 60.0
"""Where R_i reaches this, e^R is so large that the bound is taken to be infinite."""


class _Samples(NamedTuple):
    """The support or the query examples of one task at φ̂.

    Attributes:
        features: X̃.
        norm: [n] ‖x̃_i‖.
        shares: s_i, which add up to 1; zero for padding.
        logits: z_i.
        slopes: ∂ℓ_i/∂z_i.
    """

    features: Float[Array, "n augmented"]
    norm: Float[Array, " n"]
    shares: Float[Array, " n"]
    logits: Float[Array, "n ways"]
    slopes: Float[Array, "n ways"]


def _samples(
    features: Array, targets: Array, weights: Array, matrix: Array, classes: Array, caps: Caps
) -> _Samples:
    features = augmented(features)
    logits = features @ matrix.astype(features.dtype)
    if caps == SOFTMAX:
        logits = jnp.where(classes, logits, -jnp.inf)
    predicted = jax.nn.softmax(logits) if caps == SOFTMAX else logits
    slopes = jnp.where(classes, predicted - as_values(targets, classes.size, features.dtype), 0)
    norm = jnp.linalg.norm(features, axis=1)
    return _Samples(features, norm, shares(weights, features.dtype), logits, slopes)


def _support_and_query(
    params: HeadParams, context: HeadContext, caps: Caps
) -> tuple[_Samples, _Samples]:
    matrix = stacked(params)
    support = (context.support_features, context.support_targets, context.weights)
    query = (context.query_features, context.query_targets, present(context.query_targets))
    classes = classes_of(context.support_targets, matrix.shape[1])
    return _samples(*support, matrix, classes, caps), _samples(*query, matrix, classes, caps)


def _curvature(samples: _Samples) -> Scalar:
    """λmax(Σ s_i x̃_i x̃_iᵀ)."""
    return squared_norm_bound(samples.features * jnp.sqrt(samples.shares)[:, None])


def head_deviations(
    caps: Caps,
    problem: Problem,
    params: HeadParams,
    solution: HeadParams,
    radius: Scalar,
    context: HeadContext,
) -> Deviations:
    r"""`Structure.deviations` of a linear head, for the v̂ at hand.

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
    dtype = support.norm.dtype
    mu, value = problem.strong_convexity(context), problem.inner_loss(params, context)
    mu, value, radius = (x.astype(dtype) for x in (jnp.where(mu > 0, mu, 1), value, radius))
    matrix, direction = (stacked(x).astype(dtype) for x in (params, solution))
    largest_share = jnp.max(support.shares)
    shifts, query_shifts = _shifts(support, radius, caps), _shifts(query, radius, caps)

    kernel = jnp.sqrt(
        jnp.minimum((squared_norm_bound(matrix[:-1]) ** 0.5 + radius) ** 2, 2 * value / mu)
    )
    errors = jnp.sqrt(squared_norm_bound(support.shares[:, None] * support.slopes))
    errors = jnp.minimum(
        errors + trees.norm(support.shares * shifts), jnp.sqrt(2 * largest_share * value)
    )
    kernel_term = kernel * jnp.sqrt(a * largest_share)
    sensitivity = errors / mu + kernel_term / (2 * jnp.sqrt(mu))

    along = support.features @ direction  # u
    image = _image(support, along, caps)
    size = jnp.linalg.norm(along, axis=1)
    change = jnp.minimum(t * support.norm * radius, a) * size  # of D_i u_i
    hessian_change = jnp.sqrt(_curvature(support) * jnp.sum(support.shares * change**2))  # ‖ΔH v̂‖
    energy = jnp.minimum(
        _energy(support, along, image, radius, caps), hessian_change / jnp.sqrt(mu)
    )
    hessian = jnp.minimum(
        sensitivity * hessian_change, (errors / jnp.sqrt(mu) + kernel_term) * energy
    )

    across = jnp.sqrt(squared_norm_bound(direction[:-1])) * shifts + kernel * change
    query_errors = jnp.linalg.norm(query.slopes, axis=1)
    query_curvature = _curvature(query)
    spread = jnp.sqrt(query_curvature * jnp.sum(query.shares * query_shifts**2))
    return Deviations(
        outer_context=trees.norm(query.shares * (query_errors * radius + kernel * query_shifts)),
        outer_params=jnp.minimum(a * query_curvature * radius, spread),
        mixed=trees.norm(support.shares * (across + radius * jnp.linalg.norm(image, axis=1))),
        hessian=hessian,
        sensitivity=sensitivity,
        embedding=jnp.ones_like(mu),
    )


def _shifts(samples: _Samples, radius: Scalar, caps: Caps) -> Float[Array, " n"]:
    """d_i: how far ∂ℓ_i can be from where it is at φ̂; two probabilities differ by at most √2."""
    shifts = caps[0] * samples.norm * radius
    return jnp.minimum(shifts, 2**0.5) if caps == SOFTMAX else shifts


def _image(samples: _Samples, along: Array, caps: Caps) -> Array:
    """D_i u_i at φ̂."""
    if caps != SOFTMAX:
        return along
    p = jax.nn.softmax(samples.logits)
    return p * (along - jnp.sum(p * along, axis=1, keepdims=True))


def _energy(samples: _Samples, along: Array, image: Array, radius: Scalar, caps: Caps) -> Scalar:
    """ΔH v̂ in the norm of H*⁻¹: D_i changes by a factor of at most e^R, R as two logits differ."""
    if caps != SOFTMAX:
        return jnp.zeros_like(radius)
    reach = 2**0.5 * samples.norm * radius
    size = jnp.sum(along**2, axis=1)
    squares = jnp.sum(along * image, axis=1) + 4 * jnp.finfo(size.dtype).eps * size
    growth = 2 * jnp.sinh(jnp.minimum(reach, FAR) / 2)
    found = jnp.sqrt(jnp.sum(samples.shares * growth**2 * squares))
    return jnp.where(jnp.max(reach) < FAR, found, jnp.inf)
