"""Division of classes into train, validation and test: by published lists, or at random."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from memmeta.data._dataset import DataError
from memmeta.data._plan import ClassItems

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class ClassSplit:
    """A published division of classes into splits.

    Attributes:
        name: the data set's name.
        split_of: the split of each label; with `by_group`, the split of each group.
        group_of: the group of each label, for the labels whose group the list gives.
        by_group: whether whole groups are assigned to splits, instead of single labels.
        largest: the number of examples in the largest class; None where it is not known.
    """

    name: str
    split_of: dict[str, str]
    group_of: dict[str, str]
    by_group: bool
    largest: int | None

    @property
    def labels(self) -> set[str]:
        """The labels that the list names; empty where it names only groups."""
        return set(self.group_of if self.by_group else self.split_of)

    def divide(self, classes: Sequence[ClassItems]) -> dict[str, list[ClassItems]]:
        """Assign classes to their splits.

        Args:
            classes: all classes; the last part of a class's name is its label in the list.

        Returns:
            The classes of each split, in the order they were given.

        Raises:
            DataError: a class that the list names is missing, a class has too many examples, or the
                list does not name a class.

        Example:
            >>> pets = ClassSplit("pets", {"cat": "train", "cow": "test"}, {}, False, None)
            >>> pets.divide([ClassItems(name, "", [0]) for name in ("cat", "cow", "dog")])
            Traceback (most recent call last):
            memmeta.data._dataset.DataError: pets: the published split does not name 'dog'
        """
        splits: dict[str, list[ClassItems]] = {split: [] for split in SPLITS}
        missing, unnamed = set(self.labels or self.split_of), []
        for item in classes:
            label = label_of(item)
            grouped = item._replace(group=self.group_of.get(label, item.group))
            entry = grouped.group if self.by_group else label
            if entry not in self.split_of:
                unnamed.append(entry)
                continue
            if self.largest is not None and len(item.items) > self.largest:
                raise DataError(
                    f"{self.name}: the class {item.name} has {len(item.items)} examples, the "
                    f"published data set at most {self.largest}: remove those that are not in it"
                )
            splits[self.split_of[entry]].append(grouped)
            missing -= {label, entry}
        if missing:
            raise DataError(
                f"{self.name}: {len(missing)} of the {len(self.labels or self.split_of)} classes "
                f"or groups that the published split names are not there, such as {min(missing)}: "
                "add them, or name the class folders so"
            )
        if unnamed:
            raise DataError(f"{self.name}: the published split does not name {unnamed[0]!r}")
        return splits

    def check(self, splits: dict[str, list[ClassItems]]) -> dict[str, list[ClassItems]]:
        """Check that the user's own division into splits is the published one.

        Args:
            splits: the user's classes of each split.

        Returns:
            The same splits, with the published groups. Where none of the classes has a published
            name, only the numbers of classes are compared and `splits` is returned unchanged.

        Raises:
            DataError: the divisions differ, or as `divide`.
        """
        found = [len(splits[split]) for split in SPLITS]
        of_labels = Counter(self.split_of[self.group_of.get(x, x)] for x in self.labels)
        expected = [of_labels[split] for split in SPLITS]
        if found != expected:
            raise DataError(
                f"{self.name}: {', '.join(SPLITS)} have {found} classes, the published split has "
                f"{expected}"
            )
        given = {item.name: split for split, classes in splits.items() for item in classes}
        classes = list(chain.from_iterable(splits.values()))
        if self.labels.isdisjoint(map(label_of, classes)):
            return splits
        published = self.divide(classes)
        for split, divided in published.items():
            for item in divided:
                if given[item.name] != split:
                    raise DataError(
                        f"{self.name}: the class {item.name} is in {given[item.name]}, in the "
                        f"published split it is in {split}: move it"
                    )
        return published


def label_of(item: ClassItems) -> str:
    """The label of a class in a published list: its name without the folders above it."""
    return item.name.rpartition("/")[2]


def published_split(name: str) -> ClassSplit:
    """Read the published split of a data set from the JSON file beside this module.

    Args:
        name: the data set's name, such as "cifar_fs".

    Returns:
        The split.

    Example:
        >>> published_split("tiered_imagenet").group_of["n02174001"]  # rhinoceros beetle: insect
        'n02159955'
    """
    content = json.loads((Path(__file__).parent / f"{name}.json").read_text(encoding="utf-8"))
    groups = content.get("groups", {})
    return ClassSplit(
        name,
        {entry: split for split in SPLITS for entry in content["splits"][split]},
        {label: group for group, labels in groups.items() for label in labels},
        content["by"] != "label",
        content.get("largest"),
    )


def drawn_split(
    classes: Sequence[ClassItems], seed: int, train: int, validation: int
) -> dict[str, list[ClassItems]]:
    """Divide classes at random; the result depends on the seed and the names alone.

    Args:
        classes: at least three classes.
        seed: the seed of the random division.
        train: number of classes in the train split.
        validation: number of classes in the validation split; the test split gets the rest. The
            numbers are adjusted so that no split is empty.

    Returns:
        The classes of each split, in the order they were given.

    Raises:
        DataError: there are fewer than three classes.

    Example:
        >>> classes = [ClassItems(letter, "", ()) for letter in "abcdefghij"]
        >>> {split: len(found) for split, found in drawn_split(classes, 0, 6, 2).items()}
        {'train': 6, 'validation': 2, 'test': 2}
        >>> few = drawn_split(classes[:3], 0, 50, 50)
        >>> [len(found) for found in few.values()], few == drawn_split(classes[2::-1], 0, 0, 0)
        ([1, 1, 1], True)
    """
    if len(classes) < len(SPLITS):
        raise DataError(f"found {len(classes)} classes, expected at least {len(SPLITS)}")

    def lot(number: int) -> bytes:
        return hashlib.sha256(f"{seed}/{classes[number].name}".encode()).digest()

    order = sorted(range(len(classes)), key=lot)
    first = min(max(train, 1), len(order) - 2)
    second = min(max(train + validation, first + 1), len(order) - 1)
    parts = (order[:first], order[first:second], order[second:])
    return {
        split: [classes[number] for number in sorted(part)]
        for split, part in zip(SPLITS, parts, strict=True)
    }
