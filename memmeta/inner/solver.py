r"""What makes one inner step: a pair of pure functions, as in optax, that also see the problem.

    init(problem, φ₀, context) -> state
    update(problem, φ, state, context) -> (φ, state, ‖∇_φ g‖)

Any optax optimiser is one through `from_optax`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from memmeta import trees
from memmeta.problem import Context, Params, Problem, Scalar


class InnerSolver(NamedTuple):
    """One way of making an inner step: a pair of pure functions that see the problem.

    Attributes:
        init: (problem, φ₀, context) -> state.
        update: (problem, φ, state, context) -> (φ, state, norm of the gradient at the old φ).
    """

    init: Callable[[Problem, Params, Context], Any]
    update: Callable[[Problem, Params, Any, Context], tuple[Params, Any, Scalar]]


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


def rounding(loss: Scalar) -> Scalar:
    """How much a loss may seem to grow by rounding alone."""
    return 10 * float(jnp.finfo(loss.dtype).eps) * jnp.abs(loss)
