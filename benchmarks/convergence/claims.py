"""Every claim of the theory as an experiment.

    python -m benchmarks.convergence.claims [--quick] [--only NAME ...] [--out DIR]

Prints a table: claim, what is expected, what was fitted with its 95 % interval over seeds, and
whether it holds; and one of the memory that goes with each curve. Writes convergence.json (all
curves) and convergence.png; experiments that an earlier run left in the folder stay in both.
"""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from benchmarks.convergence import costs, coverage, rates
from benchmarks.convergence.experiment import Experiment, Footprint
from benchmarks.convergence.fits import table
from benchmarks.harness import pictures
from benchmarks.harness.arguments import make_parser
from benchmarks.harness.programs import two_at_a_time

EXPERIMENTS: dict[str, Callable[[Array, bool], Experiment]] = {
    "deterministic": rates.deterministic,
    "stochastic": rates.stochastic,
    "error": costs.error_against_steps,
    "complexity": costs.complexity,
    "memory": costs.memory,
    "softmax": rates.softmax_heads,
    "certificates": coverage.certificates,
    "solves": coverage.solves,
    "on_demand": rates.on_demand,
}
"""All of them, in the order of the table."""

QUICK = ["deterministic", "stochastic", "error", "memory"]
"""Those that a quick run takes, unless told otherwise."""

POINTS = 400
"""Points of a curve kept in the JSON file."""


def picture(results: dict[str, dict[str, Any]], path: Path) -> None:
    """One panel an experiment: the median over seeds and the range of all, and the memory."""
    with pictures.panels(path, len(results), columns=2, size=(7.5, 4.5)) as axes:
        for panel, result in zip(axes, results.values(), strict=True):
            for name, curve in result["curves"].items():
                x, y = np.array(curve["x"]), np.array(curve["y"])
                taken = result["memory"].get(name)
                label = f"{name}: {Footprint(**taken)}" if taken else name
                mark = "." if len(x) < 30 else ""
                (line,) = panel.plot(x, np.median(y, axis=0), label=label, marker=mark)
                low, high, colour = y.min(axis=0), y.max(axis=0), line.get_color()
                panel.fill_between(x, low, high, alpha=0.15, color=colour)
            panel.set(title=result["title"], xlabel=result["axes"][0], ylabel=result["axes"][1])
            panel.set(xscale="log", yscale="log")
            panel.legend(fontsize=7)


def beside(experiment: Experiment) -> list[str]:
    """The memory that goes with the curves, curves of the same program together."""
    grouped: dict[Footprint, list[str]] = {}
    for curve, taken in experiment.memory.items():
        grouped.setdefault(taken, []).append(curve)
    more = {n: f" and {n - 1} more" for n in map(len, grouped.values()) if n > 1}
    names = [curves[0] + more.get(len(curves), "") for curves in grouped.values()]
    return [f"{name:44} {taken}" for name, taken in zip(names, grouped, strict=True)]


def record(experiment: Experiment) -> dict[str, Any]:
    """An experiment as plain numbers."""

    def thinned(x: np.ndarray, y: np.ndarray) -> dict[str, Any]:
        at = np.unique(np.geomspace(1, len(x), min(POINTS, len(x))).astype(int)) - 1
        return {"x": np.asarray(x)[at].tolist(), "y": np.asarray(y)[:, at].tolist()}

    claims = [claim._asdict() | {"fit": claim.fit._asdict()} for claim in experiment.claims]
    memory = {name: taken._asdict() for name, taken in experiment.memory.items()}
    curves = {name: thinned(*curve) for name, curve in experiment.curves.items()}
    return experiment._asdict() | {"claims": claims, "memory": memory, "curves": curves}


def run(name: str, quick: bool) -> Experiment:
    """One experiment, in float64."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        keys = jax.random.split(jax.random.key(0), 2 if quick else 8)
        began = time.perf_counter()
        experiment = EXPERIMENTS[name](keys, quick)
    print(f"{name}: {time.perf_counter() - began:.1f} s", flush=True)
    return experiment


def main(arguments: list[str] | None = None) -> bool:
    """Run the experiments; whether every claim held."""
    parser = make_parser(__doc__, "convergence", quick="fewer seeds, steps and settings")
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=None)
    options = parser.parse_args(arguments)
    chosen = options.only or (QUICK if options.quick else list(EXPERIMENTS))
    found = two_at_a_time({name: partial(run, name, options.quick) for name in chosen})
    for experiment in found.values():
        print(*experiment.lines, sep="\n", end="\n" * bool(experiment.lines))
    claims = [claim for experiment in found.values() for claim in experiment.claims]
    print(table(claims))
    print("temporary memory of one compiled meta-step, beside the curves")
    for name, experiment in found.items():
        print("\n".join(f"    {name:13} {line}" for line in beside(experiment)))
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "convergence.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    known |= {name: record(experiment) for name, experiment in found.items()}
    results = {name: known[name] for name in EXPERIMENTS if name in known}
    file.write_text(json.dumps(results))
    picture(results, options.out / "convergence.png")
    return all(claim.holds for claim in claims)


if __name__ == "__main__":
    main()
