"""When a member of a population begins anew: conditions on what is known of one member.

reset(key, steps, report) -> bool
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
from jaxtyping import Array, Bool, Int32, Key

from memmeta._shared import checks
from memmeta._shared.readable import named
from memmeta.hypergradient import Report

Reset: TypeAlias = Callable[[Key[Array, ""], Int32[Array, ""], Report], Bool[Array, ""]]
"""(the member's key, the same throughout its life, inner steps made in it, its last report)."""

LIFETIME = 2**31 - 3
"""What keeps a lifetime apart from the other draws that are made with a member's key."""


@named
def reset_every(steps: int) -> Reset:
    """A member begins anew once it has made so many inner steps.

    Args:
        steps: inner steps of a life, rounded up to whole windows.

    Returns:
        The condition, for `WarmStart(..., reset=...)`.

    Raises:
        ValueError: `steps` is no whole number above 0.

    Example:
        >>> bool(reset_every(100)(jax.random.key(0), jax.numpy.int32(100), None))
        True
    """
    checks.count("steps", steps)
    return lambda key, made, report: made >= steps


@named
def lifetimes(least: int, most: int) -> Reset:
    """A member begins anew after a number of inner steps that is drawn for each of its lives.

    Members so come to be of different ages, and a meta-step sees all parts of an inner run.

    Args:
        least: inner steps of the shortest life.
        most: inner steps of the longest one; all from `least` to `most` are as likely.

    Returns:
        The condition, for `WarmStart(..., reset=...)`.

    Raises:
        ValueError: one is no whole number above 0, or `most` is less than `least`.

    Example:
        >>> condition, made = lifetimes(50, 100), jax.numpy.array([49, 100], "int32")
        >>> jax.vmap(lambda made: condition(jax.random.key(0), made, None))(made).tolist()
        [False, True]
    """
    checks.count("least", least)
    checks.count("most", most)
    checks.require("most", most, most >= least, f"at least {least}, the shortest life")

    def reset(key: Key[Array, ""], made: Int32[Array, ""], report: Any) -> Bool[Array, ""]:
        own = jax.random.fold_in(key, LIFETIME)
        return made >= jax.random.randint(own, (), least, most + 1)

    return reset
