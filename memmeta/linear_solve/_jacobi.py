"""The diagonal of a matrix that is known by its products only, as a preconditioner."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from memmeta import _checks
from memmeta import _trees as trees
from memmeta.linear_solve._solution import Product, Vector


def jacobi(probes: int = 16) -> Callable[[Product, Vector], Vector]:
    r"""Estimate the diagonal of A for the solvers' `diagonal` argument.

    $$\operatorname{diag}(A) \approx \frac1m \sum_{j=1}^m z_j \odot A z_j$$

    with z_j the signs of the first m rows of a Hadamard matrix, so no random key is needed. Exact
    where A_ik = 0 for every i ≠ k that are equal modulo m: for a bandwidth under m, and for every A
    of dimension m or less.

    Args:
        probes: m, a power of two; that many products are made at once for each system.

    Returns:
        (product, like) -> the diagonal, like `like`.

    Raises:
        ValueError: `probes` is no power of two.

    Source: Bekas, Kokiopoulou, Saad (2007), section 3.

    Example:
        >>> diagonal = jacobi(4)(lambda x: jnp.array([2.0, 5.0, 1.0]) * x, jnp.ones(3))
        >>> diagonal.tolist()
        [2.0, 5.0, 1.0]
    """
    _checks.count("probes", probes)
    _checks.require("probes", probes, not probes & (probes - 1), "a power of two")

    def diagonal(product: Product, like: Vector) -> Vector:
        flat, unflatten = trees.ravel(like)
        position = jnp.arange(flat.size) % probes

        def add(total: Array, row: Array) -> tuple[Array, None]:
            # entry (row, column) of the Hadamard matrix: the parity of the bits they share
            signs = 1 - 2 * (jax.lax.population_count(row & position) % 2)
            z = signs.astype(flat.dtype)
            return total + z * trees.ravel(product(unflatten(z)))[0] / probes, None

        total, _ = jax.lax.scan(add, jnp.zeros_like(flat), jnp.arange(probes))
        return unflatten(total)

    return diagonal
