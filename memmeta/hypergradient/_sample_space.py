r"""The whole inner loop of a linear head in the space of the support samples.

Gradient steps keep the head in Φ = a Φ₀ + X̃ᵀA, so that a and A [support, ways] are its whole state:

    logits of the support  a X̃Φ₀ + X̃X̃ᵀ A           logits of the query  a X̃_q Φ₀ + X̃_q X̃ᵀ A
    ∇_Φ g = (ρ a) Φ₀ + X̃ᵀ (R + ρ A)                  R = ∂ℓ/∂logits, ρ the ridge

The number of features appears in the Gram matrices only.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from memmeta._shared import checks, trees
from memmeta._shared.readable import named
from memmeta.certificate._estimate import error_of_given
from memmeta.hypergradient._estimator import TaskGradient, TaskStart, per_task, report_of_loop
from memmeta.hypergradient._seam import Estimator
from memmeta.hypergradient._structural_zeros import loop_seen, losses_seen
from memmeta.hypergradient._unrolled import has_known_curvature
from memmeta.inner import InnerLoop, InnerState
from memmeta.linear_solve import LinearSolution, make_solver
from memmeta.linear_solve._solution import Operator, dot
from memmeta.problem import LinearHead, Params, Problem, Scalar, stacked, unstacked

Aim: TypeAlias = Literal["steps", "solution"]
WIDTH = 256
"""Tangents carried at once: memory against the number of passes."""


class Coefficients(NamedTuple):
    """The head's state: Φ = start · Φ₀ + X̃ᵀ samples."""

    start: Float[Array, ""]
    samples: Float[Array, "support ways"]


class Support(NamedTuple):
    """What the inner loop sees: X̃X̃ᵀ, X̃Φ₀, ‖Φ₀‖² and the ridge."""

    gram: Float[Array, "support support"]
    logits: Float[Array, "support ways"]
    square: Float[Array, ""]
    ridge: Float[Array, ""]


class Query(NamedTuple):
    """What the outer loss sees: X̃_q X̃ᵀ and X̃_q Φ₀."""

    gram: Float[Array, "query support"]
    logits: Float[Array, "query ways"]


@named
def sample_space(differentiate: Aim = "steps", *, estimate_error: bool = True) -> Estimator:
    r"""Run and differentiate a linear head's inner loop on (support × ways) + 1 numbers.

    "steps" is the exact gradient of the loop as it is run, by forward accumulation: memory grows
    neither with the number of steps nor with that of features. "solution" is the implicit rule

    $$\nabla F_i = \partial_s f_i - \lambda^\top \partial_s r, \qquad
      (\partial_\alpha r)^\top \lambda = \partial_\alpha f_i$$

    for α = (a, A), r(α, s) = (ρ a, R + ρ A) and s the Gram matrices, by one dense solve.

    The inner solver sees r as its gradient, which gives the steps it would make in Φ whenever
    these are linear combinations of gradients: `gradient_descent`, `accelerated`, `optax.sgd` with
    or without momentum. Newton's method is `newton(None)`. Solvers that scale each coordinate, like
    Adam, would make other steps here than in Φ.

    Args:
        differentiate: "steps" or "solution".
        estimate_error: whether the report has an `error_estimate`. It costs two mixed products and
            two gradients of f on the features and, for "steps", the dense solve of "solution".

    Returns:
        The estimator.

    Raises:
        ValueError: `differentiate` is neither; (when traced) the problem has no `structure.head`
            or no `smoothness`.

    Source: forward accumulation in this space: Deleu et al., "Continuous-Time Meta-Learning with
    Forward Mode Differentiation" (COMLN, ICLR 2022), section 4.2, there for gradient flow.

    Example:
        >>> estimator = sample_space("steps")
    """
    checks.one_of("differentiate", differentiate, get_args(Aim))

    def rule(problem: Problem, inner: InnerLoop, begin: TaskStart) -> TaskGradient:
        describe, smoothness = problem.structure.head, problem.smoothness
        if describe is None or smoothness is None:
            raise ValueError(
                "sample_space: expected a problem with a `structure.head` and a `smoothness` (see "
                "memmeta.few_shot.softmax_problem), found None. For other inner losses use "
                "unrolled() or implicit()."
            )
        context = begin.context
        # the solver's state is in coefficients of features that change with θ: made anew
        fresh = replace(inner, solver=inner.steps_of._replace(carried=False))
        head = describe(context.whole)
        make_grams = lambda start, active: _grams(describe(context.at(active)), start)  # noqa: E731
        (support, query), pull_back = jax.vjp(make_grams, begin.params, context.active)
        reduced = _reduced_problem(head, smoothness(context.whole), support)
        state = _run(reduced, fresh, support, begin)
        loss, query_pull_back, aux = jax.vjp(reduced.outer_loss, state.params, query, has_aux=True)
        alpha_bar, query_bar = query_pull_back(jnp.ones_like(loss))
        _, transposed = jax.vjp(_field(head.support_loss), state.params, support)
        report = report_of_loop(state)
        wanted = estimate_error and begin.wanted.errors
        estimating = wanted and has_known_curvature(problem, inner)
        if estimating or differentiate == "solution":
            solution = _multipliers(transposed, alpha_bar, support)
        if differentiate == "solution":
            support_bar = jax.tree.map(jnp.negative, transposed(solution.value)[1])
            report = report._replace(
                linear_residual=solution.residual, smallest_curvature=solution.curvature
            )
        else:
            support_bar = _through_steps(reduced, fresh, alpha_bar, support, begin)
        start_bar, context_bar = pull_back((support_bar, query_bar))
        if estimating:
            adapted = _in_parameters(
                head, begin.params, state.params, solution.value, support, query
            )
            error, _ = error_of_given(problem, *adapted, context_bar, context)
            report = report._replace(error_estimate=error)
        params = unstacked(_head(head, begin.params, state.params), begin.params)
        found = state._replace(params=params, solver=None)
        return TaskGradient(loss, aux, context_bar, start_bar, report, found)

    seen = losses_seen if differentiate == "solution" else loop_seen
    return per_task(rule, "sample_space", seen)


def _grams(head: LinearHead, start: Params) -> tuple[Support, Query]:
    phi = stacked(start)
    x, q = head.features, head.query_features
    return Support(x @ x.T, x @ phi, jnp.sum(phi**2), head.ridge), Query(q @ x.T, q @ phi)


def _logits(alpha: Coefficients, grams: Support | Query) -> Array:
    return alpha.start * grams.logits + grams.gram @ alpha.samples


def _square(alpha: Coefficients, support: Support) -> Scalar:
    """‖Φ‖²."""
    cross = 2 * alpha.start * jnp.sum(alpha.samples * support.logits)
    own = jnp.sum(alpha.samples * (support.gram @ alpha.samples))
    return alpha.start**2 * support.square + cross + own


def _first(support: Support) -> Coefficients:
    return Coefficients(jnp.ones_like(support.ridge), jnp.zeros_like(support.logits))


def _field(loss: Callable[[Array], Scalar]) -> Callable[[Coefficients, Support], Coefficients]:
    """r(α, s): the coefficients of ∇_Φ g."""

    def field(alpha: Coefficients, support: Support) -> Coefficients:
        slope = jax.grad(loss)(_logits(alpha, support))
        return Coefficients(support.ridge * alpha.start, slope + support.ridge * alpha.samples)

    return field


def _reduced_problem(head: LinearHead, smoothness: Scalar, support: Support) -> Problem:
    """g as a function of the coefficients, with r for its gradient."""
    loss, values = trees.hoisted(head.support_loss, support.logits)

    @jax.custom_jvp
    def ruled(values: list[Any], alpha: Coefficients, support: Support) -> Scalar:
        fit: Array = loss(values, _logits(alpha, support))
        return fit + 0.5 * support.ridge * _square(alpha, support)

    @ruled.defjvp
    def ruled_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Scalar, Scalar]:
        values, alpha, support = primals
        slope = _field(partial(loss, values))(alpha, support)
        return ruled(*primals), dot(slope, tangents[1])

    return Problem(
        embed=lambda theta, batch: batch,
        inner_loss=lambda alpha, support: ruled(values, alpha, support),
        outer_loss=lambda alpha, query: head.query_loss(_logits(alpha, query)),
        init=lambda theta: theta,
        smoothness=lambda support: jax.lax.stop_gradient(smoothness),
        strong_convexity=lambda support: support.ridge,
    )


def _run(reduced: Problem, inner: InnerLoop, support: Support, begin: TaskStart) -> InnerState:
    """Run the loop; the reported norm is that of ∇_Φ g, where the solver knows that of r alone."""
    arguments = (reduced, _first(support), support, begin.key, begin.earlier)
    if inner.steps == 0:
        return inner.run(*arguments)
    before = replace(inner, steps=inner.steps - 1).run(*arguments)
    slope = jax.grad(reduced.inner_loss)(before.params, support)
    first_slope = jax.grad(reduced.inner_loss)(_first(support), support)
    # by rounding a square of a norm can come out below zero
    norms = [jnp.sqrt(jnp.maximum(_square(r, support), 0)) for r in (slope, first_slope)]
    last = replace(inner, tolerance=None)
    after = last.advance(reduced, before, support, begin.key, 1)
    return after._replace(gradient_norm=norms[0], first_gradient_norm=norms[1])


def _through_steps(
    reduced: Problem,
    inner: InnerLoop,
    alpha_bar: Coefficients,
    support: Support,
    begin: TaskStart,
) -> Support:
    """⟨ᾱ, ∂α_K/∂s⟩, coordinate by coordinate of s, by tangents carried along the loop."""
    flat, unravel = trees.ravel(support)

    def final(support: Support) -> Coefficients:
        arguments = (reduced, _first(support), support, begin.key, begin.earlier)
        params: Coefficients = inner.run(*arguments).params
        return params

    def one(index: Array) -> Scalar:
        tangent = unravel(jnp.zeros_like(flat).at[index].set(1))
        change = jax.jvp(final, (support,), (tangent,))[1]
        return dot(change, alpha_bar)

    along = jax.lax.map(one, jnp.arange(flat.size), batch_size=min(WIDTH, flat.size))
    cotangent: Support = unravel(along)
    return cotangent


def _multipliers(
    transposed: Callable[..., Any], alpha_bar: Coefficients, support: Support
) -> LinearSolution:
    """λ with (∂_α r)ᵀ λ = ᾱ, by a dense solve."""
    flat, unravel = trees.ravel(alpha_bar)
    rows = jax.vmap(lambda e: trees.ravel(transposed(unravel(e))[0])[0])(
        jnp.eye(flat.size, dtype=flat.dtype)
    )
    factors = jax.scipy.linalg.lu_factor(rows.T)

    def method(operator: Operator, b: Coefficients) -> tuple[Coefficients, Array, Array]:
        found = unravel(jax.scipy.linalg.lu_solve(factors, trees.ravel(b)[0]))
        return found, support.ridge, jnp.int32(flat.size)

    return make_solver(method)(lambda x: transposed(x)[0], alpha_bar)


def _in_parameters(
    head: LinearHead,
    start: Params,
    alpha: Coefficients,
    multipliers: Coefficients,
    support: Support,
    query: Query,
) -> tuple[Params, Params]:
    r"""Φ̂ and the v̂ of [∂²_ΦΦ g] v̂ = ∂_Φ f, from λ = (·, X̃ v̂).

    With H = ∂²ℓ/∂logits², ∂²_ΦΦ g = X̃ᵀ H X̃ + ρ I, so v̂ = (∂_Φ f − X̃ᵀ H λ) / ρ.
    """
    outer = jax.grad(lambda z: head.query_loss(z)[0])(_logits(alpha, query))
    slope = jax.grad(head.support_loss)
    image = jax.jvp(slope, (_logits(alpha, support),), (multipliers.samples,))[1]
    # infinite for a ridge of 0, and so is the estimate then
    v = (head.query_features.T @ outer - head.features.T @ image) / support.ridge
    return unstacked(_head(head, start, alpha), start), unstacked(v, start)


def _head(head: LinearHead, start: Params, alpha: Coefficients) -> Array:
    """Φ = a Φ₀ + X̃ᵀA."""
    return alpha.start * stacked(start) + head.features.T @ alpha.samples
