"""Data sets from a folder of image files: `mini_imagenet`, `tiered_imagenet`, and `folder`.

The licences of the first two do not allow redistribution, so the user must provide the files.
"""

import csv
import hashlib
import unicodedata
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from io import StringIO
from itertools import chain
from pathlib import Path

from memmeta.data._archive import unpack
from memmeta.data._cache import MANIFEST, ensure_cache, open_cache
from memmeta.data._class_folders import classes_in, folders_in, has_images, inside
from memmeta.data._class_splits import ClassSplit, drawn_split, label_of, published_split
from memmeta.data._dataset import DataError, say_once
from memmeta.data._files import read_bytes
from memmeta.data._host import HostDataset
from memmeta.data._images import SIDE, check_colour, is_grey, read_image
from memmeta.data._plan import ClassItems, Plan
from memmeta.data._reading import Reading
from memmeta.data._split_names import (
    NAMES,
    completed,
    find_splits,
    looks_like_split,
    refuse_others,
    refuse_unclear,
)

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
PUBLISHED = ("mini_imagenet", "tiered_imagenet")


def load_folder(
    name: str, split: str, data_dir: Path | None, reading: Reading = Reading()
) -> HostDataset:
    """Load one split of a folder of image files, converted on first use and after every change.

    `mini_imagenet` and `tiered_imagenet` are looked for in the folder `data_dir/<name>`, or in an
    archive of that name (.zip, .tar, .tar.gz, .tgz), which is unpacked. The folder holds one of

    - a folder for each class, named by its WordNet id;
    - a folder for each split (train, val or validation, test) with a folder for each class;
    - a CSV file for each split, with the columns filename and label.

    The split must be the published one, stored in `memmeta/data/_class_splits`, which also gives
    the groups of `tiered_imagenet`. Where there are class folders only, those that it does not name
    are ignored.

    `folder` reads `data_dir` itself: split folders or CSV files as above, or class folders only. In
    the last case 64, 16 and 20 % of the classes are assigned to the splits at random, and
    `folder:SEED` assigns them by another seed. The case of split names does not matter. If either
    validation or test is missing, a fifth of the train classes is taken for it. A name that looks
    like a split's but is none of the known ones is refused.

    `categories.csv`, with the columns label and category, sets the group of each class; without it,
    and without a published group, a class's group is the folder above it.

    Images are RGB; those of `folder` have one channel if all its images are grey. `reading` may say
    otherwise.

    Args:
        name: "mini_imagenet", "tiered_imagenet", "folder" or "folder:SEED".
        split: "train", "validation" or "test".
        data_dir: the folder, see above; the cache is made in its sub-folder `.memmeta`.
        reading: how images are read.

    Returns:
        The split, memory-mapped.

    Raises:
        DataError: files are missing, damaged or outside the folder, or the classes do not match the
            published split.
    """
    kind, _, seed = name.partition(":")
    if data_dir is None:
        where = "of class folders" if kind == "folder" else f"that holds {name}/"
        raise DataError(f"{name}: data_dir is not given: name the folder {where}")
    if not data_dir.is_dir():
        raise DataError(f"{name}: data_dir={data_dir} is no folder")
    if seed and not (seed.isascii() and seed.isdecimal() and len(seed) < 10):
        raise DataError(f"{name}: expected folder:SEED with a whole number, such as folder:1")
    reading = replace(reading, size=None if reading.size == SIDE else reading.size)
    cache = data_dir / ".memmeta" / f"{name.replace(':', '-')}{reading.name}"
    try:
        root = data_dir if kind == "folder" else _root(name, data_dir, reading)
        splits = find_classes(kind, int(seed or 0), root)
    except (DataError, OSError) as error:
        if not (cache / MANIFEST).is_file():
            raise DataError(str(error)) from error
        say_once(f"{cache} is used, though its images cannot be found as they were: {error}")
        return open_cache(cache, split, reading.progress)
    ensure_cache(cache, partial(make_plan, name, root, splits, reading), reading.progress, splits)
    return open_cache(cache, split, reading.progress)


def find_classes(kind: str, seed: int, root: Path) -> dict[str, list[ClassItems]]:
    """Find the classes and image files of each split without opening an image.

    Args:
        kind: the data set's name without a seed.
        seed: the seed of the split, used if classes are assigned to splits at random.
        root: the folder of the data set.

    Returns:
        The classes of each split.

    Raises:
        DataError: as `load_folder`.
    """
    given = _split_folders(root) or _split_lists(root)
    if kind in PUBLISHED:
        published = published_split(kind)
        if given:
            splits = published.check({split: given.get(split, []) for split in NAMES})
        else:
            splits = published.divide(_listed_by(published, root))
    elif given:
        splits = completed(root, given, seed)
    else:
        classes = classes_in(root, root)
        refuse_unclear(root, classes)
        counts = (round(0.64 * len(classes)), round(0.16 * len(classes)))
        splits = drawn_split(classes, seed, *counts)
    return _stamped(root, _with_categories(root / "categories.csv", splits))


def _stamped(root: Path, splits: dict[str, list[ClassItems]]) -> dict[str, list[ClassItems]]:
    """Give each class a stamp that changes when the size or time of one of its files does."""

    def stamp(item: ClassItems) -> str:
        digest = hashlib.sha256()
        for name in item.items:
            found = (root / name).stat()
            digest.update(repr((name, found.st_size, found.st_mtime_ns)).encode())
        return digest.hexdigest()

    return {
        split: [item._replace(stamp=stamp(item)) for item in classes]
        for split, classes in splits.items()
    }


def make_plan(name: str, root: Path, splits: dict[str, list[ClassItems]], reading: Reading) -> Plan:
    """Make the plan of the conversion; where `reading` does not say it, headers give the channels.

    Args:
        name: the data set's name.
        root: the folder of the data set.
        splits: from `find_classes`.
        reading: how images are read.

    Returns:
        The plan of the conversion.

    Raises:
        DataError: an image cannot be used.
    """
    check_colour(reading.background)
    items = chain.from_iterable(item.items for found in splits.values() for item in found)
    channels = reading.channels
    if channels is None:
        grey = name not in PUBLISHED and all(is_grey(root / item, reading) for item in items)
        channels = 1 if grey else 3
    size = SIDE if reading.size is None else reading.size
    shape = (size, size, channels)
    return Plan(name, shape, splits, lambda item: read_image(root / item, reading, channels))


def _listed_by(published: ClassSplit, root: Path) -> list[ClassItems]:
    """The class folders that a published list names; a full ImageNet folder has others too."""
    return [item for item in classes_in(root, root) if label_of(item) in published.labels]


def _root(name: str, data_dir: Path, reading: Reading) -> Path:
    root = data_dir / name
    if not root.exists():
        for suffix in ARCHIVES:
            if (archive := data_dir / f"{name}{suffix}").is_file():
                unpack(archive, root, reading.limits)
                break
        else:
            raise DataError(
                f"{name}: there is neither {root} nor an archive {name}{{{','.join(ARCHIVES)}}} "
                "beside it: its licence does not allow it to be downloaded for you; put it there"
            )
    return root


def _split_folders(root: Path) -> dict[str, list[ClassItems]]:
    found = find_splits(root)
    if len(found) == 1 and not any(map(folders_in, found.values())):
        return {}  # it holds images and no class folders, so it is a class with a split's name
    if found:
        beside = [path for path in folders_in(root) if path not in found.values()]
        refuse_others(root, (path for path in beside if has_images(path)))
    return {split: classes_in(root, folder) for split, folder in found.items()}


def _split_lists(root: Path) -> dict[str, list[ClassItems]]:
    found = find_splits(root, ".csv")
    lists = [path for path in sorted(root.iterdir()) if path.suffix.lower() == ".csv"]
    others = [path for path in lists if path not in found.values()]
    refuse_others(root, (path for path in others if looks_like_split(path.stem)))
    return {split: _listed(root, path) for split, path in found.items()}


def _listed(root: Path, path: Path) -> list[ClassItems]:
    """The classes in a CSV file of file names and labels."""
    items: dict[str, list[str]] = {}
    for name, label in _table(path, ("filename", "label")):
        choices = [root / "images", root, root / "images" / label, root / label]
        file = next((folder / name for folder in choices if (folder / name).is_file()), None)
        if file is None:
            raise DataError(f"{path}: {name} is not in {root} or its sub-folder images: add it")
        item = inside(root, file)
        listed = items.setdefault(unicodedata.normalize("NFC", label), [])
        if item in listed:
            raise DataError(f"{path}: {name} is listed twice: remove one line")
        listed.append(item)
    return [ClassItems(label, "", found) for label, found in sorted(items.items())]


def _table(path: Path, columns: tuple[str, str]) -> Iterable[tuple[str, str]]:
    try:
        text = StringIO(read_bytes(path).decode("utf-8-sig"), newline="")
        rows = [tuple(row[column] for column in columns) for row in csv.DictReader(text)]
        if not all(isinstance(cell, str) and cell and "\0" not in cell for r in rows for cell in r):
            raise ValueError("a cell is empty")
    except Exception as error:  # the csv module raises errors of several kinds
        expected = " and ".join(columns)
        raise DataError(
            f"{path}: no CSV file with columns {expected} in UTF-8 ({error!r})"
        ) from error
    return [(first, second) for first, second in rows]


def _with_categories(
    path: Path, splits: dict[str, list[ClassItems]]
) -> dict[str, list[ClassItems]]:
    if not path.is_file():
        return splits
    categories = dict(_table(path, ("label", "category")))
    missing = [c.name for found in splits.values() for c in found if c.name not in categories]
    if missing:
        raise DataError(f"{path}: the class {missing[0]} has no category: add a line for it")
    return {
        split: [item._replace(group=categories[item.name]) for item in found]
        for split, found in splits.items()
    }
