"""MINRES, for symmetric systems that need not be positive definite."""

from collections.abc import Callable
from functools import partial
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
    scaled,
    useful_steps,
)


def minres(
    steps: int = 20,
    *,
    damping: float = 0.0,
    diagonal: Callable[[Product, Vector], Vector] | None = None,
) -> LinearSolver:
    r"""The minimal-residual method, a fixed number of steps under `lax.scan`.

    $$x_k = \arg\min_{x \in \mathcal{K}_k(A, b)} \|b - A x\|$$

    A may be indefinite or singular; for a b outside the range of A the answer is a least-squares
    one. Negative curvature does not stop it but is reported: r_{k-1}ᵀA r_{k-1} comes for free.

    Args:
        steps: number of steps, 0 or more; at most twice the dimension are made.
        damping: λ ≥ 0, to solve (A + λ I) x = b instead.
        diagonal: preconditioner, see `jacobi`.

    Returns:
        The solver.

    Raises:
        ValueError: `steps` is no whole number, 0 or more, or `damping` is negative or not finite.

    Source: Paige and Saunders (1975), in the notation of Choi, Paige, Saunders (2011), Table 3.4;
    the curvature: Liu and Roosta (2022), equation 3.7.

    Example:
        >>> solution = minres(steps=2)(lambda x: jnp.array([2.0, -5.0]) * x, jnp.array([2.0, 10.0]))
        >>> solution.value.round(3).tolist(), float(solution.curvature) < 0
        ([1.0, -2.0], True)
    """
    _checks.count("steps", steps, least=0)

    def method(operator: Operator, b: Vector) -> tuple[Vector, Array, Array]:
        one, zeros = jnp.ones_like(dot(b, b)), jax.tree.map(jnp.zeros_like, b)
        zero = 0 * one
        rotation = (zero, -one, zero, zero, zero, jnp.sqrt(dot(b, b)), zero)
        start = (zeros, b, (b, zeros), (zeros, zeros), (zeros, zeros), rotation)
        carry = (*start, jnp.inf * one, dot(b, b) > 0, jnp.int32(0))
        carry, _ = jax.lax.scan(partial(_step, operator), carry, length=useful_steps(steps, b))
        return carry[0], carry[6], carry[8]

    return make_solver(method, damping, diagonal)


def _step(operator: Operator, carry: tuple[Any, ...], _: None) -> tuple[tuple[Any, ...], None]:
    """One Lanczos step, and the rotation that makes the residual minimal."""
    x, r, (v, v_old), (d, d_old), (ad, ad_old), rotation, smallest, advancing, count = carry
    beta, c, s, delta1, epsilon, phi, size = rotation
    # What rounding leaves of a zero here: 1e-5 in float32, 4e-12 in float64.
    eps = 2 * jnp.finfo(beta.dtype).eps ** 0.75
    image = operator.product(v)
    alpha = dot(v, image)
    w = axpy(-beta, v_old, axpy(-alpha, v, image))
    beta_new = jnp.sqrt(dot(w, w))
    delta2, gamma1 = c * delta1 + s * alpha, s * delta1 - c * alpha
    gamma2 = jnp.sqrt(gamma1**2 + beta_new**2)
    size = jnp.maximum(size, jnp.sqrt(alpha**2 + beta**2 + beta_new**2))
    # r is known before this step, and so is its Rayleigh quotient
    curvature = operator.curvature(r, -c * gamma1 * dot(r, r))
    advancing &= phi > eps
    smallest = jnp.where(advancing, jnp.minimum(smallest, curvature), smallest)
    slope = jnp.sqrt(gamma1**2 + (c * beta_new) ** 2)  # ‖A r‖ / ‖r‖
    advancing &= (slope > eps * size) & (gamma2 > eps * size)

    safe = jnp.where(advancing, gamma2, 1)
    c_new, s_new = gamma1 / safe, beta_new / safe

    def following(now: Vector, last: Vector, older: Vector) -> Vector:
        return scaled(1 / safe, axpy(-epsilon, older, axpy(-delta2, last, now)))

    d_new, ad_new = following(v, d, d_old), following(image, ad, ad_old)
    r_new = axpy(-c_new * phi, ad_new, r)
    # At the end of the Krylov space rounding alone is left: its step is refused.
    advancing &= dot(r_new, r_new) <= dot(r, r)
    v_new = scaled(1 / jnp.where(beta_new > 0, beta_new, 1), w)
    moved = (
        axpy(c_new * phi, d_new, x),
        r_new,
        (v_new, v),
        (d_new, d),
        (ad_new, ad),
        (beta_new, c_new, s_new, -c * beta_new, s * beta_new, s_new * phi, size),
    )
    moved = trees.where(advancing, moved, carry[:6])
    return (*moved, smallest, advancing, count + advancing.astype(jnp.int32)), None
