"""`npz`: a data set read from .npz files of plain arrays."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from memmeta.data._class_folders import find_files
from memmeta.data._dataset import DataError, Dataset
from memmeta.data._reading import Limits, Reading
from memmeta.data._split_names import find_splits

KEYS = {"images", "labels", "groups"}


def load_npz(name: str, split: str, data_dir: Path | None, reading: Reading = Reading()) -> Dataset:
    """Load one split of a data set of .npz files.

    Each split is one of

    - a file `<split>.npz` with the arrays `images`, `labels` and optionally `groups`, as
      `Dataset.from_arrays` takes them;
    - a folder `<split>/` with one .npz file for each class, which holds the array `images`. The
      class has the name of the file, and its group is the folder above the file.

    Args:
        name: "npz".
        split: "train", "validation" or "test"; other spellings in the names of files and folders,
            such as Val, are accepted as for the data set `folder`.
        data_dir: the folder with the files of all splits.
        reading: only its `limits` are used here.

    Returns:
        The split.

    Raises:
        DataError: the split is missing, or a file cannot be used.
    """
    if data_dir is None or not data_dir.is_dir():
        raise DataError(f"{name}: data_dir={data_dir} is no folder: name that of the .npz files")
    try:
        file = find_splits(data_dir, ".npz").get(split)
        folder = find_splits(data_dir).get(split)
        if file is not None:
            arrays = _read(file, {"images", "labels"}, reading.limits)
        elif folder is not None:
            arrays = _classes(folder, reading.limits)
        else:
            raise DataError(f"{name}: {data_dir} has neither {split}.npz nor a folder {split}")
    except OSError as error:
        raise DataError(f"{name}: {error}") from error
    return Dataset.from_arrays(
        arrays["images"], arrays["labels"], groups=arrays.get("groups"), name=name, split=split
    )


def _classes(folder: Path, limits: Limits) -> dict[str, np.ndarray]:
    images: list[np.ndarray] = []
    labels: list[str] = []
    groups: list[str] = []
    for path in find_files(folder, (".npz",)):
        found = _read(path, {"images"}, limits)["images"]
        if images and found.shape[1:] != images[0].shape[1:]:
            raise DataError(
                f"{path}: images of shape {found.shape[1:]}, those before it {images[0].shape[1:]}"
            )
        relative = path.relative_to(folder)
        images.append(found)
        labels += [relative.with_suffix("").as_posix()] * len(found)
        groups += [relative.parent.as_posix()] * len(found)
    if not images:
        raise DataError(f"{folder}: holds no .npz file")
    return {
        "images": np.concatenate(images),
        "labels": np.array(labels),
        "groups": np.array(groups),
    }


def _read(path: Path, needed: set[str], limits: Limits) -> dict[str, Any]:
    """Read the arrays of one file, without unpickling anything."""
    most = limits.unpacked(path.stat().st_size)
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > most:
            raise ValueError(
                f"it unpacks to {unpacked} bytes, more than {most}; allow it by most_unpacked"
            )
        with np.load(path, allow_pickle=False) as arrays:
            found = {key: arrays[key] for key in arrays.files if key in KEYS}
    except Exception as error:  # NumPy and zipfile raise errors of many kinds
        raise DataError(f"{path}: no archive of plain arrays ({error})") from error
    missing = sorted(needed - found.keys())
    if missing:
        raise DataError(f"{path}: has no array {missing[0]!r}")
    return found
