"""The plan of a conversion: the classes of each split, and how one example is read."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from memmeta.data._dataset import DataError


class ClassItems(NamedTuple):
    """One class of a data set to convert.

    Attributes:
        name: the class's name.
        group: the name of its group.
        items: one entry for each example, which `Plan.read` turns into the example.
        stamp: a text that changes when the examples change, as far as file sizes and times show it.
    """

    name: str
    group: str
    items: Sequence[Any]
    stamp: str = ""


@dataclass(frozen=True)
class Plan:
    """The plan of a conversion.

    Attributes:
        name: the data set's name.
        shape: the shape of every example.
        splits: the classes of each split.
        read: function from an item of a class to the example, uint8 of that shape; it is called
            from several threads.
        within_group: see `Dataset`.
    """

    name: str
    shape: tuple[int, ...]
    splits: dict[str, list[ClassItems]]
    read: Callable[[Any], np.ndarray]
    within_group: bool = False

    def check(self) -> None:
        """Check that no split or class is empty, and that every class name occurs once.

        Raises:
            DataError: a split or class is empty, or a class name occurs twice.
        """
        for split, classes in self.splits.items():
            if not classes:
                raise DataError(f"{self.name}: the split {split} has no classes")
            for item in classes:
                if not item.items:
                    raise DataError(
                        f"{self.name}: the class {item.name} of {split} is empty: "
                        "add examples or remove it"
                    )
        names = Counter(item.name for classes in self.splits.values() for item in classes)
        name, times = names.most_common(1)[0]
        if times > 1:
            where = [s for s, found in self.splits.items() if name in [item.name for item in found]]
            raise DataError(
                f"{self.name}: the class {name} is there {times} times (in {', '.join(where)}): "
                "a class must have one name and be in one split"
            )

    def fingerprint(self) -> str:
        """A hash of the names and items of all classes in order; it leaves the stamps out."""
        unstamped = {
            split: [item._replace(stamp="") for item in classes]
            for split, classes in self.splits.items()
        }
        return fingerprint(unstamped, (self.name, self.shape))


def fingerprint(splits: dict[str, list[ClassItems]], about: Any = None) -> str:
    """A hash of the names, groups, items and stamps of all classes in order, and of `about`."""
    digest = hashlib.sha256(repr(about).encode())
    for split, classes in sorted(splits.items()):
        digest.update(repr((split, [tuple(item) for item in classes])).encode())
    return digest.hexdigest()
