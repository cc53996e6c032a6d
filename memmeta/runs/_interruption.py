"""Why a run ends before its last meta-step; SIGTERM and SIGINT as a question asked in between."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from memmeta.runs import _processes as processes
from memmeta.runs._config import UserError


class Interrupted(UserError):
    """A signal ended a run after its state was saved; the message says how to go on."""


class Stopped(UserError):
    """A run with --strict met trouble; the message says where, what, and which files tell more."""


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Hold back SIGTERM and SIGINT; a second one of a kind acts at once.

    Yields:
        Whether one has come, to any of the run's processes.
    """
    asked: list[int] = []
    previous: dict[int, Any] = {}

    def note(number: int, frame: Any) -> None:
        asked.append(number)
        signal.signal(number, previous[number])

    if threading.current_thread() is threading.main_thread():  # no other may set handlers
        for number in (signal.SIGTERM, signal.SIGINT):
            previous[number] = signal.signal(number, note)
    try:
        yield lambda: processes.any_of_all(bool(asked))
    finally:
        for held, handler in previous.items():
            signal.signal(held, handler)
