"""Data sets converted once into a checked, memory-mapped cache of uint8 arrays.

A cache is a folder: `<split>.npy` holds the examples of a split, one in a row, class after class;
`manifest.json`, written last, describes them, with a SHA-256 of each class. A conversion that was
interrupted continues after the last class it finished. Where the classes cannot be used, no cache
is left behind. Symbolic links are refused.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np

from memmeta.data._dataset import DataError, Dataset, say_once
from memmeta.data._files import (
    FileError,
    append,
    decode,
    locked,
    own_folder,
    read_bytes,
    read_json,
    refuse_links,
    write_whole,
)
from memmeta.data._host import HostDataset
from memmeta.data._plan import ClassItems, Plan, fingerprint
from memmeta.data._reading import Progress, silent
from memmeta.data._rows import Rows

MANIFEST, JOURNAL = "manifest.json", "finished.jsonl"
Positive = Annotated[int, msgspec.Meta(ge=1, lt=2**31)]


class ClassEntry(msgspec.Struct):
    """One class of a split; its rows follow those of the class before it."""

    name: str
    group: str
    examples: Positive
    sha256: str


class Manifest(msgspec.Struct):
    """The contents of a cache.

    `stamp` is the fingerprint of the source files at conversion; empty where they never change.
    """

    format: Literal[2]
    name: str
    shape: Annotated[list[Positive], msgspec.Meta(max_length=4)]
    within_group: bool
    stamp: str
    splits: dict[str, Annotated[list[ClassEntry], msgspec.Meta(min_length=1)]]


class Finished(msgspec.Struct):
    """A line of the journal: a class whose rows have been written."""

    key: str
    stamp: str
    sha256: str


def ensure_cache(
    cache: Path,
    make_plan: Callable[[], Plan],
    progress: Progress = silent,
    sources: dict[str, list[ClassItems]] | None = None,
) -> None:
    """Convert a data set unless its cache is current; one process converts, the others wait.

    Args:
        cache: the folder of the cache.
        make_plan: returns the plan of the conversion; only called where one is needed.
        progress: shows how far the conversion is.
        sources: the classes as they are now; where they differ from those the cache was made from,
            the data set is converted again. None: they never change.

    Raises:
        DataError: the data cannot be used; the classes converted so far are kept.
    """
    stamp = "" if sources is None else fingerprint(sources)
    if _is_current(cache, stamp):
        return
    caches, lock = cache.parent, cache.with_name(f"{cache.name}.lock")
    existed = caches.exists()
    try:
        caches.mkdir(parents=True, exist_ok=True)
        own_folder(caches)
        refuse_links(caches)
        with locked(lock, wait=True):
            if not _is_current(cache, stamp):
                plan = _checked_plan(make_plan, lock)
                own_folder(cache)
                _remove_stale(cache)
                _convert(cache, plan, stamp, progress)
    except OSError as error:
        raise DataError(f"{cache}: cannot be written ({error})") from error
    finally:
        if not existed:
            with suppress(OSError):  # a folder that is not empty cannot be removed, and stays
                caches.rmdir()


def _checked_plan(make_plan: Callable[[], Plan], lock: Path) -> Plan:
    """The checked plan; where it cannot be used, the lock file is removed so that nothing stays."""
    try:
        plan = make_plan()
        plan.check()
    except BaseException:
        lock.unlink(missing_ok=True)
        raise
    return plan


def _is_current(cache: Path, stamp: str) -> bool:
    """Whether the cache was made from sources of this stamp.

    A manifest that cannot be read counts as current, because `open_cache` reports it better.
    """
    path = cache / MANIFEST
    if not path.exists() and not path.is_symlink():
        return False
    try:
        return bool(read_json(path, Manifest).stamp == stamp)
    except FileError:
        return True


def _remove_stale(cache: Path) -> None:
    """Remove a cache whose sources changed; processes that have its files open can still read."""
    if not (cache / MANIFEST).exists():
        return
    say_once(f"{cache}: the images have changed since they were converted: they are again")
    splits = read_json(cache / MANIFEST, Manifest).splits
    (cache / MANIFEST).unlink()
    for split in splits:
        (cache / f"{Path(split).name}.npy").unlink(missing_ok=True)


def _convert(cache: Path, plan: Plan, stamp: str, progress: Progress) -> None:
    journal = Journal(cache / JOURNAL, plan.fingerprint())
    described: dict[str, list[ClassEntry]] = {}
    total = sum(len(c.items) for classes in plan.splits.values() for c in classes)
    with progress(f"converting {plan.name}", total) as advance, ThreadPoolExecutor() as pool:
        for split, classes in plan.splits.items():
            number = sum(len(item.items) for item in classes)
            start, described[split] = 0, []
            with Rows(cache / f"{split}.npy", number, plan.shape) as rows:
                for item in classes:
                    key, size = f"{split}/{item.name}", len(item.items)
                    sha256 = journal.finished(key, item.stamp)
                    if sha256 is None or sha256 != rows.digest(start, size):
                        sha256 = rows.write(start, _checked(plan, pool.map(plan.read, item.items)))
                        journal.add(Finished(key, item.stamp, sha256))
                    described[split].append(ClassEntry(item.name, item.group, size, sha256))
                    start += size
                    advance(size)
    shape = list(plan.shape)
    manifest = Manifest(2, plan.name, shape, plan.within_group, stamp, described)
    write_whole(cache / MANIFEST, msgspec.json.encode(manifest))
    (cache / JOURNAL).unlink()


class Journal:
    """The classes that a conversion has finished, so that an interrupted one can continue.

    Args:
        path: the journal's file, one JSON object on each line.
        plan: the plan's fingerprint, stored on the first line; a journal of another plan is
            discarded.
    """

    def __init__(self, path: Path, plan: str) -> None:
        self.path = path
        self.entries: dict[str, Finished] = {}
        head = {"fingerprint": plan}
        with suppress(FileError):  # there is no journal yet, or a kill cut off its last line
            first, *lines = read_bytes(path).splitlines() or [b""]
            if decode(first, dict[str, str], str(path)) == head:
                for line in lines:
                    entry = decode(line, Finished, str(path))
                    self.entries[entry.key] = entry
        kept = [json.dumps(head).encode(), *map(msgspec.json.encode, self.entries.values())]
        write_whole(path, b"".join(line + b"\n" for line in kept))

    def finished(self, key: str, stamp: str) -> str | None:
        """The SHA-256 of a class's rows; None if the class is not finished or has changed since."""
        entry = self.entries.get(key)
        return entry.sha256 if entry is not None and entry.stamp == stamp else None

    def add(self, entry: Finished) -> None:
        """Record that a class is finished."""
        append(self.path, msgspec.json.encode(entry).decode())


def _checked(plan: Plan, examples: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    for example in examples:
        if example.shape != plan.shape or example.dtype != np.uint8:
            raise DataError(
                f"{plan.name}: an example is {example.dtype} {example.shape}, "
                f"expected uint8 {plan.shape}"
            )
        yield example


def open_cache(cache: Path, split: str, progress: Progress = silent) -> HostDataset:
    """Open one split of a converted data set, after checking every class against its SHA-256.

    Args:
        cache: the folder of the cache.
        split: the split's name.
        progress: shows how far the check is.

    Returns:
        The split, with its examples memory-mapped.

    Raises:
        DataError: a file is missing, truncated or altered.
    """
    remedy = f"remove {cache} to have it made again"
    try:
        refuse_links(cache)
        manifest = read_json(cache / MANIFEST, Manifest)
        if split not in manifest.splits:
            raise FileError(f"the split {split} is not in it")
        rows = np.load(cache / f"{split}.npy", mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy raises errors of many kinds for a damaged file
        raise DataError(f"{cache}: not a whole cache ({error}); {remedy}") from error
    name, classes = manifest.name, manifest.splits[split]
    expected = (sum(entry.examples for entry in classes), *manifest.shape)
    if getattr(rows, "shape", None) != expected or rows.dtype != np.uint8:
        raise DataError(
            f"{name}: {cache / split}.npy is not the uint8 array {expected} of its manifest; "
            f"{remedy}"
        )
    start = 0
    with progress(f"checking {name}/{split}", len(rows)) as advance:
        for entry in classes:
            part = np.ascontiguousarray(rows[start : start + entry.examples])
            if hashlib.sha256(part.data).hexdigest() != entry.sha256:
                raise DataError(
                    f"{name}: the class {entry.name} in {cache / split}.npy is altered; {remedy}"
                )
            start += entry.examples
            advance(entry.examples)
    return HostDataset(_index(manifest, split), rows)


def _index(manifest: Manifest, split: str) -> Dataset:
    """The data set with row numbers in place of the examples."""
    classes = manifest.splits[split]
    counts = np.array([entry.examples for entry in classes], np.int32)
    starts = np.cumsum(counts) - counts
    groups = sorted({entry.group for entry in classes})
    numbers = np.arange(counts.max(), dtype=np.int32)
    index = np.where(numbers < counts[:, None], starts[:, None] + numbers, 0).astype(np.int32)
    return Dataset(
        inputs=index,
        count=counts,
        group=np.array([groups.index(entry.group) for entry in classes], np.int32),
        family=np.zeros_like(index),
        name=manifest.name,
        split=split,
        class_names=tuple(entry.name for entry in classes),
        group_names=tuple(groups),
        family_names=("",),
        within_group=manifest.within_group,
    )
