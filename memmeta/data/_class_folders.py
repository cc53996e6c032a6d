"""Class folders in a tree of files; links that lead out of the tree are refused."""

import os
import unicodedata
from pathlib import Path

from memmeta.data._dataset import DataError
from memmeta.data._files import DEEPEST
from memmeta.data._images import SUFFIXES
from memmeta.data._plan import ClassItems

NOT_OURS = ("__macosx",)
"""Folders (in lower case) that archiving programs add and that hold no data."""


def classes_in(root: Path, folder: Path) -> list[ClassItems]:
    """One class for every folder below `folder` that holds images, or holds no folders.

    Folders without images are included so that `Plan.check` can report them. The items of a class
    are paths relative to `root`.

    Raises:
        DataError: an image is directly inside `folder`, or a link leads out of `root`.
    """
    classes = []
    for path in [folder, *all_folders(folder)]:
        items = [inside(root, entry) for entry in _images_in(path)]
        if items and path == folder:
            raise DataError(f"{items[0]} of {root} is in no class folder: move or remove it")
        if items or not (path == folder or folders_in(path)):
            relative = path.relative_to(folder)
            group = "" if relative.parent == Path(".") else plain_name(relative.parent)
            classes.append(ClassItems(plain_name(relative), group, items))
    return classes


def _images_in(folder: Path) -> list[Path]:
    return _files_in(folder, SUFFIXES)


def _files_in(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    return [entry for entry in entries if entry.suffix.lower() in suffixes and entry.is_file()]


def find_files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Every file with one of the suffixes in or below a folder, except hidden ones.

    Raises:
        DataError: a folder is a link, or a file is a link that leads out of `folder`.
    """
    found = [file for path in (folder, *all_folders(folder)) for file in _files_in(path, suffixes)]
    for file in found:
        inside(folder, file)
    return found


def has_images(folder: Path) -> bool:
    """Whether there are images in a folder or below it."""
    return any(_images_in(path) for path in (folder, *all_folders(folder)))


def all_folders(folder: Path) -> list[Path]:
    """All folders below `folder`, each after its parent."""
    found, waiting = [], folders_in(folder)[::-1]
    while waiting:
        path = waiting.pop()
        if len(path.relative_to(folder).parts) > DEEPEST:
            raise DataError(f"{folder}: holds more than {DEEPEST} folders inside one another")
        found.append(path)
        waiting += folders_in(path)[::-1]
    return found


def folders_in(folder: Path) -> list[Path]:
    found = []
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith(".") or entry.name.lower() in NOT_OURS or not entry.is_dir():
            continue
        if entry.is_symlink():
            raise DataError(f"{entry} is a link to a folder, which is not followed: remove it")
        found.append(entry)
    return found


def inside(root: Path, path: Path) -> str:
    """The path relative to the root, after a check that no link leads out of the root."""
    if not path.resolve().is_relative_to(root.resolve()):
        raise DataError(f"{path} leads out of {root}: replace it by the file itself")
    return path.relative_to(root).as_posix()


def plain_name(path: Path) -> str:
    # NFC, because composed and decomposed forms of the same letters must give the same name;
    # Latin-1, because names that are not UTF-8 are most likely from an older system
    name = os.fsencode(path.as_posix())
    try:
        text = name.decode("utf-8")
    except UnicodeDecodeError:
        text = name.decode("latin-1")
    return unicodedata.normalize("NFC", text)
