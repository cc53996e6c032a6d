r"""Reverse-mode differentiation of the unrolled inner loop: MAML, ANIL, ITD-BiO."""

from collections.abc import Callable
from functools import partial
from typing import Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from memmeta.hypergradient.estimator import Estimator, TaskGradient, TaskRule, per_task
from memmeta.hypergradient.report import unsolved_report
from memmeta.inner import InnerLoop, InnerState
from memmeta.problem import Context, Params, Problem, Scalar

Remat: TypeAlias = Literal["none", "step", "sqrt", "recursive"]
checkpoint = partial(jax.checkpoint, prevent_cse=False)  # a scan keeps XLA from undoing it
Loop: TypeAlias = Callable[[Problem, InnerLoop, Params, Context], InnerState]


def unrolled(remat: Remat = "none") -> Estimator:
    r"""The exact gradient of f(φ_K(θ), θ) through all K steps; memory grows with K.

    $$\nabla F_i = \frac{d}{d\theta} f_i(\theta, \phi_K(\theta))$$

    Args:
        remat: what is computed twice to save memory. With s the size of a solver's state and r that
            of what one step's derivative needs (for networks r ≫ s), memory grows as
            "none": K r; "step": K s + r; "sqrt": 2 √K s + r; "recursive": 2 log₂(K) s + r,
            and a step is computed 1, 2, 3 and up to log₂(K) + 2 times.

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

    def loop(problem: Problem, inner: InnerLoop, start: Params, context: Context) -> InnerState:
        state = inner.start(problem, start, context)

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

    return per_task(through(loop), "unrolled")


def through(loop: Loop) -> TaskRule:
    """The rule that differentiates the outer loss through a loop in reverse.

    Args:
        loop: (problem, inner, φ₀, context) -> the state at its end.
    """

    def rule(problem: Problem, inner: InnerLoop, start: Params, context: Context) -> TaskGradient:
        def final_loss(start: Params, context: Context) -> tuple[Scalar, tuple]:
            state = loop(problem, inner, start, context)
            loss, aux = problem.outer_loss(state.params, context)
            return loss, (aux, unsolved_report(state))

        loss, pull_back, (aux, report) = jax.vjp(final_loss, start, context, has_aux=True)
        start_bar, context_bar = pull_back(jnp.ones_like(loss))
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
