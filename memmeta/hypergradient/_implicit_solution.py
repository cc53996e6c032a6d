r"""The inner solution as an ordinary differentiable function."""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from memmeta._shared import checks, trees
from memmeta._shared.readable import named
from memmeta.hypergradient._estimator import report_of_loop
from memmeta.hypergradient._fixed_point import Point, moving, point_of, step_map
from memmeta.hypergradient._seam import Report
from memmeta.inner import InnerLoop
from memmeta.inner._loop import widened
from memmeta.linear_solve import LinearSolver, cg, gmres
from memmeta.problem import Context, Params, Problem, Scalar, SplitContext

Equation: TypeAlias = Literal["minimum", "fixed_point"]


@named
def implicit_solution(
    inner_loss: Callable[[Params, Context], Scalar],
    inner: InnerLoop = InnerLoop(),
    solver: LinearSolver | None = None,
    *,
    of: Equation = "minimum",
    with_report: bool = False,
) -> Callable[[Params, Context], Any]:
    r"""φ*(c) = argmin_φ g(φ, c), differentiable any number of times, in both modes.

    $$d\phi^* = -[\partial^2_{\phi\phi} g]^{-1} \, \partial^2_{\phi c} g \; dc$$

    or, `of` a fixed point φ* = T(φ*, c) of the inner solver's own step T,
    $$d\phi^* = [I - \partial_\phi T]^{-1} \, \partial_c T \; dc$$

    One rule serves `jax.grad`, `jvp`, `jacfwd`, `jacrev`, `hessian`, `vmap`, `jit`, `lax.scan` and
    `shard_map` (with `check_vma=False`: jax 0.10.2 refuses loops whose carry starts as a constant).
    Nothing of the inner loop is stored: memory does not grow with its steps. The derivative by the
    start is zero, as it is for an exact solution. The first rule holds at a minimiser of
    `inner_loss`: not where a constraint is active, and not where the inner optimiser decays
    weights. The second holds there too, see `fixed_point`. `with_report` tells how far the loop
    came, the estimators `implicit` and `fixed_point` have residuals too. Of a fixed point, reverse
    mode differentiates last: a Hessian is `jacfwd` or `jacrev` of `jacfwd` (jax 0.10.2 transposes a
    solve of a system that is not symmetric, but does not differentiate what comes of it).

    Args:
        inner_loss: g, a function of (φ, context).
        inner: the inner loop. Differentiate n times only if it converges: the rule holds at φ*.
        solver: of the linear system of each derivative, see `memmeta.linear_solve`. None: `cg(20)`
            for a minimum, `gmres(20)` for a fixed point, whose system is not symmetric.
        of: the equation that is differentiated, "minimum" or "fixed_point".
        with_report: whether the function returns (φ̂, `Report`) instead, with the figures of the
            inner loop.

    Returns:
        (φ₀, context) -> φ̂, like φ₀. Integer and PRNG-key leaves of both are passed through.

    Raises:
        ValueError: `of` is neither.

    Example:
        >>> solution = implicit_solution(lambda phi, c: 0.5 * jnp.sum((phi - c**2) ** 2))
        >>> jacobian = jax.jacrev(solution, argnums=1)(jnp.zeros(1), jnp.array([3.0]))
        >>> round(float(jacobian[0, 0]), 4)
        6.0
    """
    checks.one_of("of", of, get_args(Equation))
    if solver is None:
        solver = cg(20) if of == "minimum" else gmres(20)
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
    ) -> tuple[Point, Any, Report]:
        wide_problem, wide, _ = widened(problem, trees.merge(floats, others))
        context = trees.merge(active, passive)
        state = inner.run(wide_problem, wide, context, jax.random.key(0))
        if of == "minimum":
            return Point(state.params, None), None, report_of_loop(state)
        moved = moving(wide_problem, inner, state, context, jax.random.key(0))
        point, rest = point_of(state, moved)
        return point, rest, report_of_loop(state)

    @solve.defjvp
    def solve_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
        floats, others, active, passive = primals
        here, _, _ = widened(problem, trees.merge(floats, others))
        point, rest, report = solve(*primals)
        context = SplitContext(active, passive)
        where: dict[str, Any] = {}

        if of == "minimum":
            where = {"problem": here, "params": point.params, "context": context.whole}

            def equation(point: Point, active: Context) -> Point:
                slope = jax.grad(here.inner_loss)(point.params, context.at(active))
                return Point(slope, None)

            def inverse(product: Callable[..., Any], b: Point) -> Point:
                inside = lambda x: product(Point(x, None)).params  # noqa: E731
                return Point(solver(inside, b.params, **where).value, None)
        else:
            step = step_map(here, inner, rest, jax.random.key(0))

            def equation(point: Point, active: Context) -> Point:
                moved = step(point, context.at(active))
                left: Point = jax.tree.map(jnp.subtract, point, moved)
                return left

            def inverse(product: Callable[..., Any], b: Point) -> Point:
                found: Point = solver(product, b).value
                return found

        def product(vector: Point) -> Point:
            image: Point = jax.jvp(lambda z: equation(z, active), (point,), (vector,))[1]
            return image

        _, change = jax.jvp(lambda a: equation(point, a), (active,), (tangents[2],))
        right = jax.tree.map(jnp.negative, change)
        symmetric = of == "minimum"
        transposed = None if symmetric else inverse
        moved = jax.lax.custom_linear_solve(product, right, inverse, transposed, symmetric)
        still = jax.tree.map(_no_tangent, (rest, report))
        return (point, rest, report), (moved, *still)

    def solution(params: Params, context: Context) -> Any:
        floats, others = trees.split_inexact(params)
        active, passive = trees.split_inexact(context)
        point, _, report = solve(floats, others, active, passive)
        solved = widened(problem, params)[2](point.params)
        return (solved, report) if with_report else solved

    return solution


def _no_tangent(leaf: Array) -> Any:
    if trees.is_inexact(leaf):
        return jnp.zeros_like(leaf)
    return np.zeros(leaf.shape, jax.dtypes.float0)
