"""The one list of data sets, and `load`, which finds them by name."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from memmeta.data import glyphs
from memmeta.data.dataset import DataError, Dataset


class Source(NamedTuple):
    """Where a data set comes from: its name, its splits, and the function that loads a split."""

    name: str
    splits: tuple[str, ...]
    load: Callable[[str, Path | None], Dataset]


# Adding a data set is one file and one line here.
SOURCES = [
    Source("glyphs", glyphs.SPLITS, glyphs.load_glyphs),
]


def load(name: str, split: str, data_dir: str | Path | None = None) -> Dataset:
    """Load one split of a data set onto the default device.

    Args:
        name: the data set's name, one of those in `SOURCES`.
        split: the split's name; no class is in two splits.
        data_dir: the folder of data sets that are not embedded in the package.

    Returns:
        The data set, its examples grouped by class and stored as uint8.

    Raises:
        DataError: the name or the split is unknown; the archive is missing, truncated or altered.

    Example:
        >>> train = load("glyphs", "train")
        >>> len(train.class_names), train.group_names[:3]
        (1181, ('Latin', 'Greek', 'Cyrillic'))
    """
    source = next((source for source in SOURCES if source.name == name), None)
    if source is None:
        known = ", ".join(source.name for source in SOURCES)
        raise DataError(f"unknown data set {name!r}: choose one of {known}")
    if split not in source.splits:
        raise DataError(
            f"unknown split {split!r} of {name}: choose one of {', '.join(source.splits)}"
        )
    return source.load(split, None if data_dir is None else Path(data_dir))
