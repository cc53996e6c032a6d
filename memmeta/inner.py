r"""The inner loop: K steps of a pure update under `lax.scan`, and the solvers that make one step.

An inner solver is a pair of pure functions, as in optax, that also see the problem:

    init(problem, φ₀, context) -> state
    update(problem, φ, state, context) -> (φ, state, ‖∇_φ g‖)

Any optax optimiser is one through `from_optax`. `gradient_descent` and `accelerated` take their
rate from the curvature, so that no scale of the features makes them diverge.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from memmeta import trees
from memmeta.problem import Context, Params, Problem, Scalar

POWER_STEPS = 8


class InnerSolver(NamedTuple):
    """One way of making an inner step: a pair of pure functions that see the problem.

    Attributes:
        init: (problem, φ₀, context) -> state.
        update: (problem, φ, state, context) -> (φ, state, norm of the gradient the step was made of).
    """

    init: Callable[[Problem, Params, Context], Any]
    update: Callable[[Problem, Params, Any, Context], tuple[Params, Any, Scalar]]


class InnerState(NamedTuple):
    """Where an inner loop stands.

    Attributes:
        params: φ.
        solver: the solver's own state.
        gradient_norm: ‖∇_φ g‖ where the last step was made from; infinite before the first.
    """

    params: Params
    solver: Any
    gradient_norm: Scalar


def from_optax(optimizer: optax.GradientTransformation) -> InnerSolver:
    """Steps of any optax optimiser on the inner loss.

    A fixed rate diverges once the curvature exceeds 2/rate, and meta-training raises the curvature:
    prefer `accelerated` unless a published method is to be reproduced as it was run.

    Args:
        optimizer: an optax gradient transformation, for instance `optax.sgd(0.1)`.

    Returns:
        The solver.

    Example:
        >>> solver = from_optax(optax.sgd(0.1))
    """

    def update(problem: Problem, params: Params, state: Any, context: Context) -> Any:
        gradient = jax.grad(problem.inner_loss)(params, context)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes, users may be strict
            updates, state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state, trees.norm(gradient)

    return InnerSolver(lambda problem, params, context: optimizer.init(params), update)


class Curvature(NamedTuple):
    """State of the curvature-driven solvers: how steep and how flat the inner loss is.

    Attributes:
        largest: L, a bound on the curvature or the best estimate so far.
        smallest: μ, a lower bound on it (0 when none is known).
        count: steps made so far.
        ahead: the extrapolated point of the accelerated form.
    """

    largest: Scalar
    smallest: Scalar
    count: Float[Array, ""]
    ahead: Any


def _measure(problem: Problem, params: Params, context: Context) -> Curvature:
    if problem.smoothness is None:
        largest = power_iteration(problem, params, context)
    else:
        largest = problem.smoothness(context)
    bound = problem.strong_convexity
    smallest = jnp.zeros_like(largest) if bound is None else bound(context).astype(largest.dtype)
    # The rate belongs to the method, not to the function that is differentiated.
    largest, smallest = jax.lax.stop_gradient((largest, smallest))
    return Curvature(largest, smallest, jnp.zeros_like(largest), params)


def power_iteration(problem: Problem, params: Params, context: Context) -> Scalar:
    """The largest curvature of the inner loss at φ, by a few Hessian-vector products.

    Starts along the gradient, so no random key is needed. It is a lower estimate of the largest
    absolute eigenvalue of ∂²_φφ g(φ); the solvers that use it check every step.

    Args:
        problem: its inner loss is used.
        params: φ, where to measure.
        context: of one task.

    Returns:
        The estimate, positive.

    Example:
        >>> g = Problem(None, lambda phi, c: jnp.sum(c * phi**2) / 2, None, None)
        >>> float(power_iteration(g, jnp.ones(2), jnp.array([1.0, 5.0])).round(3))
        5.0
    """
    gradient, hessian_product = jax.linearize(
        lambda phi: jax.grad(problem.inner_loss)(phi, context), params
    )

    def normalised(vector: Params) -> Params:
        length = trees.norm(vector)
        return jax.tree.map(lambda x: x / jnp.maximum(length, _tiny(x)).astype(x.dtype), vector)

    def body(vector: Params, _: None) -> tuple[Params, Scalar]:
        image = hessian_product(vector)
        return normalised(image), trees.norm(image)

    # A flat start (zero gradient) would see no curvature at all.
    ones = jax.tree.map(jnp.ones_like, gradient)
    scale = trees.norm(gradient) * 1e-3
    start = jax.tree.map(lambda g, one: g + scale.astype(g.dtype) * one, gradient, ones)
    start = jax.tree.map(lambda s, one: jnp.where(scale > 0, s, one), start, ones)
    _, lengths = jax.lax.scan(body, normalised(start), length=POWER_STEPS)
    return jnp.maximum(jnp.max(lengths), _tiny(lengths))


def _tiny(array: Array) -> float:
    return float(jnp.finfo(array.dtype).tiny)


def _descend(
    problem: Problem, params: Params, context: Context, largest: Scalar
) -> tuple[Params, Bool[Array, ""], Scalar]:
    r"""One step φ − ∇g/L, refused where the descent lemma shows L to be too small.

    $$g(\phi - \nabla g / L) \le g(\phi) - \|\nabla g\|^2 / 2L$$ holds for every true bound L.
    """
    loss, gradient = jax.value_and_grad(problem.inner_loss)(params, context)
    length = trees.norm(gradient)
    proposal = jax.tree.map(lambda p, g: p - g / largest.astype(g.dtype), params, gradient)
    if problem.smoothness is not None:
        return proposal, jnp.bool_(True), length
    rounding = 10 * float(jnp.finfo(loss.dtype).eps) * jnp.abs(loss)
    promised = loss - length.astype(loss.dtype) ** 2 / (2 * largest) + rounding
    accepted = problem.inner_loss(proposal, context) <= promised
    return _where(accepted, proposal, params), accepted, length


def _where(condition: Bool[Array, ""], yes: Any, no: Any) -> Any:
    return jax.tree.map(partial(jnp.where, condition), yes, no)


def gradient_descent() -> InnerSolver:
    r"""Gradient descent at the rate 1/L, which cannot diverge.

    $$\phi_{k+1} = \phi_k - \tfrac1L \nabla_\phi g(\phi_k)$$

    L is `problem.smoothness` where given, else measured by `power_iteration` at φ₀ and doubled,
    with the step refused, whenever a step does not decrease the loss as it should.

    Returns:
        The solver.

    Example:
        >>> loop = InnerLoop(gradient_descent(), steps=50)
    """

    def update(
        problem: Problem, params: Params, state: Curvature, context: Context
    ) -> tuple[Params, Curvature, Scalar]:
        params, accepted, length = _descend(problem, params, context, state.largest)
        largest = jnp.where(accepted, state.largest, 2 * state.largest)
        return params, state._replace(largest=largest, count=state.count + 1), length

    def init(problem: Problem, params: Params, context: Context) -> Curvature:
        return _measure(problem, params, context)._replace(ahead=None)

    return InnerSolver(init, update)


def accelerated() -> InnerSolver:
    r"""Nesterov's accelerated gradient descent at the rate 1/L, the default inner solver.

    $$\phi_{k+1} = y_k - \tfrac1L \nabla_\phi g(y_k), \qquad
      y_{k+1} = \phi_{k+1} + \beta_k (\phi_{k+1} - \phi_k)$$

    with β = (√κ − 1)/(√κ + 1), κ = L/μ, where μ = `problem.strong_convexity` is known (error
    ∝ (1 − 1/√κ)^k), else β_k = k/(k + 3) (error ∝ 1/k²). L as in `gradient_descent`; a refused step
    also drops the momentum. Source: Nesterov, Introductory Lectures on Convex Optimization (2004),
    scheme 2.2.11.

    Returns:
        The solver.

    Example:
        >>> loop = InnerLoop(accelerated(), steps=50)
    """

    def update(
        problem: Problem, params: Params, state: Curvature, context: Context
    ) -> tuple[Params, Curvature, Scalar]:
        following, accepted, length = _descend(problem, state.ahead, context, state.largest)
        root = jnp.sqrt(state.largest / jnp.maximum(state.smallest, _tiny(state.smallest)))
        known = (root - 1) / (root + 1)
        momentum = jnp.where(state.smallest > 0, known, state.count / (state.count + 3))
        ahead = jax.tree.map(
            lambda new, old: new + momentum.astype(new.dtype) * (new - old), following, params
        )
        refused = state._replace(largest=2 * state.largest, count=0 * state.count, ahead=params)
        taken = state._replace(count=state.count + 1, ahead=ahead)
        return *_where(accepted, (following, taken), (params, refused)), length

    return InnerSolver(_measure, update)


@dataclass(frozen=True)
class InnerLoop:
    """The inner loop of one task: K steps of a solver from φ₀, as one `lax.scan`.

    Attributes:
        solver: an `InnerSolver`, or any optax optimiser. Default: `accelerated()`.
        steps: K, the number of steps (zero is allowed: φ₀ is the answer).

    Raises:
        ValueError: `steps` is no whole number, or is negative.

    Example:
        >>> g = Problem(None, lambda phi, c: 0.5 * jnp.sum((phi - c) ** 2), None, None)
        >>> loop = InnerLoop(optax.sgd(0.5), steps=20)
        >>> loop(g, jnp.zeros(2), jnp.array([1.0, 2.0])).round(3).tolist()
        [1.0, 2.0]
    """

    solver: InnerSolver | optax.GradientTransformation = accelerated()
    steps: int = 20

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or self.steps < 0:
            raise ValueError(
                f"steps: expected a whole number of inner steps, 0 or more, found {self.steps!r}."
            )
        if not isinstance(self.solver, InnerSolver):  # an optax optimiser, taken as it is
            object.__setattr__(self, "solver", from_optax(self.solver))

    def __call__(self, problem: Problem, params: Params, context: Context) -> Params:
        """Run the loop.

        Args:
            problem: whose `inner_loss` is minimised.
            params: φ₀.
            context: of one task.

        Returns:
            φ_K, like `params`.
        """
        start = self.start(problem, params, context)
        return self.advance(problem, start, context, self.steps).params

    def start(self, problem: Problem, params: Params, context: Context) -> InnerState:
        """The state before the first step, with arguments as for a call."""
        dtype = jax.eval_shape(problem.inner_loss, params, context).dtype
        solver = self.solver.init(problem, params, context)
        return InnerState(params, solver, jnp.asarray(jnp.inf, trees.accumulator(dtype)))

    def advance(
        self,
        problem: Problem,
        state: InnerState,
        context: Context,
        steps: int,
        step_transform: Callable[[Callable], Callable] = lambda step: step,
    ) -> InnerState:
        """Make `steps` further steps.

        Args:
            problem: whose `inner_loss` is minimised.
            state: as returned by `start` or `advance`.
            context: of one task.
            steps: how many.
            step_transform: applied to the function (state, context) -> state of one step, for
                instance `jax.checkpoint`.

        Returns:
            The state after the steps.
        """

        def one_step(state: InnerState, context: Context) -> InnerState:
            found = self.solver.update(problem, state.params, state.solver, context)
            return InnerState(*found)

        step = step_transform(one_step)
        state, _ = jax.lax.scan(lambda s, _: (step(s, context), None), state, length=steps)
        return state
