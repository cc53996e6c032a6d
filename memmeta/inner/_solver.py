r"""An inner solver: a pair of pure functions, as in optax, that also see the problem.

init(problem, φ₀, context) -> state
update(problem, φ, state, context, step, key) -> (φ, state, ‖∇_φ g‖)
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32, Key

from memmeta._shared import checks, trees
from memmeta._shared.readable import named
from memmeta.problem import Context, Params, Problem, Scalar


class InnerSolver(NamedTuple):
    """One way of making an inner step: a pair of pure functions that see the problem.

    Both are given the whole context of the task, as `Problem.embed` made it, under every estimator
    and in `evaluate` alike.

    Attributes:
        init: (problem, φ₀, context) -> state.
        update: (problem, φ, state, context, step, key) -> (φ, state, norm of the gradient at the
            old φ). `step` counts from 0; `key` is the task's own and the same in every step: draw
            from `jax.random.fold_in(key, step)`.
        optimizer: the optax optimiser that makes the steps, if one does.
        carried: whether a loop that goes on from an earlier meta-step keeps the state. False for
            states that were measured at the θ of their time: they are made anew.
        name: what it is called in its repr.

    Example:
        >>> import memmeta as mm
        >>> def update(problem, params, state, context, step, key):
        ...     gradient = jax.grad(problem.inner_loss)(params, context)
        ...     rate = 0.5 / (1 + step.astype(params.dtype))
        ...     return params - rate * gradient, state, jnp.linalg.norm(gradient)
        >>> loop = mm.InnerLoop(InnerSolver(lambda problem, params, context: (), update), steps=5)
    """

    init: Callable[[Problem, Params, Context], Any]
    update: Callable[
        [Problem, Params, Any, Context, Int32[Array, ""], Key[Array, ""]],
        tuple[Params, Any, Scalar],
    ]
    optimizer: optax.GradientTransformationExtraArgs | None = None
    carried: bool = True
    name: str | None = None


@named
def from_optax(optimizer: Any) -> InnerSolver:
    """Steps of an optax optimiser on the inner loss.

    The optimiser is given the loss, its gradient and the loss as a function too, for those with a
    line search. A fixed rate diverges once the curvature exceeds 2/rate, and meta-training raises
    the curvature: prefer `accelerated` unless a published method is to be reproduced as it was run.

    Raises:
        ValueError: it is no optimiser, or one that needs more than one set of parameters.

    Example:
        >>> solver = from_optax(optax.sgd(0.1))
    """
    transformation = as_transformation("solver", optimizer)

    def update(
        problem: Problem, params: Params, state: Any, context: Context, step: Array, key: Array
    ) -> tuple[Params, Any, Scalar]:
        def loss_at(params: Params) -> Scalar:
            return problem.inner_loss(params, context)

        loss, gradient = jax.value_and_grad(loss_at)(params)
        known = about(loss, gradient, loss_at)
        # optax (0.2.8) adds Python numbers and int32 counts to float arrays; the caller may run
        # under strict promotion
        with jax.numpy_dtype_promotion("standard"):
            updates, state = transformation.update(gradient, state, params, **known)
            return optax.apply_updates(params, updates), state, trees.norm(gradient)

    return InnerSolver(lambda _, params, __: transformation.init(params), update, transformation)


def as_transformation(name: str, optimizer: Any) -> optax.GradientTransformationExtraArgs:
    """An optax optimiser as a transformation that takes, or passes over, extra arguments.

    Raises:
        ValueError: it is neither, or keeps two sets of parameters.
    """
    if isinstance(optimizer, optax.MultiSteps):
        optimizer = optimizer.gradient_transformation()
    fits = isinstance(optimizer, optax.GradientTransformation)
    checks.require(name, optimizer, fits, "an optax gradient transformation such as optax.sgd(0.1)")
    two_sets = optimizer.init.__qualname__.startswith("lookahead.")
    expected = "an optimiser of one set of parameters; optax.lookahead keeps two"
    checks.require(name, "optax.lookahead", not two_sets, expected)
    if not isinstance(optimizer, optax.GradientTransformationExtraArgs):
        return optax.with_extra_args_support(optimizer)
    accepted = inspect.signature(optimizer.update).parameters.values()
    names = {parameter.name for parameter in accepted}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted):
        names = {"value", "grad", "value_fn"}  # optax.lbfgs refuses arguments it does not know

    def update(updates: Any, state: Any, params: Any = None, **known: Any) -> Any:
        taken = {name: value for name, value in known.items() if name in names}
        return optimizer.update(updates, state, params, **taken)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def about(loss: Scalar, gradient: Params, loss_at: Callable[[Params], Scalar]) -> dict[str, Any]:
    """What optax optimisers may ask for beside the gradient, by the names they use."""
    grad_fn = lambda params, _: jax.grad(loss_at)(params)  # noqa: E731
    return {"value": loss, "grad": gradient, "value_fn": loss_at, "grad_fn": grad_fn}


def require_derivative_at_zero(solver: InnerSolver, params: Params, reverse: bool) -> None:
    """Refuse an optax optimiser whose update has no derivative where a gradient is zero.

    Gradients of a ReLU network are exactly zero wherever a unit is dead; the derivative of one step
    would be not-a-number there, and with it the hypergradient. Looked at once, when the loop is
    traced, on parameters of one number for each leaf.

    Raises:
        ValueError: with what to write instead.
    """
    if solver.optimizer is None:
        return
    optimizer = solver.optimizer

    @jax.jit
    def derivative(ones: Params) -> Params:
        zeros, state = jax.tree.map(jnp.zeros_like, ones), optimizer.init(ones)

        def update(gradient: Params) -> Params:
            known = about(jnp.float32(0), gradient, lambda _: jnp.float32(0))
            with jax.numpy_dtype_promotion("standard"):
                return optimizer.update(gradient, state, ones, **known)[0]

        if reverse:
            return jax.vjp(update, zeros)[1](ones)
        return jax.jvp(update, (zeros,), (ones,))[1]

    with jax.ensure_compile_time_eval():
        ones = jax.tree.map(lambda leaf: jnp.ones((1,) * leaf.ndim, leaf.dtype), params)
        try:
            finite = bool(trees.all_finite(derivative(ones)))
        except ValueError as error:
            if "Reverse-mode differentiation does not work" not in str(error):
                raise
            raise ValueError(
                "solver: this optax optimiser has a loop of unknown length in each step (a line "
                "search), which has no reverse-mode derivative. Use an estimator that does not "
                "differentiate the steps, such as implicit(), or forward_mode()."
            ) from error
    if not finite:
        raise ValueError(
            "solver: the update of this optax optimiser has no finite derivative at a gradient of "
            "zero, so the hypergradient through its steps would be not-a-number. Give optax.adam "
            "and its kin eps_root=1e-8, clip by value (optax.clip) in place of by global norm, or "
            "use an estimator that does not differentiate the steps, such as implicit()."
        )


def rounding(loss: Scalar) -> Scalar:
    """How much larger a loss can come out by rounding alone: ten units in the last place."""
    return 10 * float(jnp.finfo(loss.dtype).eps) * jnp.abs(loss)
