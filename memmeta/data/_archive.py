"""The package's own archives, verified by SHA-256, and the user's, unpacked within limits."""

import hashlib
import io
import tarfile
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

import numpy as np

from memmeta.data._dataset import DataError
from memmeta.data._files import DEEPEST, read_bytes
from memmeta.data._reading import Limits

ARCHIVES = Path(__file__).parent / "archives"
REMEDY = "reinstall memmeta to get it back"


def read_archive(name: str, folder: Path | None = None) -> dict[str, np.ndarray]:
    """Read the arrays of `<name>.npz` after checking it against the SHA-256 in `<name>.sha256`.

    The file is read once, so that the bytes used are those that were checked. Nothing is unpickled.

    Args:
        name: the archive's name without its suffix.
        folder: the folder with the archive and its checksum; by default one inside the package.

    Returns:
        Every array of the archive, by name.

    Raises:
        DataError: the archive or its checksum is missing or unreadable, or they do not match.

    Example:
        >>> sorted(read_archive("glyphs"))[:4]
        ['codepoint', 'family', 'family_names', 'font']
    """
    folder = ARCHIVES if folder is None else folder
    path = folder / f"{name}.npz"
    try:
        content = path.read_bytes()
        expected = path.with_suffix(".sha256").read_text(encoding="ascii").split()[0]
    except (OSError, UnicodeDecodeError, IndexError) as error:
        raise DataError(
            f"{name}: cannot read {path} and its .sha256 ({error}); {REMEDY}"
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise DataError(
            f"{name}: {path} is truncated or altered: its SHA-256 is {found[:12]}..., "
            f"expected {expected[:12]}... ({len(content)} bytes found); {REMEDY}"
        )
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}
    except Exception as error:  # NumPy raises errors of many kinds for a damaged file
        raise DataError(f"{name}: {path} is no archive of plain arrays ({error})") from error


def unpack(path: Path, target: Path, limits: Limits) -> None:
    """Unpack the user's archive into a new folder: all of it or nothing.

    Args:
        path: a .zip or .tar file, compressed or not. If there is a file `<file>.sha256` beside it,
            the checksum in it must match.
        target: the folder to make. If everything in the archive is inside one folder of this name,
            that folder becomes `target`.
        limits: limits on the size and the number of files that are unpacked.

    Raises:
        DataError: the checksum does not match, the archive is damaged, encrypted or beyond the
            limits, or a member would be written outside the folder.
    """
    _check_sum(path)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
        inside = Path(temporary) / "all"
        inside.mkdir()
        try:
            if zipfile.is_zipfile(path):
                _unzip(path, inside, limits)
            else:
                _untar(path, inside, limits)
        except DataError:
            raise
        except Exception as error:  # zipfile and tarfile raise many kinds of errors
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"{path} cannot be unpacked ({reason}): get it again") from error
        only = inside / target.name
        try:
            (only if list(inside.iterdir()) == [only] else inside).rename(target)
        except OSError:
            if not target.is_dir():  # else another process has unpacked it meanwhile
                raise


def _check_sum(path: Path) -> None:
    beside = path.with_name(f"{path.name}.sha256")
    if not beside.is_file():
        return
    words = read_bytes(beside, 4096).decode("ascii", "replace").split()
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if words[:1] != [found]:
        stated = f"{words[0][:12]}..." if words else "nothing"
        raise DataError(
            f"{path} is truncated or altered: its SHA-256 is {found[:12]}..., {beside.name} "
            f"says {stated}: get it again"
        )


class _Count:
    """Counts an archive's members and their bytes, and refuses what exceeds the limits."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self.path, self.members, self.bytes = path, 0, 0
        self.most_members = limits.most_members
        self.most_bytes = limits.unpacked(path.stat().st_size)

    def add(self, name: str, size: int) -> None:
        """Count one member before it is unpacked."""
        self.members, self.bytes = self.members + 1, self.bytes + size
        if self.bytes > self.most_bytes:
            raise DataError(
                f"{self.path}: unpacks to more than {self.most_bytes} bytes; if that is right, "
                "allow it by most_unpacked"
            )
        if self.members > self.most_members:
            raise DataError(
                f"{self.path}: holds more than {self.most_members} files; if that is right, allow "
                "it by most_members"
            )
        if len(PurePosixPath(name).parts) > DEEPEST:
            raise DataError(f"{self.path}: holds {DEEPEST} folders inside one another")


def _unzip(path: Path, inside: Path, limits: Limits) -> None:
    count = _Count(path, limits)
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if not (inside / member.filename).resolve().is_relative_to(inside.resolve()):
                name = member.filename
                raise DataError(f"{path}: its member {name} would land outside the folder")
            count.add(member.filename, member.file_size)
            archive.extract(member, inside)


def _untar(path: Path, inside: Path, limits: Limits) -> None:
    count = _Count(path, limits)
    with tarfile.open(path) as archive:
        for member in archive:
            count.add(member.name, member.size)
            archive.extract(member, inside, filter="data")
