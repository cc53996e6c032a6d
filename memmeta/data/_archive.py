"""Archives: used only when they are, bit for bit, what was built; unpacked only inside a folder."""

import hashlib
import io
import tarfile
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np

from memmeta.data._dataset import DataError

ARCHIVES = Path(__file__).parent / "archives"
REMEDY = "reinstall memmeta to get it back"


def read_archive(name: str, folder: Path | None = None) -> dict[str, np.ndarray]:
    """Read the arrays of `<name>.npz` after checking it against the SHA-256 in `<name>.sha256`.

    The bytes that are checked are the bytes that are read. Nothing is unpickled.

    Args:
        name: the archive's name without its ending.
        folder: where the archive and its checksum lie; by default inside the package.

    Returns:
        Every array of the archive, by name.

    Raises:
        DataError: the archive or its checksum is missing or unreadable, or they do not agree.

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
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{name}: {path} is no archive of plain arrays ({error})") from error


def unpack(path: Path, target: Path) -> None:
    """Unpack an archive of the user's into a new folder: all of it or nothing.

    Args:
        path: a .zip or .tar file, compressed or not. A checksum in `<file>.sha256` beside it must
            agree.
        target: the folder to make; an archive that holds nothing but a folder of this name is
            unpacked without it.

    Raises:
        DataError: the checksum does not agree, the archive is damaged, or a member would land
            outside the folder.
    """
    beside = path.with_name(f"{path.name}.sha256")
    if beside.is_file():
        expected = beside.read_text(encoding="ascii").split()[0]
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected:
            raise DataError(
                f"{path} is truncated or altered: its SHA-256 is {found[:12]}..., {beside.name} "
                f"says {expected[:12]}...: get it again"
            )
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
        inside = Path(temporary) / "all"
        inside.mkdir()
        try:
            if zipfile.is_zipfile(path):
                _unzip(path, inside)
            else:
                with tarfile.open(path) as archive:
                    archive.extractall(inside, filter="data")
        except (tarfile.TarError, zipfile.BadZipFile, OSError, EOFError, zlib.error) as error:
            raise DataError(f"{path} cannot be unpacked ({error}): get it again") from error
        only = inside / target.name
        (only if list(inside.iterdir()) == [only] else inside).rename(target)


def _unzip(path: Path, inside: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if not (inside / name).resolve().is_relative_to(inside.resolve()):
                raise DataError(f"{path}: its member {name} would land outside the folder")
        archive.extractall(inside)
