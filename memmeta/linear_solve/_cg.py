"""Conjugate gradients, for positive definite systems."""

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
def cg(
    steps: int = 20,
    *,
    tolerance: float | None = None,
    absolute_tolerance: float = 0.0,
    damping: float = 0.0,
    preconditioner: Preconditioner | None = None,
) -> LinearSolver:
    r"""Conjugate gradients, a fixed number of steps or as many as a tolerance needs.

    $$\alpha_k = \frac{r_k^\top z_k}{p_k^\top A p_k}, \quad x_{k+1} = x_k + \alpha_k p_k, \quad
      r_{k+1} = r_k - \alpha_k A p_k, \quad z_k = M^{-1} r_k, \quad
      p_{k+1} = z_{k+1} + \frac{r_{k+1}^\top z_{k+1}}{r_k^\top z_k} p_k$$

    Where pᵀA p ≤ 0 is met, or is rounding alone (at most ε‖A‖‖p‖²: a singular A), or the residual
    has reached rounding, the answer stays as it is. Without a tolerance the number of products is
    fixed, so that every task costs the same and the solve can be differentiated in reverse; with
    one it is a `while_loop`, which has forward derivatives only.

    Args:
        steps: number of steps, 0 or more; at most twice the dimension are made.
        tolerance: stop at ‖r‖ ≤ max(tolerance · ‖b‖, absolute_tolerance); None makes all steps.
        absolute_tolerance: see there.
        damping: λ ≥ 0, to solve (A + λ I) x = b instead.
        preconditioner: of M, such as `jacobi()`; None: M = I.

    Returns:
        The solver.

    Raises:
        ValueError: `steps` is no whole number, 0 or more, or `damping` or a tolerance is negative
            or not finite.

    Source: Hestenes and Stiefel (1952); the paper's Algorithm 1 takes 20 steps from zero. With M:
    Golub and Van Loan, Algorithm 11.5.1.

    Example:
        >>> solution = cg(steps=2)(lambda x: jnp.array([2.0, 5.0]) * x, jnp.array([2.0, 10.0]))
        >>> solution.value.round(3).tolist(), float(solution.residual) < 1e-6
        ([1.0, 2.0], True)
    """
    checks.count("steps", steps, least=0)

    def method(operator: Operator, b: Vector) -> Found:
        eps = jnp.finfo(dot(b, b).dtype).eps

        def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            x, r, z, p, rr, rz, square, size, smallest, count, _ = carry
            z = r if z is None else z
            image = operator.product(p)
            mapped = operator.precondition(image)
            quadratic = dot(p, image)
            # ‖A‖ and ‖p‖ in the norms of M⁻¹ and M
            size = jnp.maximum(size, dot(image, mapped) / jnp.where(square > 0, square, 1))
            advancing = (rr > eps**2) & (rz > 0)
            smallest = jnp.where(
                advancing, jnp.minimum(smallest, operator.curvature(p, quadratic)), smallest
            )
            # False for NaN too: the last finite answer is kept
            advancing &= quadratic > eps * jnp.sqrt(size) * square
            alpha = jnp.where(advancing, rz / jnp.where(advancing, quadratic, 1), 0)
            x = axpy(alpha, p, x)
            r = trees.where(advancing, axpy(-alpha, image, r), r)
            z = trees.where(advancing, axpy(-alpha, mapped, z), z) if operator.inverse else r
            following = jnp.where(advancing, dot(r, z), rz)
            beta = following / jnp.where(rz > 0, rz, 1)
            p = trees.where(advancing, axpy(beta, p, z), p)
            square = jnp.where(advancing, following + beta**2 * square, square)
            rr = dot(r, r) if operator.inverse else following
            kept = z if operator.inverse else None
            count += advancing.astype(jnp.int32)
            return x, r, kept, p, rr, following, square, size, smallest, count, advancing

        def unfinished(carry: tuple[Any, ...]) -> Bool[Array, ""]:
            rr, advancing = carry[4], carry[10]
            more: Array = advancing & operator.unsolved(rr)
            return more

        z, rr = operator.precondition(b), dot(b, b)
        rz = dot(b, z)
        zeros = jax.tree.map(jnp.zeros_like, b)
        unseen = jnp.full_like(rr, jnp.inf)
        kept = z if operator.inverse else None
        start = (zeros, b, kept, z, rr, rz, rz, 0 * rr, unseen, jnp.int32(0), rr > 0)
        last, made = repeat(operator, step, unfinished, start, useful_steps(steps, b))
        return Found(last[0], last[8], last[9], made)

    return make_solver(
        method,
        damping,
        preconditioner,
        tolerance=tolerance,
        absolute_tolerance=absolute_tolerance,
        symmetric=True,
    )
