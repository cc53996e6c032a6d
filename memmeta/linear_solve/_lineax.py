"""Seams to lineax and optimistix, both ways; needs the extra `memmeta[lineax]`."""

from typing import Any

import jax
import jax.numpy as jnp

from memmeta._shared.readable import named
from memmeta.linear_solve._cg import cg
from memmeta.linear_solve._solution import (
    Found,
    LinearSolver,
    Operator,
    Vector,
    make_solver,
)
from memmeta.linear_solve._status import Status


@named
def from_lineax(solver: Any, *, tags: Any = (), damping: float = 0.0) -> LinearSolver:
    """Any lineax solver as one of memmeta's, its result translated into the `status`.

    Args:
        solver: a `lineax.AbstractLinearSolver`, such as `lineax.GMRES(rtol=1e-6, atol=1e-6)`.
        tags: what lineax may take for granted of A; `lineax.CG` needs
            `lineax.positive_semidefinite_tag`.
        damping: λ ≥ 0, to solve (A + λ I) x = b instead.

    Returns:
        The solver. Its `iterations` are lineax's steps, 0 where it counts none, and its `products`
        count one for each; it looks at no curvature.

    Raises:
        ImportError: lineax is not installed.
        ValueError: `damping` is negative or not finite.

    Example:
        >>> import lineax
        >>> solver = from_lineax(lineax.LU())
        >>> matrix = jnp.array([[0.0, 1.0], [-2.0, 0.0]])
        >>> found = solver(lambda x: matrix @ x, jnp.array([3.0, 4.0])).value
        >>> [round(float(x), 3) for x in found]
        [-2.0, 3.0]
    """
    import lineax

    results = lineax.RESULTS
    broken = (results.singular, results.breakdown, results.stagnation, results.conlim)

    def method(operator: Operator, b: Vector) -> Found:
        structure = jax.eval_shape(lambda: b)
        matrix = lineax.FunctionLinearOperator(operator.product, structure, tags)
        found = lineax.linear_solve(matrix, b, solver, throw=False)
        failed = jnp.any(jnp.stack([jnp.asarray(found.result == each) for each in broken]))
        bad = jnp.asarray(found.result == results.nonfinite_input)
        status = jnp.where(failed, jnp.int32(Status.BREAKDOWN), jnp.int32(Status.SOUND))
        status = jnp.where(bad, jnp.int32(Status.NOT_FINITE), status)
        steps = jnp.asarray(found.stats.get("num_steps", 0), jnp.int32)
        unknown = jnp.full((), jnp.inf, jax.tree.leaves(b)[0].dtype)
        return Found(found.value, unknown, steps, None, status)

    return make_solver(method, damping)


def optimistix_adjoint(solver: LinearSolver = cg(20)) -> Any:
    """The implicit rule for users of optimistix: its derivatives solved by a solver of memmeta's.

    Args:
        solver: of the linear system, see `memmeta.linear_solve`; `gmres()` where the Jacobian at
            the answer is not symmetric, as for `optimistix.root_find` and `fixed_point`.

    Returns:
        An `optimistix.ImplicitAdjoint` for the `adjoint` argument of `minimise`, `root_find`,
        `least_squares` and `fixed_point`.

    Raises:
        ImportError: optimistix is not installed.

    Example:
        >>> import optimistix
        >>> def solution(c):
        ...     solver = optimistix.BFGS(rtol=1e-6, atol=1e-6)
        ...     loss = lambda y, c: jnp.sum((y - c**2) ** 2)
        ...     adjoint = optimistix_adjoint(cg(5))
        ...     return optimistix.minimise(loss, solver, jnp.zeros(2), c, adjoint=adjoint).value
        >>> jacobian = jax.jacrev(solution)(jnp.array([1.0, 3.0]))
        >>> [round(float(x), 3) for x in jacobian.diagonal()]
        [2.0, 6.0]
    """
    import optimistix

    return optimistix.ImplicitAdjoint(linear_solver=_as_lineax(solver))


def _as_lineax(solver: LinearSolver) -> Any:
    import lineax

    class Solver(lineax.AbstractLinearSolver):  # type: ignore[misc]
        """One of memmeta's solvers, as lineax calls it; its state is the operator."""

        def init(self, operator: Any, options: Any) -> Any:
            return operator

        def compute(self, state: Any, vector: Any, options: Any) -> Any:
            found = solver(state.mv, vector)
            results = lineax.RESULTS
            sound = (found.status == Status.SOUND) & jnp.isfinite(found.residual)
            result = results.where(sound, results.successful, results.breakdown)
            return found.value, result, {"num_steps": found.iterations}

        def transpose(self, state: Any, options: Any) -> Any:
            return state.transpose(), options

        def conj(self, state: Any, options: Any) -> Any:
            return state, options

        def assume_full_rank(self) -> bool:
            return True

    return Solver()
