"""A .npy file of uint8 rows that is written part by part."""

import hashlib
import io
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np


class Rows:
    """The rows of an array on disk, as an interrupted conversion left them or new.

    Written by plain writes and not through a memory map, in which a full disk is a SIGBUS that
    ends the process without a word.

    Args:
        path: of the .npy file; one of another shape is replaced.
        number: of rows.
        shape: of each row.
    """

    def __init__(self, path: Path, number: int, shape: tuple[int, ...]) -> None:
        head = io.BytesIO()
        described = {"descr": "|u1", "fortran_order": False, "shape": (number, *shape)}
        np.lib.format.write_array_header_1_0(head, described)
        self.path, self.head, self.size = path, head.getvalue(), math.prod(shape)
        self.begin, self.whole = len(self.head), len(self.head) + number * self.size

    def __enter__(self) -> "Rows":
        if not self._fits():
            self.path.unlink(missing_ok=True)  # a process that still reads the old one keeps it
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            with open(os.open(self.path, flags, 0o666), "wb") as file:
                file.write(self.head)
                file.truncate(self.whole)
        descriptor = os.open(self.path, os.O_RDWR | os.O_NOFOLLOW)
        self.file = open(descriptor, "r+b")
        return self

    def _fits(self) -> bool:
        """Whether the file there is one of this shape."""
        try:
            with open(os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
                begins = file.read(self.begin) == self.head
                return begins and os.fstat(file.fileno()).st_size == self.whole
        except OSError:
            return False

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.file.close()

    def digest(self, start: int, number: int) -> str:
        """The SHA-256 of some rows as they are."""
        self.file.seek(self.begin + start * self.size)
        digest = hashlib.sha256()
        for _ in range(number):
            digest.update(self.file.read(self.size))
        return digest.hexdigest()

    def write(self, start: int, examples: Iterator[np.ndarray]) -> str:
        """Write rows from `start` on.

        Returns:
            Their SHA-256.

        Raises:
            OSError: the disk is full.
        """
        self.file.seek(self.begin + start * self.size)
        digest = hashlib.sha256()
        for example in examples:
            content = np.ascontiguousarray(example).tobytes()
            self.file.write(content)
            digest.update(content)
        self.file.flush()
        return digest.hexdigest()
