"""The one list of data sets, `load` to get one by name, and `sampler` to draw its tasks."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeAlias

from memmeta._shared import checks
from memmeta.data import _emoji as emoji
from memmeta.data import _folders as folders
from memmeta.data import _from_tfds as from_tfds
from memmeta.data import _glyphs as glyphs
from memmeta.data import _npz as npz
from memmeta.data import _sinusoid as sinusoid
from memmeta.data import _tides as tides
from memmeta.data._augmentation import Augmentation
from memmeta.data._class_splits import SPLITS
from memmeta.data._curves import Points
from memmeta.data._dataset import DataError, Dataset
from memmeta.data._episodes import Episodes
from memmeta.data._host import HostDataset, HostEpisodes, on_host
from memmeta.data._reading import Reading
from memmeta.data._resize import resized_dataset

Split: TypeAlias = Dataset | sinusoid.Sinusoid | tides.Tides
"""One split of a data set: classes of examples, or a family of curves."""


class Source(NamedTuple):
    """An entry in the list of data sets.

    Attributes:
        name: the data set's name; one that ends in a colon stands for all names that begin with it.
        load: function of (name, split, data_dir) that returns the split.
        outside: whether it reads or makes files outside the package; `load` then takes a `Reading`
            as its fourth argument. Data sets in memory get their size and channels afterwards.
    """

    name: str
    load: Callable[..., Split | HostDataset]
    outside: bool = False


SOURCES = [
    Source("glyphs", lambda _, split, data_dir: glyphs.load_glyphs(split, data_dir)),
    Source("emoji", lambda _, split, data_dir: emoji.load_emoji(split, data_dir)),
    Source("tides", lambda _, split, data_dir: tides.load_tides(split, data_dir)),
    Source("sinusoid", lambda _, split, data_dir: sinusoid.load_sinusoid(split, data_dir)),
    Source("omniglot", from_tfds.load_tfds, outside=True),
    Source("omniglot_alphabets", from_tfds.load_tfds, outside=True),
    Source("cifar_fs", from_tfds.load_tfds, outside=True),
    Source("fc100", from_tfds.load_tfds, outside=True),
    Source("tfds:", from_tfds.load_tfds, outside=True),
    Source("mini_imagenet", folders.load_folder, outside=True),
    Source("tiered_imagenet", folders.load_folder, outside=True),
    Source("npz", npz.load_npz, outside=True),
    Source("folder", folders.load_folder, outside=True),
    Source("folder:", folders.load_folder, outside=True),
]
"""Every data set; a new one needs a module of its own and a line here."""


def load(
    name: str, split: str, data_dir: str | Path | None = None, reading: Reading = Reading()
) -> Split:
    """Load one split of a data set onto the default device.

    Args:
        name: the data set's name: "glyphs", "emoji", "tides" and "sinusoid" need no files;
            "omniglot", "omniglot_alphabets", "cifar_fs", "fc100" and "tfds:NAME" are downloaded;
            "mini_imagenet", "tiered_imagenet", "folder", "folder:SEED" and "npz" are files in
            `data_dir`.
        split: "train", "validation" or "test"; no class is in two splits.
        data_dir: the folder of data sets that are not embedded in the package.
        reading: the size and the channels of images, how files are read, and limits on them.

    Returns:
        The split: a `Dataset`, with examples grouped by class and stored as uint8, or a family of
        curves. `sampler` returns the object that draws tasks from it.

    Raises:
        DataError: the name or the split is unknown; the files are missing, truncated or altered;
            or a package that is needed to read them is not installed.

    Example:
        >>> train = load("glyphs", "train")
        >>> len(train.class_names), train.group_names[:3]
        (1259, ('Latin', 'Greek', 'Cyrillic'))
    """
    found = _load(name, split, data_dir, reading)
    return found.to_device() if isinstance(found, HostDataset) else found


def load_host(
    name: str, split: str, data_dir: str | Path | None = None, reading: Reading = Reading()
) -> HostDataset:
    """Load one split of a data set and leave its examples on the host.

    For data larger than the device's memory. Data sets that are converted from files are
    memory-mapped, the others are in the host's memory. `HostEpisodes` draws the tasks.

    Args:
        name: as for `load`.
        split: as for `load`.
        data_dir: as for `load`.
        reading: as for `load`.

    Returns:
        The split.

    Raises:
        DataError: as `load`; or the data set is a family of curves.
    """
    found = _load(name, split, data_dir, reading)
    if isinstance(found, Dataset):
        return on_host(found)
    if not isinstance(found, HostDataset):
        raise DataError(f"{name}: its curves are generated on the device; use load")
    return found


def touches_files(name: str, data_dir: Path | None, reading: Reading = Reading()) -> bool:
    """Whether loading a data set now would use files outside the package and the user's cache.

    Args:
        name: as for `load`.
        data_dir: as for `load`.
        reading: as for `load`.

    Raises:
        DataError: the name is unknown.
    """
    if not _source(name).outside:
        return False
    return data_dir is not None or not from_tfds.is_converted(name, reading)


def _source(name: str) -> Source:
    def fits(source: Source) -> bool:
        begins = source.name.endswith(":") and name.startswith(source.name)
        return name != source.name if begins else name == source.name

    source = next((source for source in SOURCES if fits(source)), None)
    if source is None:
        known = ", ".join(s.name + "..." * s.name.endswith(":") for s in SOURCES)
        near = checks.meant(name, [source.name for source in SOURCES])
        raise DataError(f"unknown data set {name!r}: choose one of {known}.{near}")
    return source


def _load(
    name: str, split: str, data_dir: str | Path | None, reading: Reading
) -> Split | HostDataset:
    source = _source(name)
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r} of {name}: choose one of {', '.join(SPLITS)}")
    place = None if data_dir is None else Path(data_dir)
    found = source.load(name, split, place, *([reading] if source.outside else []))
    if isinstance(found, HostDataset):
        return found  # converted to its size
    if isinstance(found, Dataset):
        return resized_dataset(found, reading)
    if (reading.size, reading.channels) != (None, None):
        raise DataError(f"channels and image_size: {name} has curves and no images")
    return found


def sampler(
    dataset: Split | HostDataset,
    *,
    ways: int | tuple[int, int] = 5,
    shots: int | tuple[int, int] = 5,
    queries: int = 15,
    within_group: bool | None = None,
    cross_family: bool = False,
    augmentation: Augmentation | None = None,
) -> Episodes | HostEpisodes | Points:
    """The sampler that fits a data set: `Episodes` for classes, `Points` for curves.

    Args:
        dataset: a split from `load`, or from `load_host`, whose sampler is `HostEpisodes`.
        ways: classes in a task, see `Episodes`; ignored for curves.
        shots: support examples of each class, or support points of a curve.
        queries: query examples of each class, or query points of a curve.
        within_group: see `Episodes`; only for classes.
        cross_family: see `Episodes`; only for classes.
        augmentation: applied to the images, see `Episodes`; only for classes.

    Returns:
        The sampler; every kind is a frozen dataclass with `check` and `sample_batch`.

    Raises:
        DataError: the data set has curves, and `within_group`, `cross_family`, an augmentation or a
            range of shots was given.

    Example:
        >>> sampler(load("tides", "train"), shots=10)
        Points(shots=10, queries=15)
    """
    if isinstance(dataset, Dataset | HostDataset):
        episodes = Episodes(ways, shots, queries, within_group, cross_family, augmentation)
        return episodes if isinstance(dataset, Dataset) else HostEpisodes(episodes)
    if within_group or cross_family or augmentation is not None or not isinstance(shots, int):
        raise DataError(
            f"{dataset.name} has curves: within_group, cross_family, augmentation and a range of "
            "shots are for classes of examples"
        )
    return Points(shots, queries)
