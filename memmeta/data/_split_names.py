"""Recognition of a data set's split folders and split files by their names."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from memmeta.data._class_splits import SPLITS, drawn_split
from memmeta.data._dataset import DataError, say_once
from memmeta.data._plan import ClassItems

NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val"),
    "test": ("test", "testing"),
}
LOOKS_LIKE = re.compile(
    r"(meta)?(train|valid|val|test|dev|eval|holdout|heldout|split|fold)"
    r"(s|er|ing|idation|ation|uation|set|data|images?|imgs?|class|classes|split)?"
)
FILLERS = {"meta", "image", "images", "img", "imgs", "set", "data", "class", "classes"}


def split_of(name: str) -> str | None:
    """The split that a name stands for, in any case of letters; None if it stands for none.

    Example:
        >>> split_of("Val"), split_of("holdout")
        ('validation', None)
    """
    return next((split for split, names in NAMES.items() if name.lower() in names), None)


def looks_like_split(name: str, *, alone: bool = False) -> bool:
    """Whether a name is probably meant as the name of a split.

    Args:
        name: the name of a folder or file.
        alone: whether a name with other meaningful words in it does not count.

    Example:
        >>> looks_like_split("train_2017"), looks_like_split("metaTrain"), looks_like_split("tests")
        (True, True, True)
        >>> looks_like_split("animals"), looks_like_split("test tube", alone=True)
        (False, False)
    """
    words = re.findall(r"[a-z]+", re.sub(r"([a-z])([A-Z])", r"\1 \2", name).lower())
    found = [bool(LOOKS_LIKE.fullmatch(word)) for word in words]
    rest = {word for word, like in zip(words, found, strict=True) if not like}
    return any(found) and not (alone and rest - FILLERS)


def find_splits(root: Path, suffix: str = "") -> dict[str, Path]:
    """Find the folder of each split, or the file of each split with a given suffix.

    Args:
        root: the folder to look in.
        suffix: the suffix of the files, such as ".csv"; empty to look for folders.

    Returns:
        The paths by split; splits that are missing are left out.

    Raises:
        DataError: two names stand for the same split.
    """
    found: dict[str, Path] = {}
    for path in sorted(root.iterdir()):
        fits = path.is_dir() if not suffix else path.suffix.lower() == suffix and path.is_file()
        split = split_of(path.name[: len(path.name) - len(suffix)]) if fits else None
        if split is None:
            continue
        if split in found:
            raise DataError(
                f"{root}: {found[split].name} and {path.name} are both its {split} split: "
                "remove one, or put their classes together"
            )
        found[split] = path
    return {split: found[split] for split in SPLITS if split in found}


def completed(
    root: Path, splits: dict[str, list[ClassItems]], seed: int
) -> dict[str, list[ClassItems]]:
    """All three splits; a missing one is drawn from the train classes, and a message is logged.

    Args:
        root: the folder of the data set, for messages.
        splits: the classes of the splits that exist.
        seed: the seed of the random draw.

    Raises:
        DataError: train is missing, or more than one split is.
    """
    missing = [split for split in SPLITS if split not in splits]
    if not missing:
        return splits
    if "train" in missing or len(missing) > 1:
        raise DataError(
            f"{root}: found the splits {', '.join(splits)} alone, expected train with validation "
            "or test beside it: add one, or leave the folders of splits out to have them drawn"
        )
    share = max(round(0.2 * len(splits["train"])), 1)
    drawn = drawn_split(splits["train"], seed, len(splits["train"]) - share - 1, share)
    kept, taken = drawn["train"] + drawn["test"], drawn["validation"]
    say_once(
        f"{root}: there is no {missing[0]} split, so {len(taken)} of the {len(splits['train'])} "
        f"classes of train are it: {', '.join(sorted(item.name for item in taken))}"
    )
    order = {item.name: number for number, item in enumerate(splits["train"])}
    kept.sort(key=lambda item: order[item.name])
    return {**splits, "train": kept, missing[0]: taken}


def refuse_others(root: Path, others: Iterable[Path]) -> None:
    """Refuse folders or files beside the splits that may be splits under an unknown name.

    Args:
        root: the folder of the data set.
        others: folders with images in them, or CSV files with names like those of splits.

    Raises:
        DataError: `others` is not empty.
    """
    for path in others:
        raise DataError(
            f"{root}: {path.name} stands where splits stand and is none of train, validation and "
            "test: rename it, or move it elsewhere"
        )


def refuse_unclear(root: Path, classes: Sequence[ClassItems]) -> None:
    """Refuse to split classes at random if their folders seem to be divided into splits already.

    Args:
        root: the folder of the data set.
        classes: all classes.

    Raises:
        DataError: a folder above a class, or several classes, have names like those of splits.
    """
    above = {part for item in classes for part in item.name.split("/")[:-1]}
    unclear = sorted(name for name in above if looks_like_split(name))
    last = {item.name: item.name.split("/")[-1] for item in classes}
    named = sorted(name for name, part in last.items() if looks_like_split(part, alone=True))
    if not unclear and len(named) > 1:
        unclear = named
    if unclear:
        raise DataError(
            f"{root}: {unclear[0]!r} looks like a split and is none of train, validation and test "
            "in this folder itself: rename it, or name the folder that it is in; to have the split "
            "drawn, leave such folders out"
        )
