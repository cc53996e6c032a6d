"""Checkpoints written by orbax, each with a manifest of checksums.

The manifest is written twice: before the checkpoint, to mark the files to come as memmeta's own,
and after it, with the checksums. Therefore a process that is killed leaves either a complete
checkpoint or one that is known to be incomplete, and only checkpoints with a manifest are ever
removed. Only arrays and JSON are read, never code, and links are refused, so that nothing outside
the folder is reached.
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

from memmeta._shared.readable import readable
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
    """A checkpoint cannot be used; the message says which one and why."""


class Manifest(msgspec.Struct, forbid_unknown_fields=True):
    """The manifest beside a checkpoint.

    Attributes:
        format: marks the file as a manifest of memmeta's.
        step: meta-steps done, also the file's name.
        number: position of the checkpoint in the order in which they were saved.
        files: the SHA-256 of each of the checkpoint's files; None until all of them are written.
        note: plain values that the caller of `save` passed.
    """

    format: Literal["memmeta checkpoint 1"]
    step: Count
    number: Count
    files: dict[str, str] | None
    note: dict[str, Any]


def save(folder: Path, step: int, state: PyTree, note: Mapping[str, Any] | None = None) -> None:
    """Write a checkpoint and its manifest, and remove all but the last three checkpoints.

    Of several processes each writes the shards it holds, and the first one everything else.

    Args:
        folder: the folder of the run's checkpoints, made if missing; its parent must exist.
        step: meta-steps done, which become the checkpoint's name.
        state: any pytree of arrays.
        note: plain values to keep in the manifest.

    Raises:
        OSError: the disk is full or read-only, or a file without a manifest is in the way; earlier
            checkpoints are unchanged.
    """
    target = folder / f"{step:08d}"
    try:
        if processes.is_first():
            _claim(folder, target, step, dict(note or {}))
        processes.told_by_first(0)  # waits until the first process has removed the old one
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
    """Write the first manifest of a checkpoint, after removing an older one of the same step."""
    own_folder(folder)
    refuse_links(folder)
    manifests = _manifests(folder)
    if step in manifests:
        _remove(target)
    for path in (target, _manifest(target)):
        if path.exists():
            raise FileError(f"{path}: in the way of a checkpoint, and not one of ours: move it")
    number = 1 + max((found.number for found in manifests.values()), default=0)
    json.dumps(note)  # raises before anything is written if the note cannot be JSON
    claim = Manifest("memmeta checkpoint 1", step, number, None, note)
    write_whole(_manifest(target), msgspec.json.encode(claim))


def _manifests(folder: Path) -> dict[int, Manifest]:
    """All manifests in a folder by step, the last saved first."""
    found = []
    for path in folder.glob("*.json") if folder.is_dir() and not folder.is_symlink() else ():
        try:
            manifest = read_json(path, Manifest)
        except FileError:
            continue  # not a manifest of memmeta's, so leave the file alone
        if path.name == f"{manifest.step:08d}.json":
            found.append(manifest)
    found.sort(key=lambda manifest: (manifest.number, manifest.step), reverse=True)
    return {manifest.step: manifest for manifest in found}


def whole(folder: Path) -> list[int]:
    """The steps of all complete checkpoints, the last saved first."""
    return [step for step, found in _manifests(folder).items() if found.files is not None]


def note(folder: Path, step: int) -> dict[str, Any]:
    """The note that was saved with a checkpoint.

    Args:
        folder: the folder of the run's checkpoints.
        step: one of `whole(folder)`.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    found = _manifests(folder).get(step)
    if found is None:
        raise CheckpointError(f"{folder}: holds no checkpoint of meta-step {step}")
    return found.note


def set_aside(folder: Path, after: int) -> None:
    """Rename files without a manifest that would be in the way of later checkpoints.

    Args:
        folder: the folder of the run's checkpoints.
        after: the step that the run continues from.
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
    """Read the last saved checkpoint whose checksums match; damaged ones after it are logged.

    Args:
        folder: the folder of the run's checkpoints.
        like: a pytree of arrays with the structure, shapes and dtypes of the saved state. Each
            array is placed on the devices of its counterpart here, wherever it was saved from.

    Returns:
        The state.

    Raises:
        CheckpointError: there is no checkpoint, all are damaged, or it is of another model.
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
            # compared first, because orbax stops at the first array that differs while others are
            # still being read
            stored = checkpointer.metadata(target.absolute()).item_metadata
            if _arrays(stored.tree) != _arrays(abstract):
                raise ValueError("its arrays have other shapes or dtypes")
            return checkpointer.restore(target.absolute(), abstract)
    except Exception as error:  # orbax raises errors of many kinds
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
    """Remove a checkpoint that has a manifest, and the manifest."""
    # mark it as incomplete first, in case the process is killed halfway; a full disk may forbid it
    with suppress(OSError):
        found = read_json(_manifest(target), Manifest)
        claim = msgspec.structs.replace(found, files=None, note={})
        write_whole(_manifest(target), msgspec.json.encode(claim))
    # orbax writes to a temporary folder, which is left if the process is killed
    for path in (target, *target.parent.glob(f"{target.name}.orbax-checkpoint-tmp*")):
        if not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
    # the manifest last, so that remaining files are still known as memmeta's after a kill
    _manifest(target).unlink(missing_ok=True)


def _tidy(folder: Path) -> None:
    """Remove all but the last `KEPT` complete checkpoints, and incomplete ones."""
    kept = whole(folder)[:KEPT]
    for step in _manifests(folder):
        if step not in kept:
            _remove(folder / f"{step:08d}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


readable(__name__)
