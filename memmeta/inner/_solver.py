r"""What makes one inner step: a pair of pure functions, as in optax, that also see the problem.

init(problem, φ₀, context) -> state
update(problem, φ, state, context, step, key) -> (φ, state, ‖∇_φ g‖)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32, Key

from memmeta import trees
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

    Example:
        >>> import memmeta as mm
        >>> def update(problem, params, state, context, step, key):
        ...     slope = jax.grad(problem.inner_loss)(params, context)
        ...     return params - 0.5 / (1 + step) * slope, state, jnp.linalg.norm(slope)
        >>> loop = mm.InnerLoop(InnerSolver(lambda problem, params, context: (), update), steps=5)
    """

    init: Callable[[Problem, Params, Context], Any]
    update: Callable[
        [Problem, Params, Any, Context, Int32[Array, ""], Key[Array, ""]],
        tuple[Params, Any, Scalar],
    ]


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

    def update(
        problem: Problem, params: Params, state: Any, context: Context, step: Array, key: Array
    ) -> tuple[Params, Any, Scalar]:
        gradient = jax.grad(problem.inner_loss)(params, context)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes, users may be strict
            updates, state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state, trees.norm(gradient)

    return InnerSolver(lambda problem, params, context: optimizer.init(params), update)


def rounding(loss: Scalar) -> Scalar:
    """How much a loss may seem to grow by rounding alone."""
    return 10 * float(jnp.finfo(loss.dtype).eps) * jnp.abs(loss)
