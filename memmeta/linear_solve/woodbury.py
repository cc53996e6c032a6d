"""The linear system of a linear head, solved in the space of the support samples."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from memmeta import linear_head
from memmeta.linear_solve.solution import LinearSolver, Operator, SolverAt, Vector, make_solver
from memmeta.problem import Context, Params, Problem

REFINEMENTS = 2


def woodbury(*, damping: float = 0.0) -> SolverAt:
    r"""Exact solve for a linear head by the Woodbury identity; needs a `Problem.head`.

    With Z = X̃ Φ the logits, H = ∂²ℓ/∂Z² and ρ the ridge,
    $$[\tilde X^\top H \tilde X + \rho I] x = b \;\Rightarrow\; x = \tfrac1\rho
      \big(b - \tilde X^\top (\rho I + H \tilde X \tilde X^\top)^{-1} H \tilde X b\big)$$

    A dense system of (support × ways) unknowns whatever the number of features. Followed by
    iterative refinement, so that a small ρ loses no digits to the subtraction.

    Args:
        damping: λ ≥ 0, added to the ridge; with a ridge of zero it must be positive.

    Returns:
        The solver, to be given to `implicit`.

    Raises:
        ValueError: (when traced) the problem has no `head`.

    Source: Woodbury (1950); for a ridge-regression head: Bertinetto et al. (ICLR 2019).

    Example:
        >>> import memmeta as mm
        >>> estimator = mm.hypergradient.implicit(solver=woodbury())
    """

    def make(problem: Problem, params: Params, context: Context) -> LinearSolver:
        if problem.head is None:
            raise ValueError(
                "woodbury: expected a problem with a `head` (see memmeta.linear_head."
                "softmax_problem), found head=None. For other inner losses use cg() or direct()."
            )
        head = problem.head(context)
        features, ridge = head.features, head.ridge + damping
        logits = features @ linear_head.stacked(params)
        samples, ways = logits.shape
        curvature = jax.hessian(head.support_loss)(logits).reshape(samples * ways, samples * ways)
        gram = jnp.kron(features @ features.T, jnp.eye(ways, dtype=features.dtype))
        core = ridge * jnp.eye(samples * ways, dtype=gram.dtype) + curvature @ gram
        factors = jax.scipy.linalg.lu_factor(core)

        def inverse(b: Array) -> Array:
            right = curvature @ (features @ b).reshape(-1)
            inner = jax.scipy.linalg.lu_solve(factors, right).reshape(samples, ways)
            return (b - features.T @ inner) / ridge

        def method(operator: Operator, b: Vector) -> tuple[Vector, Array, Array]:
            x = inverse(linear_head.stacked(b))
            for _ in range(REFINEMENTS):
                image = linear_head.stacked(operator.product(linear_head.unstacked(x, b)))
                x += inverse(linear_head.stacked(b) - image)
            return linear_head.unstacked(x, b), head.ridge, jnp.int32(REFINEMENTS)

        return make_solver(method, damping)

    return SolverAt(make)
