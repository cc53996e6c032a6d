"""Data sets converted once into a checked, memory-mapped cache of uint8 arrays.

A cache is a folder: `<split>.npy` holds the examples of a split row by row, class after class;
`manifest.json`, written last, says what they are, with a SHA-256 of each class. A conversion that
is interrupted goes on after the last class it finished. Nothing is made before it is known that the
classes can be used, and nothing that is a link is followed.
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
    """One class of a split, its rows after those of the classes before it."""

    name: str
    group: str
    examples: Positive
    sha256: str


class Manifest(msgspec.Struct):
    """What a cache holds. `stamp` is that of the files it was made of; empty: they never change."""

    format: Literal[2]
    name: str
    shape: Annotated[list[Positive], msgspec.Meta(max_length=4)]
    within_group: bool
    stamp: str
    splits: dict[str, Annotated[list[ClassEntry], msgspec.Meta(min_length=1)]]


class Finished(msgspec.Struct):
    """A line of the journal: a class whose rows are on the disk."""

    key: str
    stamp: str
    sha256: str


def ensure_cache(
    cache: Path,
    make_plan: Callable[[], Plan],
    progress: Progress = silent,
    sources: dict[str, list[ClassItems]] | None = None,
) -> None:
    """Convert a data set unless that is done; of several processes one does, the others wait.

    Args:
        cache: the folder of the cache.
        make_plan: finds what to convert; only called where there is something to do.
        progress: told how far it is.
        sources: the classes as they are now: where they changed it is done again. None: they never
            change.

    Raises:
        DataError: the data cannot be used; what was converted so far is kept.
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
            with suppress(OSError):  # it stays where there is something in it
                caches.rmdir()


def _checked_plan(make_plan: Callable[[], Plan], lock: Path) -> Plan:
    """What to convert; the lock's file goes too where that cannot be used."""
    try:
        plan = make_plan()
        plan.check()
    except BaseException:
        lock.unlink(missing_ok=True)
        raise
    return plan


def _is_current(cache: Path, stamp: str) -> bool:
    """Whether there is a manifest; one that cannot be read is left for `open_cache` to refuse."""
    path = cache / MANIFEST
    if not path.exists() and not path.is_symlink():
        return False
    try:
        return bool(read_json(path, Manifest).stamp == stamp)
    except FileError:
        return True


def _remove_stale(cache: Path) -> None:
    """Make room where the sources have changed; a process that has the old rows open keeps them."""
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
    """The classes that a conversion has finished, for the next one of the same plan.

    Args:
        path: of the file, one JSON object a line.
        plan: the plan's fingerprint, on the first line.
    """

    def __init__(self, path: Path, plan: str) -> None:
        self.path = path
        self.entries: dict[str, Finished] = {}
        head = {"fingerprint": plan}
        with suppress(FileError):  # none, or cut off within a line
            first, *lines = read_bytes(path).splitlines() or [b""]
            if decode(first, dict[str, str], str(path)) == head:
                for line in lines:
                    entry = decode(line, Finished, str(path))
                    self.entries[entry.key] = entry
        kept = [json.dumps(head).encode(), *map(msgspec.json.encode, self.entries.values())]
        write_whole(path, b"".join(line + b"\n" for line in kept))

    def finished(self, key: str, stamp: str) -> str | None:
        """The SHA-256 of a class's rows; None where it is not finished or has changed since."""
        entry = self.entries.get(key)
        return entry.sha256 if entry is not None and entry.stamp == stamp else None

    def add(self, entry: Finished) -> None:
        """Note a class as finished."""
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
        progress: told how far the check is.

    Returns:
        The split, its examples memory-mapped.

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
    except Exception as error:  # NumPy has no error of its own
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
    """The data set with the numbers of rows in place of the examples."""
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
