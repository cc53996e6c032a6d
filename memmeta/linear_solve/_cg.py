"""Conjugate gradients, for positive definite systems."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from memmeta import _checks
from memmeta import _trees as trees
from memmeta.linear_solve._solution import (
    LinearSolver,
    Operator,
    Product,
    Vector,
    axpy,
    dot,
    make_solver,
    useful_steps,
)


def cg(
    steps: int = 20,
    *,
    damping: float = 0.0,
    diagonal: Callable[[Product, Vector], Vector] | None = None,
) -> LinearSolver:
    r"""Conjugate gradients, a fixed number of steps under `lax.scan`.

    $$\alpha_k = \frac{r_k^\top r_k}{p_k^\top A p_k}, \quad x_{k+1} = x_k + \alpha_k p_k, \quad
      r_{k+1} = r_k - \alpha_k A p_k, \quad
      p_{k+1} = r_{k+1} + \frac{r_{k+1}^\top r_{k+1}}{r_k^\top r_k} p_k$$

    Where pᵀA p ≤ 0 is met, or is rounding alone (at most ε‖A‖‖p‖²: a singular A), or the residual
    has reached rounding, the answer stays as it is; the number of products is fixed, so that every
    task costs the same and the solve can be differentiated in reverse.

    Args:
        steps: number of steps, 0 or more; at most twice the dimension are made.
        damping: λ ≥ 0, to solve (A + λ I) x = b instead.
        diagonal: preconditioner, see `jacobi`.

    Returns:
        The solver.

    Raises:
        ValueError: `steps` is no whole number, 0 or more, or `damping` is negative or not finite.

    Source: Hestenes and Stiefel (1952); the paper's Algorithm 1 takes 20 steps from zero.

    Example:
        >>> solution = cg(steps=2)(lambda x: jnp.array([2.0, 5.0]) * x, jnp.array([2.0, 10.0]))
        >>> solution.value.round(3).tolist(), float(solution.residual) < 1e-6
        ([1.0, 2.0], True)
    """
    _checks.count("steps", steps, least=0)

    def method(operator: Operator, b: Vector) -> tuple[Vector, Array, Array]:
        rr = dot(b, b)
        eps = jnp.finfo(rr.dtype).eps

        def body(carry: tuple[Any, ...], _: None) -> tuple[tuple[Any, ...], None]:
            x, r, p, rr, size, smallest, count = carry
            image = operator.product(p)
            quadratic, square = dot(p, image), dot(p, p)
            size = jnp.maximum(size, dot(image, image) / jnp.where(square > 0, square, 1))
            advancing = rr > eps**2
            smallest = jnp.where(
                advancing, jnp.minimum(smallest, operator.curvature(p, quadratic)), smallest
            )
            # False for NaN too: the last finite answer is kept
            advancing &= quadratic > eps * jnp.sqrt(size) * square
            alpha = jnp.where(advancing, rr / jnp.where(advancing, quadratic, 1), 0)
            x = axpy(alpha, p, x)
            r = trees.where(advancing, axpy(-alpha, image, r), r)
            following = jnp.where(advancing, dot(r, r), rr)
            beta = following / jnp.where(rr > 0, rr, 1)
            p = trees.where(advancing, axpy(beta, p, r), p)
            return (x, r, p, following, size, smallest, count + advancing.astype(jnp.int32)), None

        zeros = jax.tree.map(jnp.zeros_like, b)
        start = (zeros, b, b, rr, 0 * rr, jnp.full_like(rr, jnp.inf), jnp.int32(0))
        (x, _, _, _, _, smallest, count), _ = jax.lax.scan(
            body, start, length=useful_steps(steps, b)
        )
        return x, smallest, count

    return make_solver(method, damping, diagonal)
