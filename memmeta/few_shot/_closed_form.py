"""The solution of the head's inner problem with the squared loss, in closed form."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from memmeta.few_shot._examples import as_values, shares
from memmeta.few_shot._head import HeadContext, HeadParams, augmented


def ridge_solution(context: HeadContext, ridge: Any, ways: int) -> HeadParams:
    r"""The minimiser of the squared inner loss in closed form, in the smaller of the two spaces.

    $$\Phi^* = \tilde X^\top S^{1/2}
      (S^{1/2} \tilde X \tilde X^\top S^{1/2} + \text{ridge}\, I)^{-1} S^{1/2} Y,
      \qquad S = \mathrm{diag}(w_i / \textstyle\sum_j w_j)$$

    Args:
        context: of one task.
        ridge: scalar, positive.
        ways: outputs of the head, for integer targets.

    Returns:
        The head's parameters, in float32 at least.

    Source: Bertinetto, Henriques, Torr, Vedaldi (ICLR 2019), equation 4 (R2-D2).

    Example:
        >>> context = HeadContext(jnp.eye(2), jnp.arange(2), jnp.eye(2), jnp.arange(2))
        >>> params = ridge_solution(context, 0.1, ways=2)
        >>> from memmeta.few_shot import squared_problem
        >>> problem = squared_problem(lambda theta, batch: batch, lambda theta: params, 0.1)
        >>> gradient = jax.grad(problem.inner_loss)(params, context)
        >>> all(bool(jnp.all(jnp.abs(leaf) < 1e-6)) for leaf in gradient.values())
        True
    """
    features = augmented(context.support_features)
    targets = as_values(context.support_targets, ways, features.dtype)
    roots = jnp.sqrt(shares(context.weights, features.dtype))[:, None]
    scaled, targets = features * roots, targets * roots
    ridge = jnp.asarray(ridge).astype(features.dtype)

    def solve(matrix: Array, right: Array) -> Array:
        shifted = matrix + ridge * jnp.eye(matrix.shape[0], dtype=matrix.dtype)
        return jax.scipy.linalg.solve(shifted, right, assume_a="pos")

    if scaled.shape[0] <= scaled.shape[1]:
        matrix = scaled.T @ solve(scaled @ scaled.T, targets)
    else:
        matrix = solve(scaled.T @ scaled, scaled.T @ targets)
    return {"kernel": matrix[:-1], "bias": matrix[-1]}
