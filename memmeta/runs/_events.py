"""TensorBoard events with the metrics of a run."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from memmeta.runs import _processes as processes
from memmeta.runs._config import UserError


def require() -> None:
    """Check that events can be written.

    Raises:
        UserError: tensorboardX is not installed.
    """
    if find_spec("tensorboardX") is None:
        raise UserError(
            "tensorboard: expected the package tensorboardX, found none; "
            "pip install 'memmeta[tensorboard]'"
        )


@contextmanager
def written(folder: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Write each log point as TensorBoard events, one scalar for each metric.

    Of several processes only the first one writes. A resumed run makes TensorBoard hide the earlier
    events of the steps it repeats.

    Args:
        folder: the run folder; the event files go into its sub-folder `events`.

    Yields:
        The function to call with each log point. Values that are not finite numbers are left out.

    Raises:
        UserError: tensorboardX is not installed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, written(Path(folder)) as write:
        ...     write({"step": 20, "loss": 0.5, "error_bound": None})
        ...     print(len(list(Path(folder).glob("events.out.tfevents.*"))))
        1
    """
    require()
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary

    files: list[EventsWriter] = []

    def write(line: dict[str, Any]) -> None:
        if not processes.is_first():
            return
        step, now = line["step"], time.time()
        if not files:
            files.append(EventsWriter(str(folder / "events"), f".{step}"))
            start = SessionLog(
                status=SessionLog.START
            )  # TensorBoard hides earlier events from here
            files[0].write_event(Event(wall_time=now, step=step, session_log=start))
        values = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in line.items()
            if isinstance(value, int | float) and name != "step" and math.isfinite(value)
        ]
        files[0].write_event(Event(wall_time=now, step=step, summary=Summary(value=values)))
        files[0].flush()

    try:
        yield write
    finally:
        for file in files:
            file.close()
