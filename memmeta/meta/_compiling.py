"""A word to the user while a first call compiles for long."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

LONG = 5.0  # seconds
log = logging.getLogger("memmeta")


@contextmanager
def said_if_long(what: str, seconds: float = LONG) -> Iterator[None]:
    """Log a line if the body takes longer than some seconds.

    Python shows warnings of a logger on stderr where the program has not set up logging itself;
    `logging.getLogger("memmeta").setLevel("ERROR")` silences it.

    Args:
        what: what is compiled.
        seconds: how long is long.

    Example:
        >>> heard = threading.Event()
        >>> log.addFilter(lambda record: heard.set())
        >>> with said_if_long("a program", seconds=0.0):
        ...     heard.wait(60)
        True
        >>> log.filters.clear()
    """

    def say() -> None:
        log.warning(
            "compiling %s, %.0f s so far; this is done once for each shape of the tasks, and "
            "memmeta.enable_compilation_cache() keeps it for the next start of Python",
            what,
            seconds,
        )

    timer = threading.Timer(seconds, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
