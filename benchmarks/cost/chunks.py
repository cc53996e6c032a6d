"""Seconds of a meta-step against the tasks worked on at once: what `task_chunk="auto"` rests on.

    python -m benchmarks.cost.chunks [--quick] [--repeats N] [--cpu-time] [--out DIR]

A convolutional network's tasks (Omniglot's shapes, 8 a meta-step) and a small dense one's (64 a
meta-step, 10 examples of 4 numbers) with several `task_chunk`, timed in turn; the median, and
beside it the compiled MB. Every row names the chunk that was fastest and the one that "auto" takes.
Writes chunks.json.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.harness.arguments import make_parser
from benchmarks.harness.programs import compiled, temporary_megabytes
from benchmarks.harness.tables import Row, show, write
from benchmarks.harness.timing import in_turn
from benchmarks.problems.workloads import Workload, learner, meta_step
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


def prepared(case: str, chunk: int) -> tuple[Callable[[], None], float]:
    """A function that makes one meta-step, and the program's MB of temporary buffers."""
    load, build, method, _ = CASES[case]
    made = learner(build(load), method, STEPS)
    step, tasks = meta_step(made, chunk), jax.jit(load.batch)()
    kept = [step.init(made.init(jax.random.key(0)))]
    program = compiled(step.compiled, kept[0], tasks, quick=False)

    def one() -> None:
        kept[0], _ = program(kept[0], tasks)
        jax.block_until_ready(kept[0])

    return one, temporary_megabytes(program)


def automatic(case: str) -> int:
    """The chunk that "auto" takes."""
    load, build, method, _ = CASES[case]
    return meta_step(learner(build(load), method, STEPS), "auto").chunk(load.shapes())


def row(case: str, found: dict[int, tuple[np.ndarray, float]]) -> Row:
    """A case's figures: chunk -> its seconds and MB."""
    median = {chunk: float(np.median(seconds)) for chunk, (seconds, _) in found.items()}
    return {
        "case": case,
        "seconds by chunk": ", ".join(f"{chunk}: {s:.4g}" for chunk, s in median.items()),
        "MB by chunk": ", ".join(f"{chunk}: {size:.3g}" for chunk, (_, size) in found.items()),
        "fastest": min(median, key=median.__getitem__),
        "auto": automatic(case),
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = make_parser(__doc__, "chunks", quick="memory_reduced alone", repeats=7)
    options = parser.parse_args(arguments)
    cases = [case for case in CASES if not options.quick or "memory_reduced" in case]
    made = {(case, chunk): prepared(case, chunk) for case in cases for chunk in CASES[case][3]}
    calls = {run: one for run, (one, _) in made.items()}
    for call in calls.values():
        call()
    seconds = in_turn(calls, options.repeats, options.cpu_time)
    rows = []
    for case in cases:
        chunks = CASES[case][3]
        rows.append(row(case, {c: (seconds[case, c], made[case, c][1]) for c in chunks}))
    show(f"Tasks at once, T = {STEPS}, {jax.default_backend()}", rows)
    write(options.out / "chunks.json", {"rows": rows})


if __name__ == "__main__":
    main()
