r"""The inner loop: K steps of an inner solver, as a pure function."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int32, Key

from memmeta._shared import checks, trees
from memmeta.inner._descent import accelerated
from memmeta.inner._solver import InnerSolver, from_optax
from memmeta.inner._views import View, seen_by
from memmeta.problem import Context, Params, Problem, Scalar

DEFAULT = accelerated()


class InnerState(NamedTuple):
    """The state of an inner loop.

    Attributes:
        params: φ.
        solver: the solver's own state.
        gradient_norm: ‖∇_φ g‖ at the φ that the last step was made from; infinite before the first
            step.
        first_gradient_norm: the same for the first step, which may be of an earlier meta-step.
        steps: steps made so far, those of earlier meta-steps included.
        before: of these, the steps of earlier meta-steps.
    """

    params: Params
    solver: Any
    gradient_norm: Scalar
    first_gradient_norm: Scalar
    steps: Int32[Array, ""]
    before: Int32[Array, ""]


class Earlier(NamedTuple):
    """What a loop goes on with, beside φ, where it began in an earlier meta-step.

    Attributes:
        solver: the solver's own state.
        steps: steps made so far; 0 where the loop is to begin afresh.
        first_gradient_norm: ‖∇_φ g‖ before the first of them.
    """

    solver: Any
    steps: Int32[Array, ""]
    first_gradient_norm: Scalar


def widened(problem: Problem, params: Params) -> tuple[Problem, Params, Callable[..., Any]]:
    """Restate a problem in the floating-point leaves of φ, in float32 or wider.

    A step smaller than the rounding of a bfloat16 parameter would be lost, so the iterates and all
    vectors like φ are kept in float32 at least. The losses are still called with the dtypes of
    `params`.

    Returns:
        The problem in wide parameters, φ as those, and the function from wide parameters back.
    """
    floats, others = trees.split_inexact(params)
    wide = jax.tree.map(lambda x: jnp.asarray(x, trees.accumulator(jnp.result_type(x))), floats)
    dtypes = jax.tree.map(jnp.result_type, floats)

    def restore(wide: Params) -> Params:
        return trees.merge(jax.tree.map(lambda x, d: x.astype(d), wide, dtypes), others)

    if not jax.tree.leaves(others) and jax.tree.map(jnp.result_type, wide) == dtypes:
        return problem, wide, lambda params: params

    def inner_loss(wide: Params, context: Context) -> Scalar:
        loss = problem.inner_loss(restore(wide), context)
        # a half-precision loss is too coarse for the solvers' checks of descent
        return loss.astype(trees.accumulator(loss.dtype))

    def outer_loss(wide: Params, context: Context) -> tuple[Scalar, Any]:
        loss, aux = problem.outer_loss(restore(wide), context)
        return loss.astype(trees.accumulator(loss.dtype)), aux

    return replace(problem, inner_loss=inner_loss, outer_loss=outer_loss), wide, restore


@dataclass(frozen=True)
class InnerLoop:
    """The inner loop of one task: at most K steps of a solver from φ₀.

    Attributes:
        solver: an `InnerSolver`, or any optax optimiser. Default: `accelerated()`.
        steps: K, the number of steps (zero is allowed: φ₀ is the answer).
        tolerance: stop as soon as a step was made from a point with ‖∇_φ g‖ at most this; None
            makes all K steps. The steps made are in the report. Estimators that differentiate the
            steps in reverse refuse it. The tasks of one chunk all run until the slowest of them
            has stopped.
        view: (context, key, step) -> the context that this step's inner loss sees, of the same
            structure, such as `minibatch`; None: all of it. Estimators differentiate the steps as
            they were made; the linear system of an implicit rule is that of the whole context.

    Raises:
        ValueError: `steps` is no whole number, negative or beyond int32, or `tolerance` is not
            positive.

    Example:
        >>> g = Problem(
        ...     embed=lambda theta, batch: batch,
        ...     inner_loss=lambda phi, c: 0.5 * jnp.sum((phi - c) ** 2),
        ...     outer_loss=lambda phi, c: (jnp.sum(phi), {}),
        ...     init=lambda theta: theta,
        ... )
        >>> loop = InnerLoop(optax.sgd(0.5), steps=20)
        >>> loop(g, jnp.zeros(2), jnp.array([1.0, 2.0])).round(3).tolist()
        [1.0, 2.0]
    """

    solver: InnerSolver | optax.GradientTransformation | optax.MultiSteps = DEFAULT
    steps: int = 20
    tolerance: float | None = None
    view: View | None = None

    def __post_init__(self) -> None:
        checks.count("steps", self.steps, least=0)
        if self.tolerance is not None:
            checks.positive("tolerance", self.tolerance)
        if not isinstance(self.solver, InnerSolver):  # an optax optimiser, taken as it is
            object.__setattr__(self, "solver", from_optax(self.solver))
        for name, arguments in (("init", 3), ("update", 6)):
            checks.arguments(f"solver.{name}", getattr(self.solver, name), arguments)

    def __call__(
        self,
        problem: Problem,
        params: Params,
        context: Context,
        key: Key[Array, ""] | None = None,
    ) -> Params:
        """Run the loop. Forward-mode derivatives work; for reverse mode use `start` and `advance`.

        Args:
            problem: whose `inner_loss` is minimised.
            params: φ₀.
            context: of one task.
            key: for solvers that draw; default `jax.random.key(0)`.

        Returns:
            The last φ, like `params`.
        """
        key = jax.random.key(0) if key is None else key
        problem, wide, restore = widened(problem, params)
        return restore(self.run(problem, wide, context, key).params)

    def run(
        self,
        problem: Problem,
        params: Params,
        context: Context,
        key: Key[Array, ""],
        earlier: Earlier | None = None,
    ) -> InnerState:
        """The state at the end, with arguments as for `start`; memory does not grow with K."""
        return self.until(problem, self.start(problem, params, context, earlier), context, key)

    def until(
        self,
        problem: Problem,
        state: InnerState,
        context: Context,
        key: Key[Array, ""],
        enough: Scalar | None = None,
    ) -> InnerState:
        """Go on until a step was made from a point with ‖∇_φ g‖ at most `enough`.

        Args:
            problem: whose `inner_loss` is minimised.
            state: as returned by `start` or by this. A step is made in any case, if one is left.
            context: of one task.
            key: as for a call; the same from the first step to the last.
            enough: None: the loop's own `tolerance`.

        Returns:
            The state after the steps; no more than K are made since `start`.
        """
        threshold = self.tolerance if enough is None else enough
        first = state.steps
        # XLA (jax 0.10.2) inlines a loop whose trip count it can see to be 1, and then schedules
        # the rest differently. Behind the barrier program and memory are the same for every K.
        limit = state.before + jax.lax.optimization_barrier(jnp.int32(self.steps))

        def unfinished(state: InnerState) -> Bool[Array, ""]:
            more: Array = state.steps < limit
            if threshold is not None:
                more &= (state.steps == first) | ~(state.gradient_norm <= threshold)
            return more

        def body(state: InnerState) -> InnerState:
            return self._step(problem, state, context, key)

        return jax.lax.while_loop(unfinished, body, state)

    def start(
        self,
        problem: Problem,
        params: Params,
        context: Context,
        earlier: Earlier | None = None,
    ) -> InnerState:
        """The state before the first step, with arguments as for a call.

        Args:
            problem: whose `inner_loss` is minimised.
            params: φ₀, or φ of an earlier meta-step.
            context: of one task.
            earlier: what else is left of that meta-step; None begins afresh.
        """
        solver = self.steps_of.init(problem, params, context)
        dtype = jax.eval_shape(trees.norm, params).dtype
        unknown = jnp.asarray(jnp.inf, dtype)
        fresh = InnerState(params, solver, unknown, unknown, jnp.int32(0), jnp.int32(0))
        if earlier is None:
            return fresh
        before, first = earlier.steps, earlier.first_gradient_norm
        if self.steps_of.carried:
            solver = trees.where(before > 0, earlier.solver, solver)
        return InnerState(params, solver, unknown, first, before, before)

    def advance(
        self,
        problem: Problem,
        state: InnerState,
        context: Context,
        key: Key[Array, ""],
        steps: int,
        step_transform: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda step: step,
    ) -> InnerState:
        """Make `steps` further steps under `lax.scan`, which can be differentiated in reverse.

        Args:
            problem: whose `inner_loss` is minimised.
            state: as returned by `start` or `advance`.
            context: of one task.
            key: as for a call; the same from the first step to the last.
            steps: how many.
            step_transform: applied to the function (state, context) -> state of one step, for
                instance `jax.checkpoint`.

        Returns:
            The state after the steps.

        Raises:
            ValueError: the loop has a `tolerance`, so how many steps it makes is not known.
        """
        if self.tolerance is not None:
            raise ValueError(
                "tolerance: expected None where steps are differentiated in reverse, found "
                f"InnerLoop(tolerance={self.tolerance}). Leave it out, or use an estimator that "
                "runs the loop by itself, such as implicit() or forward_mode()."
            )
        step = step_transform(lambda state, context: self._step(problem, state, context, key))
        state, _ = jax.lax.scan(lambda s, _: (step(s, context), None), state, length=steps)
        return state

    def _step(
        self, problem: Problem, state: InnerState, context: Context, key: Key[Array, ""]
    ) -> InnerState:
        seen = context
        if self.view is not None:
            seen = seen_by(self.view, context, key, state.steps)
        params, solver, norm = self.steps_of.update(
            problem, state.params, state.solver, seen, state.steps, key
        )
        norm = jax.lax.stop_gradient(norm)  # it is reported, not differentiated
        first = jnp.where(state.steps == 0, norm, state.first_gradient_norm)
        return InnerState(params, solver, norm, first, state.steps + 1, state.before)

    @property
    def steps_of(self) -> InnerSolver:
        """The solver, never a bare optax optimiser."""
        assert isinstance(self.solver, InnerSolver)
        return self.solver
