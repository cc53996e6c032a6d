"""The state of a run of meta-steps."""

from typing import Any, NamedTuple

import jax
import optax
from jaxtyping import Array, Int32, Key

from memmeta.problem import MetaParams, Scalar

DRAWS = 2**31 - 1
"""What keeps the draws of meta-steps apart from those that a caller makes with the same key."""


class MetaState(NamedTuple):
    """Everything a run carries from one meta-step to the next, as one pytree.

    Attributes:
        step: meta-steps done.
        meta_params: θ.
        optimizer: state of the outer optimiser.
        key: PRNG key of the run; what step t draws comes from fold_in(fold_in(key, DRAWS), t), so
            that fold_in(key, 0), fold_in(key, 1), … are free for the caller.
        guard: state of the guard; None without one.
    """

    step: Int32[Array, ""]
    meta_params: MetaParams
    optimizer: optax.OptState
    key: Key[Array, ""]
    guard: Scalar | None


def require_state(state: Any) -> None:
    """Refuse what is no state, and a state whose arrays a former call has taken over.

    Raises:
        ValueError: saying which, and how to go on.
    """
    if not isinstance(state, MetaState):
        raise ValueError(
            f"state: found {type(state).__name__}, expected a MetaState. Begin with state = "
            "step.init(theta), and go on with the state that the step returns."
        )
    counter: Any = state.step
    known = isinstance(counter, jax.Array) and not isinstance(counter, jax.core.Tracer)
    if known and counter.is_deleted():
        raise ValueError(
            "state: found one that a former call has used up, expected the newest. Write state, "
            "metrics = step(state, tasks); jax.tree.map(jnp.copy, state.meta_params) keeps a θ."
        )
