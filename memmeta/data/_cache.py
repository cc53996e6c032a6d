"""Data sets converted once into a checked, memory-mapped cache of uint8 arrays.

A cache is a folder: `<split>.npy` holds the examples of a split row by row, class after class;
`manifest.json`, written last, says what they are, with a SHA-256 of each class. A conversion that
is interrupted goes on after the last class it finished.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from rich.console import Console
from rich.progress import Progress

from memmeta.data._dataset import DataError, Dataset
from memmeta.data._host import HostDataset
from memmeta.data._plan import Plan

FORMAT = 1
MANIFEST, JOURNAL = "manifest.json", "finished.jsonl"


def ensure_cache(cache: Path, make_plan: Callable[[], Plan]) -> None:
    """Convert a data set unless that is done; of several processes one does, the others wait.

    Args:
        cache: the folder of the cache.
        make_plan: finds what to convert; only called where there is something to do.

    Raises:
        DataError: the data cannot be used; what was converted so far is kept.
    """
    if (cache / MANIFEST).is_file():
        return
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache.with_name(f"{cache.name}.lock")):
        if not (cache / MANIFEST).is_file():
            plan = make_plan()
            plan.check()
            _convert(cache, plan)


def _convert(cache: Path, plan: Plan) -> None:
    fingerprint = plan.fingerprint()
    finished = _finished(cache / JOURNAL, fingerprint)
    described: dict[str, list[dict[str, Any]]] = {}
    total = sum(len(c.items) for classes in plan.splits.values() for c in classes)
    with (
        (cache / JOURNAL).open("w", encoding="utf-8") as journal,
        progress_bar(f"converting {plan.name}", total) as advance,
        ThreadPoolExecutor() as pool,
    ):
        _append(journal, {"fingerprint": fingerprint})
        for key, digest in finished.items():
            _append(journal, {"class": key, "sha256": digest})
        for split, classes in plan.splits.items():
            rows = _rows(cache / f"{split}.npy", sum(len(c.items) for c in classes), plan.shape)
            start, described[split] = 0, []
            for item in classes:
                part = rows[start : start + len(item.items)]
                start += len(item.items)
                key = f"{split}/{item.name}"
                if finished.get(key) != _digest(part):
                    _fill(part, plan, pool.map(plan.read, item.items))
                    finished[key] = _digest(part)
                    _append(journal, {"class": key, "sha256": finished[key]})
                advance(len(item.items))
                described[split].append(
                    {
                        "name": item.name,
                        "group": item.group,
                        "examples": len(item.items),
                        "sha256": finished[key],
                    }
                )
            rows.flush()
    content = {
        "format": FORMAT,
        "name": plan.name,
        "shape": plan.shape,
        "within_group": plan.within_group,
        "splits": described,
    }
    unfinished = cache / f"{MANIFEST}.unfinished"
    unfinished.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    os.replace(unfinished, cache / MANIFEST)
    (cache / JOURNAL).unlink()


def _finished(path: Path, fingerprint: str) -> dict[str, str]:
    """The classes that an interrupted conversion of the same plan has finished."""
    found: dict[str, str] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        if json.loads(lines[0]) != {"fingerprint": fingerprint}:
            return {}
        for line in lines[1:]:
            entry = json.loads(line)
            found[entry["class"]] = entry["sha256"]
    except (OSError, ValueError, IndexError):  # none, or cut off within a line
        pass
    return found


def _append(journal: Any, entry: dict[str, str]) -> None:
    # not forced to the disk: rows that a crash loses are found by their checksum
    journal.write(json.dumps(entry) + "\n")
    journal.flush()


def _rows(path: Path, number: int, shape: tuple[int, ...]) -> np.memmap:
    """The array on disk, as an interrupted conversion left it or new."""
    expected = (number, *shape)
    try:
        rows = np.lib.format.open_memmap(path, mode="r+")
        if rows.shape == expected and rows.dtype == np.uint8:
            return rows
    except (OSError, ValueError):
        pass
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=expected)


def _fill(part: np.ndarray, plan: Plan, examples: Iterator[np.ndarray]) -> None:
    for row, example in enumerate(examples):
        if example.shape != plan.shape or example.dtype != np.uint8:
            raise DataError(
                f"{plan.name}: an example is {example.dtype} {example.shape}, "
                f"expected uint8 {plan.shape}"
            )
        part[row] = example


def _digest(part: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(part).data).hexdigest()


def open_cache(cache: Path, split: str) -> HostDataset:
    """Open one split of a converted data set, after checking every class against its SHA-256.

    Args:
        cache: the folder of the cache.
        split: the split's name.

    Returns:
        The split, its examples memory-mapped.

    Raises:
        DataError: a file is missing, truncated or altered.
    """
    remedy = f"remove {cache} to have it made again"
    try:
        manifest = json.loads((cache / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']}, expected {FORMAT}")
        classes = manifest["splits"][split]
        name, shape = manifest["name"], tuple(manifest["shape"])
        rows = np.load(cache / f"{split}.npy", mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{cache}: not a whole cache ({error!r}); {remedy}") from error
    counts = np.array([found["examples"] for found in classes], np.int32)
    starts = np.cumsum(counts) - counts
    expected = (int(counts.sum()), *shape)
    if rows.shape != expected or rows.dtype != np.uint8:
        raise DataError(
            f"{name}: {cache / split}.npy holds {rows.dtype} {rows.shape}, expected uint8 "
            f"{expected}; {remedy}"
        )
    with progress_bar(f"checking {name}/{split}", len(rows)) as advance:
        for found, start in zip(classes, starts.tolist(), strict=True):
            if _digest(rows[start : start + found["examples"]]) != found["sha256"]:
                raise DataError(
                    f"{name}: the class {found['name']} in {cache / split}.npy is altered; {remedy}"
                )
            advance(found["examples"])
    groups = sorted({found["group"] for found in classes})
    numbers = np.arange(counts.max(), dtype=np.int32)
    index = np.where(numbers < counts[:, None], starts[:, None] + numbers, 0).astype(np.int32)
    return HostDataset(
        index=Dataset(
            inputs=index,
            count=counts,
            group=np.array([groups.index(found["group"]) for found in classes], np.int32),
            family=np.zeros_like(index),
            name=name,
            split=split,
            class_names=tuple(found["name"] for found in classes),
            group_names=tuple(groups),
            family_names=("",),
            within_group=bool(manifest["within_group"]),
        ),
        rows=rows,
    )


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on the terminal, if there is one; yields what moves it on."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda number: progress.update(task, advance=number)
