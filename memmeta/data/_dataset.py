"""A labelled data set as one pytree: examples grouped by class, on the device as stored."""

from dataclasses import dataclass, field
from typing import no_type_check

import jax
import numpy as np
from jaxtyping import Array, Int32, Shaped


class DataError(ValueError):
    """A data set cannot be used: it is unknown, missing, altered, or too small for the episodes."""


@jax.tree_util.register_dataclass
@no_type_check  # JAX also builds it with stand-ins for the arrays: shapes, axes, shardings
@dataclass(frozen=True)
class Dataset:
    """The examples of one split, grouped by class; a pytree that is passed to compiled functions.

    Classes with fewer examples than the largest are padded; `count` says how many are real and
    the padding is never drawn. Pass a data set to `jax.jit` as an argument: closed over, it would
    become a constant of the compiled program.

    Args:
        inputs: the examples, `[classes, examples, *shape]`; images are `[height, width, channels]`
            of dtype uint8 (0 to 255).
        count: examples really present in each class.
        group: the superclass of each class (its script, its category), an index into
            `group_names`.
        family: the kind of each example (its font family), an index into `family_names`; what
            cross-family episodes keep apart.
        name: the data set's name.
        split: "train", "validation" or "test".
        class_names: one name a class.
        group_names: one name a group.
        family_names: one name a family.
        within_group: whether the usual episodes of these data draw all classes from one group.

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
