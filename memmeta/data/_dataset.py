"""A labelled data set as one pytree: examples grouped by class, in their stored dtype."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, Shaped


class DataError(ValueError):
    """A data set cannot be used: it is unknown, missing, altered, or too small for the episodes."""


@cache
def say_once(message: str) -> None:
    """Log a message about the data for the user, at most once in a process."""
    logging.getLogger("memmeta").warning("%s", message)


@jax.tree_util.register_dataclass
@no_type_check  # JAX also builds it with placeholders for the arrays: shapes, axes, shardings
@dataclass(frozen=True)
class Dataset:
    """The examples of one split, grouped by class; a pytree that is passed to compiled functions.

    Classes with fewer examples than the largest are padded; `count` says how many are real, and
    the padding is never drawn. Pass a data set to a compiled function as an argument: if the
    function closes over it, it becomes a constant of the compiled program.

    Args:
        inputs: the examples, `[classes, examples, *shape]`; images are `[height, width, channels]`
            of dtype uint8 (0 to 255).
        count: how many real examples each class has.
        group: the superclass of each class (such as its script or category), an index into
            `group_names`.
        family: the kind of each example (such as its font family), an index into `family_names`;
            cross-family episodes take support and query from different families.
        name: the data set's name.
        split: "train", "validation" or "test".
        class_names: the name of each class.
        group_names: the name of each group.
        family_names: the name of each family.
        within_group: whether episodes of this data set draw all classes from one group by default.

    Example:
        >>> import memmeta.data
        >>> test = memmeta.data.load("glyphs", "test")
        >>> test.inputs.shape[1:], str(test.inputs.dtype)
        ((20, 28, 28, 1), 'uint8')
        >>> test.group_names
        ('Sinhala', 'Khmer', 'Telugu', 'Kannada', 'Thai', 'Lao', 'Georgian')
    """

    inputs: Shaped[Array | np.ndarray, "classes examples *shape"]
    count: Int32[Array | np.ndarray, " classes"]
    group: Int32[Array | np.ndarray, " classes"]
    family: Int32[Array | np.ndarray, "classes examples"]
    name: str = field(metadata={"static": True})
    split: str = field(metadata={"static": True})
    class_names: tuple[str, ...] = field(metadata={"static": True})
    group_names: tuple[str, ...] = field(metadata={"static": True})
    family_names: tuple[str, ...] = field(metadata={"static": True})
    within_group: bool = field(default=False, metadata={"static": True})

    @property
    def example_shape(self) -> tuple[int, ...]:
        """The shape of one example."""
        return tuple(self.inputs.shape[2:])

    @classmethod
    def from_arrays(
        cls,
        inputs: Any,
        labels: Sequence[Any] | np.ndarray,
        *,
        groups: Sequence[Any] | np.ndarray | None = None,
        within_group: bool = False,
        name: str = "arrays",
        split: str = "train",
    ) -> "Dataset":
        """Make a data set from arrays of examples and labels.

        Args:
            inputs: `[examples, *shape]`; images are `[examples, height, width, channels]`.
            labels: `[examples]`, the class of each example: whole numbers or names. The classes are
                sorted by them.
            groups: `[examples]`, the superclass of each example, the same throughout a class.
            within_group: whether episodes draw all classes from one group by default.
            name: the data set's name.
            split: "train", "validation" or "test".

        Returns:
            The data set, on the default device.

        Raises:
            DataError: the lengths differ, there is no example, or a class is in two groups.

        Example:
            >>> images = np.zeros((5, 8, 8, 1), np.uint8)
            >>> pets = Dataset.from_arrays(images, ["cat", "dog", "cat", "cow", "dog"])
            >>> pets.class_names, pets.count.tolist()
            (('cat', 'cow', 'dog'), [2, 1, 2])
        """
        inputs, labels = np.asarray(inputs), np.asarray(labels)
        owners = np.zeros(len(labels), int) if groups is None else np.asarray(groups)
        _check_arrays(name, inputs, labels, owners)
        classes, number = np.unique(labels, return_inverse=True)
        group_names, group_of = np.unique(owners, return_inverse=True)
        count = np.bincount(number)
        padded = np.zeros((len(classes), count.max(), *inputs.shape[1:]), inputs.dtype)
        group = np.zeros(len(classes), np.int32)
        for row in range(len(classes)):
            found = np.flatnonzero(number == row)
            padded[row, : len(found)] = inputs[found]
            group[row] = group_of[found[0]]
            if (group_of[found] != group[row]).any():
                raise DataError(f"{name}: groups: the class {classes[row]} is in two groups")
        return cls(
            inputs=jnp.asarray(padded),
            count=jnp.asarray(count.astype(np.int32)),
            group=jnp.asarray(group),
            family=jnp.zeros(padded.shape[:2], jnp.int32),
            name=name,
            split=split,
            class_names=tuple(str(label) for label in classes),
            group_names=("",) if groups is None else tuple(str(label) for label in group_names),
            family_names=("",),
            within_group=within_group,
        )


def _check_arrays(name: str, inputs: np.ndarray, labels: np.ndarray, owners: np.ndarray) -> None:
    if inputs.ndim == 0 or not len(inputs):
        raise DataError(f"{name}: inputs: expected at least one example, found {inputs.shape}")
    if inputs.dtype.kind not in "buif":
        raise DataError(f"{name}: inputs: expected numbers, found {inputs.dtype}")
    for what, found in (("labels", labels), ("groups", owners)):
        if found.shape != inputs.shape[:1] or found.dtype.kind not in "iuUS":
            raise DataError(
                f"{name}: {what}: expected a whole number or a name for each of the {len(inputs)} "
                f"examples, found {found.dtype} {found.shape}"
            )
