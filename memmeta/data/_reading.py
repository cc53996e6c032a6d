"""How files of a person's own become a data set, and how far they are trusted."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Literal, TypeAlias

Advance: TypeAlias = Callable[[int], None]
Progress: TypeAlias = Callable[[str, int], AbstractContextManager[Advance]]
"""(what is done, how many examples) -> a context whose value is called with each number done."""


@contextmanager
def silent(what: str, total: int) -> Iterator[Advance]:
    """The `Progress` that shows nothing."""
    yield lambda number: None


@dataclass(frozen=True)
class Limits:
    """What a file may ask of the machine; beyond it is refused by name."""

    most_pixels: int = 2**25
    """Pixels of one image."""
    most_unpacked: int | None = None
    """Bytes that an archive unpacks to; None: 20 times its own size, and at least 64 MiB."""
    most_members: int = 2_000_000
    """Files in an archive."""

    def unpacked(self, packed: int) -> int:
        """Bytes that an archive of `packed` bytes may unpack to."""
        return max(2**26, 20 * packed) if self.most_unpacked is None else self.most_unpacked


@dataclass(frozen=True)
class Reading:
    """How image files are read.

    Args:
        size: pixels a side.
        fit: "crop" resizes the short side and takes the middle; "squeeze" resizes both sides, each
            by its own factor.
        background: what shows through where an image is transparent: a name or "#rrggbb".
        limits: what a file may ask of the machine.
        progress: told how far a conversion or a check is.

    Example:
        >>> Reading(size=28, background="black").fit
        'crop'
    """

    size: int = 84
    fit: Literal["crop", "squeeze"] = "crop"
    background: str = "white"
    limits: Limits = Limits()
    progress: Progress = silent

    @property
    def name(self) -> str:
        """What tells conversions of the same images apart; empty for the defaults."""
        default = Reading()
        if (self.size, self.fit, self.background) == (default.size, default.fit, "white"):
            return ""
        colour = "".join(c for c in self.background.lower() if c.isalnum())
        return f"-{self.size}-{self.fit}-{colour}"
