"""Messages between devices in a compiled meta-step: one all-reduce, whatever the method."""

from collections.abc import Iterator

import jax

from benchmarks.harness.programs import collectives, compiled
from benchmarks.harness.tables import Row
from benchmarks.problems.workloads import Workload, learner, meta_step
from memmeta.meta import task_mesh

SMALL = Workload(ways=3, queries=4, image_shape=(8, 8, 1), width=8, depth=2)
METHODS = ("memory_reduced", "imaml", "maml")


def rows(quick: bool) -> Iterator[Row]:
    """Of each method (quick: the first) on all devices there are; one device sends nothing."""
    count = jax.device_count()
    load, mesh = SMALL._replace(tasks=2 * count), task_mesh()
    for method in METHODS[:1] if quick else METHODS:
        step = meta_step(made := learner(SMALL.network(), method, 3), 1, mesh)
        state = step.init(made.init(jax.random.key(0)))
        found = [name for name, _ in collectives(compiled(step.update, state, load.shapes()))]
        expected = ["all-reduce"] if count > 1 else []
        row: Row = {"platform": jax.default_backend(), "devices": count, "method": method}
        row["messages"] = ", ".join(found) or "none"
        yield row | {"": "holds" if found == expected else "MISSED"}
