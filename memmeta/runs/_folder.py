"""The folder of one run: who may write to it, its configuration, its metrics file.

Of several processes of a run the first one writes; the others read. Nothing in it may be a link.

config.json            the configuration
metrics.jsonl          one line a log point (pandas.read_json(..., lines=True))
metrics.set-aside-N    lines that a resumed run could not use, as they were
checkpoints/           see `memmeta.runs.checkpoints`
offending_batch.npz    the tasks that stopped a run with --strict (numpy.load reads it)
learning_curve.png     drawn at the end
report.json            the final report
lock                   held while a process writes
"""

import io
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import msgspec
import numpy as np
from jaxtyping import PyTree

from memmeta.data._files import (
    LEFT_OVER,
    FileError,
    InUse,
    append,
    locked,
    read_bytes,
    read_json,
    refuse_links,
    unused_path,
    write_whole,
)
from memmeta.runs import _processes as processes
from memmeta.runs._config import Config, UserError
from memmeta.runs._records import FinalReport, log_line

LOCK = "lock"
LONGEST = 2**32  # bytes of metrics: some million log points
log = logging.getLogger("memmeta")


@dataclass(frozen=True)
class RunFolder:
    """Paths and small files of one run.

    Attributes:
        path: the folder.
        inode: what the folder was when it was locked; None where nothing will be written.
    """

    path: Path
    inode: tuple[int, int] | None = None

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are."""
        return self.path / "checkpoints"

    @property
    def metrics_file(self) -> Path:
        """One JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def config_file(self) -> Path:
        """The configuration as JSON."""
        return self.path / "config.json"

    def config(self) -> Config:
        """The configuration the run was made with.

        Raises:
            UserError: there is none, or it is not readable; or something in the folder is a link.
        """
        _require_unicode(self.path)
        try:
            content = read_bytes(self.config_file)
            refuse_links(self.path)
        except OSError as error:
            raise UserError(
                f"{self.path}: not the folder of a run that can be used ({error})"
            ) from error
        return Config.from_json(content, str(self.config_file))

    def write_config(self, config: Config) -> None:
        """Write the configuration."""
        if processes.is_first():
            self.require_here()
            write_whole(self.config_file, config.to_json() + "\n")

    def require_here(self) -> None:
        """Refuse to write where the folder is no longer.

        Raises:
            UserError: it was moved or replaced since it was locked.
        """
        try:
            found = _inode(self.path)
        except OSError:
            found = None
        if self.inode is not None and found != self.inode:
            raise UserError(
                f"{self.path}: moved or replaced while the run was going on; go on where it is "
                "now, by --resume --run"
            )

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Add one log point, on the disk when this returns.

        Figures that are no numbers (an infinite curvature) are written as null.
        """
        if processes.is_first():
            self.require_here()
            plain = {name: _jsonable(value) for name, value in line.items()}
            append(self.metrics_file, msgspec.json.encode(plain).decode())

    def metrics(self) -> list[dict[str, Any]]:
        """All log points that can be read.

        Raises:
            FileError: the file is a link or no plain file.
        """
        return self._parted()[0]

    def _parted(self) -> tuple[list[dict[str, Any]], list[bytes]]:
        """The log points in the order of their steps, and the lines that are none."""
        if not self.metrics_file.exists() and not self.metrics_file.is_symlink():
            return [], []
        found, damaged = {}, []
        for number, row in enumerate(read_bytes(self.metrics_file, LONGEST).splitlines(), 1):
            try:
                line = log_line(row, f"{self.metrics_file}:{number}")
            except FileError:
                damaged.append(row)
            else:
                found[line["step"]] = line
        return [found[step] for step in sorted(found)], damaged

    def keep_metrics_until(self, step: int) -> None:
        """Drop the log points after a step, which a resumed run will make again.

        Lines that cannot be read are set aside; so is all of it where the run starts again.
        """
        if not processes.is_first():
            return
        lines, damaged = self._parted()
        if step == 0 and lines:
            damaged = read_bytes(self.metrics_file, LONGEST).splitlines()
        if damaged:
            beside = unused_path(self.path, "metrics.set-aside")
            write_whole(beside, b"\n".join(damaged) + b"\n")
            what = "all" if step == 0 and lines else f"{len(damaged)} unreadable"
            log.warning("%s: %s of its lines are set aside in %s", self.metrics_file, what, beside)
        kept = [msgspec.json.encode(line) + b"\n" for line in lines if line["step"] <= step]
        write_whole(self.metrics_file, b"".join(kept))

    def final_report(self) -> FinalReport | None:
        """The final report; None where the run has not ended.

        Raises:
            FileError: it is not one.
        """
        path = self.path / "report.json"
        return read_json(path, FinalReport) if path.exists() or path.is_symlink() else None

    def write(self, name: str, content: str | bytes) -> None:
        """Write a small file whole."""
        if processes.is_first():
            self.require_here()
            write_whole(self.path / name, content)

    def save_batch(self, tasks: PyTree) -> Path:
        """Write a batch of tasks as plain arrays, for a look at what went wrong.

        Returns:
            The file, offending_batch.npz.
        """
        leaves = jax.tree_util.tree_leaves_with_path(tasks)
        names = [jax.tree_util.keystr(key, simple=True, separator=".") for key, _ in leaves]
        arrays: dict[str, Any] = {
            name: np.asarray(leaf) for name, (_, leaf) in zip(names, leaves, strict=True)
        }
        content = io.BytesIO()
        np.savez(content, **arrays)
        self.write("offending_batch.npz", content.getvalue())
        return self.path / "offending_batch.npz"


def _jsonable(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _inode(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def _require_unicode(path: Path) -> None:
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError as error:  # the libraries that write arrays know no other names
        raise UserError(f"{path}: its name is no UTF-8: rename the folder") from error


def require_new(path: Path) -> None:
    """Refuse a folder that a new run must not be made in; nothing is made.

    Args:
        path: of the folder.

    Raises:
        UserError: a run is in it, or anything else.
    """
    _require_unicode(path)
    if RunFolder(path).config_file.exists():
        raise UserError(
            f"{path}: already holds a run; go on with it by --resume, "
            "or name another folder with --run"
        )
    try:
        names = sorted(entry.name for entry in path.iterdir())
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error})") from error
    # a run that was killed before it wrote its configuration is none
    others = [name for name in names if name != LOCK and not LEFT_OVER.fullmatch(name)]
    if others:
        raise UserError(
            f"{path}: holds {others[0]!r} and is no run; name a new or empty folder with --run"
        )


@contextmanager
def new_run(path: Path, config: Config) -> Iterator[RunFolder]:
    """Make and hold the folder of a new run.

    Args:
        path: of the folder; made, may exist if empty.
        config: written to it.

    Yields:
        The folder, locked until the block ends.

    Raises:
        UserError: another run or anything else is in it, or it cannot be written.
    """
    if not processes.is_first():  # the first one may have made it already
        yield RunFolder(path)
        return
    require_new(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error})") from error
    with _held(path) as folder:
        require_new(path)
        folder.write_config(config)
        yield folder


@contextmanager
def old_run(path: Path) -> Iterator[RunFolder]:
    """Hold the folder of a run that exists.

    Args:
        path: of the folder.

    Yields:
        The folder, locked until the block ends.

    Raises:
        UserError: it is no run's folder, is in use, or cannot be written.
    """
    RunFolder(path).config()
    if not processes.is_first():
        yield RunFolder(path)
        return
    with _held(path) as folder:
        yield folder


@contextmanager
def _held(path: Path) -> Iterator[RunFolder]:
    try:
        with locked(path / LOCK, wait=False):
            yield RunFolder(path, _inode(path))
    except InUse as error:
        raise UserError(f"{error}; wait for it, or name another folder with --run") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error})") from error
