"""BiCGSTAB, for systems that need not be symmetric, on a few vectors."""

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
from memmeta.linear_solve._status import Status


@named
def bicgstab(
    steps: int = 20,
    *,
    tolerance: float | None = None,
    absolute_tolerance: float = 0.0,
    damping: float = 0.0,
    preconditioner: Preconditioner | None = None,
) -> LinearSolver:
    r"""The stabilised bi-conjugate gradient method: two products a step, seven vectors.

    $$\alpha = \frac{\rho}{\hat r^\top A M^{-1} p}, \quad s = r - \alpha A M^{-1} p, \quad
      \omega = \frac{s^\top A M^{-1} s}{\|A M^{-1} s\|^2}, \quad
      x \leftarrow x + \alpha M^{-1} p + \omega M^{-1} s$$

    A may be anything, but the recurrence can break down where `gmres` cannot: its status says so,
    and the best x so far is kept.

    Args:
        steps: number of steps, 0 or more; at most twice the dimension are made.
        tolerance: stop at ‖r‖ ≤ max(tolerance · ‖b‖, absolute_tolerance), see `cg`; None makes all
            steps.
        absolute_tolerance: see there.
        damping: λ ≥ 0, to solve (A + λ I) x = b instead.
        preconditioner: of M, such as `jacobi()`, applied from the right; None: M = I.

    Returns:
        The solver.

    Raises:
        ValueError: `steps` is no whole number, 0 or more, or `damping` or a tolerance is negative
            or not finite.

    Source: van der Vorst (1992).

    Example:
        >>> matrix = jnp.array([[1.0, 1.0], [-2.0, 1.0]])
        >>> bicgstab(4)(lambda x: matrix @ x, jnp.array([3.0, 0.0])).value.round(3).tolist()
        [1.0, 2.0]
    """
    checks.count("steps", steps, least=0)

    def method(operator: Operator, b: Vector) -> Found:
        one = jnp.ones_like(dot(b, b))
        eps = jnp.finfo(one.dtype).eps

        def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            (x, r, p, rho), (best, least), smallest, count, advancing = carry
            mapped_p = operator.precondition(p)
            image = operator.product(mapped_p)
            along = dot(b, image)
            curvature = operator.curvature(mapped_p, dot(mapped_p, image))
            smallest = jnp.where(advancing, jnp.minimum(smallest, curvature), smallest)
            alpha = rho / jnp.where(along != 0, along, 1)
            s = axpy(-alpha, image, r)
            mapped_s = operator.precondition(s)
            second = operator.product(mapped_s)
            square = dot(second, second)
            omega = dot(s, second) / jnp.where(square > 0, square, 1)
            moved_x = axpy(omega, mapped_s, axpy(alpha, mapped_p, x))
            moved_r = axpy(-omega, second, s)
            following = dot(b, moved_r)
            beta = following / jnp.where(rho != 0, rho, 1) * alpha / jnp.where(omega != 0, omega, 1)
            moved_p = axpy(beta, axpy(-omega, image, p), moved_r)
            rr = dot(moved_r, moved_r)
            sound = advancing & (along != 0) & jnp.isfinite(rr)
            moved = trees.where(sound, (moved_x, moved_r, moved_p, following), (x, r, p, rho))
            better = sound & (rr < least)
            best, least = trees.where(better, moved_x, best), jnp.where(better, rr, least)
            count += 2 * sound.astype(jnp.int32)
            # rounding alone is left of the residual, or of one of the two inner products
            small = (jnp.abs(following) <= eps**2) | (jnp.abs(omega) <= eps)
            return moved, (best, least), smallest, count, sound & (rr > eps**2) & ~small

        def unfinished(carry: tuple[Any, ...]) -> Bool[Array, ""]:
            more: Array = carry[4] & operator.unsolved(carry[1][1])
            return more

        zeros, square = jax.tree.map(jnp.zeros_like, b), dot(b, b)
        first = (zeros, b, b, square)
        start = (first, (zeros, square), jnp.inf * one, jnp.int32(0), square > 0)
        last, made = repeat(operator, step, unfinished, start, useful_steps(steps, b))
        _, (x, least), smallest, count, advancing = last
        goal = 1e3 * eps if operator.threshold is None else operator.threshold
        broken = ~advancing & (square > 0) & ~(jnp.sqrt(least) <= goal)
        status = jnp.where(broken, jnp.int32(Status.BREAKDOWN), jnp.int32(0))
        return Found(x, smallest, count, 2 * made, status)

    return make_solver(
        method,
        damping,
        preconditioner,
        tolerance=tolerance,
        absolute_tolerance=absolute_tolerance,
    )
