"""How classes are divided into train, validation and test: published lists, or a draw by seed."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from memmeta.data.dataset import DataError
from memmeta.data.plan import ClassItems

SPLITS = ("train", "validation", "test")


def read_class_split(name: str, classes: Sequence[ClassItems]) -> dict[str, list[ClassItems]]:
    """Divide classes as the published split says that lies beside this file, with its source.

    Args:
        name: the split's name, such as "cifar_fs".
        classes: all of them.

    Returns:
        The classes of each split.

    Raises:
        DataError: the classes are not those that the split divides.
    """
    content = json.loads((Path(__file__).parent / f"{name}.json").read_text(encoding="utf-8"))
    listed = {entry: split for split in SPLITS for entry in content["splits"][split]}
    splits: dict[str, list[ClassItems]] = {split: [] for split in SPLITS}
    for item in classes:
        entry = item.name if content["by"] == "label" else item.group
        if entry not in listed:
            raise DataError(f"{name}: the published split does not name {entry!r}")
        splits[listed[entry]].append(item)
    return splits


def drawn_split(
    classes: Sequence[ClassItems], seed: int, train: int, validation: int
) -> dict[str, list[ClassItems]]:
    """Divide classes at random, by seed and names alone, so the same way on every machine.

    Args:
        classes: at least three.
        seed: of the draw.
        train: classes of the train split.
        validation: classes of the validation split; the test split gets the rest. No split is left
            empty.

    Returns:
        The classes of each split, in their order.

    Raises:
        DataError: there are fewer than three classes.

    Example:
        >>> classes = [ClassItems(letter, "", ()) for letter in "abcdefghij"]
        >>> {split: len(found) for split, found in drawn_split(classes, 0, 6, 2).items()}
        {'train': 6, 'validation': 2, 'test': 2}
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
