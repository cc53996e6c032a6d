"""GMRES, for systems that need not be symmetric."""

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
    make_solver,
    repeat,
)


@named
def gmres(
    steps: int = 20,
    *,
    tolerance: float | None = None,
    absolute_tolerance: float = 0.0,
    damping: float = 0.0,
    preconditioner: Preconditioner | None = None,
) -> LinearSolver:
    r"""The generalised minimal-residual method, without restarts.

    $$x_k = M^{-1} \arg\min_{y \in \mathcal{K}_k(A M^{-1}, b)} \|b - A M^{-1} y\|$$

    A may be anything; for a singular one the answer is right where b is in its range. Keeps all
    `steps` + 1 directions, orthogonal by Gram and Schmidt twice.

    Args:
        steps: number of steps, 0 or more; at most as many as the dimension are made.
        tolerance: stop at ‖r‖ ≤ max(tolerance · ‖b‖, absolute_tolerance), see `cg`; None makes all
            steps.
        absolute_tolerance: see there.
        damping: λ ≥ 0, to solve (A + λ I) x = b instead.
        preconditioner: of M, such as `jacobi()`, applied from the right; None: M = I.

    Returns:
        The solver. Its `curvature` is that of the orthogonal directions alone: it may stay positive
        for an indefinite A.

    Raises:
        ValueError: `steps` is no whole number, 0 or more, or `damping` or a tolerance is negative
            or not finite.

    Source: Saad and Schultz (1986); from the right: Saad (2003), Algorithm 9.5.

    Example:
        >>> matrix = jnp.array([[0.0, 1.0], [-2.0, 0.0]])
        >>> found = gmres(2)(lambda x: matrix @ x, jnp.array([3.0, 4.0])).value
        >>> [round(float(x), 3) for x in found]
        [-2.0, 3.0]
    """
    checks.count("steps", steps, least=0)

    def method(operator: Operator, b: Vector) -> Found:
        first, unravel = trees.ravel(b)
        length = min(steps, first.size)
        eps = jnp.finfo(first.dtype).eps
        nothing, one = jnp.zeros((), first.dtype), jnp.ones((), first.dtype)

        def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            basis, triangle, rotations, right, size, smallest, count, advancing = carry
            v = basis[count]
            p = operator.precondition(unravel(v))
            image = operator.product(p)
            flat, direction = trees.ravel(image)[0], trees.ravel(p)[0]
            seen = operator.curvature(p, direction @ flat)
            smallest = jnp.where(advancing, jnp.minimum(smallest, seen), smallest)
            size = jnp.maximum(size, trees.norm(flat))
            column = jnp.zeros(length + 1, first.dtype)
            for _ in range(2):  # once is not enough
                parts = basis @ flat
                flat, column = flat - parts @ basis, column + parts
            following = trees.norm(flat)
            column, cosine, sine, left = _rotated(column, rotations, count, following)
            # False for NaN too, and where A M⁻¹ v lies in A of the directions before: a singular A
            advancing &= left > 100 * eps * size
            cut = following <= 100 * eps * size  # the whole Krylov space is known
            new = jnp.where(cut, 0, flat / jnp.where(cut, 1, following))
            moved = (
                basis.at[count + 1].set(new),
                triangle.at[:, count].set(column[:length]),
                rotations.at[count].set(jnp.stack([cosine, sine])),
                right.at[count + 1].set(-sine * right[count]).at[count].multiply(cosine),
            )
            kept = trees.where(advancing, moved, (basis, triangle, rotations, right))
            count += advancing.astype(jnp.int32)
            return *kept, size, smallest, count, advancing & ~cut

        def unfinished(carry: tuple[Any, ...]) -> Bool[Array, ""]:
            right, count, advancing = carry[3], carry[6], carry[7]
            more: Array = advancing & operator.unsolved(right[count] ** 2)
            return more

        start = (
            jnp.zeros((length + 1, first.size), first.dtype).at[0].set(first),
            jnp.eye(length, dtype=first.dtype),
            jnp.zeros((length, 2), first.dtype),
            jnp.zeros(length + 1, first.dtype).at[0].set(trees.norm(first)),
            nothing,
            jnp.inf * one,
            jnp.int32(0),
            trees.norm(first) > 0,
        )
        last, made = repeat(operator, step, unfinished, start, length)
        basis, triangle, _, right, _, smallest, count, _ = last
        # columns past the last step are those of the identity
        made_so_far = jnp.arange(length, dtype=jnp.int32) < count
        weights = jax.scipy.linalg.solve_triangular(
            triangle, jnp.where(made_so_far, right[:length], 0)
        )
        x = operator.precondition(unravel(weights @ basis[:length]))
        return Found(x, smallest, count, made)

    return make_solver(
        method,
        damping,
        preconditioner,
        tolerance=tolerance,
        absolute_tolerance=absolute_tolerance,
    )


def _rotated(
    column: Array, rotations: Array, count: Array, following: Array
) -> tuple[Array, Array, Array, Array]:
    """A column of the Hessenberg matrix after all Givens rotations, the new one, its length."""

    def turn(column: Array, index: Array) -> tuple[Array, None]:
        cosine, sine = rotations[index]
        upper, lower = column[index], column[index + 1]
        turned = column.at[index].set(cosine * upper + sine * lower)
        turned = turned.at[index + 1].set(cosine * lower - sine * upper)
        return jnp.where(index < count, turned, column), None

    column, _ = jax.lax.scan(turn, column, jnp.arange(len(rotations), dtype=jnp.int32))
    length = jnp.hypot(column[count], following)
    safe = jnp.where(length > 0, length, 1)
    cosine, sine = column[count] / safe, following / safe
    return column.at[count].set(length), cosine, sine, length
