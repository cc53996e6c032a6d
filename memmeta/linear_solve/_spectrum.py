"""Extreme eigenvalues of a symmetric operator that is known by its products only."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from memmeta._shared import checks, trees
from memmeta.linear_solve._solution import Product, Vector, unit

CANCELLED = 100
"""Units of rounding: what is no longer than so many counts as zero."""

HALVINGS = 60
"""Of an interval that is no longer than the spectrum, down to rounding in float64."""


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
    alpha, beta, used = _lanczos(product, start, steps)
    # Past the end of the Krylov space: the first Ritz value again, which changes neither end.
    values = _ritz_values(jnp.where(used, alpha, alpha[0]), beta)
    return values[0], values[-1]


def largest_eigenvalue_bound(
    product: Product, like: PyTree, key: Key[Array, ""], failure: float, steps: int
) -> Float[Array, ""]:
    r"""A number that λ_max(A) exceeds with a chance of at most p = `failure`, by Lanczos steps.

    $$\prod_{i \le k} \frac{t - \theta_i}{\beta_i} = \frac{\|\omega\|}{\tau}, \quad
      t > \theta_{\max}, \qquad \omega \sim N(0, I), \quad \tau = p \sqrt{\pi/2}$$

    solved for t, with the Ritz values θ_i and the off-diagonal β_i of k steps from ω. Derived in
    docs/theory.md, section "The linear solve alone".

    Args:
        product: x -> A x on pytrees; A is symmetric, and may be indefinite.
        like: a vector, for shapes and dtypes.
        key: of ω.
        failure: p, in (0, 1).
        steps: k, at most the dimension; that many vectors are kept.

    Returns:
        t, with the share of rounding added.

    Raises:
        ValueError: `failure` is not between 0 and 1, or `steps` is no whole number, 1 or more.

    Source: van Dorsselaer, Hochstenbach, van der Vorst (SIAM J. Matrix Anal. Appl. 2000).

    Example:
        >>> values, key = jnp.linspace(0.0, 1.0, 100), jax.random.key(0)
        >>> found = largest_eigenvalue_bound(lambda x: values * x, values, key, 1e-6, 30)
        >>> 1.0 <= float(found) < 1.1
        True
    """
    checks.probability("failure", failure)
    checks.count("steps", steps)
    flat, unflatten = trees.ravel(like)
    omega = jax.random.normal(key, flat.shape, flat.dtype)
    alpha, beta, used = _lanczos(product, unflatten(omega), steps)
    values = _ritz_values(jnp.where(used, alpha, alpha[0]), beta)
    rounding = jnp.finfo(flat.dtype).eps * jnp.max(jnp.abs(values))
    # what may be left of the β that ended the Krylov space
    least = CANCELLED * rounding + jnp.finfo(flat.dtype).tiny
    level = jnp.sum(jnp.where(used, jnp.log(jnp.maximum(beta, least)), 0))
    level += jnp.log(jnp.linalg.norm(omega)) - math.log(failure * math.sqrt(math.pi / 2))

    def halved(ends: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        short, enough = ends
        beyond = (short + enough) / 2
        t = values[-1] + beyond
        padding = jnp.where(used, 0, jnp.log(t - alpha[0]))
        reached = jnp.sum(jnp.log(values[-1] - values + beyond) - padding) >= level
        return (jnp.where(reached, short, beyond), jnp.where(reached, beyond, enough)), None

    # enough, since no factor is smaller than t − θ_max
    enough = jnp.exp(level / jnp.sum(used, dtype=level.dtype))
    (_, beyond), _ = jax.lax.scan(halved, (0 * enough, enough), length=HALVINGS)
    whole = jnp.all(used) & (values.size == flat.size)  # all eigenvalues are Ritz values
    return values[-1] + jnp.where(whole, 0, beyond) + values.size * rounding


def _lanczos(product: Product, start: PyTree, steps: int) -> tuple[Array, Array, Array]:
    """α and β of the steps, and which of them were made before the Krylov space ended."""
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
        advancing = beta > CANCELLED * rounding * scale
        q = jnp.where(advancing, rest / jnp.where(advancing, beta, 1), 0)
        return (q, basis, scale), (alpha, jnp.where(advancing, beta, 0), jnp.any(basis[index] != 0))

    basis = jnp.zeros((steps, flat.size), flat.dtype)
    first = flat / jnp.linalg.norm(flat)
    start_carry = (first, basis, jnp.zeros((), flat.dtype))
    _, (alpha, beta, used) = jax.lax.scan(body, start_carry, jnp.arange(steps))
    return alpha, beta, used


def _ritz_values(alpha: Array, beta: Array) -> Array:
    """The eigenvalues of T, the smallest first."""
    matrix = jnp.diag(alpha) + jnp.diag(beta[:-1], 1) + jnp.diag(beta[:-1], -1)
    values: Array = jnp.linalg.eigvalsh(matrix)
    return values


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
