"""Two real processes on one machine against one."""

import contextlib
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from test_faults import (
    QUICK,
    TINY,
    assert_same_run,
    ended,
    final_state,
    line_count,
    lines,
    start_with,
    wait_for_lines,
)

from memmeta.__main__ import main
from memmeta.runs import checkpoints

COUNTED_BY = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "JAX_NUM_PROCESSES")
"""Where launchers say how many processes a run has."""
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def assert_close(first, second):
    np.testing.assert_allclose(
        lines(first).to_numpy(float), lines(second).to_numpy(float), rtol=2e-2, atol=2e-3
    )
    for one, other in zip(final_state(first), final_state(second), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-2, atol=2e-3)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    path = tmp_path_factory.mktemp("processes") / "alone"
    assert main(["train", "--run", str(path), *TINY, *QUICK, "--meta-steps=4", "--devices=1"]) == 0
    return path


@pytest.mark.slow
def test_two_processes_give_what_one_gives(alone, tmp_path, capsys):
    options = [*TINY, *QUICK, "--meta-steps=4", "--processes=2", "--tensorboard"]
    process = start_with(tmp_path / "two", *options)
    errors = process.communicate()[1]
    assert process.returncode == 0, errors
    assert_close(alone, tmp_path / "two")
    assert checkpoints.whole(tmp_path / "two" / "checkpoints") == [4, 2]
    (events,) = (tmp_path / "two").glob("events.out.tfevents.*")  # the first process writes
    assert events.stat().st_size > 0


@pytest.mark.slow
def test_a_process_of_two_dies_and_one_process_goes_on(tmp_path):
    steps = "--meta-steps=3000"
    path = tmp_path / "died"
    process = start_with(path, *TINY, *QUICK, steps, "--processes=2")
    wait_for_lines(path, process, 3)
    children = children_of(process.pid)
    os.kill(children[-1], signal.SIGKILL)
    errors = process.communicate()[1]
    assert process.returncode == 1
    assert "go on with --resume" in errors
    done = checkpoints.whole(path / "checkpoints")[0]
    process = start_with(path, "--resume", "--devices=1")
    wait_for_lines(path, process, done + 3)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate()[1]
    assert process.returncode == 75, errors
    found = lines(path)["step"].tolist()
    assert found == list(range(1, len(found) + 1))


@pytest.mark.slow
def test_a_signal_to_two_processes(tmp_path):
    path = tmp_path / "stopped"
    process = start_with(path, *TINY, *QUICK, "--meta-steps=3000", "--processes=2")
    wait_for_lines(path, process, 3)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate()[1]
    assert process.returncode == 75, errors
    assert checkpoints.whole(path / "checkpoints")[0] == lines(path)["step"].max()


def listening(pids):
    """The addresses that processes listen on, as /proc has them."""
    sockets = set()
    for pid in pids:
        for file in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                sockets.add(os.readlink(file).removeprefix("socket:[").removesuffix("]"))
    rows = [
        row.split()
        for name in ("tcp", "tcp6")
        for row in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    return {row[1].rpartition(":")[0] for row in rows if row[3] == "0A" and row[9] in sockets}


def still_there(path):
    """The processes of a run, whoever started them."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if os.fsencode(path) in file.read_bytes().split(b"\0"):
                found.append(int(file.parent.name))
    return found


@pytest.mark.slow
def test_a_launcher_killed_at_any_moment_leaves_no_process_behind(tmp_path):
    """Its processes listen to this machine alone and end; the run is that of no kill, bit by bit.

    MEMMETA_KILLS says how many times it is killed.
    """
    kills, rng = int(os.environ.get("MEMMETA_KILLS", "3")), random.Random(0)
    options = [*TINY, "--method=memory_reduced", "--head-start=random", "--inner-steps=2"]
    options += ["--cg-steps=2", "--processes=2", f"--meta-steps={20 * kills}"]
    whole, path = tmp_path / "whole", tmp_path / "killed"
    began = time.monotonic()
    process = start_with(whole, *options)
    wait_for_lines(whole, process, 1)
    until_first_line = time.monotonic() - began
    ended(process)
    for number in range(kills):
        resumed = (path / "config.json").exists()
        process = start_with(path, *(["--resume", "--processes=2"] if resumed else options))
        if number % 2:  # wherever it is by then: imports, reading, compiling
            time.sleep(rng.random() * until_first_line)
        else:  # while it makes steps, judges or saves
            wait_for_lines(path, process, line_count(path) + rng.randrange(1, 4))
            assert listening(still_there(path)) <= LOOPBACK
            time.sleep(rng.random() * 0.3)
        assert process.poll() is None
        process.kill()
        process.communicate()
        deadline = time.monotonic() + 60
        while left := still_there(path):
            assert time.monotonic() < deadline, f"left behind by kill {number}: {left}"
            time.sleep(0.05)
    ended(start_with(path, "--resume", "--processes=2"))
    assert_same_run(whole, path)


def children_of(pid):
    """The children of a process, in the order they were started."""
    found = subprocess.run(
        ["pgrep", "-P", str(pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    return sorted(int(child) for child in found)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS: not set"),
        (
            {
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": "2",
                "JAX_COORDINATOR_ADDRESS": "127.0.0.1:1",
            },
            "JAX_PROCESS_ID: expected a number below JAX_NUM_PROCESSES",
        ),
    ],
)
def test_variables_that_do_not_fit_are_named(tmp_path, monkeypatch, capsys, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "--run", str(tmp_path / "run"), *TINY, *QUICK]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("count", [None, "1"])
@pytest.mark.parametrize("name", COUNTED_BY)
def test_one_process_is_not_launched(name, count, tmp_path, monkeypatch, capsys):
    """It waits for no other one: all that is wrong with this run is its tasks."""
    for other in COUNTED_BY:
        monkeypatch.delenv(other, raising=False)
    if count is not None:
        monkeypatch.setenv(name, count)
    assert main(["train", "--run", str(tmp_path / "run"), *TINY, *QUICK, "--shots=30"]) == 1
    assert "shots=30" in capsys.readouterr().err
