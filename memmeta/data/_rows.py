"""A .npy file of uint8 rows that is written in several parts."""

import hashlib
import io
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np


class Rows:
    """The rows of an array on disk: new, or as an interrupted conversion left them.

    They are written by plain writes, because a write through a memory map to a full disk ends the
    process by SIGBUS, without an error message.

    Args:
        path: the .npy file; an existing file of another shape is replaced.
        number: the number of rows.
        shape: the shape of each row.
    """

    def __init__(self, path: Path, number: int, shape: tuple[int, ...]) -> None:
        head = io.BytesIO()
        described = {"descr": "|u1", "fortran_order": False, "shape": (number, *shape)}
        np.lib.format.write_array_header_1_0(head, described)
        self.path, self.head, self.size = path, head.getvalue(), math.prod(shape)
        self.begin, self.whole = len(self.head), len(self.head) + number * self.size

    def __enter__(self) -> "Rows":
        if not self._fits():
            self.path.unlink(missing_ok=True)  # processes that have it open can still read it
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            with open(os.open(self.path, flags, 0o666), "wb") as file:
                file.write(self.head)
                file.truncate(self.whole)
        descriptor = os.open(self.path, os.O_RDWR | os.O_NOFOLLOW)
        self.file = open(descriptor, "r+b")
        return self

    def _fits(self) -> bool:
        """Whether there is a file of this shape already."""
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
        """The SHA-256 of `number` rows from `start` on, as they are on disk."""
        self.file.seek(self.begin + start * self.size)
        digest = hashlib.sha256()
        for _ in range(number):
            digest.update(self.file.read(self.size))
        return digest.hexdigest()

    def write(self, start: int, examples: Iterator[np.ndarray]) -> str:
        """Write examples to the rows from `start` on.

        Returns:
            The SHA-256 of the rows written.

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
