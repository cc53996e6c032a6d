"""Schemas that the JSON files of a run are checked against when they are read."""

from typing import Annotated, Any, NamedTuple, TypedDict

import msgspec

from memmeta.data._files import FileError, decode
from memmeta.meta._evaluation import Interval

Count = Annotated[int, msgspec.Meta(ge=0, lt=2**62)]
Whole = Annotated[int, msgspec.Meta(gt=-(2**62), lt=2**62)]
Number = Annotated[float, msgspec.Meta(gt=-1e300, lt=1e300)]
LARGEST_LINE = 2**20


class Mean(TypedDict):
    """A mean with its 95 % interval."""

    mean: Number
    interval: Number


class Row(NamedTuple):
    """One run beside others.

    Attributes:
        name: of its folder.
        method: its method.
        episodes: how many there were.
        accuracy: its mean accuracy.
        difference: the mean of its accuracy minus the first run's, episode by episode; None of the
            first run.
    """

    name: str
    method: str
    episodes: int
    accuracy: Interval
    difference: Interval | None


class FinalReport(TypedDict):
    """The content of report.json."""

    method: str
    data: str
    meta_steps: Count
    ways: Count
    shots: Count
    episodes: Count
    accuracy: dict[str, Mean]
    meta_steps_per_second: Number | None
    meta_step_temporary_bytes: Count | None
    backend: str
    devices: Count


def log_line(row: bytes, where: str) -> dict[str, Any]:
    """Decode one log point: a flat JSON object of numbers, with the meta-step as `step`.

    Args:
        row: one line of metrics.jsonl.
        where: the name of the line in error messages.

    Returns:
        The metrics by name; None for those that were not finite.

    Raises:
        FileError: the line is not a log point.

    Example:
        >>> log_line(b'{"step": 20, "loss": 0.5, "tasks_per_second": 31.0}', "metrics.jsonl:1")
        {'step': 20, 'loss': 0.5, 'tasks_per_second': 31.0}
    """
    line: dict[str, Any] = decode(row[:LARGEST_LINE], dict[str, Whole | Number | None], where)
    step = line.get("step")
    if not isinstance(step, int) or step < 0:
        raise FileError(f"{where}: no log point of a run (step: expected 0 or more, found {step})")
    if (line.get("validation_accuracy") is None) != (line.get("validation_interval") is None):
        raise FileError(f"{where}: no log point of a run (half a validation figure)")
    return line
