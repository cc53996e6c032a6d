"""How the user's own files are read as a data set, and the limits on what they may contain."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Literal, TypeAlias

Advance: TypeAlias = Callable[[int], None]
Progress: TypeAlias = Callable[[str, int], AbstractContextManager[Advance]]
"""(description, total number of examples) -> a context manager.

It yields a function that is called with the number of examples done since the last call.
"""


@contextmanager
def silent(what: str, total: int) -> Iterator[Advance]:
    """The `Progress` that shows nothing."""
    yield lambda number: None


@dataclass(frozen=True)
class Limits:
    """Limits on the user's files; a file beyond one is refused, and the error names the limit."""

    most_pixels: int = 2**25
    """Most pixels in one image."""
    most_unpacked: int | None = None
    """Most bytes that an archive unpacks to; None: 20 times its own size, and at least 64 MiB."""
    most_members: int = 2_000_000
    """Most files in an archive."""

    def unpacked(self, packed: int) -> int:
        """The most bytes that an archive of `packed` bytes may unpack to."""
        return max(2**26, 20 * packed) if self.most_unpacked is None else self.most_unpacked


@dataclass(frozen=True)
class Reading:
    """How images are read.

    Args:
        size: the length of a side in pixels; images become square. None: 84 for files of a folder,
            and what the data set has for others.
        channels: 1 for grey images, 3 for colour; None: as they are.
        fit: "crop" takes the largest square in the middle and resizes it; "squeeze" resizes both
            sides, each by its own factor.
        background: the colour behind transparent images: a name or "#rrggbb".
        limits: limits on what a file may contain.
        progress: shows how far a conversion or a check is.

    Example:
        >>> Reading(size=28, background="black").fit
        'crop'
    """

    size: int | None = None
    fit: Literal["crop", "squeeze"] = "crop"
    background: str = "white"
    limits: Limits = Limits()
    progress: Progress = silent
    channels: Literal[1, 3] | None = None

    @property
    def name(self) -> str:
        """Suffix of the cache's name for how images are made; empty for the defaults."""
        if (self.size, self.fit, self.background, self.channels) == (None, "crop", "white", None):
            return ""
        colour = "".join(c for c in self.background.lower() if c.isalnum())
        channels = "" if self.channels is None else f"-{self.channels}"
        return f"-{self.size or 'own'}-{self.fit}-{colour}{channels}"
