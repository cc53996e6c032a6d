"""The Neumann series: gradient descent on the quadratic form, one product a term."""

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
    Vector,
    axpy,
    dot,
    make_solver,
    repeat,
)
from memmeta.linear_solve._spectrum import power_iteration

POWER_STEPS = 8


@named
def neumann(
    steps: int = 20,
    *,
    rate: float | None = None,
    tolerance: float | None = None,
    absolute_tolerance: float = 0.0,
    damping: float = 0.0,
) -> LinearSolver:
    r"""The first terms of the Neumann series.

    $$x = \eta \sum_{k=0}^{\text{steps}-1} (I - \eta A)^k \, b$$

    Unlike other codes it cannot diverge: a term that would enlarge the residual is left out and η
    halved. Its error falls as (1 − 1/κ)^steps, that of `cg` as (1 − 2/√κ)^steps or faster.

    Args:
        steps: number of terms, 0 or more.
        rate: η; None means 1/L, with L from 8 power steps along b (counted as products).
        tolerance: stop at ‖r‖ ≤ max(tolerance · ‖b‖, absolute_tolerance), see `cg`; None takes all
            terms.
        absolute_tolerance: see there.
        damping: λ ≥ 0, to solve (A + λ I) x = b instead.

    Returns:
        The solver.

    Raises:
        ValueError: `steps` is negative or no whole number, or `rate` is not positive.

    Source: Lorraine, Vicol, Duvenaud (AISTATS 2020), Algorithm 3.

    Example:
        >>> solution = neumann(40)(lambda x: jnp.array([1.0, 2.0]) * x, jnp.array([1.0, 4.0]))
        >>> solution.value.round(3).tolist()
        [1.0, 2.0]
    """
    checks.count("steps", steps, least=0)
    if rate is not None:
        checks.positive("rate", rate)

    def method(operator: Operator, b: Vector) -> Found:
        square = dot(b, b)
        if rate is None:
            largest = jax.lax.stop_gradient(power_iteration(operator.product, b, POWER_STEPS))
        else:
            largest = jnp.full_like(square, 1 / rate)

        def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            x, r, rr, largest, smallest = carry
            image = operator.product(r)
            # of a residual that is rounding alone, squares underflow and show a curvature of zero
            seen = rr > jnp.finfo(rr.dtype).eps ** 2
            smallest = jnp.where(
                seen, jnp.minimum(smallest, operator.curvature(r, dot(r, image))), smallest
            )
            proposal = axpy(-1 / largest, image, r)
            proposed_rr = dot(proposal, proposal)
            advancing = proposed_rr < rr  # False for NaN too, and where A r = 0
            x = trees.where(advancing, axpy(1 / largest, r, x), x)
            largest = jnp.where(advancing, largest, 2 * largest)
            r, rr = trees.where(advancing, proposal, r), jnp.where(advancing, proposed_rr, rr)
            return x, r, rr, largest, smallest

        def unfinished(carry: tuple[Any, ...]) -> Bool[Array, ""]:
            return operator.unsolved(carry[2])

        zeros = jax.tree.map(jnp.zeros_like, b)
        start = (zeros, b, square, largest, jnp.full_like(square, jnp.inf))
        (x, _, _, _, smallest), made = repeat(operator, step, unfinished, start, steps)
        # the power steps count as products too
        return Found(x, smallest, made + (0 if rate is not None else POWER_STEPS))

    return make_solver(
        method, damping, tolerance=tolerance, absolute_tolerance=absolute_tolerance, symmetric=True
    )
