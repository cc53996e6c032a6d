"""Inner steps and linear solves in turn, until the certificate is at most a tolerance."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from memmeta._shared import trees
from memmeta.certificate import estimate
from memmeta.certificate._bound import Measured
from memmeta.certificate._certify import certify_measured
from memmeta.hypergradient._estimator import TaskStart
from memmeta.inner import InnerLoop, InnerState
from memmeta.linear_solve import LinearSolver
from memmeta.problem import Params, Problem, Scalar, hessian_product

ROUND = 5
"""Inner steps between two looks at the certificate; chosen, not tuned."""


class Pair(NamedTuple):
    """The state of the inner and the linear solve of one task.

    Attributes:
        inner: of φ.
        solution: v.
        error: the certificate of the hypergradient that they give, a bound or an estimate.
    """

    inner: InnerState
    solution: Params
    error: Scalar


def until(
    tolerance: float | Float[Array, ""],
    problem: Problem,
    inner: InnerLoop,
    solver: LinearSolver,
    begin: TaskStart,
) -> Pair:
    """Rounds of 5 inner steps and one linear solve, each from where the last one ended.

    Ends when the certificate is at most the tolerance, or `inner.steps` (rounded up to whole
    rounds) are made. The certificate is the rigorous bound where the problem gives its deviations,
    else `certificate.estimate`.
    """
    context = begin.context.whole

    def solve(params: Params, guess: Params) -> tuple[Params, Scalar]:
        gradient, product = hessian_product(problem, params, context)
        outer = jax.grad(lambda phi: problem.outer_loss(phi, context)[0])(params)
        where = {"problem": problem, "params": params, "context": context}
        found = solver(product, outer, **where, start=guess)
        if not problem.certifiable:
            return found.value, estimate(problem, params, found.value, context).total
        residual = found.residual * trees.norm(outer)
        measured = Measured(trees.norm(gradient), residual, found.value)
        return found.value, certify_measured(problem, params, measured, begin.context).total

    def unfinished(pair: Pair) -> Bool[Array, ""]:
        # `error <= tolerance` is False for NaN: steps are spent, not saved
        made = pair.inner.steps - pair.inner.before
        return ~(pair.error <= tolerance) & (made < inner.steps)

    def one_round(pair: Pair) -> Pair:
        state = inner.advance(problem, pair.inner, context, begin.key, ROUND)
        return Pair(state, *solve(state.params, pair.solution))

    state = inner.start(problem, begin.params, context, begin.earlier)
    guess = begin.guess
    guess = jax.tree.map(jnp.zeros_like, begin.params) if guess is None else guess
    first = Pair(state, guess, jnp.full_like(state.gradient_norm, jnp.inf))
    return jax.lax.while_loop(unfinished, one_round, first)
