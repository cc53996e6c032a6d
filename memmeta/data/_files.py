"""Files that a stranger may have laid out: no link is followed, nothing is written in halves.

Every file that the program reads or writes in a folder of runs or data goes through here.
"""

import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

LARGEST = 2**28
"""Bytes of a file that is read in one piece."""
DEEPEST = 64
"""Folders inside one another, of what a person would have made."""


LEFT_OVER = re.compile(r"\.[0-9a-f]{16}\.new")
"""Names of what `write_whole` leaves where it is killed."""


class FileError(OSError):
    """A file or folder cannot be used; the message names it, says why, and what to do."""


class InUse(FileError):
    """Another process holds the lock."""


def read_bytes(path: Path, most: int = LARGEST) -> bytes:
    """Read a whole file, if it is a plain one.

    Args:
        path: of the file.
        most: bytes it may have.

    Returns:
        Its content.

    Raises:
        FileError: it is a link, a device or a pipe, it is longer, or it cannot be read.
    """
    with _opened(path, os.O_RDONLY) as descriptor:
        size = os.fstat(descriptor).st_size
        if size > most:
            raise FileError(f"{path}: {size} bytes, expected at most {most}")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()


def decode(content: bytes, kind: Any, where: str) -> Any:
    """Read JSON through a schema.

    Args:
        content: the JSON.
        kind: what it must be, any type that msgspec knows.
        where: what the error calls it.

    Returns:
        An object of that type.

    Raises:
        FileError: it is something else.

    Example:
        >>> decode(b'{"step": 3}', dict[str, int], "a line")
        {'step': 3}
    """
    try:
        return msgspec.json.decode(content, type=kind)
    except (ValueError, RecursionError) as error:  # all of msgspec's and what is no UTF-8
        raise FileError(f"{where}: not what was expected there ({error})") from error


def read_json(path: Path, kind: Any) -> Any:
    """`decode` for a file.

    Raises:
        FileError: as `read_bytes` and `decode`.
    """
    return decode(read_bytes(path), kind, str(path))


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a kill, sees the old one or the new one.

    What stands at the path is replaced, and never followed where it is a link.

    Args:
        path: of the file; its folder exists.
        content: text is written as UTF-8.

    Raises:
        OSError: it cannot be written; the old file is as it was.
    """
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    temporary = path.with_name(f".{secrets.token_hex(8)}.new")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with open(os.open(temporary, flags, 0o666), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def append(path: Path, line: str) -> None:
    """Add a line to a file; on the disk when this returns.

    Args:
        path: of the file, made where missing in a folder that exists.
        line: without its end.

    Raises:
        OSError: it cannot be written, or is no plain file.
    """
    with _opened(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT) as descriptor:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(f"{line}\n".encode())
        os.fsync(descriptor)


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    try:
        # not blocking: a pipe without a writer would hold us for ever
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except (OSError, ValueError) as error:
        raise FileError(f"{path}: {_reason(path, error)}") from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise FileError(f"{path}: not a plain file")
        yield descriptor
    finally:
        os.close(descriptor)


def _reason(path: Path, error: Exception) -> str:
    with suppress(OSError, ValueError):
        if path.is_symlink():
            return "a link, which is not followed: replace it by the file"
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def refuse_links(folder: Path) -> None:
    """Refuse a folder in which anything is a link; the folder itself may be one.

    Args:
        folder: that is about to be written to.

    Raises:
        FileError: it holds a link, or cannot be read.
    """
    waiting = [(str(folder), 0)]
    while waiting:
        path, depth = waiting.pop()
        if depth > DEEPEST:
            raise FileError(f"{folder}: holds more than {DEEPEST} folders inside one another")
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.is_symlink():
                    raise FileError(f"{entry.path}: a link, which is not followed: remove it")
                if entry.is_dir(follow_symlinks=False):
                    waiting.append((entry.path, depth + 1))


def own_folder(path: Path) -> Path:
    """Make a folder to write in, unless it is there.

    Args:
        path: its parent exists.

    Returns:
        The path.

    Raises:
        FileError: it is a link.
        OSError: it cannot be made.
    """
    path.mkdir(exist_ok=True)
    if path.is_symlink():
        raise FileError(f"{path}: a link, which is not followed: replace it by the folder")
    return path


def unused_path(root: Path, name: str) -> Path:
    """The first of root/name-1, root/name-2, … that does not exist."""
    number = 1
    while (path := root / f"{name}-{number}").exists() or path.is_symlink():
        number += 1
    return path


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold a lock; the operating system releases it when the process dies, however it dies.

    Args:
        path: of the lock's file, made where missing.
        wait: for the process that has it.

    Raises:
        InUse: another has it, and `wait` is False.
        FileError: the file is a link, or cannot be made.
    """
    while True:
        with _opened(path, os.O_RDWR | os.O_CREAT) as descriptor:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError as error:
                raise InUse(f"{path.parent}: in use by another process") from error
            # who held it may have removed the file, and then a third has the lock of a new one
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                yield
                return


def user_cache() -> Path:
    """Where a person's caches are: `$XDG_CACHE_HOME` where it is absolute, else `~/.cache`.

    Raises:
        FileError: the home folder is not known.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not root.is_absolute():  # as its specification says: anything else counts as not set
        root = Path("~/.cache").expanduser()
    if not root.is_absolute():
        raise FileError("HOME: expected an absolute path, for the folder of caches")
    return root / "memmeta"


def distrust(folder: Path) -> str | None:
    """Why what lies in a folder may be another person's; None where it can only be this one's.

    Args:
        folder: that exists.
    """
    for path in (folder, *folder.resolve().parents):
        found: Any = path.stat()
        if found.st_uid not in (0, os.geteuid()):
            return f"{path} belongs to another user"
        if found.st_mode & 0o022 and not (path != folder and found.st_mode & stat.S_ISVTX):
            return f"{path} can be written by others (chmod go-w {path})"
    return None
