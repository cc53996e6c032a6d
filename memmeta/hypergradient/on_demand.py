"""Accuracy on demand: inner steps and linear solves in turn, until the certificate is met."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from memmeta import certificate, trees
from memmeta.certificate import Measured
from memmeta.inner import InnerLoop, InnerState, hessian_product
from memmeta.linear_solve import LinearSolver, SolverAt
from memmeta.problem import Context, Params, Problem, Scalar

ROUND = 5
"""Inner steps between two looks at the certificate."""


class Pair(NamedTuple):
    """Where the two solves of one task stand.

    Attributes:
        inner: of φ.
        solution: v.
        error: what the certificate says of the hypergradient they give.
    """

    inner: InnerState
    solution: Params
    error: Scalar


def error_bound(
    problem: Problem, params: Params, measured: Measured, context: Context
) -> Float[Array, ""]:
    """The bound of `certificate.certify`, infinite where the problem gives no constants."""
    if not certificate.certifiable(problem):
        return jnp.full_like(measured.gradient, jnp.inf)
    return certificate.certify_measured(problem, params, measured, context).total


def until(
    tolerance: float | Float[Array, ""],
    problem: Problem,
    inner: InnerLoop,
    solver: LinearSolver | SolverAt,
    start: tuple[Params, Params | None],
    context: Context,
) -> Pair:
    """Rounds of 5 inner steps and one linear solve, each from where the last one ended.

    Ends when the certificate is at most the tolerance, or `inner.steps` (rounded up to whole
    rounds) are made. The certificate is the rigorous bound where the problem gives its constants,
    else `certificate.estimate`.

    Args:
        tolerance: on ‖∇̂F_i − ∇F_i‖; a number or a traced scalar.
        problem: with its context bound.
        inner: the inner loop.
        solver: of the linear system; each round makes one call.
        start: φ₀, and a guess of v or None.
        context: of one task.

    Returns:
        The pair; memory does not grow with the rounds.
    """

    def solve(params: Params, guess: Params) -> tuple[Params, Scalar]:
        gradient, product = hessian_product(problem, params, context)
        outer = jax.grad(lambda phi: problem.outer_loss(phi, context)[0])(params)
        made = solver.make(problem, params, context) if isinstance(solver, SolverAt) else solver
        found = made(product, outer, guess)
        if not certificate.certifiable(problem):
            return found.value, certificate.estimate(problem, params, found.value, context).total
        residual = found.residual * trees.norm(outer)
        measured = Measured(trees.norm(gradient), residual, found.value)
        return found.value, error_bound(problem, params, measured, context)

    def unfinished(pair: Pair) -> Bool[Array, ""]:
        # `error <= tolerance` is False for NaN: steps are spent, not saved
        return ~(pair.error <= tolerance) & (pair.inner.steps < inner.steps)

    def one_round(pair: Pair) -> Pair:
        state = inner.advance(problem, pair.inner, context, ROUND)
        return Pair(state, *solve(state.params, pair.solution))

    params, guess = start
    state = inner.start(problem, params, context)
    guess = jax.tree.map(jnp.zeros_like, params) if guess is None else guess
    first = Pair(state, guess, jnp.full_like(state.gradient_norm, jnp.inf))
    return jax.lax.while_loop(unfinished, one_round, first)
