"""How much program a meta-step is, beside the same step written by hand.

    python -m benchmarks.cost.lean [--quick] [--repeats N] [--cpu-time] [--out DIR]

The implicit rule on a problem of ten numbers (`benchmarks.problems.ridges`): lines of StableHLO,
instructions of the optimised program, FLOPs and bytes as the compiler counts them (a loop's body
once), CPU seconds to trace and to compile, and microseconds of a call, for the step by hand and for
each level of the report. Compilations and calls are timed in turn, round by round; the medians are
printed, and their ratios to the step by hand. Then the first call of a Conv4's meta-step (workload
a, T = 5) in a process of its own with an empty compilation cache, in CPU seconds. Writes lean.json.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.harness.arguments import make_parser
from benchmarks.harness.tables import Row, aim, show, write
from benchmarks.harness.timing import bound_process, in_turn
from benchmarks.problems import ridges
from benchmarks.problems.workloads import PAPERS_OMNIGLOT, learner, meta_step

MODULE = "benchmarks.cost.lean"
CALLS = 100
"""In one timing: a call alone is as short as the clock's own."""
AIMS = {"HLO": 1.5, "compile s": 1.5, "call µs": 1.25}
"""Of the light report, over the step by hand."""
FIRST_CALLS = {"memory_reduced": 5.0, "imaml": 12.0}
"""CPU seconds of a Conv4's first call that are aimed at."""


def compile_seconds(repeats: int) -> dict[str, tuple[float, float]]:
    """Of each of the `steps`: CPU seconds to trace and lower, and to compile."""
    tasks = jax.eval_shape(ridges.batch)
    seconds: dict[str, list[tuple[float, float]]] = {}
    for _ in range(repeats):
        for name, (step, state) in ridges.steps().items():
            began = time.process_time()
            lowered = getattr(step, "compiled", step).lower(state, tasks)
            traced = time.process_time()
            lowered.compile()
            each = traced - began, time.process_time() - traced
            seconds.setdefault(name, []).append(each)
    return {name: tuple(np.median(each, axis=0)) for name, each in seconds.items()}


def call_microseconds(repeats: int, cpu_time: bool) -> dict[str, float]:
    """Of each of the `steps`, compiled: one call, its arguments on the device."""
    tasks = jax.jit(ridges.batch)()

    def called(step: Any, state: Any) -> Callable[[], None]:
        kept = [state]

        def some() -> None:
            for _ in range(CALLS):
                kept[0], _ = step(kept[0], tasks)
            jax.block_until_ready(kept[0])

        some()
        return some

    calls = {name: called(*each) for name, each in ridges.steps().items()}
    seconds = in_turn(calls, repeats, cpu_time)
    return {name: float(np.median(each)) / CALLS * 1e6 for name, each in seconds.items()}


def first_call(method: str) -> Row:
    """CPU seconds of this process for a Conv4's start and for its first meta-step."""
    made = learner(PAPERS_OMNIGLOT.network(), method, 5)
    step = meta_step(made, 1)
    tasks = jax.jit(PAPERS_OMNIGLOT.batch)()
    began = time.process_time()
    state = step.init(made.init(jax.random.key(0)))
    started = time.process_time()
    jax.block_until_ready(step(state, tasks))
    found = {"method": method, "init, CPU s": started - began}
    return found | {"first call, CPU s": time.process_time() - started}


def first_calls(quick: bool) -> list[Row]:
    """The first calls, each in a process of its own with an empty compilation cache."""
    rows: list[Row] = []
    for method in list(FIRST_CALLS)[: 1 if quick else None]:
        with tempfile.TemporaryDirectory() as cache:
            rows += bound_process(MODULE, ["--first", method], 1, 1, Path(cache))
    return rows


def ridge_rows(options: argparse.Namespace) -> list[Row]:
    """One row a step, with the ratios to the step by hand in a row below it."""
    compiling = compile_seconds(2 if options.quick else 5)
    calling = call_microseconds(options.repeats, options.cpu_time)
    rows: list[Row] = []
    for name, each in ridges.counts().items():
        traced, compiled = compiling[name]
        seconds = {"trace s": traced, "compile s": compiled, "call µs": calling[name]}
        rows.append({"step": name, **each, **seconds})
    ratios = [
        {"step": f"{row['step']} / {ridges.BY_HAND}"}
        | {key: row[key] / rows[0][key] for key in row if key != "step"}
        for row in rows[1:]
    ]
    return rows + ratios


def main(arguments: list[str] | None = None) -> None:
    """Print the tables and write them."""
    parser = make_parser(__doc__, "lean", "fewer rounds, one first call", repeats=30)
    parser.add_argument("--first", choices=FIRST_CALLS, help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        print(json.dumps(first_call(options.first)))
        return
    jax.config.update("jax_enable_compilation_cache", False)
    rows = ridge_rows(options)
    show(f"The ridge problem, jax {jax.__version__}", rows)
    calls = first_calls(options.quick)
    show("A Conv4's first call, compilation cache empty", calls)
    [light] = [row for row in rows if row["step"] == f"light / {ridges.BY_HAND}"]
    aims = [
        aim(f"{name}, light over by hand", f"≤ {most}", light[name], light[name] <= most)
        for name, most in AIMS.items()
    ]
    for row in calls:
        found, most = row["first call, CPU s"], FIRST_CALLS[row["method"]]
        aims.append(aim(f"first call, {row['method']}, CPU s", f"≤ {most}", found, found <= most))
    show("Aims", aims)
    write(options.out / "lean.json", {"ridge": rows, "first calls": calls, "aims": aims})


if __name__ == "__main__":
    main()
