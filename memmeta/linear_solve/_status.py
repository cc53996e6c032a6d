"""What can be wrong with a linear system, as a number in its solution, and how it is found."""

from collections.abc import Callable
from enum import IntEnum
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from memmeta._shared import trees


class Status(IntEnum):
    """Why a solution should not be used, whatever its residual."""

    SOUND = 0
    NOT_FINITE = 1
    ASYMMETRIC = 2
    PRECONDITIONER = 3
    BREAKDOWN = 4


SENTENCES = {
    Status.NOT_FINITE: (
        "Failed: the system or its solution is not finite. Look for NaN in the task, or make the "
        "inner loss strongly convex (ridge, proximal term, damping)."
    ),
    Status.ASYMMETRIC: (
        "Asymmetric product: wᵀ(A u) and uᵀ(A w) differ for two random vectors, and this solver "
        "needs a symmetric A. Use gmres(), bicgstab() or normal_cg()."
    ),
    Status.PRECONDITIONER: (
        "Preconditioner not positive: rᵀM⁻¹r was zero, negative or not finite for a residual r. "
        "Give one that is positive definite, such as jacobi() or nystrom(), or none."
    ),
    Status.BREAKDOWN: (
        "Broken down: the recurrence divided by zero or stagnated before the system was solved. "
        "Use gmres() with more steps, damping, or another preconditioner."
    ),
}


def is_positive(inverse: Callable[[Any], Any], r: Any) -> Bool[Array, ""]:
    """Whether rᵀM⁻¹r > 0, or r = 0 or is not finite, so that nothing can be said.

    Example:
        >>> bool(is_positive(lambda r: -r, jnp.ones(2)))
        False
    """
    quadratic = trees.dot(r, inverse(r))
    square = trees.dot(r, r)
    # Of a residual that is rounding alone the squares may underflow.
    blind = ~(square > jnp.finfo(square.dtype).eps ** 3)
    return blind | ~jnp.isfinite(square) | ((quadratic > 0) & jnp.isfinite(quadratic))


def is_asymmetric(product: Callable[[Any], Any], like: Any) -> Bool[Array, ""]:
    r"""Whether uᵀ(A w) ≠ wᵀ(A u) beyond rounding, for two random vectors u and w.

    The difference has a mean square of ‖A − Aᵀ‖²; up to the third root of the machine's precision,
    relative to ‖A u‖ + ‖A w‖, it is taken for rounding. False where a product is not finite.

    Example:
        >>> bool(is_asymmetric(lambda x: jnp.array([x[1], 0 * x[0]]), jnp.ones(2)))
        True
    """
    flat, unravel = trees.ravel(like)
    # Always the same ones: a product is the user's code, and no adversary.
    u, w = pair = jax.random.normal(jax.random.key(0), (2, flat.size), flat.dtype)
    images = jax.lax.map(lambda x: trees.ravel(product(unravel(x)))[0], pair)
    difference = jnp.abs(u @ images[1] - w @ images[0])
    size = trees.norm(images[0]) + trees.norm(images[1])
    return jax.lax.stop_gradient(difference > jnp.finfo(flat.dtype).eps ** (1 / 3) * size)
