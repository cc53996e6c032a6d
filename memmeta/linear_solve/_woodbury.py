"""The linear system of a linear head, solved in the space of the support samples."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array

from memmeta._shared import checks
from memmeta._shared.readable import named
from memmeta.linear_solve._solution import (
    LinearSolution,
    LinearSolver,
    Operator,
    Product,
    Vector,
    make_solver,
)
from memmeta.problem import Context, LinearHead, Params, Problem, stacked, unstacked

REFINEMENTS = 2


@named
def woodbury(*, damping: float = 0.0) -> LinearSolver:
    r"""Exact solve for a linear head by the Woodbury identity; needs a `Structure.head`.

    With Z = X̃ Φ the logits, H = ∂²ℓ/∂Z² and ρ the ridge,
    $$[\tilde X^\top H \tilde X + \rho I] x = b \;\Rightarrow\; x = \tfrac1\rho
      \big(b - \tilde X^\top (\rho I + H \tilde X \tilde X^\top)^{-1} H \tilde X b\big)$$

    A dense system of (support × ways) unknowns whatever the number of features. Followed by
    iterative refinement, so that a small ρ loses no digits to the subtraction.

    Args:
        damping: λ ≥ 0, added to the ridge; with a ridge of zero it must be positive.

    Returns:
        The solver.

    Raises:
        ValueError: (when traced) the problem has no `structure.head`.

    Source: Woodbury (1950); for a ridge-regression head: Bertinetto et al. (ICLR 2019).

    Example:
        >>> import memmeta as mm
        >>> estimator = mm.hypergradient.implicit(solver=woodbury())
    """

    checks.not_negative("damping", damping)

    def solve(
        product: Product,
        b: Vector,
        *,
        problem: Problem | None = None,
        params: Params | None = None,
        context: Context | None = None,
        start: Vector | None = None,
    ) -> LinearSolution:
        describe = None if problem is None else problem.structure.head
        if describe is None or params is None:
            raise ValueError(
                "woodbury: expected a problem with a `structure.head` (see "
                "memmeta.few_shot.softmax_problem), found None. For other inner losses use cg() or "
                "direct()."
            )
        method = partial(_refined, describe(context), params, damping)
        return make_solver(method, damping)(product, b, start=start)

    return solve


def _refined(
    head: LinearHead, params: Params, damping: float, operator: Operator, b: Vector
) -> tuple[Vector, Array, Array]:
    """The identity's answer, and what rounding left of the residual solved for again."""
    features, ridge = head.features, head.ridge + damping
    logits = features @ stacked(params)
    samples, ways = logits.shape
    curvature = jax.hessian(head.support_loss)(logits).reshape(samples * ways, samples * ways)
    gram = jnp.kron(features @ features.T, jnp.eye(ways, dtype=features.dtype))
    core = ridge * jnp.eye(samples * ways, dtype=gram.dtype) + curvature @ gram
    factors = jax.scipy.linalg.lu_factor(core)

    def inverse(b: Array) -> Array:
        right = curvature @ (features @ b).reshape(-1)
        inner = jax.scipy.linalg.lu_solve(factors, right).reshape(samples, ways)
        outer: Array = (b - features.T @ inner) / ridge
        return outer

    x = inverse(stacked(b))
    for _ in range(REFINEMENTS):
        image = stacked(operator.product(unstacked(x, b)))
        x += inverse(stacked(b) - image)
    return unstacked(x, b), head.ridge, jnp.int32(REFINEMENTS)
