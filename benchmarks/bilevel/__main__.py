"""Stochastic bilevel methods: suboptimality against seconds and products, and against code by hand.

    python -m benchmarks.bilevel [--quick] [--problem quadratic logistic] [--samples N]
        [--only METHOD ...] [--benchmark-bilevel DIR] [--boat] [--repeats N] [--cpu-time]
        [--out DIR]

Two sets of 2^15 samples, blocks of 64. Each method makes as many steps as a budget of gradients
and products pays for, in compiled parts of equal length. F(θ) − min F is read between the parts,
outside of the timing. Then a scan of each recipe and the same written by hand, which goes through
the same numbers, are timed in turn; and at last, on 20,000 samples, a step of SOBA and one exact
hypergradient. Writes bilevel.json and bilevel.png.

With --benchmark-bilevel, the folder of a clone of github.com/benchopt/benchmark_bilevel, and with
--boat other libraries make the same steps too; their curves are drawn dashed. They need

    pip install 'memmeta[peers]' && pip install --no-deps boat-torch
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.bilevel.by_hand import BY_HAND, Rates
from benchmarks.bilevel.exact import LEAST, beside_exact
from benchmarks.bilevel.exact import SAMPLES as SAMPLES_OF_EXACT
from benchmarks.bilevel.peers import CHECKED_STEPS, beside_peer, pairs, same_step
from benchmarks.bilevel.problems import PROBLEMS, Example, in_order
from benchmarks.bilevel.recipes import COSTS, RATES, first_state, one_task, step_of, view_of
from benchmarks.bilevel.runs import curve, one_step, rows, run_of, scan
from benchmarks.harness import pictures
from benchmarks.harness.arguments import make_parser
from benchmarks.harness.tables import Row, aim, show, write
from benchmarks.harness.timing import in_turn

SAMPLES, QUICK_SAMPLES, ROWS = 2**15, 2**9, 64
BUDGET, QUICK_BUDGET = 160_000, 640
"""Gradients and products on a block of 64 rows that each method may make."""
TIMED, LIMIT = 2000, 1.15
"""Steps of a timed run; how much slower than by hand a recipe may be."""


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


def picture(found: dict[str, Any], path: Path) -> None:
    """A row a problem: against seconds, against products; a peer in the colour of ours, dashed."""
    cells = [(problem, by) for problem in found for by in ("seconds", "products")]
    with pictures.panels(path, len(cells), columns=2) as axes:
        for panel, (problem, by) in zip(axes, cells, strict=True):
            beside = {row["peer"]: row["ours"] for row in found[problem]["peers"]}
            colours: dict[str, Any] = {}
            for name, each in found[problem]["curves"].items():
                style = "--" if name in beside else "-"
                options = {"color": colours.get(beside.get(name, "")), "label": name}
                shown = slice(by == "seconds", None)  # a log axis has no 0
                x, y = each[by][shown], each["suboptimality"][shown]
                (line,) = panel.plot(x, y, style, marker=".", **options)
                colours[name] = line.get_color()
            highest = 10 * each["suboptimality"][0]  # what diverges leaves the picture
            panel.set(yscale="log", xlabel=by, ylabel="F(θ) − min F", title=problem)
            panel.set(xscale="log" if by == "seconds" else "linear", ylim=(None, highest))
        for panel in axes[1::2]:
            panel.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))


def main(given: list[str] | None = None) -> dict[str, Any]:
    """Measure, print, write and draw; returns the figures."""
    parser = make_parser(__doc__, "bilevel", quick="few samples and steps", repeats=7)
    add = parser.add_argument
    add("--problem", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
    add("--samples", type=int, help=f"in each set; {SAMPLES}")
    add("--only", nargs="+", choices=COSTS, default=list(COSTS), metavar="METHOD")
    add("--benchmark-bilevel", type=Path, metavar="DIR", help="its solvers too; see above")
    add("--boat", action="store_true", help="BOAT too; see above")
    options = parser.parse_args(given)
    found = {name: measure(name, options) for name in options.problem}
    write(options.out / "bilevel.json", found)
    picture(found, options.out / "bilevel.png")
    return found


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """All of one problem."""
    samples = options.samples or (QUICK_SAMPLES if options.quick else SAMPLES)
    budget, steps = (QUICK_BUDGET, 20) if options.quick else (BUDGET, TIMED)
    example, rates = PROBLEMS[name](samples), RATES[name]._replace(blocks=samples // ROWS)
    peers = pairs(name, options)
    same = [same_step(*named, example, rates) for named in peers.items()]
    show(f"{name}: after {CHECKED_STEPS} steps of both on the same rows", same)
    ours = [*options.only, *(pair.ours for pair in peers.values())]
    runs = {method: run_of(method, example, rates, ROWS) for method in ours}
    runs |= {peer: pair.peer(example, rates, ROWS) for peer, pair in peers.items()}
    curves = {method: curve(run, example, budget) for method, run in runs.items()}
    show(f"{name}, {samples} samples: F(θ) − min F", rows(curves))
    ordered = lambda method: run_of(method, example, rates, ROWS, in_order(ROWS))  # noqa: E731
    beside = [beside_peer(*named, runs, ordered, options) for named in peers.items()]
    show(f"{name}: a step of each peer beside ours", beside)
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
    exact = exact_row(name, rates, options)
    return {"curves": curves, "same": same, "peers": beside, "timed": timed, "exact": exact}


if __name__ == "__main__":
    main()
