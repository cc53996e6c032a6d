"""A dense solve, for systems small enough to be written out."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from memmeta._shared import trees
from memmeta._shared.readable import named
from memmeta.linear_solve._solution import LinearSolver, Operator, Vector, make_solver


@named
def direct(*, damping: float = 0.0) -> LinearSolver:
    r"""Writes A out, one product per dimension, and solves by its eigenvectors.

    $$x = \sum_{|\lambda_j| > \epsilon} \frac{q_j^\top b}{\lambda_j} q_j$$

    Exact, for few inner parameters (memory grows with the square of their number). Eigenvalues at
    rounding level are left out, so a singular A gives its least-squares answer, and the residual
    says what is missing. The curvature reported is the smallest eigenvalue.

    Args:
        damping: λ ≥ 0, to solve (A + λ I) x = b instead.

    Returns:
        The solver.

    Raises:
        ValueError: `damping` is negative.

    Example:
        >>> solution = direct()(lambda x: jnp.array([2.0, -5.0]) * x, jnp.array([2.0, 10.0]))
        >>> solution.value.round(3).tolist(), float(solution.curvature)
        ([1.0, -2.0], -5.0)
    """

    def method(operator: Operator, b: Vector) -> tuple[Vector, Array, Array]:
        flat, unflatten = trees.ravel(b)

        def column(vector: Array) -> Array:
            return trees.ravel(operator.product(unflatten(vector)))[0]

        matrix = jax.vmap(column)(jnp.eye(flat.size, dtype=flat.dtype))
        finite = jnp.all(jnp.isfinite(matrix))
        # eigenvectors of a matrix with NaN may never come
        values, vectors = jnp.linalg.eigh(jnp.where(finite, (matrix + matrix.T) / 2, 0))
        cut = flat.size * jnp.finfo(flat.dtype).eps * jnp.max(jnp.abs(values))
        kept = jnp.abs(values) > cut
        inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)
        x = vectors @ (inverse * (vectors.T @ flat))
        smallest = jnp.where(finite, values[0] - damping, jnp.inf)
        return unflatten(x), smallest, jnp.int32(flat.size)

    return make_solver(method, damping, symmetric=True)
