"""Endless sequences of tasks: task i depends only on the sequence's key and on i."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key, PRNGKeyArray

from memmeta.problem import Task


def task_keys(
    key: PRNGKeyArray, tasks: int, first: int | Int[Array, ""] = 0
) -> Key[Array, " tasks"]:
    """The keys of tasks number `first` to `first + tasks - 1` of the sequence that `key` defines.

    Args:
        key: the PRNG key of the sequence.
        tasks: how many keys.
        first: the number of the first task; may be traced.

    Returns:
        `[tasks]` keys; the key of task number i is `jax.random.fold_in(key, i)`.

    Example:
        >>> keys = task_keys(jax.random.key(0), 3, first=1)
        >>> bool(keys[0] == jax.random.fold_in(jax.random.key(0), 1))
        True
    """
    numbers = jnp.asarray(first, jnp.uint32) + jnp.arange(tasks, dtype=jnp.uint32)
    return jax.vmap(lambda i: jax.random.fold_in(key, i))(numbers)


def sample_numbered(
    sample: Callable[[PRNGKeyArray], Task],
    key: PRNGKeyArray,
    tasks: int,
    first: int | Int[Array, ""] = 0,
) -> Task:
    """Draw tasks number `first` to `first + tasks - 1` of the sequence that `key` defines.

    Drawing them in several calls or on several devices gives the same tasks.

    Args:
        sample: function that draws one task from the task's own key.
        key: the PRNG key of the sequence.
        tasks: how many tasks to draw.
        first: the number of the first task; may be traced.

    Returns:
        The tasks, every array with a leading axis of length `tasks`.
    """
    return jax.vmap(sample)(task_keys(key, tasks, first))
