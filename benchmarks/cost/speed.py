"""Seconds of a meta-step, and what share of the machine's matrix products they are worth.

    python -m benchmarks.cost.speed [--quick] [--only a:maml:1 ...] [--cores 1 2] [--one-device]
        [--repeats N] [--cpu-time] [--cache DIR] [--out DIR]

Seconds of a meta-step for several T, one task at a time on each device; the first call's seconds
apart (with an empty compilation cache and again with a warm one); direct-convolution FLOP/s over
the best matrix product (sgemm) of the same process; memory_reduced at K = 200 over K = 20. The
programs are timed in turn, again and again; the median and the spread are printed. With several
cores the tasks are spread over as many CPU devices, so that two tasks are worked on at once;
`--one-device` leaves the cores to XLA's own threads instead. `--cache` keeps compiled programs for
the next call, which then has no empty cache to time. Writes speed.json.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.harness.arguments import make_parser
from benchmarks.harness.tables import Row, aim, show, write
from benchmarks.harness.timing import MATRIX, Call, bound_process, in_turn, matrix_product
from benchmarks.problems.workloads import WORKLOADS, Workload, learner, meta_step, spread
from memmeta.meta import task_mesh

Run = tuple[str, str, int]
"""Workload, method, T."""
RUNS: list[Run] = [
    *(("a", method, steps) for method in ("memory_reduced", "anil", "fomaml") for steps in (1, 5)),
    *(("a", "maml", steps) for steps in (1, 5, 10, 50)),
    *(("a", method, 5) for method in ("imaml", "imaml, no estimate")),
    *(("b32", "memory_reduced", steps) for steps in (20, 200)),
    ("b84", "memory_reduced", 20),
]
NAMES = [":".join(map(str, run)) for run in RUNS]
QUICK = ["a:maml:1", "b32:memory_reduced:20", "b32:memory_reduced:200"]
TASKS = 8
"""Of the workloads b; the paper's 32 cost four times as much."""
MODULE = "benchmarks.cost.speed"


def workload_of(run: Run) -> Workload:
    """With as many tasks as are timed."""
    return WORKLOADS[run[0]]._replace(tasks=4 if run[0] == "a" else TASKS)


def prepared(run: Run) -> Call:
    """A function that makes one meta-step, its tasks spread over all devices."""
    workload, (_, method, steps) = workload_of(run), run
    made = learner(workload.network(), method, steps)
    mesh = task_mesh() if jax.device_count() > 1 else None
    step = meta_step(made, 1, mesh)
    tasks = spread(jax.jit(workload.batch)(), mesh)
    kept = [step.init(made.init(jax.random.key(0)))]

    def one() -> None:
        kept[0], _ = step(kept[0], tasks)
        jax.block_until_ready(kept[0])

    return one


def work(options: argparse.Namespace) -> None:
    """In a process of its own, bound to its cores: measure and print JSON."""
    names = options.only or (QUICK if options.quick else NAMES)
    calls: dict[Any, Call] = {"sgemm": matrix_product()}
    first = {}
    for run in [RUNS[NAMES.index(name)] for name in names]:
        began = time.perf_counter()
        calls[run] = prepared(run)
        calls[run]()
        first[run] = time.perf_counter() - began
    if options.first:
        print(json.dumps(list(first.values())))
        return
    calls["sgemm"]()
    seconds = in_turn(calls, options.repeats, options.cpu_time)
    peak = 2 * MATRIX**3 / seconds["sgemm"].min()
    rows = [row(run, seconds[run], first[run], peak) for run in first]
    print(json.dumps({"rows": rows, "sgemm GFLOP/s": peak / 1e9, "devices": jax.device_count()}))


def row(run: Run, seconds: np.ndarray, first: float, peak: float) -> Row:
    """The figures of one run; `peak` is FLOP/s of matrix products."""
    workload, method, steps = run
    median = float(np.median(seconds))
    share = round(workload_of(run).convolution_flops / median / peak, 3)
    found: Row = {"workload": workload, "method": method, "T": steps, "s": median}
    found |= {"from": seconds.min(), "to": seconds.max(), "first call s": round(first, 2)}
    # of the other methods the arithmetic is not that of one supervised gradient
    return found | {"of sgemm": share if method in ("memory_reduced", "anil") else ""}


def aims(found: dict[int, Any]) -> list[Row]:
    """The lines of `docs/performance.md` that this file measures."""
    lines = []
    for cores, each in found.items():
        at = {(r["workload"], r["method"], r["T"]): r for r in each["rows"]}
        short, long = (at.get(("b32", "memory_reduced", k)) for k in (20, 200))
        if short and long:
            ratio, share = long["s"] / short["s"], short["of sgemm"]
            what = f"memory_reduced, K = 200 over 20, cores: {cores}"
            lines.append(aim(what, "≤ 1.05", ratio, ratio <= 1.05))
            what = f"memory_reduced on b32 over sgemm, cores: {cores}"
            lines.append(aim(what, "≥ 0.85", share, share >= 0.85))
    return lines


def measured(arguments: list[str], options: argparse.Namespace, cores: int, cache: Path) -> Any:
    """The figures of one number of cores; the first calls without a cache where none was given."""
    devices = 1 if options.one_device else cores

    def run(*more: str) -> Any:
        [found] = bound_process(MODULE, [*arguments, *more], cores, devices, cache)
        return found

    cold = [] if options.cache else run("--first")
    found = run()
    for each, seconds in zip(found["rows"], cold, strict=False):
        each["without cache s"] = round(seconds, 2)
    peak = found["sgemm GFLOP/s"]
    show(f"{cores} cores, {devices} devices, sgemm {peak:.0f} GFLOP/s", found["rows"])
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measure with each number of cores in turn; print, write, draw."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = make_parser(__doc__, "speed", quick="fewer methods", repeats=7)
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="WORKLOAD:METHOD:T")
    parser.add_argument("--one-device", action="store_true", help="whatever the number of cores")
    parser.add_argument("--cache", type=Path, help="where compiled programs are kept")
    parser.add_argument("--cores", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--first", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        return work(options)
    with tempfile.TemporaryDirectory() as folder:
        cache = options.cache.absolute() if options.cache else Path(folder)
        found = {cores: measured(arguments, options, cores, cache) for cores in options.cores}
    lines = aims(found)
    show("Aims", lines)
    write(options.out / "speed.json", {"cores": found, "aims": lines})


if __name__ == "__main__":
    main()
