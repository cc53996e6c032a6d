"""Peak memory of a meta-step by the device's own statistics, each figure in a process of its own.

A process's peak cannot be set back, and a compiler that tries kernels allocates too. So one process
compiles all programs into the cache, and each of the others loads one and runs it.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

import jax

from benchmarks.accelerator.meta_steps import Case, Program, side_by_side
from benchmarks.harness.tables import Row

CASES = [
    *(Case("a", method, t) for method in ("memory_reduced", "imaml") for t in (1, 1000)),
    *(Case("a", "maml", t) for t in (1, 100)),
]
QUICK_CASES = [Case("a", "memory_reduced", t) for t in (1, 20)]
CALLS = 3


def cases(quick: bool) -> list[Case]:
    """Those that are measured."""
    return QUICK_CASES if quick else CASES


def rows(quick: bool) -> Iterator[Row]:
    """A row a process, which measures one program."""
    for arguments in ["compile"], *([str(number)] for number in range(len(cases(quick)))):
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.accelerator", "--part", "peak"]
        command += [*arguments, *(["--quick"] if quick else [])]
        ended = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if arguments == ["compile"]:
            continue
        case = cases(quick)[int(arguments[0])]
        row: Row = {"workload": case.workload, "method": case.method, "T": case.steps}
        lines = ended.stdout.splitlines()
        failed = {"said": f"the measuring process ended with {ended.returncode}"}
        yield row | (failed if ended.returncode else json.loads(lines[-1]))


def one(what: str, quick: bool) -> Iterator[Row]:
    """In a process of its own: compile all, or measure the case of this number."""
    if what == "compile":
        list(side_by_side([partial(Program, case, quick) for case in cases(quick)]))
        return
    program, device = Program(cases(quick)[int(what)], quick), jax.devices()[0]
    before = device.memory_stats()
    for _ in range(CALLS):
        program()
    after = device.memory_stats()
    found: Row = {"compiled MB": program.megabytes, "peak MB": None, "above inputs MB": None}
    if before and after:
        found["peak MB"] = after["peak_bytes_in_use"] / 1e6
        found["above inputs MB"] = (after["peak_bytes_in_use"] - before["bytes_in_use"]) / 1e6
        if after["peak_bytes_in_use"] == before["peak_bytes_in_use"]:
            found["said"] = "at most: the peak was there before the first call"
    else:
        found["said"] = f"a {device.platform} gives no memory statistics"
    yield found
