"""Data sets from a folder of image files: `mini_imagenet`, `tiered_imagenet`, and `folder`.

Their licences do not allow them to be passed on, so the user brings the files.
"""

import csv
import unicodedata
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np

from memmeta.data._archive import unpack
from memmeta.data._cache import ensure_cache, open_cache
from memmeta.data._class_splits import ClassSplit, drawn_split, label_of, published_split
from memmeta.data._dataset import DataError
from memmeta.data._host import HostDataset
from memmeta.data._images import SUFFIXES, read_image
from memmeta.data._plan import ClassItems, Plan

SIZE = 84
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
PUBLISHED = ("mini_imagenet", "tiered_imagenet")


def load_folder(name: str, split: str, data_dir: Path | None) -> HostDataset:
    """One split of a data set of image files, 84 x 84 RGB, converted on first use.

    `mini_imagenet` and `tiered_imagenet` are looked for in `data_dir/<name>`, or in an archive of
    that name (.zip, .tar, .tar.gz, .tgz), which is unpacked. They hold a folder for each class,
    named by its WordNet id; or a folder for each split (train, val or validation, test) with a
    folder for each class; or a CSV file for each split with the columns filename and label. The
    split must be the published one (`class_splits/`), which also gives the classes of
    `tiered_imagenet` their groups; class folders that it does not name are left out.
    `categories.csv`, with the columns label and category, gives groups of one's own; without
    either a class's group is the folder above it.

    `folder` is `data_dir` itself: split folders as above, or class folders only, whose split is
    drawn: 64, 16 and 20 % of the classes. `folder:SEED` draws another.

    Args:
        name: "mini_imagenet", "tiered_imagenet", "folder" or "folder:SEED".
        split: "train", "validation" or "test".
        data_dir: the folder, see above; the cache is made in its sub-folder `.memmeta`.

    Returns:
        The split, memory-mapped.

    Raises:
        DataError: files are missing, damaged, outside the folder, or not of the published split.
    """
    kind, _, seed = name.partition(":")
    if data_dir is None:
        where = "of class folders" if kind == "folder" else f"that holds {name}/"
        raise DataError(f"{name}: data_dir is not given: name the folder {where}")
    if not data_dir.is_dir():
        raise DataError(f"{name}: data_dir={data_dir} is no folder")
    if seed and not seed.isdecimal():
        raise DataError(f"{name}: expected folder:SEED with a whole number, such as folder:1")
    cache = data_dir / ".memmeta" / name.replace(":", "-")
    ensure_cache(cache, lambda: make_plan(name, kind, int(seed or 0), data_dir))
    return open_cache(cache, split)


def make_plan(name: str, kind: str, seed: int, data_dir: Path) -> Plan:
    """Find the classes and image files of each split.

    Args:
        name: the data set's name.
        kind: the name without a seed.
        seed: of the split, where one is drawn.
        data_dir: as for `load_folder`.

    Returns:
        The plan of the conversion.

    Raises:
        DataError: as `load_folder`.
    """
    root = data_dir if kind == "folder" else _root(name, data_dir)
    given = _split_folders(root) or _split_lists(root)
    if kind in PUBLISHED:
        published = published_split(kind)
        splits = published.check(given) if given else published.divide(_listed_by(published, root))
    elif given:
        splits = given
    else:
        classes = _classes(root, root)
        counts = (round(0.64 * len(classes)), round(0.16 * len(classes)))
        splits = drawn_split(classes, seed, *counts)
    splits = _with_categories(root / "categories.csv", splits)
    return Plan(name, (SIZE, SIZE, 3), splits, partial(_read, root))


def _listed_by(published: ClassSplit, root: Path) -> list[ClassItems]:
    """The class folders that a published list names; ImageNet's own folder holds others too."""
    return [item for item in _classes(root, root) if label_of(item) in published.labels]


def _read(root: Path, item: str) -> np.ndarray:
    return read_image(root / item, SIZE)


def _root(name: str, data_dir: Path) -> Path:
    root = data_dir / name
    if not root.exists():
        for suffix in ARCHIVES:
            if (archive := data_dir / f"{name}{suffix}").is_file():
                unpack(archive, root)
                break
        else:
            raise DataError(
                f"{name}: there is neither {root} nor an archive {name}{{{','.join(ARCHIVES)}}} "
                "beside it: its licence does not allow it to be downloaded for you; put it there"
            )
    return root


def _find(root: Path, suffix: str) -> dict[str, Path] | None:
    """The folder (or file with that suffix) of each split, if all three are there."""
    names = {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)}
    found = {}
    for split, choices in names.items():
        paths = [path for choice in choices if (path := root / f"{choice}{suffix}").exists()]
        if not paths:
            return None
        found[split] = paths[0]
    return found


def _split_folders(root: Path) -> dict[str, list[ClassItems]] | None:
    found = _find(root, "")
    return (
        None
        if found is None
        else {split: _classes(root, folder) for split, folder in found.items()}
    )


def _classes(root: Path, folder: Path) -> list[ClassItems]:
    """Every folder below `folder` that has images in it is a class."""
    classes = []
    for path in [folder, *_folders(root, folder)]:
        entries = [entry for entry in sorted(path.iterdir()) if not entry.name.startswith(".")]
        files = [entry for entry in entries if entry.suffix.lower() in SUFFIXES]
        inside = [_inside(root, entry) for entry in files if entry.is_file()]
        if inside and path == folder:
            raise DataError(f"{inside[0]} of {root} is in no class folder: move or remove it")
        if inside or not (path == folder or any(entry.is_dir() for entry in entries)):
            relative = path.relative_to(folder)
            group = "" if relative.parent == Path(".") else _name(relative.parent)
            classes.append(ClassItems(_name(relative), group, inside))
    return classes


def _folders(root: Path, folder: Path) -> list[Path]:
    """The folders below `folder`, each after the one it is in."""
    found = []
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith(".") or not entry.is_dir():
            continue
        if entry.is_symlink():
            raise DataError(f"{entry} is a link to a folder, which is not followed: remove it")
        found += [entry, *_folders(root, entry)]
    return found


def _inside(root: Path, path: Path) -> str:
    """The path below the root, once it is sure that the file really lies there."""
    if not path.resolve().is_relative_to(root.resolve()):
        raise DataError(f"{path} leads out of {root}: replace it by the file itself")
    return path.relative_to(root).as_posix()


def _name(path: Path) -> str:
    # the same letters in composed and decomposed form are the same name
    return unicodedata.normalize("NFC", path.as_posix())


def _split_lists(root: Path) -> dict[str, list[ClassItems]] | None:
    found = _find(root, ".csv")
    return None if found is None else {split: _listed(root, path) for split, path in found.items()}


def _listed(root: Path, path: Path) -> list[ClassItems]:
    """The classes of a CSV file of file names and labels."""
    items: dict[str, list[str]] = {}
    for name, label in _table(path, ("filename", "label")):
        choices = [root / "images", root, root / "images" / label, root / label]
        file = next((folder / name for folder in choices if (folder / name).is_file()), None)
        if file is None:
            raise DataError(f"{path}: {name} is not in {root} or its sub-folder images: add it")
        item = _inside(root, file)
        listed = items.setdefault(unicodedata.normalize("NFC", label), [])
        if item in listed:
            raise DataError(f"{path}: {name} is listed twice: remove one line")
        listed.append(item)
    return [ClassItems(label, "", found) for label, found in sorted(items.items())]


def _table(path: Path, columns: tuple[str, str]) -> Iterable[tuple[str, str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return [(row[columns[0]], row[columns[1]]) for row in csv.DictReader(file)]
    except (OSError, KeyError, UnicodeDecodeError, csv.Error) as error:
        expected = " and ".join(columns)
        raise DataError(
            f"{path}: no CSV file with columns {expected} in UTF-8 ({error!r})"
        ) from error


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
