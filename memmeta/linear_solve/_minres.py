"""MINRES, for symmetric systems that need not be positive definite."""

from functools import partial
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
    scaled,
    useful_steps,
)


@named
def minres(
    steps: int = 20,
    *,
    tolerance: float | None = None,
    absolute_tolerance: float = 0.0,
    damping: float = 0.0,
    preconditioner: Preconditioner | None = None,
) -> LinearSolver:
    r"""The minimal-residual method, a fixed number of steps or as many as a tolerance needs.

    $$x_k = \arg\min_{x \in \mathcal{K}_k(M^{-1} A, M^{-1} b)} \|b - A x\|_{M^{-1}}$$

    A may be indefinite or singular; for a b outside the range of A the answer is a least-squares
    one. Negative curvature does not stop it but is reported: r_{k-1}ᵀA r_{k-1} comes for free.

    Args:
        steps: number of steps, 0 or more; at most twice the dimension are made.
        tolerance: stop at ‖r‖ ≤ max(tolerance · ‖b‖, absolute_tolerance), see `cg`; None makes all
            steps.
        absolute_tolerance: see there.
        damping: λ ≥ 0, to solve (A + λ I) x = b instead.
        preconditioner: of M, such as `jacobi()`; None: M = I.

    Returns:
        The solver.

    Raises:
        ValueError: `steps` is no whole number, 0 or more, or `damping` or a tolerance is negative
            or not finite.

    Source: Paige and Saunders (1975), in the notation of Choi, Paige, Saunders (2011), Table 3.4;
    the curvature: Liu and Roosta (2022), equation 3.7.

    Example:
        >>> solution = minres(steps=2)(lambda x: jnp.array([2.0, -5.0]) * x, jnp.array([2.0, 10.0]))
        >>> solution.value.round(3).tolist(), float(solution.curvature) < 0
        ([1.0, -2.0], True)
    """
    checks.count("steps", steps, least=0)

    def method(operator: Operator, b: Vector) -> Found:
        mapped = operator.precondition(b)
        size = jnp.sqrt(jnp.maximum(dot(b, mapped), 0))
        one, zeros = jnp.ones_like(size), jax.tree.map(jnp.zeros_like, b)
        zero = 0 * one
        first = 1 / jnp.where(size > 0, size, 1)
        vectors = (scaled(first, b), zeros), scaled(first, mapped) if operator.inverse else None
        residual = (b, size**2, dot(b, b), dot(mapped, mapped))
        rotation = (zero, -one, zero, zero, zero, size, zero)
        figures = jnp.inf * one, size > 0, jnp.int32(0)
        start = (zeros, residual, vectors, (zeros, zeros), (zeros, zeros), rotation, *figures)

        def unfinished(carry: tuple[Any, ...]) -> Bool[Array, ""]:
            more: Array = carry[7] & operator.unsolved(carry[1][2])
            return more

        steps_made = useful_steps(steps, b)
        carry, made = repeat(operator, partial(_step, operator), unfinished, start, steps_made)
        return Found(carry[0], carry[6], carry[8], made)

    return make_solver(
        method,
        damping,
        preconditioner,
        tolerance=tolerance,
        absolute_tolerance=absolute_tolerance,
        symmetric=True,
    )


def _step(operator: Operator, carry: tuple[Any, ...]) -> tuple[Any, ...]:
    """One Lanczos step, and the rotation that makes the residual minimal.

    v has norm 1 in M⁻¹; q = M⁻¹ v, which without a preconditioner is not kept.
    """
    x, residual, ((v, v_old), q), (d, d_old), (ad, ad_old), rotation, *rest = carry
    (r, rr, _, square), (smallest, advancing, count) = residual, rest
    beta, c, s, delta1, epsilon, phi, size = rotation
    q = v if q is None else q
    # What rounding leaves of a zero here: 1e-5 in float32, 4e-12 in float64.
    eps = 2 * jnp.finfo(beta.dtype).eps ** 0.75
    image = operator.product(q)
    alpha = dot(q, image)
    w = axpy(-beta, v_old, axpy(-alpha, v, image))
    mapped = operator.precondition(w)
    beta_new = jnp.sqrt(jnp.maximum(dot(w, mapped), 0))
    delta2, gamma1 = c * delta1 + s * alpha, s * delta1 - c * alpha
    gamma2 = jnp.sqrt(gamma1**2 + beta_new**2)
    size = jnp.maximum(size, jnp.sqrt(alpha**2 + beta**2 + beta_new**2))
    # r is known before this step, and so is the Rayleigh quotient of M⁻¹ r
    curvature = -c * gamma1 * rr / jnp.where(square > 0, square, 1) - operator.damping
    advancing &= (phi > eps) if operator.inverse is None else (residual[2] > eps**2)
    smallest = jnp.where(advancing, jnp.minimum(smallest, curvature), smallest)
    slope = jnp.sqrt(gamma1**2 + (c * beta_new) ** 2)  # ‖A r‖ / ‖r‖
    advancing &= (slope > eps * size) & (gamma2 > eps * size)

    safe = jnp.where(advancing, gamma2, 1)
    c_new, s_new = gamma1 / safe, beta_new / safe

    def following(now: Vector, last: Vector, older: Vector) -> Vector:
        return scaled(1 / safe, axpy(-epsilon, older, axpy(-delta2, last, now)))

    d_new, ad_new = following(q, d, d_old), following(image, ad, ad_old)
    r_new = axpy(-c_new * phi, ad_new, r)
    mapped_r = operator.precondition(r_new)
    rr_new = dot(r_new, mapped_r)
    # At the end of the Krylov space rounding alone is left: its step is refused.
    advancing &= rr_new <= rr
    inverse = 1 / jnp.where(beta_new > 0, beta_new, 1)
    moved = (
        axpy(c_new * phi, d_new, x),
        (r_new, rr_new, dot(r_new, r_new), dot(mapped_r, mapped_r)),
        ((scaled(inverse, w), v), scaled(inverse, mapped) if operator.inverse else None),
        (d_new, d),
        (ad_new, ad),
        (beta_new, c_new, s_new, -c * beta_new, s * beta_new, s_new * phi, size),
    )
    moved = trees.where(advancing, moved, carry[:6])
    return (*moved, smallest, advancing, count + advancing.astype(jnp.int32))
