"""Every hypergradient estimator on the same two problems: error, seconds, memory.

    python -m benchmarks.estimators [--quick] [--only NAME ...] [--problem NAME] [--steps T ...]
        [--out DIR]

For each number T of inner steps (gradient descent at 1/L): the error against the exact
hypergradient of the inner solution, relative to its length; seconds of one hypergradient of 4
tasks, as the median and range of rounds in which the estimators take turns; temporary bytes of the
compiled program. For estimators that draw directions the error is the root mean square over keys.
Prints a table for each problem; writes estimators.json and estimators.png. With `--problem` the
figures of the other one are kept as they are in estimators.json.
"""

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np

import memmeta as mm
from benchmarks.problems_estimators import Example, exact_hypergradient, heads, networks
from memmeta.hypergradient import ESTIMATORS

PROBLEMS: dict[str, Callable[[], Example]] = {"head": heads, "network": networks}
TITLES = {
    "head": "A linear head adapts (φ: 125 numbers, θ: 144)",
    "network": "A whole network adapts (φ and θ: 112 numbers)",
}
STEPS, QUICK_STEPS = (1, 3, 10, 30, 100, 300, 1000), (1, 10)
KEYS, ROUNDS, BUDGET = 8, 7, 1.0
"""Draws of random estimators; rounds of timing; seconds after which a program is timed no more."""

_PLAIN = argparse.RawDescriptionHelpFormatter


class Program:
    """One estimator on one problem at one T, compiled.

    Attributes:
        bytes: temporary memory.
        seconds: of each timed call.
    """

    def __init__(self, example: Example, name: str, steps: int, quick: bool) -> None:
        estimator, inner = ESTIMATORS[name].make(), mm.InnerLoop(mm.inner.gradient_descent(), steps)

        def call(theta: Any, tasks: Any, key: Any) -> mm.hypergradient.Hypergradient:
            chunk = mm.hypergradient.Chunk.of(tasks, key=key)
            return estimator(example.problem, inner, theta, chunk)

        self.inputs = (example.theta, example.tasks)
        options = {"xla_backend_optimization_level": 0} if quick else {}
        traced = jax.jit(call).lower(*self.inputs, jax.random.key(0))
        self.compiled = traced.compile(options)  # type: ignore[arg-type]
        analysis: Any = self.compiled.memory_analysis()
        self.bytes: int = analysis.temp_size_in_bytes
        self.seconds: list[float] = []

    def __call__(self, seed: int = 0) -> mm.hypergradient.Hypergradient:
        return jax.block_until_ready(self.compiled(*self.inputs, jax.random.key(seed)))

    def time(self) -> None:
        """One more timed call, unless there were enough."""
        if len(self.seconds) > 1 and sum(self.seconds) > BUDGET:
            return
        began = time.perf_counter()
        self()
        self.seconds.append(time.perf_counter() - began)


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

    def make(case: tuple[str, int]) -> Program:
        return Program(example, *case, quick)

    with ThreadPoolExecutor(2) as pool:  # the compiler uses one core
        programs = dict(zip(cases, pool.map(make, cases), strict=True))
    for _, steps in cases[: len(counts)]:
        for _ in range(1 + (1 if quick else ROUNDS)):  # the first is left out
            for name in names:
                programs[name, steps].time()
    found: dict[str, list[dict]] = {name: [] for name in names}
    for (name, steps), program in programs.items():
        draws = KEYS if ESTIMATORS[name].random and not quick else 1
        later = program.seconds[1:]
        found[name].append(
            {"T": steps, "bytes": program.bytes, **compared(program, exact, draws)}
            | {"seconds": float(np.median(later)), "range": [min(later), max(later)]}
        )
    return found


def table(found: dict[str, list[dict]]) -> str:
    """The figures of one problem as text."""
    counts = [point["T"] for point in next(iter(found.values()))]
    chosen = [counts.index(c) for c in counts if c in (1, 10, 100, 1000)]

    def row(cells: list[str]) -> str:
        return f"{cells[0]:22}" + "".join(f"{cell:>10}" for cell in cells[1:])

    heads = [f"{what} {counts[i]}" for what in ("err", "ms", "kB") for i in chosen]
    lines = [row(["T =", *heads, "cosine"])]
    for name, points in found.items():
        cells = [f"{points[i]['error']:.1e}" for i in chosen]
        cells += [f"{1e3 * points[i]['seconds']:.3g}" for i in chosen]
        cells += [f"{points[i]['bytes'] / 1e3:.4g}" for i in chosen]
        lines.append(row([name, *cells, f"{points[-1]['cosine']:.3f}"]))
    return "\n".join(lines)


COLOURS = {
    "implicit": "tab:blue",
    "sample_space": "tab:purple",
    "unrolled": "tab:red",
    "mixed_mode": "tab:orange",
    "hessian_free": "goldenrod",
    "truncated": "tab:pink",
    "forward_mode": "tab:green",
    "finite_difference": "tab:olive",
    "evolution_strategies": "tab:cyan",
    "first_order": "tab:brown",
    "reptile": "black",
}
"""One colour a file; the variants of one file differ in their marks and lines."""


def picture(found: dict[str, dict], path: Path) -> None:
    """A row a problem: error, seconds, memory."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (17, 5.2 * len(found))
    figure, axes = pyplot.subplots(len(found), 3, squeeze=False, figsize=size, layout="constrained")
    for (problem, results), panels in zip(found.items(), axes, strict=True):
        used: dict[str, int] = {}
        for name, points in results.items():
            family = name.split("-")[0]
            variant = used[family] = used.get(family, -1) + 1
            style = {"color": COLOURS[family], "marker": "o^svx"[variant], "markersize": 4}
            style |= {"linestyle": ["-", "--", ":", "-.", (0, (1, 3))][variant], "label": name}
            steps = [point["T"] for point in points]
            panels[0].plot(steps, [point["error"] for point in points], **style)
            panels[1].plot(steps, [1e3 * point["seconds"] for point in points], **style)
            low, high = 1e3 * np.array([point["range"] for point in points]).T
            panels[1].fill_between(steps, low, high, color=COLOURS[family], alpha=0.1)
            panels[2].plot(steps, [point["bytes"] / 1e3 for point in points], **style)
        labels = ("error / ‖∇F‖", "ms for 4 tasks", "temporary kB for 4 tasks")
        for panel, label in zip(panels, labels, strict=True):
            panel.set(xscale="log", yscale="log", xlabel="inner steps T", ylabel=label)
            panel.grid(alpha=0.3)
        panels[0].set_title(TITLES[problem])
        panels[2].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> dict[str, dict]:
    """Measure, print and draw; returns the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_PLAIN)
    parser.add_argument("--quick", action="store_true", help="two T, one round, little optimised")
    parser.add_argument("--only", nargs="+", choices=ESTIMATORS, default=list(ESTIMATORS))
    parser.add_argument("--problem", choices=PROBLEMS, help="this one alone")
    parser.add_argument("--steps", nargs="+", type=int, help="numbers T of inner steps")
    parser.add_argument("--out", type=Path, default=Path("build/estimators"))
    options = parser.parse_args(arguments)
    counts = tuple(options.steps or (QUICK_STEPS if options.quick else STEPS))
    options.out.mkdir(parents=True, exist_ok=True)
    kept, found = options.out / "estimators.json", {}
    if options.problem and kept.exists():
        found = json.loads(kept.read_text())
    for problem in [options.problem] if options.problem else PROBLEMS:
        found[problem] = measured(problem, options.only, counts, options.quick)
        print(table(found[problem]), flush=True)
    kept.write_text(json.dumps(found, indent=1))
    picture(found, options.out / "estimators.png")
    print(f"figures and picture in {options.out}")
    return found


if __name__ == "__main__":
    main()
