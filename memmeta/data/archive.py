"""Archives that ship with the package: read only when they are, bit for bit, what was built."""

import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np

from memmeta.data.dataset import DataError

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
