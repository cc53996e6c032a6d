"""Bounds on the largest curvature of a linear head's inner loss, in closed form."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from memmeta.few_shot._examples import shares
from memmeta.few_shot._head import HeadContext, augmented
from memmeta.problem import Scalar

SQUARINGS = 5


def largest_eigenvalue_bound(gram: Float[Array, "n n"]) -> Scalar:
    r"""A bound from above on the largest eigenvalue of a positive semi-definite matrix.

    $$\lambda_{\max} \le \big(\operatorname{tr} G^{p}\big)^{1/p} \le n^{1/p} \lambda_{\max},
      \qquad p = 2^5$$

    by repeated squaring: matrix products only, no eigensolver on the device; at most 16 % above
    for n = 100.

    Args:
        gram: [n, n], symmetric, positive semi-definite.

    Returns:
        The bound.

    Example:
        >>> round(float(largest_eigenvalue_bound(jnp.diag(jnp.array([3.0, 1.0])))), 3)
        3.0
    """
    tiny = jnp.finfo(gram.dtype).tiny
    scale = jnp.maximum(jnp.trace(gram), tiny)
    power, log_scale = gram / scale, jnp.log(scale)
    for k in range(1, SQUARINGS + 1):
        power = jnp.matmul(power, power, precision=jax.lax.Precision.HIGHEST)
        # tr Gᵖ of a matrix of trace 1 is at least n^(1-p): divided out so that it cannot underflow
        trace = jnp.maximum(jnp.trace(power), tiny)
        power, log_scale = power / trace, log_scale + jnp.log(trace) / 2**k
    rounding = 1 + 2 * gram.shape[0] * float(jnp.finfo(gram.dtype).eps)
    return jnp.exp(log_scale) * rounding


def squared_norm_bound(matrix: Float[Array, "n m"]) -> Scalar:
    """A bound from above on ‖matrix‖₂², by the smaller of its two Gram matrices.

    Example:
        >>> round(float(squared_norm_bound(jnp.array([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))), 3)
        9.0
    """
    small = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    return largest_eigenvalue_bound(jnp.matmul(small, small.T, precision=jax.lax.Precision.HIGHEST))


def smoothness_bound(context: HeadContext, ridge: Any) -> Scalar:
    r"""L with ∂²g ⪯ L·I for the softmax head, whatever its parameters.

    $$L = \tfrac12 \lambda_{\max}\big(\textstyle\sum_i \frac{w_i}{\sum_j w_j}
      \tilde x_i \tilde x_i^\top\big) + \text{ridge}$$

    because diag(p) − ppᵀ ⪯ ½ I. λmax by `largest_eigenvalue_bound`: L is rigorous up to
    rounding.

    Args:
        context: of one task.
        ridge: as in `softmax_inner_loss`.

    Returns:
        L, in float32 at least.

    Example:
        >>> context = HeadContext(jnp.zeros((4, 2)), jnp.arange(4), jnp.eye(2), jnp.arange(2))
        >>> round(float(smoothness_bound(context, 0.1)), 3)
        0.6
    """
    return 0.5 * _largest_curvature(context) + ridge


def squared_smoothness_bound(context: HeadContext, ridge: Any) -> Scalar:
    """L with ∂²g ⪯ L·I for the squared loss: as `smoothness_bound` without the factor ½."""
    return _largest_curvature(context) + ridge


def _largest_curvature(context: HeadContext) -> Scalar:
    features = augmented(context.support_features)
    weights = shares(context.weights, features.dtype)
    return squared_norm_bound(features * jnp.sqrt(weights)[:, None])
