"""Reading and writing files in folders that may come from somebody else.

No link is followed, so that such a folder cannot lead to other files, and a file is replaced as a
whole or not at all. The small files of runs and caches are read and written here; only array files
(`_rows`, orbax's checkpoints) are not.
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
"""The most bytes of a file that is read as a whole, by default."""
DEEPEST = 64
"""The most folders inside one another; no user's own data would have more."""

LEFT_OVER = re.compile(r"\.[0-9a-f]{16}\.new")
"""Names of the temporary files that `write_whole` leaves behind if it is killed."""


class FileError(OSError):
    """A file or folder cannot be used; the message names it and says why."""


class InUse(FileError):
    """Another process holds the lock."""


def read_bytes(path: Path, most: int = LARGEST) -> bytes:
    """Read a whole regular file.

    Args:
        path: the file.
        most: the most bytes it may have.

    Returns:
        The file's content.

    Raises:
        FileError: it is a link, a device or a pipe, it is too long, or it cannot be read.
    """
    with _opened(path, os.O_RDONLY) as descriptor:
        size = os.fstat(descriptor).st_size
        if size > most:
            raise FileError(f"{path}: {size} bytes, expected at most {most}")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()


def decode(content: bytes, kind: Any, where: str) -> Any:
    """Decode JSON and check it against a type.

    Args:
        content: the JSON.
        kind: the expected type, any that msgspec supports.
        where: the name of the JSON in error messages.

    Returns:
        An object of that type.

    Raises:
        FileError: the content is not JSON of that type.

    Example:
        >>> decode(b'{"step": 3}', dict[str, int], "a line")
        {'step': 3}
    """
    try:
        return msgspec.json.decode(content, type=kind)
    except (ValueError, RecursionError) as error:  # msgspec's errors, and bytes that are not UTF-8
        raise FileError(f"{where}: not what was expected there ({error})") from error


def read_json(path: Path, kind: Any) -> Any:
    """Read a JSON file and check it against a type, see `decode`.

    Raises:
        FileError: as `read_bytes` and `decode`.
    """
    return decode(read_bytes(path), kind, str(path))


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that readers see the old or the new content, even if the process is killed.

    A link at the path is replaced, not followed.

    Args:
        path: the file; its folder must exist.
        content: the content; text is written as UTF-8.

    Raises:
        OSError: the file cannot be written; the old file is unchanged.
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
    """Append a line to a file, and return once it is on the disk.

    Args:
        path: the file, made if missing; its folder must exist.
        line: the line without a newline.

    Raises:
        OSError: the file cannot be written, or is not a regular file.
    """
    with _opened(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT) as descriptor:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(f"{line}\n".encode())
        os.fsync(descriptor)


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    try:
        # without O_NONBLOCK, opening a pipe that nobody writes to would block for ever
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
    """Refuse a folder with a link anywhere inside; the folder itself may be a link.

    Args:
        folder: the folder that is about to be read or written.

    Raises:
        FileError: there is a link in it, or its folders are nested too deeply.
        OSError: it cannot be read.
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
    """Make a folder to write to, unless it exists.

    Args:
        path: the folder; its parent must exist.

    Returns:
        The path.

    Raises:
        FileError: the folder is a link.
        OSError: the folder cannot be made.
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
    """Hold a lock; the operating system releases it however the process ends.

    Args:
        path: the lock file, made if missing.
        wait: whether to wait if another process holds the lock.

    Raises:
        InUse: another process holds the lock, and `wait` is False.
        FileError: the lock file is a link, or cannot be made.
    """
    while True:
        with _opened(path, os.O_RDWR | os.O_CREAT) as descriptor:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError as error:
                raise InUse(f"{path.parent}: in use by another process") from error
            # the process that held the lock may have removed the file: then ours is not the lock
            # that a third process would take, so try again with the file that is there now
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                yield
                return


def user_cache() -> Path:
    """memmeta's folder in the user's cache: `$XDG_CACHE_HOME` if absolute, else `~/.cache`.

    Raises:
        FileError: the home folder is not known.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not root.is_absolute():  # the XDG specification says to ignore relative paths
        root = Path("~/.cache").expanduser()
    if not root.is_absolute():
        raise FileError("HOME: expected an absolute path, for the folder of caches")
    return root / "memmeta"


def distrust(folder: Path) -> str | None:
    """The reason why other users could write to a folder; None if only this user (or root) can.

    Args:
        folder: an existing folder.
    """
    for path in (folder, *folder.resolve().parents):
        found: Any = path.stat()
        if found.st_uid not in (0, os.geteuid()):
            return f"{path} belongs to another user"
        if found.st_mode & 0o022 and not (path != folder and found.st_mode & stat.S_ISVTX):
            return f"{path} can be written by others (chmod go-w {path})"
    return None
