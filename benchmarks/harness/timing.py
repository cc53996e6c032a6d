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


def in_turn(
    calls: Mapping[Any, Call], repeats: int, cpu_time: bool = False, patience: float = float("inf")
) -> dict[Any, np.ndarray]:
    """Seconds of each call, measured round by round, so that all meet the same disturbances.

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
    for _ in range(repeats):
        for name, call in calls.items():
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


def bound_process(
    module: str, arguments: Sequence[str], cores: int, devices: int, cache: Path
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

    Raises:
        SystemExit: there are fewer cores, or the process failed.
    """
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) < cores:
        raise SystemExit(f"cores: expected at most the {len(usable)} there are, found {cores}")
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_COMPILATION_CACHE_DIR": str(cache)}
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
