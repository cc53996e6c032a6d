"""What to convert: the classes of each split, and how one example is read."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from memmeta.data._dataset import DataError


class ClassItems(NamedTuple):
    """One class of a data set to convert: its name, its group, and where its examples are.

    `stamp` changes when the examples do, as far as that can be seen without reading them.
    """

    name: str
    group: str
    items: Sequence[Any]
    stamp: str = ""


@dataclass(frozen=True)
class Plan:
    """What to convert.

    Attributes:
        name: the data set's name.
        shape: of every example.
        splits: the classes of each split.
        read: item -> one example, uint8 of that shape; called from several threads.
        within_group: see `Dataset`.
    """

    name: str
    shape: tuple[int, ...]
    splits: dict[str, list[ClassItems]]
    read: Callable[[Any], np.ndarray]
    within_group: bool = False

    def check(self) -> None:
        """Refuse a plan whose classes are empty, or are in two splits or twice in one.

        Raises:
            DataError: it is such a plan.
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
        """What tells this plan from another: names, numbers and order of everything in it."""
        unstamped = {
            split: [item._replace(stamp="") for item in classes]
            for split, classes in self.splits.items()
        }
        return fingerprint(unstamped, (self.name, self.shape))


def fingerprint(splits: dict[str, list[ClassItems]], about: Any = None) -> str:
    """What tells some classes from others: names, numbers, stamps and order of all in them."""
    digest = hashlib.sha256(repr(about).encode())
    for split, classes in sorted(splits.items()):
        digest.update(repr((split, [tuple(item) for item in classes])).encode())
    return digest.hexdigest()
