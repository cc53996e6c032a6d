"""Other libraries' methods beside the recipes: same problems, rates, blocks, starts and budget.

Each peer stands beside one of ours that is the same algorithm. Both first make some steps on the
same rows, where there is nothing to draw, and must come to the same θ; then each makes its run with
draws of its own; then steps of both are timed in turn.
"""

import argparse
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import jax
import numpy as np

from benchmarks.bilevel.benchopt_solvers import SOLVERS, NotThere, check, solver_run
from benchmarks.bilevel.by_hand import Rates
from benchmarks.bilevel.problems import Example
from benchmarks.bilevel.runs import Run, run_of
from benchmarks.harness.tables import Row
from benchmarks.harness.timing import in_turn

CHECKED_ROWS, CHECKED_STEPS, TOLERANCE = 512, 20, 1e-3
"""Where θ is compared: rows that both see, steps, and the difference allowed, of the way θ went."""
IN_ORDER, ONE_BY_ONE = "no draws", "a call a step"


class Pair(NamedTuple):
    """A peer, and ours that is the same algorithm.

    Attributes:
        ours: name of it, for `run_of`.
        peer: (problem, rates, rows of a block) -> its run.
        steps: of a timed call.
        like: how ours is timed once more: `IN_ORDER`, without a draw in each step, as the peer's
            order of blocks is drawn once an epoch; or `ONE_BY_ONE`, called from Python.
    """

    ours: str
    peer: Callable[[Example, Rates, int], Run]
    steps: int
    like: str = ""


def pairs(problem: str, options: argparse.Namespace) -> dict[str, Pair]:
    """Those asked for, by the peer's name; prints a line for what is not installed."""
    found: dict[str, Pair] = {}
    many, few = (20, 2) if options.quick else (2000, 100)
    if options.benchmark_bilevel:
        try:
            check(options.benchmark_bilevel)
        except NotThere as error:
            print(f"benchmark_bilevel: left out, {error}")
        else:
            for ours, solver in SOLVERS.items():
                peer = partial(solver_run, options.benchmark_bilevel, ours)
                like = "" if ours == "saba" else IN_ORDER  # SABA draws its number itself
                found[f"{solver.name}, benchopt"] = Pair(ours, peer, many, like)
    if options.boat and any(find_spec(name) is None for name in ("torch", "higher", "boat_torch")):
        print(
            "BOAT: left out, it is not installed "
            "(pip install 'memmeta[peers]' && pip install --no-deps boat-torch)"
        )
    elif options.boat:
        from benchmarks.bilevel.boat import RULES, boat_run

        for ours, rule in RULES.items():
            peer = partial(boat_run, rule, problem)
            found[f"NGD + {rule}, BOAT"] = Pair(ours, peer, few, ONE_BY_ONE)
    return found


def same_step(name: str, pair: Pair, example: Example, rates: Rates) -> Row:
    """Both on the same rows alone: how far apart θ is after some steps, over the way it went."""
    few = jax.tree.map(lambda leaf: leaf[:CHECKED_ROWS], example.data)
    rows = min(CHECKED_ROWS, jax.tree.leaves(few)[0].shape[0])
    short, alone = example._replace(data=few), rates._replace(blocks=1)
    runs = {"ours": run_of(pair.ours, short, alone, rows), "peer": pair.peer(short, alone, rows)}
    ends = {
        who: np.array(run.theta(run.advance(run.start(), CHECKED_STEPS)), np.float64)
        for who, run in runs.items()
    }
    way = float(np.max(np.abs(ends["ours"] - np.asarray(example.theta))))
    apart = float(np.max(np.abs(ends["peer"] - ends["ours"]))) / way
    same = "yes" if apart <= TOLERANCE else "NO"
    return {"peer": name, "ours": pair.ours, "θ apart": apart, "same": same}


def beside_peer(
    name: str,
    pair: Pair,
    runs: dict[str, Run],
    ordered: Callable[[str], Run],
    options: argparse.Namespace,
) -> Row:
    """Microseconds of a step of both, and of ours once more as the pair says.

    Args:
        name: of the peer.
        pair: it and ours.
        runs: of both, by name.
        ordered: name of ours -> it with blocks in order.
        options: of the command line.
    """
    peer, ours = runs[name], runs[pair.ours]
    calls = {"peer": going_on(peer, pair.steps), "ours": going_on(ours, pair.steps)}
    if pair.like == IN_ORDER:
        calls["like"] = going_on(ordered(pair.ours), pair.steps)
    if pair.like == ONE_BY_ONE:
        calls["like"] = going_on(ours, 1, pair.steps)
    for call in calls.values():
        call()
    seconds = in_turn(calls, options.repeats, options.cpu_time)
    each = {who: 1e6 * float(np.median(found)) / pair.steps for who, found in seconds.items()}
    over = {who: float(np.median(seconds["peer"] / found)) for who, found in seconds.items()}
    return {
        "peer": name,
        "peer, µs": each["peer"],
        "ours": pair.ours,
        "ours, µs": each["ours"],
        "over ours": over["ours"],
        "ours with": pair.like,
        "µs": each.get("like", ""),
        "over it": over.get("like", ""),
    }


def going_on(run: Run, steps: int, calls: int = 1) -> Callable[[], None]:
    """So many calls of so many steps, from where the last ones ended."""
    kept = [run.start()]

    def call() -> None:
        for _ in range(calls):
            kept[0] = run.advance(kept[0], steps)

    return call
