"""Checks of a batch of few-shot tasks, before anything is compiled."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from memmeta.few_shot._examples import Loss
from memmeta.problem import Task


def check_tasks(ways: int, loss: Loss | None, tasks: Any) -> None:
    """Refuse a batch of tasks whose targets the losses cannot read.

    Shapes and dtypes are checked always, values outside compiled code only: inside, a task with a
    label that no output stands for is left out and counted.

    Args:
        ways: outputs of the network.
        loss: the user's own, which may read targets of any kind.
        tasks: a `Task` whose leaves have a leading axis of tasks.

    Raises:
        ValueError: naming the leaf of the batch, what it holds and what to write.

    Example:
        >>> images, labels = jnp.ones((1, 2, 8)), jnp.array([[1, 2]])
        >>> try:
        ...     check_tasks(2, None, Task(images, labels, images, labels))
        ... except ValueError as error:
        ...     print(str(error).partition("expected ")[2])
        class indices from 0 to 1 (-1 is padding). Subtract 1.
    """
    if not isinstance(tasks, Task):
        raise ValueError(
            f"tasks: found {type(tasks).__name__}, expected a memmeta.Task. Write memmeta.Task("
            "support_inputs, support_targets, query_inputs, query_targets), each with a leading "
            "axis of tasks."
        )
    _check_extras(tasks.extras)
    for part in ("support", "query"):
        inputs, targets = (getattr(tasks, f"{part}_{kind}") for kind in ("inputs", "targets"))
        name, shape = f"{part}_targets", np.shape(targets)
        try:
            chex.assert_equal_shape_prefix([targets, *jax.tree.leaves(inputs)], 2)
        except AssertionError as error:
            raise ValueError(
                f"{name}: found shape {list(shape)} beside {part}_inputs of "
                f"{jax.tree.map(np.shape, inputs)}, expected the same two leading axes: tasks, "
                "examples."
            ) from error
        if loss is None:
            _check_kind(name, targets, ways)
            if not isinstance(targets, jax.core.Tracer):
                _check_values(name, np.asarray(targets), ways)


def _check_extras(extras: Any) -> None:
    """Refuse keys under another name, with which dropout would be off without a word."""
    keys = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(extras)
        if jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)
    ]
    if keys and not (isinstance(extras, dict) and "key" in extras):
        raise ValueError(
            f"extras: found PRNG keys at extras{', extras'.join(keys)}, expected them as "
            '{"key": keys}, which networks draw their noise of. Write tasks._replace('
            'extras={"key": keys}).'
        )


def _check_kind(name: str, targets: Any, ways: int) -> None:
    shape, dtype = np.shape(targets), jnp.result_type(targets)
    found = f"{name}: found {dtype}{list(shape)}, expected "
    if jnp.issubdtype(dtype, jnp.floating):
        if len(shape) == 2 and ways == 1:
            raise ValueError(f"{found}[tasks, examples, 1]. Write targets[..., None].")
        if len(shape) != 3 or shape[-1] != ways:
            raise ValueError(
                f"{found}class indices as integers [tasks, examples], or values "
                f"[tasks, examples, {ways}] for the {ways} outputs. Write targets.astype(int) for "
                "the first."
            )
    elif not jnp.issubdtype(dtype, jnp.signedinteger):
        raise ValueError(f"{found}signed integers or floating point. Write targets.astype(int).")
    elif len(shape) != 2:
        remedy = "targets[..., 0]" if shape[-1] == 1 else "targets.argmax(-1)"
        raise ValueError(f"{found}class indices [tasks, examples]. Write {remedy}.")


def _check_values(name: str, targets: np.ndarray, ways: int) -> None:
    if targets.ndim == 3:
        one_hot = np.isin(targets, (0, 1)).all() and (targets.sum(-1) == 1).all()
        if one_hot and ways > 1:
            raise ValueError(
                f"{name}: found one-hot rows, expected class indices. Write targets.argmax(-1), or "
                "give the method a loss of your own that reads rows."
            )
        return
    low, high = int(targets.min(initial=0)), int(targets.max(initial=-1))
    if low < -1 or high >= ways:
        lowest = int(targets[targets >= 0].min(initial=high))
        remedy = "Subtract 1." if lowest == 1 and high == ways else f"Make {high + 1} outputs."
        raise ValueError(
            f"{name}: found labels from {min(low, lowest)} to {high}, expected class indices from "
            f"0 to {ways - 1} (-1 is padding). {remedy}"
        )
