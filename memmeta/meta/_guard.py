"""What keeps one bad batch from ruining a run: updates that are looked at before they are kept."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from memmeta import _checks, trees


class Guard(NamedTuple):
    """Refuses updates: θ and the optimiser's state then stay as they are, and the step is counted.

    Make one by `guard`. `make_meta_step(..., guard=None)` follows every update whatever it is.

    Attributes:
        factor: a meta-gradient this many times longer than usual is not followed.
    """

    factor: float

    def init(self, like: Float[Array, ""]) -> Float[Array, ""]:
        """The state before the first step: no gradient has been seen, and none is usual."""
        return jnp.zeros_like(like)

    def accepts(
        self, usual: Float[Array, ""], gradient_norm: Float[Array, ""], proposed: PyTree
    ) -> tuple[Bool[Array, ""], Float[Array, ""]]:
        """Look at one update.

        Args:
            usual: the state: the geometric running mean of the meta-gradient's norm.
            gradient_norm: of this step; not a number where no task was usable.
            proposed: the next θ and optimiser's state.

        Returns:
            Whether to keep them, and the next state. Refused gradients of finite length count in
            the mean too: should they stay long, they are the usual ones after a few steps.
        """
        known = usual > 0
        near = gradient_norm <= jnp.where(known, self.factor * usual, jnp.inf)
        drawn = usual * (gradient_norm / jnp.where(known, usual, 1)) ** 0.1
        followed = jnp.where(known, drawn, gradient_norm)
        counts = (gradient_norm > 0) & jnp.isfinite(followed)
        return near & trees.all_finite(proposed), jnp.where(counts, followed, usual)


def guard(factor: float = 1000.0) -> Guard:
    """A guard against updates that are not finite, or follow a gradient of unusual length.

    Args:
        factor: more than this many times the running mean of ‖∇F‖ is unusual.

    Returns:
        The guard, for `make_meta_step`.

    Raises:
        ValueError: `factor` is no finite number above 1.

    Example:
        >>> keep_all_but_nonsense = guard(factor=1e6)
    """
    _checks.positive("factor", factor)
    _checks.require("factor", factor, factor > 1, "a number above 1")
    return Guard(float(factor))


DEFAULT_GUARD = guard()
