r"""Inner steps and linear solves in turn, until the error is at most a share of the hypergradient.

What is left of either is proportional to what it adds to the error, so each round knows from the
last how far it has to go:

    ‖∇_φ g‖ ← ‖∇_φ g‖ · (its share of the error allowed) / (its part of the error),   ‖r‖ likewise

and a few rounds are enough, whatever the tolerance.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from memmeta._shared import trees
from memmeta.certificate._bound import Measured
from memmeta.certificate._certify import certify_measured
from memmeta.certificate._estimate import given_curvature, residuals_with_error
from memmeta.hypergradient._estimator import TaskGradient, TaskStart, report_of_loop
from memmeta.inner import InnerLoop, InnerState
from memmeta.linear_solve import LinearSolver, cg
from memmeta.linear_solve._solution import Product, dot, scaled
from memmeta.problem import Context, Params, Problem, Scalar, hessian_product, outer_gradients

SOLVER = cg(100, tolerance=0.0, absolute_tolerance=1.0)
"""Stops where a round has asked it to, since the systems are in units of the residual allowed."""

INNER, LINEAR = 0.6, 0.2
"""Shares of the error allowed that a round aims at; the rest is for what is not proportional."""

AT_ONCE = 0.1
"""No round goes further down than by this: its figures are of a point that is not near enough."""

ROUNDS = 20
"""At most so many; by `AT_ONCE` it takes no more to any accuracy there is."""


class Round(NamedTuple):
    """What one task has after a number of rounds.

    Attributes:
        inner: the state of the inner loop.
        solution: v̂.
        context: ∂_c f − ∂²_cφ g v̂, the hypergradient.
        by_inner, by_linear: the two parts of its estimated error.
        residual: ‖r‖ / ‖∂_φ f‖.
        curvature: the smallest that the solver has met since it last met a negative one.
        products: of second derivatives made, those of the estimates included.
        rounds: made so far.
        status: of the last solve.
        wanted: of the next round, ‖∇_φ g‖ and ‖r‖ / ‖∂_φ f‖.
    """

    inner: InnerState
    solution: Params
    context: Context
    by_inner: Scalar
    by_linear: Scalar
    residual: Scalar
    curvature: Scalar
    products: Int32[Array, ""]
    rounds: Int32[Array, ""]
    status: Int32[Array, ""]
    wanted: tuple[Scalar, Scalar]


def until(
    tolerance: float | Float[Array, ""],
    problem: Problem,
    inner: InnerLoop,
    solver: LinearSolver,
    begin: TaskStart,
) -> Round:
    r"""Rounds until the estimate of ‖∇̂F_i − ∇F_i‖ is at most ε ‖∇F_i‖.

    Ends, too, when `inner.steps` are made and the linear system is solved as well as was asked.
    """
    split, context = begin.context, begin.context.whole

    def allowed(found: Context) -> Scalar:
        # e ≤ ε (‖∇̂F‖ − e), and ‖∇F‖ is at least what stands in the brackets
        return tolerance / (1 + tolerance) * trees.norm(found)

    def unfinished(last: Round) -> Bool[Array, ""]:
        most = allowed(last.context)
        # comparisons are False for NaN: steps are spent, not saved
        reached = last.by_inner + last.by_linear <= most
        possible = last.inner.steps - last.inner.before < inner.steps
        possible |= ~(last.by_linear <= LINEAR * most)
        return ~reached & possible & (last.rounds < ROUNDS)

    def one_round(last: Round) -> Round:
        state = inner.until(problem, last.inner, context, begin.key, last.wanted[0])
        params, norm = state.params, state.gradient_norm
        gradient, product = hessian_product(problem, params, context)
        outer = outer_gradients(problem, params, split)
        unit = last.wanted[1] * trees.norm(outer[0])
        unit = jnp.where(unit > 0, unit, 1)
        where = {"problem": problem, "params": params, "context": context}
        guess = scaled(1 / unit, last.solution)
        found = solver(product, scaled(1 / unit, outer[0]), **where, start=guess)
        solution = scaled(unit, found.value)

        met = found.curvature
        curvature = jnp.where(last.curvature > 0, jnp.minimum(last.curvature, met), met)
        made = found.products + 2
        if problem.strong_convexity is not None:
            mu = given_curvature(problem, context, curvature)
        else:
            # what is left of ∇_φ g lies along the smallest curvatures, if anything does
            mu, made = jnp.minimum(curvature, _along(gradient, product)), made + 1
        here, error = residuals_with_error(problem, params, solution, outer, split, mu)
        most = allowed(here.context)
        wanted = (
            norm * _shrunk(INNER * most, error.inner),
            found.residual * _shrunk(LINEAR * most, error.linear),
        )
        following = Round(
            state,
            solution,
            here.context,
            error.inner,
            error.linear,
            found.residual,
            curvature,
            last.products + made,
            last.rounds + 1,
            jnp.asarray(found.status),
            wanted,
        )
        kept: Round = jax.tree.map(lambda new, old: new.astype(old.dtype), following, last)
        return kept

    state = inner.start(problem, begin.params, context, begin.earlier)
    # in a life that goes on, the slope that it began with, unless it began at a minimum
    slope = trees.norm(jax.grad(problem.inner_loss)(begin.params, context))
    slope = jnp.where(state.before > 0, jnp.maximum(slope, state.first_gradient_norm), slope)
    unknown = jnp.full_like(state.gradient_norm, jnp.inf)
    share = jnp.minimum(jnp.asarray(tolerance, unknown.dtype), 0.5)
    none = jax.tree.map(jnp.zeros_like, begin.params)
    first = Round(
        state,
        none if begin.guess is None else begin.guess,
        jax.tree.map(jnp.zeros_like, begin.context.active),
        *(unknown, unknown, unknown, unknown),
        *(jnp.int32(0), jnp.int32(0), jnp.int32(0)),
        (share * slope.astype(unknown.dtype), share),
    )
    return jax.lax.while_loop(unfinished, one_round, first)


def _along(direction: Params, product: Product) -> Scalar:
    """uᵀA u / uᵀu; infinite where u = 0."""
    square = dot(direction, direction)
    quotient = dot(direction, product(direction)) / jnp.where(square > 0, square, 1)
    return jnp.where(square > 0, quotient, jnp.inf)


def _shrunk(allowed: Scalar, part: Scalar) -> Scalar:
    """allowed / part, between `AT_ONCE` and 1; `AT_ONCE` where the part is not known."""
    known = jnp.isfinite(part) & (part > 0)
    share = jnp.clip(allowed / jnp.where(known, part, 1), AT_ONCE, 1)
    return jnp.where(part == 0, 1, jnp.where(known, share, AT_ONCE))


def hypergradient(
    tolerance: float | Float[Array, ""],
    solver: LinearSolver,
    problem: Problem,
    inner: InnerLoop,
    begin: TaskStart,
) -> TaskGradient:
    """The rule of `implicit(tolerance=...)` for one task."""
    if inner.tolerance is not None:
        raise ValueError(
            "tolerance: expected None in the rounds of implicit(tolerance=...), which say "
            f"themselves when to stop, found InnerLoop(tolerance={inner.tolerance}). Leave it out."
        )
    last = until(tolerance, problem, inner, solver, begin)
    params, context = last.inner.params, begin.context.whole
    loss, aux = problem.outer_loss(params, context)
    report = report_of_loop(last.inner)._replace(
        linear_residual=last.residual,
        linear_iterations=last.products.astype(last.residual.dtype),
        linear_status=last.status.astype(last.residual.dtype),
        smallest_curvature=last.curvature,
    )
    if begin.wanted.errors:
        report = report._replace(error_estimate=last.by_inner + last.by_linear)
        if problem.certifiable:
            gradient = trees.norm(jax.grad(problem.inner_loss)(params, context))
            size = trees.norm(outer_gradients(problem, params, begin.context)[0])
            measured = Measured(gradient, last.residual * size, last.solution)
            bound = certify_measured(problem, params, measured, begin.context)
            report = report._replace(error_bound=bound.total)
    return TaskGradient(loss, aux, last.context, None, report, last.inner, last.solution)
