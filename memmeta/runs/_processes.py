"""Runs of several processes: joining JAX's distributed runtime, agreeing, and launching."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

JOINED_BY = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
COUNTED_BY = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "JAX_NUM_PROCESSES")
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
LAUNCHER = "MEMMETA_LAUNCHER"
"""Environment variable with the file descriptor of a pipe that closes when the launcher ends."""
LAST_WORDS = 20.0
"""Seconds for a process to end by itself, after another one or the launcher has ended."""


def launched() -> bool:
    """Whether the environment says that this process is one of several."""
    counts = [os.environ.get(name, "1") for name in COUNTED_BY]
    return any(count.isdecimal() and int(count) > 1 for count in counts)


def join() -> None:
    """Connect to the run's other processes; must be called before JAX initialises its devices.

    JAX recognises some launchers, such as Slurm, by itself. For others the environment variables
    `JAX_COORDINATOR_ADDRESS` (host:port of process 0), `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`
    must be set.

    Raises:
        ValueError: `JAX_NUM_PROCESSES` is set, but another variable is missing or a number is
            wrong.
    """
    if "JAX_NUM_PROCESSES" not in os.environ:
        jax.distributed.initialize()
        return
    missing = [name for name in JOINED_BY if name not in os.environ]
    if missing:
        raise ValueError(f"{missing[0]}: not set, expected all of {', '.join(JOINED_BY)}")
    address, count, number = (os.environ[name] for name in JOINED_BY)
    if not (count.isdecimal() and number.isdecimal() and int(number) < int(count)):
        raise ValueError(
            f"JAX_PROCESS_ID: expected a number below JAX_NUM_PROCESSES, found {number!r} of "
            f"{count!r}"
        )
    end_with_launcher()
    # the coordinator accepts anyone who connects, so if all processes are on this machine, let it
    # listen on the loopback address only
    here = address if address.rpartition(":")[0] in LOOPBACK else None
    if here is not None:
        _sums_over_loopback()
    jax.distributed.initialize(
        address,
        int(count),
        int(number),
        initialization_timeout=60,
        coordinator_bind_address=here,
    )


def _sums_over_loopback() -> None:
    """Make the CPU's sums over processes listen on the loopback address only.

    By default they listen on the address of the host's name, and jax 0.10.2 has no option to change
    that.
    """
    from jaxlib import _jax

    if (make := getattr(_jax, "make_gloo_tcp_collectives", None)) is not None:
        _jax.make_gloo_tcp_collectives = partial(make, hostname="127.0.0.1")


def end_with_launcher() -> None:
    """End this process by SIGTERM when its launcher ends, because nobody else would end it."""
    pipe = os.environ.pop(LAUNCHER, None)
    if pipe is None:
        return

    def watch() -> None:
        os.read(int(pipe), 1)  # blocks until the launcher's end of the pipe is closed
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(LAST_WORDS)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def is_first() -> bool:
    """Whether this is process 0, which alone writes the run's small files and to the terminal."""
    return jax.process_index() == 0


def any_of_all(flag: bool) -> bool:
    """Whether a flag is set in any process; all processes must call this."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def told_by_first(value: int) -> int:
    """The number that process 0 passes; all processes must call this."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def launch(count: int, arguments: Sequence[str]) -> int:
    """Run `memmeta` in several processes on this machine, to try out a run of several machines.

    They use the CPU and communicate over the loopback address. SIGTERM and SIGINT are passed on to
    all of them. When one process fails the others cannot continue and are ended.

    Args:
        count: the number of processes.
        arguments: the command-line arguments of each process.

    Returns:
        The exit code of process 0; but 1 if a signal killed it or the first process that ended, or
        if another process failed first and process 0 ended with 0.
    """
    environment = {"JAX_PLATFORMS": "cpu"} | os.environ | {"JAX_NUM_PROCESSES": str(count)}
    environment["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{_free_port()}"
    command = [sys.executable, "-m", "memmeta", *arguments]
    held_by_children, held_by_us = os.pipe()  # the system closes it however the launcher ends
    environment[LAUNCHER] = str(held_by_children)
    with tempfile.TemporaryFile() as errors:
        children = [
            subprocess.Popen(
                command,
                env=environment | {"JAX_PROCESS_ID": str(number)},
                stdout=None if number == 0 else subprocess.DEVNULL,
                stderr=None if number == 0 else errors,
                pass_fds=[held_by_children],
                start_new_session=True,  # else Ctrl-C would reach them twice, also by the launcher
            )
            for number in range(count)
        ]

        os.close(held_by_children)

        def pass_on(number: int, _: Any) -> None:
            for child in children:
                child.send_signal(number)

        previous = {
            number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            return _wait(children)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            os.close(held_by_us)


def _wait(children: list[subprocess.Popen[Any]]) -> int:
    while not (ended := [child for child in children if child.poll() is not None]):
        time.sleep(0.05)
    first, deadline = ended[0], time.monotonic() + LAST_WORDS
    while any(child.poll() is None for child in children):
        if first.returncode != 0 and time.monotonic() > deadline:
            break
        time.sleep(0.05)
    for child in children:
        if child.poll() is None:
            child.kill()
            child.wait()
    if first.returncode < 0 or (children[0].returncode == 0 and first.returncode != 0):
        number = children.index(first)
        print(
            f"memmeta: process {number} of {len(children)} died (exit code {first.returncode}) and "
            "the others were ended; go on with --resume",
            file=sys.stderr,
        )
        return 1
    return children[0].returncode if children[0].returncode >= 0 else 1


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
