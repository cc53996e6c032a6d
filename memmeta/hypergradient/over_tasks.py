"""`vmap` over a chunk of tasks, which is often one task."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from memmeta import trees


def over_tasks(function: Callable, *arguments: PyTree) -> PyTree:
    """`jax.vmap(function)(*arguments)`; of one task without `vmap`.

    An axis of one task would have XLA copy arrays between layouts that are the same in memory, and
    make both branches of every condition.

    Args:
        function: of one task.
        arguments: pytrees whose leaves have a leading axis of tasks.

    Returns:
        What the function returns, each leaf with a leading axis of tasks.

    Example:
        >>> over_tasks(lambda x, y: x * y, jnp.ones((1, 3)), jnp.ones((1, 3))).shape
        (1, 3)
    """
    if trees.leading_size(arguments, "tasks") > 1:
        return jax.vmap(function)(*arguments)
    one = jax.tree.map(lambda leaf: jnp.squeeze(leaf, 0), arguments)
    return jax.tree.map(lambda leaf: jnp.expand_dims(leaf, 0), function(*one))
