"""Seconds: programs timed in turn, in processes bound to some cores."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Call = Callable[[], Any]
MATRIX = 2048
"""Rows of the product that measures a machine's FLOP/s."""
STREAM = 2**26
"""Numbers of the array whose doubling measures its bandwidth: more than fit into a cache."""


def in_turn(
    calls: Mapping[Any, Call], repeats: int, cpu_time: bool = False, patience: float = float("inf")
) -> dict[Any, np.ndarray]:
    """Seconds of each call, measured round by round, so that all meet the same disturbances.

    Every other round goes backwards: what one call leaves in the caches meets each neighbour.

    Args:
        calls: by name; each waits for its result.
        repeats: rounds.
        cpu_time: measure this process's CPU seconds, which on one core are the seconds less what
            other processes took of them.
        patience: seconds after which a call that was timed twice is timed no more.

    Returns:
        The seconds of each, in the order they were measured.
    """
    clock = time.process_time if cpu_time else time.perf_counter
    seconds: dict[Any, list[float]] = {name: [] for name in calls}
    for number in range(repeats):
        for name, call in list(calls.items())[:: -1 if number % 2 else 1]:
            if len(seconds[name]) > 1 and sum(seconds[name]) > patience:
                continue
            began = clock()
            call()
            seconds[name].append(clock() - began)
    return {name: np.array(each) for name, each in seconds.items()}


def matrix_product() -> Call:
    """A product of two matrices of `MATRIX` rows, 2 MATRIX³ FLOPs, on all cores there are."""
    matrix = jnp.ones((MATRIX, MATRIX))
    multiply = jax.jit(jnp.dot)
    return lambda: multiply(matrix, matrix).block_until_ready()


def peak_and_bandwidth(repeats: int = 5) -> tuple[float, float]:
    """FLOP/s of a matrix product in float32, and bytes/s of doubling a large array."""
    array, double = jnp.ones(STREAM), jax.jit(lambda array: 2 * array)
    calls = {"product": matrix_product(), "double": lambda: double(array).block_until_ready()}
    for call in calls.values():
        call()
    seconds = in_turn(calls, repeats)
    return 2 * MATRIX**3 / seconds["product"].min(), 2 * array.nbytes / seconds["double"].min()


def bound_process(
    module: str,
    arguments: Sequence[str],
    cores: int,
    devices: int,
    cache: Path,
    more: Mapping[str, str] | None = None,
) -> Iterator[Any]:
    """Run a benchmark's `--worker` in a process of its own; yields the lines it prints, as JSON.

    A process keeps the threads that it was started with: to measure several numbers of cores takes
    as many processes.

    Args:
        module: of the benchmark.
        arguments: of its command line.
        cores: the first that this process may use, so many.
        devices: CPU devices that JAX has there.
        cache: folder of compiled programs.
        more: further environment variables; an XLA_FLAGS is added to the number of devices.

    Raises:
        SystemExit: there are fewer cores, or the process failed.
    """
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < cores:
        raise SystemExit(f"cores: expected at most the {len(usable)} there are, found {cores}")
    more = more or {}
    flags = f"--xla_force_host_platform_device_count={devices} {more.get('XLA_FLAGS', '')}"
    given = {**more, "XLA_FLAGS": flags.strip(), "JAX_COMPILATION_CACHE_DIR": str(cache)}
    environment = {**os.environ, **given}
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", module, *arguments, "--worker"],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: os.sched_setaffinity(0, usable[:cores]),
    ) as process:
        assert process.stdout is not None
        yield from map(json.loads, process.stdout)
    if process.returncode:
        raise SystemExit(f"{module}: the measuring process ended with {process.returncode}")
