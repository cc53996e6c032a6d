"""TensorBoard events: the figures of the metrics file, once a step, whatever was made twice."""

import json
import signal
import struct
import sys

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event
from test_faults import QUICK, TINY, line_count, start, wait_for_lines

from memmeta.__main__ import main

pytestmark = pytest.mark.slow


def records(path):
    """The events of one file: length, its checksum, the event, its checksum, and so on."""
    content, found = path.read_bytes(), []
    while content:
        (length,) = struct.unpack_from("<Q", content)
        found.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    return found


def event_files(folder):
    """The files of events, the oldest first."""
    return sorted(folder.glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime)


def shown(folder):
    """(step, name) -> value, as TensorBoard reads a folder: a start hides what came after it."""
    found = {}
    for path in event_files(folder):
        for event in records(path):
            if event.HasField("session_log"):
                found = {key: value for key, value in found.items() if key[0] < event.step}
            for value in event.summary.value:
                assert (event.step, value.tag) not in found
                found[event.step, value.tag] = value.simple_value
    return found


def figures(folder):
    """(step, name) -> value of the metrics file, null where it was no finite number."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {
        (line["step"], name): value
        for line in lines
        for name, value in line.items()
        if name != "step"
    }


def finite(found):
    """Those figures that are numbers, as an event holds them."""
    return {key: float(np.float32(value)) for key, value in found.items() if value is not None}


def trained(folder, *options):
    assert main(["train", "--run", str(folder), "--devices=1", "--tensorboard", *options]) == 0


def test_every_figure_that_is_a_number_is_written(tmp_path):
    trained(tmp_path / "run", *TINY, "--inner-steps=0", "--cg-steps=2", "--meta-steps=2")
    found = figures(tmp_path / "run")
    assert None in found.values()  # a loop of no steps has met no gradient
    assert {(1, "loss"), (2, "masked"), (2, "validation_accuracy")} <= found.keys()
    assert shown(tmp_path / "run") == finite(found)


def test_a_log_point_is_on_the_disk_before_the_next(tmp_path):
    path = tmp_path / "run"
    process = start(path, "--tensorboard", steps=3000)
    wait_for_lines(path, process, 3)
    process.send_signal(signal.SIGSTOP)
    done = line_count(path)  # first: it may still make a step
    written = shown(path)
    process.kill()
    process.communicate()
    assert done >= 3
    assert {step for step, _ in written} >= set(range(1, done))


@pytest.mark.slow
def test_what_a_resumed_run_makes_again_counts_once(tmp_path):
    path = tmp_path / "run"
    trained(path, *TINY, *QUICK, "--meta-steps=6")
    for step in (4, 6):
        (path / "checkpoints" / f"{step:08d}.json").unlink()
    trained(path, "--resume")
    first, second = (
        {event.step for event in records(file) if event.summary.value} for file in event_files(path)
    )
    assert first & second == {3, 4, 5, 6}
    assert shown(path) == finite(figures(path))


def test_a_missing_package_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    assert main(["train", "--tensorboard", "--run", str(tmp_path / "run")]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "pip install 'memmeta[tensorboard]'" in line
    assert not (tmp_path / "run").exists()
