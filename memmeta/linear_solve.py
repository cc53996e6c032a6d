r"""Matrix-free solvers of A x = b for a symmetric A, that say how they ended.

A solver is a function (product, b) -> LinearSolution, where product(x) = A x on pytrees. None of
them hides a failure: residual, curvature and iterations come back as data, the answer is always
finite where b is, and the scale of b does not matter.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int32

from memmeta import trees

Vector: TypeAlias = Any
Product: TypeAlias = Callable[[Vector], Vector]


class LinearSolution(NamedTuple):
    """What a linear solver found and how it ended.

    Attributes:
        value: x, like b.
        residual: ‖b − A x‖ / ‖b‖, computed from x itself; 0 where b = 0.
        curvature: the smallest pᵀA p / pᵀp met; negative where A was seen to be indefinite.
        iterations: products with A that went into x.
    """

    value: Vector
    residual: Float[Array, ""]
    curvature: Float[Array, ""]
    iterations: Int32[Array, ""]


LinearSolver: TypeAlias = Callable[[Product, Vector], LinearSolution]


def _dot(a: Vector, b: Vector) -> Float[Array, ""]:
    return jnp.asarray(optax.tree.vdot(a, b))


def _axpy(scale: Float[Array, ""], x: Vector, y: Vector) -> Vector:
    return jax.tree.map(lambda a, b: scale.astype(a.dtype) * a + b, x, y)


def _scaled(scale: Float[Array, ""], x: Vector) -> Vector:
    return jax.tree.map(lambda a: scale.astype(a.dtype) * a, x)


def _unit(b: Vector) -> tuple[Vector, Float[Array, ""]]:
    """b/‖b‖ and ‖b‖, so that tiny and huge right-hand sides are all the same to a solver."""
    length = trees.norm(b)
    return jax.tree.map(lambda x: x / jnp.where(length > 0, length, 1).astype(x.dtype), b), length


def _finish(
    product: Product,
    unit: Vector,
    length: Float[Array, ""],
    value: Vector,
    curvature: Float[Array, ""],
    iterations: Int32[Array, ""],
) -> LinearSolution:
    residual = trees.norm(jax.tree.map(jnp.subtract, unit, product(value)))
    return LinearSolution(
        _scaled(length, value),
        jnp.where(length > 0, residual, 0),
        jnp.where(jnp.isfinite(curvature), curvature, 0),
        iterations,
    )


def cg(steps: int = 20) -> LinearSolver:
    r"""Conjugate gradients from zero, a fixed number of steps under `lax.scan`.

    $$\alpha_k = \frac{r_k^\top r_k}{p_k^\top A p_k}, \quad x_{k+1} = x_k + \alpha_k p_k, \quad
      r_{k+1} = r_k - \alpha_k A p_k, \quad
      p_{k+1} = r_{k+1} + \frac{r_{k+1}^\top r_{k+1}}{r_k^\top r_k} p_k$$

    Where pᵀA p ≤ 0 is met, or the residual has reached rounding, the answer stays as it is; the
    number of products made stays fixed, so tasks sharded over devices need no collective here.

    Args:
        steps: number of steps, 0 or more.

    Returns:
        The solver.

    Raises:
        ValueError: `steps` is negative or no whole number.

    Source: Hestenes and Stiefel (1952); the paper's Algorithm 1 takes 20 steps from zero.

    Example:
        >>> solution = cg(steps=2)(lambda x: jnp.array([2.0, 5.0]) * x, jnp.array([2.0, 10.0]))
        >>> solution.value.round(3).tolist(), float(solution.residual) < 1e-6
        ([1.0, 2.0], True)
    """
    check_steps(steps)

    def solve(product: Product, b: Vector) -> LinearSolution:
        unit, length = _unit(b)
        rounding = jnp.finfo(length.dtype).eps ** 2

        def body(carry: tuple, _: None) -> tuple[tuple, None]:
            x, r, p, rr, curvature, count = carry
            image = product(p)
            bend, square = _dot(p, image), _dot(p, p)
            going = rr > rounding
            quotient = bend / jnp.where(going, square, 1)
            curvature = jnp.where(going, jnp.minimum(curvature, quotient), curvature)
            # `bend > 0` is False for NaN too: the last finite answer is kept
            going &= bend > 0
            alpha = jnp.where(going, rr / jnp.where(going, bend, 1), 0)
            x, r = _axpy(alpha, p, x), _axpy(-alpha, image, r)
            r = jax.tree.map(lambda a, b: jnp.where(going, a, b), r, carry[1])
            following = jnp.where(going, _dot(r, r), rr)
            beta = following / jnp.where(rr > 0, rr, 1)
            p = jax.tree.map(lambda a, b: jnp.where(going, a, b), _axpy(beta, p, r), p)
            return (x, r, p, following, curvature, count + going.astype(jnp.int32)), None

        zeros = jax.tree.map(jnp.zeros_like, unit)
        infinite = jnp.full_like(length, jnp.inf)
        start = (zeros, unit, unit, _dot(unit, unit), infinite, jnp.int32(0))
        (x, _, _, _, curvature, count), _ = jax.lax.scan(body, start, length=steps)
        return _finish(product, unit, length, x, curvature, count)

    return solve


def check_steps(steps: int) -> None:
    """Refuse a number of steps that is none."""
    if not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps: expected a whole number, 0 or more, found {steps!r}.")
