"""Checkpoints: orbax writes them, a manifest of checksums says which are whole and which are ours.

A manifest is written twice: before the checkpoint, to say that what comes is ours, and after it, in
one piece, with the checksums. A kill at any moment therefore leaves either a whole checkpoint or
one that is known to be torn, and nothing is ever removed that no manifest of ours names. What is
read is arrays and JSON, never code; links are not followed, so nothing outside the folder is
reached.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import msgspec
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from memmeta.data._files import (
    FileError,
    own_folder,
    read_json,
    refuse_links,
    unused_path,
    write_whole,
)
from memmeta.runs import _processes as processes

__all__ = ["CheckpointError", "restore", "save", "whole"]

KEPT = 3
Count = Annotated[int, msgspec.Meta(ge=0, lt=2**62)]
log = logging.getLogger("memmeta")


class CheckpointError(Exception):
    """A checkpoint cannot be used; the message says which, why, and what to do."""


class Manifest(msgspec.Struct, forbid_unknown_fields=True):
    """What stands beside a checkpoint.

    Attributes:
        format: tells our manifests from other JSON files.
        step: meta-steps done; the file's name too.
        number: checkpoints of this folder are numbered in the order they were saved.
        files: the SHA-256 of each of its files; None until all of them are written.
        note: what the caller wanted to be kept with it.
    """

    format: Literal["memmeta checkpoint 1"]
    step: Count
    number: Count
    files: dict[str, str] | None
    note: dict[str, Any]


def save(folder: Path, step: int, state: PyTree, note: Mapping[str, Any] | None = None) -> None:
    """Write a checkpoint, then its manifest; keep those that were saved last, `KEPT` of them.

    Of several processes each writes the shards it holds, and the first one everything else.

    Args:
        folder: of all checkpoints of a run; made where missing in a folder that exists.
        step: meta-steps done, the checkpoint's name.
        state: any pytree of arrays.
        note: plain values to keep with it, in its manifest.

    Raises:
        OSError: the disk is full or read-only, or something that is not ours is in the way; earlier
            checkpoints stay as they were.
    """
    target = folder / f"{step:08d}"
    try:
        if processes.is_first():
            _claim(folder, target, step, dict(note or {}))
        processes.told_by_first(0)  # nobody writes before the old one is gone
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(target.absolute(), state)
            checkpointer.wait_until_finished()
        if processes.is_first():
            found = read_json(_manifest(target), Manifest)
            found.files = _digests(target)
            write_whole(_manifest(target), msgspec.json.encode(found))
    except FileError:
        raise
    except Exception as error:
        if processes.is_first():
            _remove(target)
        raise OSError(
            f"{folder}: cannot write the checkpoint of meta-step {step} ({_first_line(error)}); "
            "earlier checkpoints are whole: make room there, then go on with --resume"
        ) from error
    if processes.is_first():
        _tidy(folder)


def _claim(folder: Path, target: Path, step: int, note: dict[str, Any]) -> None:
    """Say that what will stand at `target` is ours; what we left there before is removed."""
    own_folder(folder)
    refuse_links(folder)
    manifests = _manifests(folder)
    if step in manifests:
        _remove(target)
    for path in (target, _manifest(target)):
        if path.exists():
            raise FileError(f"{path}: in the way of a checkpoint, and not one of ours: move it")
    number = 1 + max((found.number for found in manifests.values()), default=0)
    json.dumps(note)  # a note that is no JSON is the caller's mistake, found before it is written
    claim = Manifest("memmeta checkpoint 1", step, number, None, note)
    write_whole(_manifest(target), msgspec.json.encode(claim))


def _manifests(folder: Path) -> dict[int, Manifest]:
    """Every manifest of ours, by step, newest first."""
    found = []
    for path in folder.glob("*.json") if folder.is_dir() and not folder.is_symlink() else ():
        try:
            manifest = read_json(path, Manifest)
        except FileError:
            continue  # somebody else's file, or an altered one: not ours to touch
        if path.name == f"{manifest.step:08d}.json":
            found.append(manifest)
    found.sort(key=lambda manifest: (manifest.number, manifest.step), reverse=True)
    return {manifest.step: manifest for manifest in found}


def whole(folder: Path) -> list[int]:
    """The steps of all checkpoints that were finished, the one saved last first."""
    return [step for step, found in _manifests(folder).items() if found.files is not None]


def note(folder: Path, step: int) -> dict[str, Any]:
    """What was kept with a checkpoint.

    Args:
        folder: of all checkpoints of a run.
        step: one of `whole(folder)`.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    found = _manifests(folder).get(step)
    if found is None:
        raise CheckpointError(f"{folder}: holds no checkpoint of meta-step {step}")
    return found.note


def set_aside(folder: Path, after: int) -> None:
    """Rename what would be in the way of later checkpoints and is known by no manifest of ours.

    Args:
        folder: of all checkpoints of a run.
        after: the step that the run goes on from.
    """
    if not processes.is_first() or not folder.is_dir():
        return
    known = _manifests(folder)
    for path in sorted(folder.iterdir()):
        name = path.name.removesuffix(".json")
        if name.isdecimal() and len(name) >= 8 and after < int(name) and int(name) not in known:
            beside = unused_path(folder, f"{path.name}.set-aside")
            path.rename(beside)
            log.warning("%s: no manifest says that it is whole; it is now %s", path, beside.name)


def restore(folder: Path, like: PyTree) -> PyTree:
    """Read the newest checkpoint that is unaltered; those that are passed over are logged.

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
        intact = next((n for n, step in enumerate(steps) if _intact(folder / f"{step:08d}")), -1)
        for step in steps[: max(intact, 0)]:
            log.warning(
                "%s: the checkpoint of meta-step %d was altered or torn after it was written and "
                "is passed over, for that of meta-step %d",
                *(folder, step, steps[intact]),
            )
    number = processes.told_by_first(intact)
    if number >= 0:
        return _read(folder / f"{steps[number]:08d}", like)
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
    except Exception as error:  # orbax has no error of its own
        raise CheckpointError(
            f"{target}: a checkpoint of another model or optimiser; use the options it was made "
            f"with, see config.json ({_first_line(error)})"
        ) from error


def _arrays(tree: PyTree) -> list[str]:
    return sorted(f"{leaf.dtype}{leaf.shape}" for leaf in jax.tree.leaves(tree))


def _intact(target: Path) -> bool:
    try:
        refuse_links(target)
        return bool(read_json(_manifest(target), Manifest).files == _digests(target))
    except OSError:
        return False


def _digests(target: Path) -> dict[str, str]:
    digests = {}
    for path in sorted(path for path in target.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            name = path.relative_to(target).as_posix()
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _manifest(target: Path) -> Path:
    return target.with_name(f"{target.name}.json")


def _remove(target: Path) -> None:
    """Remove a checkpoint that a manifest of ours names, whole or torn."""
    with suppress(OSError):  # torn from now on, wherever a kill comes; a full disk may forbid it
        found = read_json(_manifest(target), Manifest)
        claim = msgspec.structs.replace(found, files=None, note={})
        write_whole(_manifest(target), msgspec.json.encode(claim))
    # orbax renames its own temporary folder at the end
    for path in (target, *target.parent.glob(f"{target.name}.orbax-checkpoint-tmp*")):
        if not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
    # the manifest last: what a kill leaves of the rest is still known as ours
    _manifest(target).unlink(missing_ok=True)


def _tidy(folder: Path) -> None:
    """Remove all but the newest whole checkpoints, and what a kill left of others."""
    kept = whole(folder)[:KEPT]
    for step in _manifests(folder):
        if step not in kept:
            _remove(folder / f"{step:08d}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
