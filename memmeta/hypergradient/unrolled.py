r"""Reverse-mode differentiation of the unrolled inner loop: MAML, ANIL, ITD-BiO."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from memmeta.hypergradient.error_estimate import can_be_judged, claimed, tilted
from memmeta.hypergradient.estimator import Estimator, TaskGradient, TaskRule, per_task
from memmeta.hypergradient.report import unsolved_report
from memmeta.inner import InnerLoop, InnerState
from memmeta.problem import Context, Params, Problem, Scalar

Remat: TypeAlias = Literal["none", "step", "sqrt", "recursive"]
Outcome: TypeAlias = tuple[Scalar, tuple[Any, InnerState]]
checkpoint = partial(jax.checkpoint, prevent_cse=False)  # a scan keeps XLA from undoing it
Loop: TypeAlias = Callable[[Problem, InnerLoop, InnerState, Context], InnerState]
"""(problem, inner, the state before the first step, context) -> the state after the last."""


def unrolled(remat: Remat = "none", *, estimate_error: bool = True) -> Estimator:
    r"""The exact gradient of f(φ_K(θ), θ) through all K steps; memory grows with K.

    $$\nabla F_i = \frac{d}{d\theta} f_i(\theta, \phi_K(\theta))$$

    Args:
        remat: what is computed twice to save memory. With s the size of a solver's state and r that
            of what one step's derivative needs (for networks r ≫ s), memory grows as
            "none": K r; "step": K s + r; "sqrt": 2 √K s + r; "recursive": 2 log₂(K) s + r,
            and a step is computed 1, 2, 3 and up to log₂(K) + 2 times.
        estimate_error: whether the report has an `error_estimate` where the problem gives its
            `strong_convexity`: how far the steps made are from the inner solution, in terms of the
            hypergradient. It costs two mixed products and two gradients of f, whatever K.

    Returns:
        The estimator.

    Raises:
        ValueError: `remat` is none of these.

    Source: Finn, Abbeel, Levine (ICML 2017), equation 1, for any number of steps; checkpoints:
    Chen, Xu, Zhang, Guestrin (2016); Griewank and Walther (2000).

    Example:
        >>> estimator = unrolled(remat="sqrt")
    """
    if remat not in get_args(Remat):
        raise ValueError(f"remat: expected one of {', '.join(get_args(Remat))}, found {remat!r}.")

    def loop(problem: Problem, inner: InnerLoop, state: InnerState, context: Context) -> InnerState:
        def every_step(state: InnerState, context: Context, steps: int) -> InnerState:
            return inner.advance(problem, state, context, steps, checkpoint)

        def by_root(state: InnerState, context: Context, steps: int) -> InnerState:
            return in_segments(every_step, state, context, steps, max(1, round(steps**0.5)))

        def by_halves(state: InnerState, context: Context, steps: int) -> InnerState:
            if steps <= 2:
                return every_step(state, context, steps)
            half = 2 ** ((steps - 1).bit_length() - 1)
            return in_segments(by_halves, state, context, steps, half)

        if remat == "none":
            return inner.advance(problem, state, context, inner.steps)
        run = {"step": every_step, "sqrt": by_root, "recursive": by_halves}[remat]
        return run(state, context, inner.steps)

    return per_task(through(loop, estimate_error), "unrolled")


def through(
    loop: Loop,
    estimate_error: bool,
    stepped: Callable[[Problem], Problem] = lambda problem: problem,
) -> TaskRule:
    """The rule that differentiates the outer loss through a loop in reverse.

    Args:
        loop: makes the steps.
        estimate_error: see `unrolled`.
        stepped: from the problem to that which the steps see, with the same values.
    """

    def rule(problem: Problem, inner: InnerLoop, start: Params, context: Context) -> TaskGradient:
        judging = estimate_error and can_be_judged(problem, inner)
        tilt = jax.tree.map(jnp.zeros_like, start) if judging else None

        def final_loss(start: Params, context: Context, tilt: Params | None) -> Outcome:
            state = inner.start(problem, start, context)
            state = loop(tilted(stepped(problem), tilt), inner, state, context)
            loss, aux = problem.outer_loss(state.params, context)
            return loss, (aux, state)

        loss, pull_back, (aux, state) = jax.vjp(final_loss, start, context, tilt, has_aux=True)
        start_bar, context_bar, tilt_bar = pull_back(jnp.ones_like(loss))
        report = unsolved_report(state)
        if judging:
            v = jax.tree.map(jnp.negative, tilt_bar)
            estimate, met = claimed(problem, state.params, v, context_bar, context)
            report = report._replace(error_estimate=estimate, smallest_curvature=met)
        return TaskGradient(loss, aux, context_bar, start_bar, report)

    return rule


def in_segments(
    run: Callable[[InnerState, Context, int], InnerState],
    state: InnerState,
    context: Context,
    steps: int,
    segment: int,
) -> InnerState:
    """Steps in segments of which only the first state is kept; what is left over runs as it is."""
    whole, rest = divmod(steps, segment)

    def one(state: InnerState, context: Context) -> InnerState:
        return run(state, context, segment)

    kept = checkpoint(one)
    state, _ = jax.lax.scan(lambda s, _: (kept(s, context), None), state, length=whole)
    return run(state, context, rest) if rest else state
