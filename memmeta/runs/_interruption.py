"""Early ends of a run: handling of SIGTERM and SIGINT between blocks, and two exceptions."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from memmeta.runs import _processes as processes
from memmeta.runs._config import UserError


class Interrupted(UserError):
    """A signal ended a run after its state was saved; the message names the meta-step."""


class Stopped(UserError):
    """A run with --strict met trouble; the message says when, what, and where it was saved."""


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Record SIGTERM and SIGINT instead of ending; a second signal of a kind acts as usual.

    Yields:
        A function that says whether one of them has come, in any of the run's processes.
    """
    asked: list[int] = []
    previous: dict[int, Any] = {}

    def note(number: int, frame: Any) -> None:
        asked.append(number)
        signal.signal(number, previous[number])

    if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, note)
    try:
        yield lambda: processes.any_of_all(bool(asked))
    finally:
        for held, handler in previous.items():
            signal.signal(held, handler)
