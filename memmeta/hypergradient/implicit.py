r"""The implicit hypergradient: the last inner iterate, one linear solve, one mixed product."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from memmeta import trees
from memmeta.certificate import Measured
from memmeta.hypergradient.error_estimate import Judged, given_curvature, judged, slopes
from memmeta.hypergradient.estimator import Estimator, TaskGradient, per_task
from memmeta.hypergradient.on_demand import error_bound, until
from memmeta.hypergradient.report import Report
from memmeta.hypergradient.structural_zeros import losses_seen
from memmeta.hypergradient.warm import Memory
from memmeta.inner import InnerLoop, InnerState, hessian_product
from memmeta.linear_solve import LinearSolution, LinearSolver, SolverAt, cg
from memmeta.problem import Context, Params, Problem


def implicit(
    solver: LinearSolver | SolverAt = cg(20),
    *,
    tolerance: float | Array | None = None,
    estimate_error: bool = True,
) -> Estimator:
    r"""The hypergradient by the implicit function theorem; memory does not grow with K.

    $$\nabla F_i = \partial_c f_i - \partial^2_{c\phi} g_i \, v_i, \qquad
      [\partial^2_{\phi\phi} g_i] \, v_i = \partial_\phi f_i \quad\text{at } \hat\phi = \phi_K$$

    in the context c, pulled back through `embed` by `per_task`. Only φ_K is kept of the inner loop.

    Args:
        solver: of the linear system, see `memmeta.linear_solve`.
        tolerance: how wrong the hypergradient of a task may be; inner steps and solves are spent
            in turn until its certificate says so, or `inner.steps` are made, see `on_demand`. May
            be a traced scalar, to be tightened with the outer iterations by `Scheduled`. None
            makes all inner steps and one solve.
        estimate_error: whether the report has an `error_estimate`. It costs another gradient of f
            and another mixed product: next to nothing for a head on cached features, a good part
            of the time where the whole network adapts. Without it the estimate is infinite.

    Returns:
        The estimator.

    Source: Yang, Ma, Yu (AAAI 2025), Algorithm 1; the theorem in this form, and the tolerance:
    Pedregosa (ICML 2016), Algorithm 1.

    Example:
        >>> from memmeta.linear_solve import cg
        >>> estimator = implicit(solver=cg(steps=20))
    """

    def rule(
        problem: Problem, inner: InnerLoop, start: Params | Memory, context: Context
    ) -> TaskGradient:
        warm = isinstance(start, Memory)
        start, guess = start if warm else (start, None)
        if tolerance is None:
            state = inner.run(problem, start, context)
        else:
            state, guess, _ = until(tolerance, problem, inner, solver, (start, guess), context)
        params = state.params
        _, product = hessian_product(problem, params, context)
        loss, pull_back, aux = jax.vjp(problem.outer_loss, params, context, has_aux=True)
        outer = pull_back(jnp.ones_like(loss))
        solve = solver.make(problem, params, context) if isinstance(solver, SolverAt) else solver
        # The barrier lets go of all that the products kept before the next pass begins.
        solution = jax.lax.optimization_barrier(solve(product, outer[0], guess))
        found = _looked_at(problem, params, solution, outer, context, estimate_error)
        report = _report(problem, state, solution, found, context)
        memory = Memory(params, solution.value) if warm else None
        return TaskGradient(loss, aux, found.here.context, None, report, memory)

    return per_task(rule, "implicit", losses_seen, remembers=True)


def _looked_at(
    problem: Problem,
    params: Params,
    solution: LinearSolution,
    outer: tuple[Params, Context],
    context: Context,
    estimate_error: bool,
) -> Judged:
    """The implicit hypergradient, and its error where asked for."""
    curvature = solution.curvature
    if not estimate_error:
        here = slopes(problem, params, solution.value, outer, context)
        return Judged(here, jnp.full_like(curvature, jnp.inf))
    if problem.strong_convexity is not None:
        curvature = given_curvature(problem, context, curvature)
    return judged(problem, params, solution.value, outer, context, curvature)


def _report(
    problem: Problem, state: InnerState, solution: LinearSolution, found: Judged, context: Context
) -> Report:
    here = found.here
    measured = Measured(trees.norm(here.inner), trees.norm(here.params), solution.value)
    dtype = state.gradient_norm.dtype
    return Report(
        inner_gradient_norm=measured.gradient,
        inner_steps=state.steps.astype(dtype),
        linear_residual=solution.residual,
        smallest_curvature=solution.curvature,
        linear_iterations=solution.iterations.astype(dtype),
        error_estimate=found.estimate,
        standard_error=jnp.zeros_like(measured.gradient),
        error_bound=error_bound(problem, state.params, measured, context),
    )
