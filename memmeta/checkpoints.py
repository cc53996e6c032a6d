"""Checkpoints: orbax writes them, a manifest of checksums says which are whole.

A checkpoint counts only once its manifest stands beside it, which is written last and in one piece.
A kill at any moment therefore leaves either a whole checkpoint or none.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

KEPT = 3


class CheckpointError(Exception):
    """A checkpoint cannot be used; the message says which, why, and what to do."""


def save(folder: Path, step: int, state: PyTree) -> None:
    """Write a checkpoint, then its manifest; keep the newest `KEPT`.

    Args:
        folder: of all checkpoints of a run; made where missing.
        step: meta-steps done, the checkpoint's name.
        state: any pytree of arrays.

    Raises:
        OSError: the disk is full or read-only; earlier checkpoints stay as they were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{step:08d}"
    _remove(target)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(target.absolute(), state)
            checkpointer.wait_until_finished()
    except Exception as error:
        shutil.rmtree(target, ignore_errors=True)
        raise OSError(f"cannot write checkpoint {target}: {_first_line(error)}") from error
    write_whole(_manifest(target), json.dumps(_digests(target)))
    for old in whole(folder)[KEPT:]:
        _remove(folder / f"{old:08d}")


def whole(folder: Path) -> list[int]:
    """The steps of all checkpoints that were finished, newest first."""
    manifests = folder.glob("[0-9]*.json")
    return sorted((int(path.stem) for path in manifests if path.stem.isdigit()), reverse=True)


def restore(folder: Path, like: PyTree) -> PyTree:
    """Read the newest checkpoint that is unaltered.

    Args:
        folder: of all checkpoints of a run.
        like: a pytree of arrays of the same structure, shapes and dtypes.

    Returns:
        The state.

    Raises:
        CheckpointError: there is none, all are altered, or it is of another model.
    """
    steps = whole(folder)
    if not steps:
        raise CheckpointError(f"{folder}: holds no whole checkpoint; start without --resume")
    for step in steps:
        target = folder / f"{step:08d}"
        if _intact(target):
            return _read(target, like)
    raise CheckpointError(
        f"{folder}: every checkpoint was altered or torn after it was written (its files do not "
        "match their checksums); restore the folder from a copy or start a new run"
    )


def _read(target: Path, like: PyTree) -> Any:
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(target.absolute(), abstract)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{target}: a checkpoint of another model or optimiser; use the options it was made "
            f"with, see config.json ({_first_line(error)})"
        ) from error


def _intact(target: Path) -> bool:
    try:
        return bool(json.loads(_manifest(target).read_text()) == _digests(target))
    except (OSError, ValueError):
        return False


def _digests(target: Path) -> dict[str, str]:
    files = sorted(path for path in target.rglob("*") if path.is_file())
    return {
        str(path.relative_to(target)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def _manifest(target: Path) -> Path:
    return target.with_suffix(".json")


def _remove(target: Path) -> None:
    # the manifest first: without it the rest does not count
    _manifest(target).unlink(missing_ok=True)
    shutil.rmtree(target, ignore_errors=True)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that a reader, or a kill, sees the old one or the new one."""
    temporary = path.with_name(path.name + ".new")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
