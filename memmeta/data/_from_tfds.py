"""Data sets from tensorflow-datasets: `omniglot`, `cifar_fs`, `fc100`, and any other by name.

They are read from ArrayRecord files without TensorFlow, then converted to a cache of memmeta's own.
Only the first download and preparation of the files needs TensorFlow, in a separate process.
"""

import importlib.util
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from memmeta.data._cache import MANIFEST, ensure_cache, open_cache
from memmeta.data._class_splits import drawn_split, published_split
from memmeta.data._dataset import DataError
from memmeta.data._files import user_cache
from memmeta.data._host import HostDataset, with_rotations
from memmeta.data._images import decoded, resized, with_channels
from memmeta.data._plan import ClassItems, Plan
from memmeta.data._reading import Reading

READ_PIP = "pip install 'memmeta[tfds]'"
PREPARE_PIP = "pip install 'memmeta[tfds-prepare]'"
LARGEST = 84  # side in pixels of `tfds:NAME` images that are larger, not square, or of varying size
PREPARE = """
import sys
import tensorflow_datasets as tfds
builder = tfds.builder(sys.argv[1], data_dir=sys.argv[2] or None, file_format="array_record")
builder.download_and_prepare()
"""


@dataclass(frozen=True)
class Source:
    """A prepared data set of tensorflow-datasets: its labels in memory, its examples on disk.

    Its own splits ("train", "test") are not the splits of classes that memmeta makes.

    Attributes:
        examples: for each of its own splits, the examples by number.
        labels: for each of its own splits and each label feature, the label of every example.
        label_names: for each label feature, the names of the labels.
        channels: the number of channels of its images.
    """

    examples: dict[str, Any]
    labels: dict[str, dict[str, np.ndarray]]
    label_names: dict[str, list[str]]
    channels: int = 3

    def classes(self, group: str | None, splits: Iterable[str]) -> list[ClassItems]:
        """The classes in some of its own splits; a class's items are (split, number) pairs.

        Args:
            group: the label feature with the group of each class; None for no groups.
            splits: which of its own splits to read.
        """
        found: dict[int, list[tuple[str, int]]] = {}
        groups: dict[int, str] = {}
        for split in splits:
            labels = self.labels[split]
            for number, label in enumerate(labels["label"].tolist()):
                if label >= 0:  # -1 marks the examples of test sets without labels
                    found.setdefault(label, []).append((split, number))
                    if group is not None:
                        groups[label] = self.label_names[group][labels[group][number]]
        names = self.label_names["label"]
        return [ClassItems(names[k], groups.get(k, ""), tuple(found[k])) for k in sorted(found)]


def load_tfds(
    name: str, split: str, data_dir: Path | None, reading: Reading = Reading()
) -> HostDataset:
    """Load one split from tensorflow-datasets, downloaded and converted on first use.

    - `omniglot`: 28 x 28, white on black; 1100, 100 and 423 characters drawn at random from all
      alphabets, as papers on MAML do. Each character rotated by 90, 180 or 270 degrees is a class
      of its own.
    - `omniglot_alphabets`: 28 x 28, white on black. Train and validation are 25 and 5 of the 30
      alphabets that Omniglot's authors call the background set, and test is the 20 others. Groups
      are alphabets.
    - `cifar_fs` and `fc100`: 32 x 32 RGB with the published class splits, stored in
      `memmeta/data/_class_splits`. Groups are the superclasses.
    - `tfds:NAME`: any builder with the features image and label. 64, 16 and 20 % of the classes are
      assigned to the splits at random.

    Args:
        name: the data set's name.
        split: "train", "validation" or "test".
        data_dir: the folder of tensorflow-datasets; None: its own default.
        reading: how images are made from the files.

    Returns:
        The split, memory-mapped; `omniglot`, with its rotations, in memory.

    Raises:
        DataError: a package is not installed (the message has the pip command), the download
            failed, or the builder does not have images and labels.
    """
    cache = _cache_of(name, data_dir, reading)
    ensure_cache(cache, lambda: make_plan(name, data_dir, reading), reading.progress)
    dataset = open_cache(cache, split, reading.progress)
    return with_rotations(dataset) if name == "omniglot" else dataset


def _cache_of(name: str, data_dir: Path | None, reading: Reading) -> Path:
    caches = user_cache() / "data" if data_dir is None else data_dir / ".memmeta"
    return caches / f"{name.replace(':', '-').replace('/', '-')}{reading.name}"


def is_converted(name: str, reading: Reading) -> bool:
    """Whether the user's default cache has a data set already."""
    return (_cache_of(name, None, reading) / MANIFEST).is_file()


def make_plan(name: str, data_dir: Path | None, reading: Reading = Reading()) -> Plan:
    """Find the classes and examples of each split, after downloading the data where needed.

    Args:
        name: the data set's name.
        data_dir: as for `load_tfds`.
        reading: as for `load_tfds`.

    Returns:
        The plan of the conversion.

    Raises:
        DataError: as `load_tfds`.
    """
    if name.startswith("omniglot"):
        return _omniglot(name, data_dir, reading)
    if name.startswith("tfds:"):
        return _any(name, data_dir, reading)
    source, _ = read_source("cifar100", data_dir, ("label", "coarse_label"))
    classes = source.classes("coarse_label", source.examples)
    splits = published_split(name).divide(classes)
    shape = _shape(reading, 32, 3)
    return Plan(name, shape, splits, lambda item: _made(_image(source, item, reading), reading))


def _shape(reading: Reading, side: int, channels: int) -> tuple[int, int, int]:
    """The shape that `reading` asks for, with the data set's own side and channels."""
    side = reading.size or side
    return (side, side, reading.channels or channels)


def _made(image: np.ndarray, reading: Reading, side: int | None = None) -> np.ndarray:
    """An image as `reading` asks for it; without a size there, of this side, or as it is."""
    side = reading.size or side
    if side is not None:
        image = resized(image, side, reading.fit)
    return with_channels(image, reading.channels, reading.background)


def _omniglot(name: str, data_dir: Path | None, reading: Reading) -> Plan:
    source, _ = read_source("omniglot", data_dir, ("label", "alphabet"))

    def read(item: tuple[str, int]) -> np.ndarray:
        grey = 255 - _image(source, item, reading)[..., :1]  # the source has black strokes on white
        return _made(grey, reading, 28)

    shape = _shape(reading, 28, 1)

    if name == "omniglot":
        classes = source.classes(None, ("train", "test"))
        return Plan(name, shape, drawn_split(classes, 0, 1100, 100), read)
    background = source.classes("alphabet", ("train",))
    alphabets = [ClassItems(group, "", ()) for group in sorted({c.group for c in background})]
    if len(alphabets) < 7:
        raise DataError(f"{name}: found {len(alphabets)} background alphabets, expected 30")
    kept = {item.name for item in drawn_split(alphabets, 0, len(alphabets) - 6, 5)["validation"]}
    splits = {
        "train": [item for item in background if item.group not in kept],
        "validation": [item for item in background if item.group in kept],
        "test": source.classes("alphabet", ("test",)),
    }
    return Plan(name, shape, splits, read, within_group=True)


def _any(name: str, data_dir: Path | None, reading: Reading) -> Plan:
    source, shape = read_source(name.removeprefix("tfds:"), data_dir, ("label",))
    height, width, channels = shape
    side = height if height == width and height is not None else LARGEST
    side = min(side, LARGEST)
    classes = source.classes(None, source.examples)
    counts = (round(0.64 * len(classes)), round(0.16 * len(classes)))
    return Plan(
        name,
        _shape(reading, side, channels),
        drawn_split(classes, 0, *counts),
        lambda item: _made(_image(source, item, reading), reading, side),
    )


def _image(source: Source, item: tuple[str, int], reading: Reading) -> np.ndarray:
    split, number = item
    found = source.examples[split][number]["image"]
    if not isinstance(found, bytes):
        return np.asarray(found)
    return decoded(found, source.channels, f"{split}, example {number}", reading.limits)


def read_source(
    builder_name: str, data_dir: Path | None, keys: Sequence[str]
) -> tuple[Source, tuple[int | None, int | None, int]]:
    """Open a data set of tensorflow-datasets, and prepare it first where needed.

    Args:
        builder_name: its name in the catalogue of tensorflow-datasets; a configuration follows
            after a slash.
        data_dir: the folder of tensorflow-datasets; None: its own default.
        keys: the features that hold labels.

    Returns:
        The data set, and the shape of its images, with None for a height or width that varies.

    Raises:
        DataError: as `load_tfds`.
    """
    tfds = _tensorflow_datasets()
    where = None if data_dir is None else str(data_dir)
    try:
        builder = tfds.builder(builder_name, data_dir=where)
        if not builder.is_prepared():
            prepare(builder_name, data_dir)
            builder = tfds.builder(builder_name, data_dir=where)
        features = builder.info.features
        _check_features(tfds, builder_name, features, keys)
        # our own decoder reads the images, because it tries only formats that are safe to decode
        skip = {"image": tfds.decode.SkipDecoding()}
        examples, labels = dict(builder.as_data_source(decoders=skip)), {}
        for split, undecoded in examples.items():
            found = [[example[key] for key in keys] for example in undecoded]
            columns = np.array(found, np.int64).reshape(-1, len(keys)).T
            labels[split] = dict(zip(keys, columns, strict=True))
    except (tfds.core.DatasetNotFoundError, NotImplementedError) as error:
        raise DataError(
            f"tfds:{builder_name} cannot be read ({str(error).splitlines()[0]}): it must be a data "
            "set of tensorflow-datasets, prepared in the format array_record"
        ) from error
    names = {key: list(features[key].names) for key in keys}
    shape = tuple(features["image"].shape)
    return Source(examples, labels, names, shape[-1]), shape


def _check_features(tfds: Any, builder_name: str, features: Any, keys: Sequence[str]) -> None:
    found = dict(features) if isinstance(features, tfds.features.FeaturesDict) else {}
    image = isinstance(found.get("image"), tfds.features.Image)
    if not image or not all(isinstance(found.get(k), tfds.features.ClassLabel) for k in keys):
        raise DataError(
            f"tfds:{builder_name} has the features {sorted(found)}: expected an image and a label"
        )


def _tensorflow_datasets() -> Any:
    try:
        import array_record.python.array_record_data_source  # noqa: F401
        import PIL  # noqa: F401
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DataError(f"this data set needs tensorflow-datasets ({error}): {READ_PIP}") from error
    return tfds


def prepare(builder_name: str, data_dir: Path | None) -> None:
    """Download a data set and write its ArrayRecord files, in a separate process.

    Args:
        builder_name: its name in the catalogue of tensorflow-datasets.
        data_dir: the folder of tensorflow-datasets; None: its own default.

    Raises:
        DataError: TensorFlow is not installed, or the preparation failed.
    """
    if importlib.util.find_spec("tensorflow") is None:
        raise DataError(
            f"preparing {builder_name}, once, needs TensorFlow (reading it does not): {PREPARE_PIP}"
        )
    command = [sys.executable, "-c", PREPARE, builder_name, str(data_dir or "")]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DataError(f"preparing {builder_name} failed: {last}")
