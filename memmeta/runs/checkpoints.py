"""Checkpoints: orbax writes them, a manifest of checksums says which are whole.

A checkpoint counts only once its manifest stands beside it, which is written last and in one piece.
A kill at any moment therefore leaves either a whole checkpoint or none. What is read is arrays and
JSON, never code; links are not followed, so nothing outside the folder is reached.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from memmeta.runs import _processes as processes

__all__ = ["CheckpointError", "restore", "save", "whole"]

KEPT = 3


class CheckpointError(Exception):
    """A checkpoint cannot be used; the message says which, why, and what to do."""


def save(folder: Path, step: int, state: PyTree) -> None:
    """Write a checkpoint, then its manifest; keep the newest `KEPT`.

    Of several processes each writes the shards it holds, and the first one everything else.

    Args:
        folder: of all checkpoints of a run; made where missing.
        step: meta-steps done, the checkpoint's name.
        state: any pytree of arrays.

    Raises:
        OSError: the disk is full or read-only; earlier checkpoints stay as they were.
    """
    target = folder / f"{step:08d}"
    try:
        if processes.is_first():
            folder.mkdir(parents=True, exist_ok=True)
            _remove(target)
        processes.told_by_first(step)  # nobody writes before the old one is gone
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(target.absolute(), state)
            checkpointer.wait_until_finished()
        if processes.is_first():
            write_whole(_manifest(target), json.dumps(_digests(target)))
    except Exception as error:
        if processes.is_first():
            _remove(target)
        raise OSError(
            f"{folder}: cannot write the checkpoint of meta-step {step} ({_first_line(error)}); "
            "earlier checkpoints are whole: make room there, then go on with --resume"
        ) from error
    if processes.is_first():
        _tidy(folder)


def whole(folder: Path) -> list[int]:
    """The steps of all checkpoints that were finished, newest first."""
    manifests = [path for path in folder.glob("*.json") if re.fullmatch("[0-9]{8}", path.stem)]
    return sorted((int(path.stem) for path in manifests), reverse=True)


def restore(folder: Path, like: PyTree) -> PyTree:
    """Read the newest checkpoint that is unaltered.

    Args:
        folder: of all checkpoints of a run.
        like: a pytree of arrays of the same structure, shapes and dtypes; each is read to where
            its counterpart is, whatever the devices it was written from.

    Returns:
        The state.

    Raises:
        CheckpointError: there is none, all are altered, or it is of another model.
    """
    steps = whole(folder)
    if not steps:
        raise CheckpointError(f"{folder}: holds no whole checkpoint; let memmeta train reach one")
    intact = -1
    if processes.is_first():
        intact = next((step for step in steps if _intact(folder / f"{step:08d}")), -1)
    step = processes.told_by_first(intact)
    if step >= 0:
        return _read(folder / f"{step:08d}", like)
    raise CheckpointError(
        f"{folder}: every checkpoint was altered or torn after it was written (its files do not "
        "match their checksums); restore the folder from a copy or start a new run"
    )


def _read(target: Path, like: PyTree) -> Any:
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            # before anything is read: orbax stops at the first array that differs, others underway
            stored = checkpointer.metadata(target.absolute()).item_metadata
            if _arrays(stored.tree) != _arrays(abstract):
                raise ValueError("its arrays have other shapes or dtypes")
            return checkpointer.restore(target.absolute(), abstract)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{target}: a checkpoint of another model or optimiser; use the options it was made "
            f"with, see config.json ({_first_line(error)})"
        ) from error


def _arrays(tree: PyTree) -> list[str]:
    return sorted(f"{leaf.dtype}{leaf.shape}" for leaf in jax.tree.leaves(tree))


def _intact(target: Path) -> bool:
    if target.is_symlink() or any(path.is_symlink() for path in target.rglob("*")):
        return False
    try:
        return bool(json.loads(_manifest(target).read_bytes()) == _digests(target))
    except (OSError, ValueError, RecursionError):
        return False


def _digests(target: Path) -> dict[str, str]:
    digests = {}
    for path in sorted(path for path in target.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            name = path.relative_to(target).as_posix()
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _manifest(target: Path) -> Path:
    return target.with_suffix(".json")


def _remove(target: Path) -> None:
    # the manifest first: without it the rest does not count
    _manifest(target).unlink(missing_ok=True)
    if target.is_symlink():
        target.unlink()
    shutil.rmtree(target, ignore_errors=True)


def _tidy(folder: Path) -> None:
    """Remove all but the newest whole checkpoints, and what a kill left of others."""
    kept = {f"{step:08d}" for step in whole(folder)[:KEPT]}
    for path in sorted(folder.iterdir()):
        name = path.name.split(".")[0]
        if re.fullmatch("[0-9]{8}", name) and path.name not in kept | {f"{k}.json" for k in kept}:
            if path.is_dir() and not path.is_symlink():
                _remove(path)
            else:
                path.unlink(missing_ok=True)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def write_whole(path: Path, text: str) -> None:
    """Write a small file so that a reader, or a kill, sees the old one or the new one."""
    temporary = path.with_name(path.name + ".new")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
