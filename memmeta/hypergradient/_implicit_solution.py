r"""The inner solution as an ordinary differentiable function."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from memmeta import _trees as trees
from memmeta.hypergradient._estimator import report_of_loop
from memmeta.hypergradient._seam import Report
from memmeta.inner import InnerLoop
from memmeta.inner._loop import widened
from memmeta.linear_solve import LinearSolver, cg
from memmeta.problem import Context, Params, Problem, Scalar


def implicit_solution(
    inner_loss: Callable[[Params, Context], Scalar],
    inner: InnerLoop = InnerLoop(),
    solver: LinearSolver = cg(20),
    *,
    with_report: bool = False,
) -> Callable[[Params, Context], Any]:
    r"""φ*(c) = argmin_φ g(φ, c), differentiable any number of times, in both modes.

    $$d\phi^* = -[\partial^2_{\phi\phi} g]^{-1} \, \partial^2_{\phi c} g \; dc$$

    One rule serves `jax.grad`, `jvp`, `jacfwd`, `jacrev`, `hessian`, `vmap`, `jit`, `lax.scan` and
    `shard_map` (with `check_vma=False`: jax 0.10.2 refuses loops whose carry starts as a constant).
    Nothing of the inner loop is stored: memory does not grow with its steps. The derivative by the
    start is zero, as it is for an exact solution. It holds at a minimiser of `inner_loss`: not
    where a constraint is active, and not where the inner optimiser decays weights; `with_report`
    tells how far the loop came, the estimator `implicit` has residuals and error estimates too.

    Args:
        inner_loss: g, a function of (φ, context).
        inner: the inner loop. Differentiate n times only if it converges: the rule holds at φ*.
        solver: of the linear system of each derivative, see `memmeta.linear_solve`.
        with_report: whether the function returns (φ̂, `Report`) instead, with the figures of the
            inner loop.

    Returns:
        (φ₀, context) -> φ̂, like φ₀. Integer and PRNG-key leaves of both are passed through.

    Example:
        >>> solution = implicit_solution(lambda phi, c: 0.5 * jnp.sum((phi - c**2) ** 2))
        >>> jacobian = jax.jacrev(solution, argnums=1)(jnp.zeros(1), jnp.array([3.0]))
        >>> round(float(jacobian[0, 0]), 4)
        6.0
    """
    problem = Problem(
        embed=lambda theta, batch: batch,
        inner_loss=inner_loss,
        outer_loss=lambda params, context: (inner_loss(params, context), {}),
        init=lambda theta: theta,
    )

    # custom_jvp with custom_linear_solve, and not custom_vjp: JAX transposes the linear solve
    # itself, so one rule gives grad, jvp, vmap and derivatives of any order. In its place
    # `jax.scipy.sparse.linalg.cg` breaks reverse mode (jax 0.10.2).
    @jax.custom_jvp
    def solve(
        floats: Params, others: Params, active: Context, passive: Context
    ) -> tuple[Params, Report]:
        wide_problem, wide, _ = widened(problem, trees.merge(floats, others))
        context = trees.merge(active, passive)
        state = inner.run(wide_problem, wide, context, jax.random.key(0))
        return state.params, report_of_loop(state)

    @solve.defjvp
    def solve_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
        floats, others, active, passive = primals
        here, _, _ = widened(problem, trees.merge(floats, others))
        params, report = solve(*primals)
        where = {"problem": here, "params": params, "context": trees.merge(active, passive)}

        def slope(params: Params, active: Context) -> Params:
            return jax.grad(here.inner_loss)(params, trees.merge(active, passive))

        def product(vector: Params) -> Params:
            return jax.jvp(lambda p: slope(p, active), (params,), (vector,))[1]

        def inverse(product: Callable[..., Any], b: Params) -> Params:
            return solver(product, b, **where).value

        _, change = jax.jvp(lambda a: slope(params, a), (active,), (tangents[2],))
        right = jax.tree.map(jnp.negative, change)
        moved = jax.lax.custom_linear_solve(product, right, inverse, symmetric=True)
        return (params, report), (moved, jax.tree.map(jnp.zeros_like, report))

    def solution(params: Params, context: Context) -> Any:
        floats, others = trees.split_inexact(params)
        active, passive = trees.split_inexact(context)
        solved, report = solve(floats, others, active, passive)
        solved = widened(problem, params)[2](solved)
        return (solved, report) if with_report else solved

    return solution
