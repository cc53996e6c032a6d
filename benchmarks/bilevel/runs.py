"""A method on a problem, of this library or of another, as a run that goes on step by step."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.bilevel.by_hand import Rates, View
from benchmarks.bilevel.problems import Context, Example, blocks
from benchmarks.bilevel.recipes import BESIDE_PEERS, COSTS, first_state, one_task, step_of, view_of
from benchmarks.harness.tables import Row
from memmeta.meta import WarmStart

PARTS = 20
"""Of a run: F is read between them."""


class Run(NamedTuple):
    """What a curve and a clock need of a method.

    Attributes:
        cost: gradients and products of one step, on a block each.
        start: -> a first state.
        advance: (state, steps) -> the state so many steps later, computed.
        theta: state -> θ.
    """

    cost: float
    start: Callable[[], Any]
    advance: Callable[[Any, int], Any]
    theta: Callable[[Any], Any]


def scan(body: Callable[[Any, Any], tuple[Any, Any]], steps: int) -> Any:
    """So many steps (carry, data) -> (carry, f) as one compiled call, the data as an argument."""

    def run(carry: Any, data: Any) -> tuple[Any, Any]:
        return jax.lax.scan(lambda c, _: body(c, data), carry, length=steps)

    return jax.jit(run)


def one_step(step: WarmStart, state: Any, tasks: Any) -> tuple[Any, Any]:
    """A meta-step as the body of a scan, with its outer loss."""
    state, metrics = step.update(state, tasks)
    return state, metrics.loss


def run_of(name: str, example: Example, rates: Rates, rows: int, view: View | None = None) -> Run:
    """One of the recipes, or of what stands beside peers; by default with the view of its name."""
    step = step_of(name, example, view or view_of(name, rows), rates)
    cost = (COSTS | BESIDE_PEERS)[name]
    if name.endswith("a block"):
        return _block_run(step, example, cost, rows)
    data = one_task(example.data)
    return Run(
        cost * (samples_of(example) / rows if name.endswith("all rows") else 1),
        start=lambda: first_state(step, example, jax.random.key(0)),
        advance=_scanned(partial(one_step, step), data),
        theta=lambda state: state.meta.meta_params,
    )


def _block_run(step: WarmStart, example: Example, cost: float, rows: int) -> Run:
    """A meta-step that is given one block, drawn anew each time, as if it were all of the data."""
    key = jax.random.key(0)

    def block(data: Any, count: Any) -> Any:
        seen = blocks(rows)(Context(example.theta, *data), key, count)
        return one_task((seen.train, seen.validation))

    def body(carry: Any, data: Any) -> tuple[Any, Any]:
        state, count = carry
        state, loss = one_step(step, state, block(data, count))
        return (state, count + 1), loss

    return Run(
        cost,
        start=lambda: (step.init(example.theta, block(example.data, 0), key), jnp.int32(0)),
        advance=_scanned(body, example.data),
        theta=lambda carry: carry[0].meta.meta_params,
    )


def samples_of(example: Example) -> int:
    """Of each set."""
    return int(jax.tree.leaves(example.data)[0].shape[0])


def _scanned(body: Callable[[Any, Any], tuple[Any, Any]], data: Any) -> Callable[[Any, int], Any]:
    compiled: dict[int, Any] = {}

    def advance(state: Any, steps: int) -> Any:
        if steps not in compiled:
            compiled[steps] = scan(body, steps)
        return jax.block_until_ready(compiled[steps](state, data)[0])

    return advance


def curve(run: Run, example: Example, budget: int) -> dict[str, list[float]]:
    """F − min F, seconds and products along one run."""
    steps = max(1, round(budget / run.cost / PARTS))
    run.advance(run.start(), steps)  # compiled before the clock starts
    state = run.start()
    found: dict[str, list[float]] = {"suboptimality": [], "seconds": [0.0], "products": [0.0]}
    found["suboptimality"].append(gap(example, run.theta(state)))
    for _ in range(PARTS):
        began = time.perf_counter()
        state = run.advance(state, steps)
        found["seconds"].append(found["seconds"][-1] + time.perf_counter() - began)
        found["products"].append(found["products"][-1] + run.cost * steps)
        found["suboptimality"].append(gap(example, run.theta(state)))
    return found


def gap(example: Example, theta: Any) -> float:
    """F(θ) − min F."""
    return example.value(np.asarray(theta, np.float64)) - example.best


def rows(found: dict[str, dict[str, list[float]]]) -> list[Row]:
    """Suboptimality at a tenth, a half and all of the budget, and what it cost."""
    lines = []
    for name, each in found.items():
        at = {
            f"at {share:.0%}": each["suboptimality"][round(share * PARTS)]
            for share in (0.1, 0.5, 1)
        }
        cost = {"s": each["seconds"][-1], "products": each["products"][-1]}
        lines.append({"method": name, "start": each["suboptimality"][0], **at, **cost})
    return lines
