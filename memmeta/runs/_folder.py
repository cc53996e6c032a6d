"""The folder of one run: who may write to it, its configuration, its metrics file.

Of several processes of a run the first one writes; the others read.

config.json          the configuration
metrics.jsonl        one line a log point (pandas.read_json(..., lines=True))
checkpoints/         see `memmeta.runs`
offending_batch.npz  the tasks that stopped a run with --strict (numpy.load reads it)
learning_curve.png   drawn at the end
report.json          the final report
"""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import jax
import numpy as np
from jaxtyping import PyTree

from memmeta.runs import _processes as processes
from memmeta.runs._config import Config, UserError
from memmeta.runs.checkpoints import write_whole


@dataclass(frozen=True)
class RunFolder:
    """Paths and small files of one run.

    Attributes:
        path: the folder.
    """

    path: Path

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
            UserError: there is none, or it is not readable.
        """
        try:
            text = self.config_file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.path}: not the folder of a run (no readable config.json)"
            ) from error
        try:
            return Config.from_json(text, str(self.config_file))
        except RecursionError as error:
            raise UserError(f"{self.config_file}: not a configuration of a run") from error

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Add one log point, on the disk when this returns.

        Figures that are no numbers (an infinite curvature) are written as null.
        """
        if not processes.is_first():
            return
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({k: _jsonable(v) for k, v in line.items()}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def metrics(self) -> list[dict[str, Any]]:
        """All log points, without a last line torn by a kill."""
        lines: list[dict[str, Any]] = []
        if self.metrics_file.exists():
            text = self.metrics_file.read_text(encoding="utf-8", errors="replace")
            for row in text.splitlines():
                try:
                    line = json.loads(row)
                except (ValueError, RecursionError):
                    break
                if not isinstance(line, dict) or not isinstance(line.get("step"), int):
                    break
                lines.append(line)
        return lines

    def keep_metrics_until(self, step: int) -> None:
        """Drop the log points after a step, which a resumed run will make again."""
        if not processes.is_first():
            return
        kept = [json.dumps(line) + "\n" for line in self.metrics() if line["step"] <= step]
        write_whole(self.metrics_file, "".join(kept))

    def save_batch(self, tasks: PyTree) -> Path:
        """Write a batch of tasks as plain arrays, for a look at what went wrong.

        Returns:
            The file, offending_batch.npz.
        """
        path = self.path / "offending_batch.npz"
        if processes.is_first():
            leaves = jax.tree_util.tree_leaves_with_path(tasks)
            names = [jax.tree_util.keystr(key, simple=True, separator=".") for key, _ in leaves]
            arrays: dict[str, Any] = {
                name: np.asarray(leaf) for name, (_, leaf) in zip(names, leaves, strict=True)
            }
            np.savez(path, **arrays)
        return path


def _jsonable(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def new_run(path: Path, config: Config) -> Iterator[RunFolder]:
    """Make and hold the folder of a new run.

    Args:
        path: of the folder; made, may exist if empty.
        config: written to it.

    Yields:
        The folder, locked until the block ends.

    Raises:
        UserError: another run is in it, or it cannot be written.
    """
    folder = RunFolder(path)
    if not processes.is_first():
        yield folder
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
        with _held(path):
            if folder.config_file.exists():
                raise UserError(
                    f"{path}: already holds a run; go on with it by --resume, "
                    "or name another folder with --run"
                )
            write_whole(folder.config_file, config.to_json() + "\n")
            write_whole(folder.metrics_file, "")
            yield folder
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error})") from error


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
    folder = RunFolder(path)
    folder.config()
    if not processes.is_first():
        yield folder
        return
    try:
        with _held(path):
            yield folder
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error})") from error


@contextmanager
def _held(path: Path) -> Iterator[None]:
    # released by the operating system when the process dies, however it dies
    lock = filelock.FileLock(path / "lock", timeout=0)
    try:
        with lock:
            yield
    except filelock.Timeout as error:
        raise UserError(
            f"{path}: in use by another process; wait for it, or name another folder with --run"
        ) from error


def unused_path(root: Path, name: str) -> Path:
    """The first of root/name-1, root/name-2, … that does not exist."""
    number = 1
    while (root / f"{name}-{number}").exists():
        number += 1
    return root / f"{name}-{number}"
