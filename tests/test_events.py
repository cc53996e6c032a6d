"""TensorBoard events: the figures of the metrics file, once a step, whatever was made twice."""

import math
import struct

import pytest
from tensorboardX.proto.event_pb2 import Event

from memmeta.__main__ import main
from memmeta.runs import UserError
from memmeta.runs import _events as events
from memmeta.runs import _processes as processes


def records(path):
    """The events of one file: length, its checksum, the event, its checksum, and so on."""
    content, found = path.read_bytes(), []
    while content:
        (length,) = struct.unpack_from("<Q", content)
        found.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    return found


def shown(folder):
    """(step, name) -> value, as TensorBoard reads a folder: a start hides what came after it."""
    found = {}
    for path in sorted(folder.glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime):
        for event in records(path):
            if event.HasField("session_log"):
                found = {key: value for key, value in found.items() if key[0] < event.step}
            for value in event.summary.value:
                assert (event.step, value.tag) not in found
                found[event.step, value.tag] = value.simple_value
    return found


def test_every_figure_that_is_a_number_is_written(tmp_path):
    with events.written(tmp_path) as write:
        write({"step": 2, "loss": 1.5, "masked": 0, "error_bound": None, "curvature": math.inf})
        write({"step": 4, "loss": 0.5, "masked": 1, "error_bound": math.nan, "curvature": 0.25})
    assert shown(tmp_path) == {
        (2, "loss"): 1.5,
        (2, "masked"): 0,
        (4, "loss"): 0.5,
        (4, "masked"): 1,
        (4, "curvature"): 0.25,
    }


def test_a_log_point_is_on_the_disk_before_the_next(tmp_path):
    with events.written(tmp_path) as write:
        write({"step": 2, "loss": 1.5})
        assert shown(tmp_path) == {(2, "loss"): 1.5}


def test_what_a_resumed_run_makes_again_counts_once(tmp_path):
    with events.written(tmp_path) as write:
        for step in (2, 4, 6):
            write({"step": step, "loss": float(step)})
    with events.written(tmp_path) as write:
        write({"step": 4, "loss": 40.0})
    assert shown(tmp_path) == {(2, "loss"): 2.0, (4, "loss"): 40.0}


def test_a_later_process_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "is_first", lambda: False)
    with events.written(tmp_path) as write:
        write({"step": 2, "loss": 1.5})
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(events, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="tensorboardX"):
        events.require()
    assert main(["train", "--tensorboard", "--run", str(tmp_path / "run")]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "pip install 'memmeta[tensorboard]'" in line
    assert not (tmp_path / "run").exists()
