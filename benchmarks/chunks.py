"""Seconds of a meta-step against the tasks worked on at once: what `task_chunk="auto"` rests on.

    python -m benchmarks.chunks [--quick] [--repeats N] [--cpu-time] [--out DIR]

A convolutional network's tasks (Omniglot's shapes, 8 a meta-step) and a small dense one's (64 a
meta-step, 10 examples of 4 numbers) with several `task_chunk`, timed in turn; the median, and
beside it the compiled MB. Every row names the chunk that was fastest and the one that "auto" takes.
Writes chunks.json.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.speed import in_turn
from benchmarks.tables import Row, show, write
from benchmarks.workloads import Workload, learner, meta_step, temporary
from memmeta.few_shot.algorithms import Learner
from memmeta.models import mlp

DENSE = Workload(tasks=64, queries=1, image_shape=(2, 2, 1))
CONVOLUTIONAL = Workload(tasks=8, width=64)
CASES: dict[str, tuple[Workload, Any, str, tuple[int, ...]]] = {
    f"{name}, {method}": (load, build, method, chunks)
    for name, load, build, chunks in (
        ("conv4-64", CONVOLUTIONAL, Workload.network, (1, 2, 4, 8)),
        ("conv4-32", CONVOLUTIONAL._replace(width=32), Workload.network, (1, 2, 4, 8)),
        ("dense-40", DENSE, lambda load: mlp(load.ways, (40, 40), load.image_shape), (1, 8, 64)),
    )
    for method in ("memory_reduced", "maml", "imaml")
}
"""Workload, network, method, chunks."""
STEPS = 5


def made_of(case: str) -> Learner:
    """A case's method on its network."""
    load, build, method, _ = CASES[case]
    return learner(build(load), method, STEPS)


def prepared(case: str, chunk: int) -> tuple[Callable[[], None], float]:
    """A function that makes one meta-step, and the program's MB of temporary buffers."""
    load, made = CASES[case][0], made_of(case)
    step = meta_step(made, chunk)
    tasks = jax.jit(load.batch)()
    state = step.init(made.init(jax.random.key(0)))
    called: Any = step.compiled
    program = called.lower(state, tasks).compile()
    kept = [state]

    def one() -> None:
        kept[0], _ = program(kept[0], tasks)
        jax.block_until_ready(kept[0])

    return one, temporary(program)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="memory_reduced alone")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cpu-time", action="store_true", help="seconds of the process's own")
    parser.add_argument("--out", type=Path, default=Path("build/chunks"))
    options = parser.parse_args(arguments)
    cases = [case for case in CASES if not options.quick or "memory_reduced" in case]
    made = {(case, chunk): prepared(case, chunk) for case in cases for chunk in CASES[case][3]}
    calls = {run: one for run, (one, _) in made.items()}
    for call in calls.values():
        call()
    seconds = in_turn(calls, options.repeats, options.cpu_time)
    rows: list[Row] = []
    for case in cases:
        chunks = CASES[case][3]
        found = {chunk: float(np.median(seconds[case, chunk])) for chunk in chunks}
        row: Row = {"case": case}
        row["seconds by chunk"] = ", ".join(f"{chunk}: {s:.4g}" for chunk, s in found.items())
        row["MB by chunk"] = ", ".join(f"{chunk}: {made[case, chunk][1]:.3g}" for chunk in chunks)
        row["fastest"] = min(chunks, key=lambda chunk: found[chunk])
        row["auto"] = meta_step(made_of(case), "auto").chunk(CASES[case][0].shapes())
        rows.append(row)
    show(f"Tasks at once, T = {STEPS}, {jax.default_backend()}", rows)
    write(options.out / "chunks.json", {"rows": rows})


if __name__ == "__main__":
    main()
