"""Stochastic bilevel methods: suboptimality against seconds and products, and against code by hand.

    python -m benchmarks.bilevel [--quick] [--problem quadratic logistic] [--samples N]
        [--only METHOD ...] [--repeats N] [--cpu-time] [--out DIR]

Two sets of 2^15 samples, blocks of 64. Each method makes as many steps as a budget of gradients
and products pays for, in compiled parts of equal length. F(θ) − min F is read between the parts,
outside of the timing. Then a scan of each recipe and the same written by hand, which goes through
the same numbers, are timed in turn; and at last, on 20,000 samples, a step of SOBA and one exact
hypergradient. Writes bilevel.json and bilevel.png.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.bilevel.by_hand import BY_HAND, Rates
from benchmarks.bilevel.exact import LEAST, beside_exact
from benchmarks.bilevel.exact import SAMPLES as SAMPLES_OF_EXACT
from benchmarks.bilevel.problems import PROBLEMS, Example
from benchmarks.bilevel.recipes import COSTS, RATES, first_state, one_task, step_of, view_of
from benchmarks.harness import pictures
from benchmarks.harness.arguments import make_parser
from benchmarks.harness.tables import Row, aim, show, write
from benchmarks.harness.timing import in_turn
from memmeta.meta import WarmStart

SAMPLES, QUICK_SAMPLES, ROWS = 2**15, 2**9, 64
BUDGET, QUICK_BUDGET = 160_000, 640
"""Gradients and products on a block of 64 rows that each method may make."""
PARTS, TIMED, LIMIT = 20, 2000, 1.15
"""Parts of a run; steps of a timed one; how much slower than by hand a recipe may be."""


def scan(body: Callable[[Any, Any], tuple[Any, Any]], steps: int) -> Any:
    """So many steps (carry, data) -> (carry, f) as one compiled call, the data as an argument."""

    def run(carry: Any, data: Any) -> tuple[Any, Any]:
        return jax.lax.scan(lambda c, _: body(c, data), carry, length=steps)

    return jax.jit(run)


def curve(name: str, example: Example, rates: Rates, budget: int) -> dict[str, list[float]]:
    """F − min F, seconds and products along one run."""
    samples = jax.tree.leaves(example.data)[0].shape[0]
    cost = COSTS[name] * (samples / ROWS if name.endswith("all rows") else 1)
    steps = max(1, round(budget / cost / PARTS))
    step = step_of(name, example, view_of(name, ROWS), rates)
    state, data = first_state(step, example, jax.random.key(0)), one_task(example.data)
    part = scan(partial(one_step, step), steps).lower(state, data).compile()
    found: dict[str, list[float]] = {"suboptimality": [], "seconds": [0.0], "products": [0.0]}
    found["suboptimality"].append(gap(example, state.meta.meta_params))
    for _ in range(PARTS):
        began = time.perf_counter()
        state, _ = jax.block_until_ready(part(state, data))
        found["seconds"].append(found["seconds"][-1] + time.perf_counter() - began)
        found["products"].append(found["products"][-1] + cost * steps)
        found["suboptimality"].append(gap(example, state.meta.meta_params))
    return found


def one_step(step: WarmStart, state: Any, tasks: Any) -> tuple[Any, Any]:
    """A meta-step as the body of a scan, with its outer loss."""
    state, metrics = step.update(state, tasks)
    return state, metrics.loss


def gap(example: Example, theta: Any) -> float:
    return example.value(np.asarray(theta, np.float64)) - example.best


def beside_hand(
    name: str, example: Example, rates: Rates, steps: int, options: argparse.Namespace
) -> Row:
    """Microseconds of a step, of the recipe and of the code by hand, timed in turn."""
    view, key = view_of(name, ROWS), jax.random.key(0)
    step = step_of(name, example, view, rates)
    state = first_state(step, example, key)
    own = state.memory.key[0]

    def recipe(state: Any, data: Any) -> Any:
        return one_step(step, state, one_task(data))

    def by_hand(carry: Any, data: Any) -> Any:
        return BY_HAND[name](example._replace(data=data), view, own, rates)[1](carry)

    carry = BY_HAND[name](example, view, own, rates)[0](example.theta)
    programs = {
        kind: partial(scan(body, steps), begin, example.data)
        for kind, body, begin in (("recipe", recipe, state), ("by hand", by_hand, carry))
    }
    ends = {kind: program()[0] for kind, program in programs.items()}
    apart = np.max(np.abs(ends["recipe"].meta.meta_params - ends["by hand"][0]))
    calls = {
        kind: lambda program=program: jax.block_until_ready(program())
        for kind, program in programs.items()
    }
    seconds = in_turn(calls, options.repeats, options.cpu_time)
    each = {f"{kind}, µs": 1e6 * float(np.median(s)) / steps for kind, s in seconds.items()}
    ratio = float(np.median(seconds["recipe"] / seconds["by hand"]))
    scale = float(np.max(np.abs(ends["by hand"][0] - example.theta)))
    return {"method": name, **each, "ratio": ratio, "θ apart": float(apart) / scale}


def exact_row(name: str, rates: Rates, options: argparse.Namespace) -> Row:
    """How much more one exact hypergradient costs than a step of SOBA."""
    samples = QUICK_SAMPLES if options.quick else SAMPLES_OF_EXACT
    row = beside_exact(PROBLEMS[name](samples), rates, ROWS, options)
    show(f"{name}, {samples} samples: a step of SOBA beside an exact hypergradient", [row])
    met = row["ratio"] >= LEAST
    show(f"{name}: aim", [aim("exact over SOBA", f"≥ {LEAST}", row["ratio"], met)])
    return row


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


def picture(found: dict[str, Any], path: Path) -> None:
    """A row a problem: against seconds, against products."""
    cells = [(problem, by) for problem in found for by in ("seconds", "products")]
    with pictures.panels(path, len(cells), columns=2) as axes:
        for panel, (problem, by) in zip(axes, cells, strict=True):
            for name, each in found[problem]["curves"].items():
                panel.plot(each[by], each["suboptimality"], marker=".", label=name)
            panel.set(yscale="log", xlabel=by, ylabel="F(θ) − min F", title=problem)
            panel.legend(fontsize=8)


def main(given: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, write and draw; returns the figures."""
    parser = make_parser(__doc__, "bilevel", quick="few samples and steps", repeats=7)
    add = parser.add_argument
    add("--problem", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    add("--samples", type=int, help=f"in each set; {SAMPLES}")
    add("--only", nargs="+", choices=COSTS, default=list(COSTS), metavar="METHOD")
    options = parser.parse_args(given)
    samples = options.samples or (QUICK_SAMPLES if options.quick else SAMPLES)
    budget, steps = (QUICK_BUDGET, 20) if options.quick else (BUDGET, TIMED)
    found: dict[str, Any] = {}
    for name in options.problem:
        example, rates = PROBLEMS[name](samples), RATES[name]._replace(blocks=samples // ROWS)
        curves = {method: curve(method, example, rates, budget) for method in options.only}
        show(f"{name}, {samples} samples: F(θ) − min F", rows(curves))
        timed = [
            beside_hand(method, example, rates, steps, options)
            for method in options.only
            if method in BY_HAND
        ]
        show(f"{name}: a step of each recipe beside the same by hand", timed)
        aims = [
            aim(f"{row['method']} over by hand", f"≤ {LIMIT}", row["ratio"], row["ratio"] <= LIMIT)
            for row in timed
        ]
        show(f"{name}: aims", aims)
        beside = exact_row(name, rates, options)
        found[name] = {"curves": curves, "timed": timed, "exact": beside}
    write(options.out / "bilevel.json", found)
    picture(found, options.out / "bilevel.png")
    return found


if __name__ == "__main__":
    main()
