"""Conjugate gradients on the normal equations, for any matrix of which the transpose is known."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from memmeta._shared import checks, trees
from memmeta._shared.readable import named
from memmeta.linear_solve._solution import (
    Found,
    LinearSolver,
    Operator,
    Preconditioner,
    Vector,
    axpy,
    dot,
    make_solver,
    repeat,
    useful_steps,
)


@named
def normal_cg(
    steps: int = 20,
    *,
    tolerance: float | None = None,
    absolute_tolerance: float = 0.0,
    damping: float = 0.0,
    preconditioner: Preconditioner | None = None,
) -> LinearSolver:
    r"""CG on (A M⁻¹)ᵀ(A M⁻¹) y = (A M⁻¹)ᵀ b, x = M⁻¹ y: least squares, for any A.

    $$\alpha = \frac{\|B^\top r\|^2}{\|B p\|^2}, \quad y \leftarrow y + \alpha p, \quad
      r \leftarrow r - \alpha B p, \qquad B = A M^{-1}$$

    Never breaks down, and its residual never grows; but it needs as many steps as CG on a matrix
    of the squared condition number, of one product with A and one with Aᵀ each, the latter by
    `jax.linear_transpose`.

    Args:
        steps: number of steps, 0 or more; at most twice the dimension are made.
        tolerance: stop at ‖r‖ ≤ max(tolerance · ‖b‖, absolute_tolerance), see `cg`; None makes all
            steps.
        absolute_tolerance: see there.
        damping: λ ≥ 0, to solve (A + λ I) x = b instead.
        preconditioner: of M, such as `jacobi()`, applied from the right; None: M = I.

    Returns:
        The solver. Its `curvature` is that of the directions x was moved along.

    Raises:
        ValueError: `steps` is no whole number, 0 or more, or `damping` or a tolerance is negative
            or not finite.

    Source: Hestenes and Stiefel (1952), section 10; as CGLS in Björck (1996), section 7.4.

    Example:
        >>> matrix = jnp.array([[0.0, 1.0], [-2.0, 0.0]])
        >>> found = normal_cg(4)(lambda x: matrix @ x, jnp.array([3.0, 4.0])).value
        >>> [round(float(x), 3) for x in found]
        [-2.0, 3.0]
    """
    checks.count("steps", steps, least=0)

    def method(operator: Operator, b: Vector) -> Found:
        transposed = jax.linear_transpose(operator.product, b)
        eps = jnp.finfo(dot(b, b).dtype).eps

        def adjoint(r: Vector) -> Vector:  # M is symmetric
            return operator.precondition(transposed(r)[0])

        def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            y, r, p, gradient, size, smallest, count, _ = carry
            moved = operator.precondition(p)
            image = operator.product(moved)
            curvature = operator.curvature(moved, dot(moved, image))
            square, energy = dot(p, p), dot(image, image)
            size = jnp.maximum(size, energy / jnp.where(square > 0, square, 1))
            # False for NaN too; of ‖A‖² alone rounding leaves ε², but of the gradient ε
            advancing = (gradient > (eps**2) * size) & (energy > eps**2 * size * square)
            smallest = jnp.where(advancing, jnp.minimum(smallest, curvature), smallest)
            alpha = jnp.where(advancing, gradient / jnp.where(advancing, energy, 1), 0)
            y = axpy(alpha, p, y)
            r = trees.where(advancing, axpy(-alpha, image, r), r)
            slope = adjoint(r)
            following = dot(slope, slope)
            beta = following / jnp.where(gradient > 0, gradient, 1)
            p = trees.where(advancing, axpy(beta, p, slope), p)
            gradient = jnp.where(advancing, following, gradient)
            count += 2 * advancing.astype(jnp.int32)
            return y, r, p, gradient, size, smallest, count, advancing

        def unfinished(carry: tuple[Any, ...]) -> Bool[Array, ""]:
            more: Array = carry[7] & operator.unsolved(dot(carry[1], carry[1]))
            return more

        zeros, slope = jax.tree.map(jnp.zeros_like, b), adjoint(b)
        gradient = dot(slope, slope)
        unseen = jnp.full_like(gradient, jnp.inf)
        start = (zeros, b, slope, gradient, 0 * gradient, unseen, jnp.int32(0), gradient > 0)
        last, made = repeat(operator, step, unfinished, start, useful_steps(steps, b))
        x = operator.precondition(last[0])
        return Found(x, last[5], last[6], 2 * made + 1)

    return make_solver(
        method,
        damping,
        preconditioner,
        tolerance=tolerance,
        absolute_tolerance=absolute_tolerance,
    )
