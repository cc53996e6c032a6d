r"""The implicit hypergradient: the last inner iterate, one linear solve, one mixed product."""

from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array

from memmeta import _checks
from memmeta import _trees as trees
from memmeta.certificate._bound import Measured
from memmeta.certificate._certify import certify_measured
from memmeta.certificate._estimate import (
    Residuals,
    given_curvature,
    residuals,
    residuals_with_error,
)
from memmeta.hypergradient._estimator import TaskGradient, TaskStart, per_task, report_of_loop
from memmeta.hypergradient._on_demand import until
from memmeta.hypergradient._seam import Estimator, Memory
from memmeta.hypergradient._structural_zeros import losses_seen
from memmeta.inner import InnerLoop
from memmeta.linear_solve import LinearSolution, LinearSolver, cg
from memmeta.problem import (
    Context,
    Params,
    Problem,
    Scalar,
    SplitContext,
    gauss_newton_product,
    hessian_product,
)

Matrix: TypeAlias = Literal["hessian", "gauss_newton"]


def implicit(
    solver: LinearSolver = cg(20),
    *,
    tolerance: float | Array | None = None,
    estimate_error: bool = True,
    products: Matrix = "hessian",
) -> Estimator:
    r"""The hypergradient by the implicit function theorem; memory does not grow with K.

    $$\nabla F_i = \partial_c f_i - \partial^2_{c\phi} g_i \, v_i, \qquad
      [\partial^2_{\phi\phi} g_i] \, v_i = \partial_\phi f_i \quad\text{at } \hat\phi = \phi_K$$

    in the context c, pulled back through `embed` by `per_task`. Only φ_K is kept of the inner loop.

    Args:
        solver: of the linear system, see `memmeta.linear_solve`.
        tolerance: how wrong the hypergradient of a task may be; inner steps and solves are spent
            in turn: rounds of five inner steps and one linear solve, each from where the last one
            ended, until the certificate is at most this or `inner.steps` are made. May be a traced
            scalar, to be tightened with the outer iterations by `scheduled`. None makes all inner
            steps and one solve.
        estimate_error: whether the report has an `error_estimate`. It costs another gradient of f
            and another mixed product: little for a head on cached features, a noticeable share of
            the time where a whole network adapts.
        products: "gauss_newton" solves the system of the Gauss–Newton matrix Jᵀ ∂²ℓ J + ρ I in
            place of the Hessian's, for networks whose Hessian is indefinite: well posed wherever
            ρ > 0, but no longer the hypergradient at the inner solution, except where the outputs
            are linear in φ or the loss ℓ has no slope. Then `linear_residual` and
            `smallest_curvature` are those of that matrix, and the error figures need
            `Problem.strong_convexity`. Needs a `Structure.composite` or a `Structure.head`.

    Returns:
        The estimator.

    Raises:
        ValueError: `products` is neither; it is "gauss_newton" together with a `tolerance`; (when
            traced) the problem has no `structure.composite`.

    Source: Yang, Ma, Yu (AAAI 2025), Algorithm 1; the theorem in this form, and the tolerance:
    Pedregosa (ICML 2016), Algorithm 1.

    Example:
        >>> from memmeta.linear_solve import cg
        >>> estimator = implicit(solver=cg(steps=20))
    """

    _checks.one_of("products", products, get_args(Matrix))
    if products == "gauss_newton" and tolerance is not None:
        raise ValueError(
            f"tolerance: expected None with products='gauss_newton', found {tolerance!r}: no "
            "certificate bounds what that matrix leaves out. Leave one of them out."
        )
    newton = products == "gauss_newton"

    def rule(problem: Problem, inner: InnerLoop, begin: TaskStart) -> TaskGradient:
        context, guess = begin.context.whole, begin.guess
        if tolerance is None:
            state = inner.run(problem, begin.params, context, begin.key)
        else:
            state, guess, _ = until(tolerance, problem, inner, solver, begin)
        params = state.params
        if newton:
            product = gauss_newton_product(problem, params, context)
        else:
            _, product = hessian_product(problem, params, context)

        def outer_loss(params: Params, active: Context) -> tuple[Scalar, Any]:
            return problem.outer_loss(params, begin.context.at(active))

        arguments = (params, begin.context.active)
        loss, pull_back, aux = jax.vjp(outer_loss, *arguments, has_aux=True)
        outer = pull_back(jnp.ones_like(loss))
        where = {"problem": problem, "params": params, "context": context}
        # XLA (jax 0.10.2) would otherwise start the mixed product before the solve has ended, and
        # hold the intermediate values of both at once.
        solution = jax.lax.optimization_barrier(solver(product, outer[0], **where, start=guess))

        # a curvature of Gauss–Newton's matrix bounds nothing of the Hessian
        known = not newton or problem.strong_convexity is not None
        estimating = estimate_error and begin.wanted.errors and known
        here, estimate = _residuals(problem, params, solution, outer, begin.context, estimating)
        report = report_of_loop(state)._replace(
            linear_residual=solution.residual,
            linear_iterations=solution.iterations.astype(state.gradient_norm.dtype),
            smallest_curvature=solution.curvature,
            error_estimate=estimate,
        )
        if problem.certifiable and begin.wanted.errors:
            measured = Measured(trees.norm(here.inner), trees.norm(here.params), solution.value)
            bound = certify_measured(problem, params, measured, begin.context)
            report = report._replace(error_bound=bound.total)
        memory = Memory(params, solution.value)
        return TaskGradient(loss, aux, here.context, None, report, memory)

    return per_task(rule, "implicit", losses_seen, remembers=True)


def _residuals(
    problem: Problem,
    params: Params,
    solution: LinearSolution,
    outer: tuple[Params, Context],
    context: SplitContext,
    estimate_error: bool,
) -> tuple[Residuals, Scalar | None]:
    """The implicit hypergradient, and its error where asked for."""
    if not estimate_error:
        return residuals(problem, params, solution.value, outer, context), None
    curvature = solution.curvature
    if problem.strong_convexity is not None:
        curvature = given_curvature(problem, context.whole, curvature)
    here, error = residuals_with_error(problem, params, solution.value, outer, context, curvature)
    return here, error.total
