"""Every hypergradient estimator on the same two problems: error, seconds, memory.

    python -m benchmarks.cost.estimators [--quick] [--only NAME ...] [--problem NAME]
        [--steps T ...] [--out DIR]

For each number T of inner steps (gradient descent at 1/L): the error against the exact
hypergradient of the inner solution, relative to its norm; seconds of one hypergradient of 4
tasks, as the median and range of rounds in which the estimators take turns; temporary bytes of the
compiled program. For estimators that draw directions the error is the root mean square over keys.
Prints a table for each problem; writes estimators.json and estimators.png. With `--problem` the
figures of the other one are kept as they are in estimators.json.
"""

import json
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib import colormaps

import memmeta as mm
from benchmarks.harness import pictures
from benchmarks.harness.arguments import make_parser
from benchmarks.harness.programs import compiled, temporary_megabytes, two_at_a_time
from benchmarks.harness.tables import Row, show
from benchmarks.harness.timing import in_turn
from benchmarks.problems.head_and_network import Example, exact_hypergradient, heads, networks
from memmeta.hypergradient import ESTIMATORS, Chunk, Hypergradient

PROBLEMS: dict[str, Callable[[], Example]] = {"head": heads, "network": networks}
TITLES = {
    "head": "A linear head adapts (φ: 125 numbers, θ: 144)",
    "network": "A whole network adapts (φ and θ: 112 numbers)",
}
STEPS, QUICK_STEPS = (1, 3, 10, 30, 100, 300, 1000), (1, 10)
KEYS, ROUNDS, BUDGET = 8, 7, 1.0
"""Draws of random estimators; rounds of timing; seconds after which a program is timed no more."""


class Program:
    """One estimator on one problem at one T, compiled.

    Attributes:
        bytes: temporary memory.
    """

    def __init__(self, example: Example, name: str, steps: int, quick: bool) -> None:
        estimator, inner = ESTIMATORS[name].make(), mm.InnerLoop(mm.inner.gradient_descent(), steps)

        def call(theta: Any, tasks: Any, key: Any) -> Hypergradient:
            return estimator(example.problem, inner, theta, Chunk.of(tasks, key=key))

        self.inputs = (example.theta, example.tasks)
        self.compiled = compiled(call, *self.inputs, jax.random.key(0), quick=quick)
        self.bytes = round(1e6 * temporary_megabytes(self.compiled))

    def __call__(self, seed: int = 0) -> Hypergradient:
        return jax.block_until_ready(self.compiled(*self.inputs, jax.random.key(seed)))


def accepts(problem: str, name: str) -> bool:
    """Whether the estimator takes the problem: heads alone, or one whose start is learned."""
    return name != "reptile" if problem == "head" else not ESTIMATORS[name].heads


def flat(tree: Any) -> np.ndarray:
    """All numbers of a tree as one vector of float64."""
    return np.concatenate([np.ravel(leaf).astype(float) for leaf in jax.tree.leaves(tree)])


def compared(program: Program, exact: np.ndarray, draws: int) -> dict[str, float]:
    """Error and cosine against the exact hypergradient."""
    found = np.stack([flat(program(seed).gradient) for seed in range(draws)])
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(exact)
    errors = np.linalg.norm(found - exact, axis=1) / np.linalg.norm(exact)
    return {
        "error": float(np.sqrt(np.mean(errors**2))),
        "cosine": float(np.mean(found @ exact / lengths)),
    }


def measured(problem: str, names: list[str], counts: tuple[int, ...], quick: bool) -> dict:
    """name -> a list over T of all figures."""
    example = PROBLEMS[problem]()
    gradient, left = exact_hypergradient(example)
    exact = flat(gradient)
    print(
        f"{problem}: ‖∇F‖ = {np.linalg.norm(exact):.3g}, exact where ‖∇g‖ = {left:.1g}", flush=True
    )
    names = [name for name in names if accepts(problem, name)]
    cases = list(product(names, counts))
    programs = two_at_a_time({case: partial(Program, example, *case, quick) for case in cases})
    seconds: dict[tuple[str, int], np.ndarray] = {}
    for steps in counts:
        calls: dict[Any, Program] = {(name, steps): programs[name, steps] for name in names}
        seconds |= in_turn(calls, 2 if quick else 1 + ROUNDS, patience=BUDGET)
    found: dict[str, list[dict]] = {name: [] for name in names}
    for (name, steps), program in programs.items():
        draws = KEYS if ESTIMATORS[name].random and not quick else 1
        later = seconds[name, steps][1:]  # the first call is slower
        found[name].append(
            {"T": steps, "bytes": program.bytes, **compared(program, exact, draws)}
            | {"seconds": float(np.median(later)), "range": [later.min(), later.max()]}
        )
    return found


def rows(found: dict[str, list[dict]]) -> list[Row]:
    """The figures of one problem at T = 1, 10, 100 and 1000, and the cosine at the last T."""
    lines = []
    for name, points in found.items():
        row: Row = {"estimator": name}
        for title, figure, scale in (
            ("err", "error", 1),
            ("ms", "seconds", 1e3),
            ("kB", "bytes", 1e-3),
        ):
            for point in points:
                if point["T"] in (1, 10, 100, 1000):
                    row[f"{title} {point['T']}"] = f"{scale * point[figure]:.3g}"
        lines.append(row | {"cosine": f"{points[-1]['cosine']:.3f}"})
    return lines


def picture(found: dict[str, dict], path: Path) -> None:
    """A row a problem: error, seconds, memory."""
    figures = (
        ("error", 1.0, "error / ‖∇F‖"),
        ("seconds", 1e3, "ms for 4 tasks"),
        ("bytes", 1e-3, "temporary kB for 4 tasks"),
    )
    cells = [(problem, *figure) for problem in found for figure in figures]
    with pictures.panels(path, len(cells), columns=3, size=(5.6, 5.2)) as axes:
        for panel, (problem, figure, scale, label) in zip(axes, cells, strict=True):
            for name, points in found[problem].items():
                values = [scale * point[figure] for point in points]
                panel.plot(
                    [point["T"] for point in points], values, marker=".", label=name, **style(name)
                )
            panel.set(xscale="log", yscale="log", xlabel="inner steps T", ylabel=label)
            if figure == "error":
                panel.set_title(TITLES[problem])
            if figure == "bytes":
                panel.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def style(name: str) -> dict[str, Any]:
    """One of twenty colours each, and lines of four kinds in turn."""
    number = list(ESTIMATORS).index(name)
    return {"color": colormaps["tab20"](number), "ls": ["-", "--", ":", "-."][number % 4]}


def main(arguments: list[str] | None = None) -> dict[str, dict]:
    """Measure, print and draw; returns the figures."""
    parser = make_parser(__doc__, "estimators", quick="two T, one round, little optimised")
    parser.add_argument("--only", nargs="+", choices=ESTIMATORS, default=list(ESTIMATORS))
    parser.add_argument("--problem", choices=PROBLEMS, help="this one alone")
    parser.add_argument("--steps", nargs="+", type=int, help="numbers T of inner steps")
    options = parser.parse_args(arguments)
    counts = tuple(options.steps or (QUICK_STEPS if options.quick else STEPS))
    options.out.mkdir(parents=True, exist_ok=True)
    kept, found = options.out / "estimators.json", {}
    if options.problem and kept.exists():
        found = json.loads(kept.read_text())
    for problem in [options.problem] if options.problem else PROBLEMS:
        found[problem] = measured(problem, options.only, counts, options.quick)
        show(TITLES[problem], rows(found[problem]))
    kept.write_text(json.dumps(found, indent=1))
    picture(found, options.out / "estimators.png")
    return found


if __name__ == "__main__":
    main()
