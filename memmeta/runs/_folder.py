"""The folder of one run: its lock, its configuration, its metrics and its small files.

Of several processes of a run only the first one writes. Links in the folder are refused.

config.json            the configuration
metrics.jsonl          one line for each log point (pandas.read_json(..., lines=True))
metrics.set-aside-N    lines that a resumed run could not use, unchanged
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
LONGEST = 2**32  # the most bytes of metrics that are read: millions of log points
log = logging.getLogger("memmeta")


@dataclass(frozen=True)
class RunFolder:
    """Paths and small files of one run.

    Attributes:
        path: the folder.
        inode: the folder's device and inode numbers when it was locked, to notice if it is
            replaced; None if it is not locked.
    """

    path: Path
    inode: tuple[int, int] | None = None

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def metrics_file(self) -> Path:
        """The file with the log points, one JSON object on each line."""
        return self.path / "metrics.jsonl"

    @property
    def config_file(self) -> Path:
        """The file with the configuration as JSON."""
        return self.path / "config.json"

    def config(self) -> Config:
        """Read the configuration that the run was made with.

        Raises:
            UserError: the configuration is missing or not readable, or there is a link in the
                folder.
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
        """Check that the folder is still the one that was locked.

        Raises:
            UserError: it was moved or replaced since.
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
        """Append one log point, and return once it is on the disk.

        Values that are not finite (such as an infinite curvature) are written as null.
        """
        if processes.is_first():
            self.require_here()
            plain = {name: _jsonable(value) for name, value in line.items()}
            append(self.metrics_file, msgspec.json.encode(plain).decode())

    def metrics(self) -> list[dict[str, Any]]:
        """All log points that can be read, sorted by meta-step.

        Raises:
            FileError: the metrics file is a link or not a regular file.
        """
        return self._parted()[0]

    def _parted(self) -> tuple[list[dict[str, Any]], list[bytes]]:
        """The log points sorted by meta-step, and the lines that cannot be read."""
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
        """Drop the log points after a step, because a resumed run will write them again.

        Lines that cannot be read are moved to another file; if the run starts again from step 0,
        all lines are.
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
        """Read the final report; None if the run has not ended.

        Raises:
            FileError: the file is not a final report.
        """
        path = self.path / "report.json"
        return read_json(path, FinalReport) if path.exists() or path.is_symlink() else None

    def write(self, name: str, content: str | bytes) -> None:
        """Write a small file as a whole."""
        if processes.is_first():
            self.require_here()
            write_whole(self.path / name, content)

    def save_batch(self, tasks: PyTree) -> Path:
        """Write a batch of tasks as plain arrays, so that the user can inspect it.

        Returns:
            The path of the file, offending_batch.npz.
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
    except UnicodeEncodeError as error:  # orbax cannot write to such a path
        raise UserError(f"{path}: its name is no UTF-8: rename the folder") from error


def require_new(path: Path) -> None:
    """Check that a folder for a new run is missing or empty.

    Args:
        path: the folder.

    Raises:
        UserError: there is a run or anything else in it.
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
    # a run killed before it wrote its configuration leaves only these files: start anew there
    others = [name for name in names if name != LOCK and not LEFT_OVER.fullmatch(name)]
    if others:
        raise UserError(
            f"{path}: holds {others[0]!r} and is no run; name a new or empty folder with --run"
        )


@contextmanager
def new_run(path: Path, config: Config) -> Iterator[RunFolder]:
    """Make and lock the folder of a new run.

    Args:
        path: the folder to make; it may exist if it is empty.
        config: the configuration to write to it.

    Yields:
        The folder, locked until the `with` block ends.

    Raises:
        UserError: there is a run or anything else in it, or it cannot be written.
    """
    if not processes.is_first():  # the first process may have made the folder already
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
    """Lock the folder of an existing run.

    Args:
        path: the folder.

    Yields:
        The folder, locked until the `with` block ends.

    Raises:
        UserError: it is not a run folder, is in use, or cannot be written.
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
