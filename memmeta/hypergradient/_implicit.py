r"""The implicit hypergradient: the last inner iterate, one linear solve, one mixed product."""

from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array

from memmeta._shared import checks, trees
from memmeta._shared.readable import named
from memmeta.certificate._bound import Measured
from memmeta.certificate._certify import certify_measured
from memmeta.certificate._estimate import (
    Residuals,
    given_curvature,
    residuals,
    residuals_with_error,
)
from memmeta.hypergradient import _on_demand
from memmeta.hypergradient._estimator import (
    TaskGradient,
    TaskStart,
    drawn,
    per_task,
    report_of_loop,
)
from memmeta.hypergradient._recycled import combined, remembered
from memmeta.hypergradient._seam import Estimator
from memmeta.hypergradient._structural_zeros import losses_seen
from memmeta.inner import InnerLoop
from memmeta.inner._views import View
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

SYSTEM = 2**31 - 4
"""What keeps the draws of the linear system apart from those of the inner steps."""


@named
def implicit(
    solver: LinearSolver | None = None,
    *,
    tolerance: float | Array | None = None,
    view: View | None = None,
    estimate_error: bool = True,
    products: Matrix = "hessian",
    recycled: int = 1,
) -> Estimator:
    r"""The hypergradient by the implicit function theorem; memory does not grow with K.

    $$\nabla F_i = \partial_c f_i - \partial^2_{c\phi} g_i \, v_i, \qquad
      [\partial^2_{\phi\phi} g_i] \, v_i = \partial_\phi f_i \quad\text{at } \hat\phi = \phi_K$$

    in the context c, pulled back through `embed` by `per_task`. Only φ_K is kept of the inner loop.

    Args:
        solver: of the linear system, see `memmeta.linear_solve`. None: `cg(20)`; with a tolerance
            `cg(100, tolerance=0.0, absolute_tolerance=1.0)`, for whose sake each system comes in
            units of the residual that is allowed. Others do what they do, in every round.
        tolerance: how wrong the hypergradient of a task may be, as a share of its length: rounds of
            inner steps and of one linear solve, each from where the last one ended and only as far
            as that says is needed, until ‖∇̂F_i − ∇F_i‖ ≤ tolerance · ‖∇F_i‖, in the context, by
            the figure that `error_estimate` reports; or until `inner.steps` are made. It is an
            estimate: the bound is `error_bound`. May be a traced scalar, to be tightened with the
            outer iterations by `scheduled`. None makes all inner steps and one solve.
        view: (context, key, step) -> what the linear system and the outer loss see, with the number
            of the last inner step: one draw a meta-step, so that the system is symmetric; such as
            `memmeta.inner.minibatch`. Cotangents go back through it. The figures of the report are
            then of that draw. None: all of the context.
        estimate_error: whether the report has an `error_estimate`. It costs another gradient of f
            and another mixed product: little for a head on cached features, a noticeable share of
            the time where a whole network adapts.
        products: "gauss_newton" solves the system of the Gauss–Newton matrix Jᵀ ∂²ℓ J + ρ I in
            place of the Hessian's, for networks whose Hessian is indefinite: well posed wherever
            ρ > 0, but no longer the hypergradient at the inner solution, except where the outputs
            are linear in φ or the loss ℓ has no slope. Then `linear_residual` and
            `smallest_curvature` are those of that matrix, and the error figures need
            `Problem.strong_convexity`. Needs a `Structure.composite` or a `Structure.head`.

        recycled: under `memmeta.meta.WarmStart`, how many of a member's last v̂ the linear solve
            starts from: 1 from the last one, more from their combination nearest to the solution in
            the norm of the matrix. Each costs a product, counted in `linear_iterations`, and is
            kept with the member. Worth it where members come back and θ moves slowly.

    Returns:
        The estimator.

    Raises:
        ValueError: `products` is neither; `recycled` is no whole number, 1 or more; `tolerance` is
            not positive, or comes together with "gauss_newton", a `view` or several `recycled`, or
            (when traced) with `InnerLoop(tolerance=...)`; (when traced) the problem has no
            `structure.composite`.

    Source: Yang, Ma, Yu (AAAI 2025), Algorithm 1; the theorem in this form, and the tolerance:
    Pedregosa (ICML 2016), Algorithm 1.

    Example:
        >>> from memmeta.linear_solve import cg
        >>> estimator = implicit(solver=cg(steps=20))
    """

    checks.one_of("products", products, get_args(Matrix))
    checks.count("recycled", recycled)
    if tolerance is not None:
        _check_alone(tolerance, products, view, recycled)
        on_demand = partial(_on_demand.hypergradient, tolerance, solver or _on_demand.SOLVER)
        return per_task(on_demand, "implicit", losses_seen)
    solve = solver or cg(20)
    newton = products == "gauss_newton"

    def rule(problem: Problem, inner: InnerLoop, begin: TaskStart) -> TaskGradient:
        whole = begin.context.whole
        state = inner.run(problem, begin.params, whole, begin.key, begin.earlier)
        params = state.params
        # draws of its own: φ has just been moved by those of the inner loop
        own_key = jax.random.fold_in(begin.key, SYSTEM)
        number = jnp.maximum(state.steps - 1, 0)
        seen, pull_back_view = drawn(view, begin.context, own_key, number)
        context = seen.whole
        if newton:
            product = gauss_newton_product(problem, params, context)
        else:
            _, product = hessian_product(problem, params, context)

        def outer_loss(params: Params, active: Context) -> tuple[Scalar, Any]:
            return problem.outer_loss(params, seen.at(active))

        arguments = (params, seen.active)
        loss, pull_back, aux = jax.vjp(outer_loss, *arguments, has_aux=True)
        outer = pull_back(jnp.ones_like(loss))
        where = {"problem": problem, "params": params, "context": context}
        guess, made = begin.guess, 0
        if recycled > 1 and guess is not None:
            guess, made = combined(product, outer[0], guess), recycled
        solution = solve(product, outer[0], **where, start=guess)
        # XLA (jax 0.10.2) would otherwise start the mixed product before the solve has ended, and
        # hold the intermediate values of both at once. On a CPU it drops barriers before it orders
        # the program: there φ̂ waits for the solver's count of products, which is never below 0.
        params, value = jax.lax.optimization_barrier((params, solution.value))
        params = trees.where(solution.iterations < 0, value, params)
        solution = solution._replace(value=value)

        # a curvature of Gauss–Newton's matrix bounds nothing of the Hessian
        known = not newton or problem.strong_convexity is not None
        estimating = estimate_error and begin.wanted.errors and known
        here, estimate = _residuals(problem, params, solution, outer, seen, estimating)
        report = report_of_loop(state)._replace(
            linear_residual=solution.residual if newton else _share(here.params, outer[0]),
            linear_iterations=(solution.iterations + made).astype(state.gradient_norm.dtype),
            linear_status=jnp.asarray(solution.status, state.gradient_norm.dtype),
            smallest_curvature=solution.curvature,
            error_estimate=estimate,
        )
        if problem.certifiable and begin.wanted.errors:
            measured = Measured(trees.norm(here.inner), trees.norm(here.params), solution.value)
            bound = certify_measured(problem, params, measured, begin.context)
            report = report._replace(error_bound=bound.total)
        context_bar = pull_back_view(here.context)
        kept = solution.value
        if recycled > 1:
            kept = remembered(begin.guess, kept, recycled)
        return TaskGradient(loss, aux, context_bar, None, report, state, kept)

    return per_task(rule, "implicit", losses_seen)


def _check_alone(
    tolerance: float | Array, products: Matrix, view: View | None, recycled: int
) -> None:
    """Refuse a tolerance that is not positive, and what has no error to be held to it."""
    if not isinstance(tolerance, jax.core.Tracer):
        checks.positive("tolerance", jnp.asarray(tolerance).item())
    for name, holds in (
        ("products='gauss_newton'", products == "gauss_newton"),
        ("a view", view is not None),
    ):
        if holds:
            raise ValueError(
                f"tolerance: expected None with {name}, found {tolerance!r}: no certificate bounds "
                "what that leaves out. Leave one of them out."
            )
    if recycled > 1:
        raise ValueError(
            f"recycled: expected 1 with a tolerance, whose rounds start from the last v̂ alone, "
            f"found {recycled}. Leave one of them out."
        )


def _share(residual: Params, right: Params) -> Scalar:
    """‖r‖ / ‖∂_φ f‖, from the pass that the mixed product takes anyway; 0 where there is no f."""
    norm = trees.norm(right)
    share = trees.norm(residual) / jnp.where(norm > 0, norm, 1)
    return jnp.where(norm == 0, 0, jnp.where(jnp.isnan(share), jnp.inf, share))


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
