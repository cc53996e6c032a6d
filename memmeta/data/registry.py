"""The one list of data sets, `load` to get one by name, and `sampler` to draw its tasks."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

from jaxtyping import Array, Int, PRNGKeyArray

from memmeta.data import glyphs, sinusoid, tides
from memmeta.data.curves import Points
from memmeta.data.dataset import DataError, Dataset
from memmeta.data.episodes import Episodes
from memmeta.problem import Task

Split: TypeAlias = Dataset | sinusoid.Sinusoid | tides.Tides
"""One split of a data set: classes of examples, or a family of curves."""


class Source(NamedTuple):
    """Where a data set comes from: its name, its splits, and the function that loads a split."""

    name: str
    splits: tuple[str, ...]
    load: Callable[[str, Path | None], Split]


# Adding a data set is one file and one line here.
SOURCES = [
    Source("glyphs", glyphs.SPLITS, glyphs.load_glyphs),
    Source("tides", tides.SPLITS, tides.load_tides),
    Source("sinusoid", sinusoid.SPLITS, sinusoid.load_sinusoid),
]


@runtime_checkable
class Sampler(Protocol):
    """What draws the tasks of a data set; `Episodes` and `Points` are the two."""

    def check(self, dataset: Split) -> None:
        """Raise `DataError` if such tasks cannot be drawn from the data."""
        ...

    def sample_batch(
        self, dataset: Split, key: PRNGKeyArray, tasks: int, first: int | Int[Array, ""] = 0
    ) -> Task:
        """Draw tasks number `first` to `first + tasks - 1` of the list that `key` names."""
        ...


def load(name: str, split: str, data_dir: str | Path | None = None) -> Split:
    """Load one split of a data set onto the default device.

    Args:
        name: the data set's name, one of those in `SOURCES`.
        split: the split's name; no class is in two splits.
        data_dir: the folder of data sets that are not embedded in the package.

    Returns:
        The split: a `Dataset`, its examples grouped by class and stored as uint8, or a family of
        curves. `sampler` gives what draws tasks from it.

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


def sampler(
    dataset: Split,
    *,
    ways: int = 5,
    shots: int = 5,
    queries: int = 15,
    cross_family: bool = False,
) -> Episodes | Points:
    """The sampler that belongs to a data set: `Episodes` of classes, or `Points` of curves.

    Args:
        dataset: from `load`.
        ways: classes in a task; curves have none and take no notice of it.
        shots: support examples of each class, or support points.
        queries: query examples of each class, or query points.
        cross_family: see `Episodes`; only for classes.

    Returns:
        The sampler; both kinds are frozen dataclasses with `check` and `sample_batch`.

    Raises:
        DataError: `cross_family` is asked of curves.

    Example:
        >>> sampler(load("tides", "train"), shots=10)
        Points(shots=10, queries=15)
    """
    if isinstance(dataset, Dataset):
        return Episodes(ways, shots, queries, cross_family=cross_family)
    if cross_family:
        raise DataError(f"cross_family=True: {dataset.name} has curves, not families of examples")
    return Points(shots, queries)
