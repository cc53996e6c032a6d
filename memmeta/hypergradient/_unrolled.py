r"""Reverse-mode differentiation of the unrolled inner loop: MAML, ANIL, ITD-BiO."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Key

from memmeta._shared import checks
from memmeta._shared.readable import named
from memmeta.certificate._estimate import error_of_given, tilted
from memmeta.hypergradient._estimator import (
    TaskGradient,
    TaskRule,
    TaskStart,
    per_task,
    report_of_loop,
)
from memmeta.hypergradient._seam import Estimator
from memmeta.inner import InnerLoop, InnerState
from memmeta.inner._solver import require_derivative_at_zero
from memmeta.problem import Context, Params, Problem, Scalar, SplitContext

Remat: TypeAlias = Literal["none", "step", "sqrt", "recursive", "host"]
Outcome: TypeAlias = tuple[Scalar, tuple[Any, InnerState]]
# `prevent_cse` is for code outside of loops: in a scan XLA cannot merge the second computation
# with the first.
checkpoint = partial(jax.checkpoint, prevent_cse=False)
STATE = "memmeta_inner_state"
"""The name under which a policy of `jax.checkpoint` finds the states between steps."""
Loop: TypeAlias = Callable[[Problem, InnerLoop, InnerState, Context, Key[Array, ""]], InnerState]
"""(problem, inner, the state before the first step, context, key) -> the state after the last."""


@named
def unrolled(remat: Remat = "none", *, estimate_error: bool = True) -> Estimator:
    r"""The exact gradient of f(φ_K(θ), θ) through all K steps; memory grows with K.

    $$\nabla F_i = \frac{d}{d\theta} f_i(\theta, \phi_K(\theta))$$

    Args:
        remat: what the backward pass recomputes instead of storing. With s the size of a solver's
            state and r that of what one step's derivative needs (for networks r ≫ s), memory grows
            as
            "none": K r; "step": K s + r; "sqrt": 2 √K s + r; "recursive": 2 log₂(K) s + r,
            and a step is computed 1, 2, 3 and up to log₂(K) + 2 times. "host": as "step", with the
            K s in the host's memory where a backend (a GPU, a TPU) has one of its own.
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
    checks.one_of("remat", remat, get_args(Remat))

    def loop(
        problem: Problem, inner: InnerLoop, state: InnerState, context: Context, key: Array
    ) -> InnerState:
        def every_step(state: InnerState, context: Context, steps: int) -> InnerState:
            return inner.advance(problem, state, context, key, steps, checkpoint)

        def from_host(state: InnerState, context: Context, steps: int) -> InnerState:
            return inner.advance(problem, state, context, key, steps, offloaded)

        def by_root(state: InnerState, context: Context, steps: int) -> InnerState:
            return in_segments(every_step, state, context, steps, max(1, round(steps**0.5)))

        def by_halves(state: InnerState, context: Context, steps: int) -> InnerState:
            if steps <= 2:
                return every_step(state, context, steps)
            half = 2 ** ((steps - 1).bit_length() - 1)
            return in_segments(by_halves, state, context, steps, half)

        if remat == "none":
            return inner.advance(problem, state, context, key, inner.steps)
        run = {"step": every_step, "sqrt": by_root, "recursive": by_halves, "host": from_host}[
            remat
        ]
        return run(state, context, inner.steps)

    return per_task(through(loop, estimate_error), "unrolled")


def through(
    loop: Loop,
    estimate_error: bool,
    for_steps: Callable[[Problem, SplitContext], Problem] = lambda problem, context: problem,
) -> TaskRule:
    """A rule that runs a loop and differentiates the outer loss through it in reverse.

    Args:
        loop: makes the steps.
        estimate_error: see `unrolled`.
        for_steps: (problem, the task's context) -> the problem that the steps see, of the same
            values.
    """

    def rule(problem: Problem, inner: InnerLoop, begin: TaskStart) -> TaskGradient:
        require_derivative_at_zero(inner.steps_of, begin.params, reverse=True)
        wanted = estimate_error and begin.wanted.errors
        estimating = wanted and has_known_curvature(problem, inner)
        # g + ⟨e, φ⟩ at e = 0: the cotangent of e is −v̂, see `tilted`
        tilt = jax.tree.map(jnp.zeros_like, begin.params) if estimating else None

        def final_loss(start: Params, active: Context, tilt: Params | None) -> Outcome:
            context = begin.context.at(active)
            state = inner.start(problem, start, context, begin.earlier)
            seen = tilted(for_steps(problem, begin.context), tilt)
            state = loop(seen, inner, state, context, begin.key)
            loss, aux = problem.outer_loss(state.params, context)
            return loss, (aux, state)

        arguments = (begin.params, begin.context.active, tilt)
        loss, pull_back, (aux, state) = jax.vjp(final_loss, *arguments, has_aux=True)
        start_bar, context_bar, tilt_bar = pull_back(jnp.ones_like(loss))
        report = report_of_loop(state)
        if estimating:
            v = jax.tree.map(jnp.negative, tilt_bar)
            error, met = error_of_given(problem, state.params, v, context_bar, begin.context)
            report = report._replace(error_estimate=error, smallest_curvature=met)
        return TaskGradient(loss, aux, context_bar, start_bar, report, state)

    return rule


def offloaded(step: Callable[..., InnerState]) -> Callable[..., InnerState]:
    """`checkpoint` of a step; the state that it begins from waits in the host's memory."""

    def named_step(state: InnerState, context: Context) -> InnerState:
        # single numbers stay: on a TPU their transfer in a loop fails (jax 0.10.2, issue 24115)
        name = lambda leaf: checkpoint_name(leaf, STATE) if leaf.size > 1 else leaf  # noqa: E731
        return step(jax.tree.map(name, state), context)

    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[STATE],
        offload_src="device",
        offload_dst="pinned_host",
    )
    kept: Callable[..., InnerState] = checkpoint(named_step, policy=policy)
    return kept


def has_known_curvature(problem: Problem, inner: InnerLoop) -> bool:
    """Whether an estimator without a linear solve can estimate its error: μ is given, K > 0."""
    return problem.strong_convexity is not None and inner.steps > 0


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
