"""Extreme eigenvalues of a symmetric operator that is known by its products only."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from memmeta._shared import trees
from memmeta.linear_solve._solution import Product, Vector, unit


def extreme_eigenvalues(
    product: Product, start: PyTree, steps: int = 10
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    r"""The smallest and largest Ritz values of a few Lanczos steps.

    $$A q_k = \beta_{k-1} q_{k-1} + \alpha_k q_k + \beta_k q_{k+1}, \qquad
      \lambda_{\min}(A) \le \lambda_{\min}(T) \le \lambda_{\max}(T) \le \lambda_{\max}(A)$$

    The space is kept orthogonal in full, so memory is `steps` vectors.

    Args:
        product: x -> A x on pytrees.
        start: the first direction; ones are added where it is zero altogether.
        steps: Lanczos steps, at least 1.

    Returns:
        The two Ritz values; both inside the spectrum of A, so estimates of its ends.

    Source: Lanczos (1950); with full reorthogonalisation, Golub and Van Loan, section 10.3.

    Example:
        >>> ends = extreme_eigenvalues(lambda x: jnp.array([1.0, 2.0, 5.0]) * x, jnp.ones(3), 3)
        >>> [round(float(end), 3) for end in ends]
        [1.0, 5.0]
    """
    flat, unflatten = trees.ravel(start)
    steps = min(steps, flat.size)
    flat = jnp.where(jnp.any(flat != 0) & jnp.all(jnp.isfinite(flat)), flat, jnp.ones_like(flat))
    rounding = float(jnp.finfo(flat.dtype).eps)

    def orthogonal(vector: Array, basis: Array) -> Array:
        for _ in range(2):  # once is not enough
            vector -= basis.T @ (basis @ vector)
        return vector

    def body(carry: tuple[Any, ...], index: Array) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        q, basis, scale = carry
        basis = basis.at[index].set(q)
        image = trees.ravel(product(unflatten(q)))[0]
        alpha = q @ image
        rest = orthogonal(image, basis)
        scale = jnp.maximum(scale, jnp.linalg.norm(image))
        beta = jnp.linalg.norm(rest)
        advancing = beta > 100 * rounding * scale
        q = jnp.where(advancing, rest / jnp.where(advancing, beta, 1), 0)
        return (q, basis, scale), (alpha, jnp.where(advancing, beta, 0), jnp.any(basis[index] != 0))

    basis = jnp.zeros((steps, flat.size), flat.dtype)
    first = flat / jnp.linalg.norm(flat)
    start_carry = (first, basis, jnp.zeros((), flat.dtype))
    _, (alpha, beta, used) = jax.lax.scan(body, start_carry, jnp.arange(steps))
    # Past the end of the Krylov space: the first Ritz value again, which changes neither end.
    alpha = jnp.where(used, alpha, alpha[0])
    matrix = jnp.diag(alpha) + jnp.diag(beta[:-1], 1) + jnp.diag(beta[:-1], -1)
    values = jnp.linalg.eigvalsh(matrix)
    return values[0], values[-1]


def power_iteration(product: Product, start: Vector, steps: int = 8) -> Float[Array, ""]:
    r"""A lower estimate of the largest absolute eigenvalue, by a few products.

    $$q_{k+1} = A q_k / \|A q_k\|, \qquad \max_k \|A q_k\| \le \max_j |\lambda_j(A)|$$

    Example:
        >>> float(power_iteration(lambda x: jnp.array([1.0, 5.0]) * x, jnp.ones(2)).round(3))
        5.0
    """

    def body(vector: Vector, _: None) -> tuple[Vector, Array]:
        image = product(unit(vector)[0])
        return image, trees.norm(image)

    _, norms = jax.lax.scan(body, start, length=steps)
    return jnp.maximum(jnp.max(norms), jnp.finfo(norms.dtype).tiny)
