"""Products that a linear solve needs, by what it starts from.

    python -m benchmarks.cost.recycled [--quick] [--out DIR]

The head and the network of the estimators' benchmark, 4 members that come back in every meta-step,
θ moved by Adam: Hessian-vector products a task that conjugate gradients take to a residual of 1e-4,
from zero, from the last solution and from the last 2, 3 and 5 of them, whose own products count.
Writes recycled.json.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

import memmeta as mm
from benchmarks.harness.arguments import make_parser
from benchmarks.harness.tables import Row, show, write
from benchmarks.problems.head_and_network import Example, heads, networks
from memmeta.hypergradient import implicit
from memmeta.linear_solve import cg
from memmeta.meta import WarmStart

PROBLEMS: dict[str, Callable[[], Example]] = {"head": heads, "network": networks}
SOLVER = cg(200, tolerance=1e-4)
INNER_STEPS, META_STEPS, SETTLED = 500, 60, 10
"""The first meta-steps, in which there is nothing to start from yet, do not count."""


def products(example: Example, recycled: int, rate: float, meta_steps: int) -> np.ndarray:
    """Of the mean task in each meta-step; `recycled` = 0: every solve from zero."""
    inner = mm.InnerLoop(mm.inner.accelerated(), INNER_STEPS)
    estimator = implicit(SOLVER, recycled=max(recycled, 1))
    cold = mm.make_meta_step(example.problem, inner, estimator, optax.adam(rate))
    tasks = example.tasks
    warm = WarmStart(cold, jax.tree.leaves(tasks)[0].shape[0])
    step: Any = warm if recycled else cold
    state = warm.init(example.theta, tasks) if recycled else cold.init(example.theta)
    made = []
    for _ in range(meta_steps):
        state, metrics = step(state, tasks)
        made.append(metrics.report.linear_iterations)
    return np.array(made[min(SETTLED, meta_steps // 2) :])


def main(arguments: list[str] | None = None) -> None:
    """Print the table and write it."""
    parser = make_parser(__doc__, "recycled", quick="few meta-steps")
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    for name, make in PROBLEMS.items():
        for rate in (1e-3, 1e-2):
            row: Row = {"problem": name, "rate of θ": rate}
            for recycled in (0, 1, 2, 3, 5):
                made = products(make(), recycled, rate, 6 if options.quick else META_STEPS)
                row[f"last {recycled}" if recycled else "from zero"] = float(made.mean())
            rows.append(row)
    show("products a task", rows)
    write(options.out / "recycled.json", {"rows": rows})


if __name__ == "__main__":
    main()
