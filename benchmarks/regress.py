"""Counts of cost that must not grow: a check for continuous integration, without a clock.

    python -m benchmarks.regress [--update] [--out DIR]

For some methods on a small workload: bytes of temporary buffers and FLOPs of the compiled meta-step
as its compiler counts them (a loop's body once), convolutions made in a meta-step, forwards and
backwards (a loop's body as often as it runs), and compilations in three calls. Compared with
`regress.json` beside this file; ends with an error when one has grown by more than 1 %. `--update`
writes what was found there instead, for a change that is meant to cost more (or less).
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import jax
from jax.extend.core import jaxprs_in_params

from benchmarks.tables import Row, show, write
from benchmarks.workloads import Workload, compiled_step, learner, meta_step, supervised, temporary

LIMITS = Path(__file__).with_suffix(".json")
SMALL = Workload(tasks=2, ways=3, queries=4, image_shape=(8, 8, 1), width=8, depth=2)
STEPS = 3
METHODS = ("memory_reduced", "imaml", "maml")
ROOM = 1.01
CONVOLUTIONS = ("memmeta_convolution", "memmeta_kernel_gradient")


def counts(method: str) -> dict[str, float]:
    """All counts of one method."""
    made = learner(SMALL.network(), method, STEPS)
    step = meta_step(made, 1)
    state, tasks = step.init(made.init(jax.random.key(0))), jax.jit(SMALL.batch)()
    convolutions = made_by(jax.make_jaxpr(step.update)(state, tasks).jaxpr)
    program = compiled_step(made, SMALL, chunk=1)
    for _ in range(3):
        state, _ = step(state, tasks)
    called: Any = step.compiled
    return {
        "bytes": round(temporary(program) * 1e6),
        "FLOPs": flops(program),
        "convolutions": convolutions,
        "compilations": called._cache_size(),
    }


def flops(program: jax.stages.Compiled) -> float:
    """What the compiler counts."""
    analysis: Any = program.cost_analysis()
    return float(analysis["flops"])


def made_by(jaxpr: Any) -> int:
    """How many convolutions a program makes; inner loops of unknown length make `STEPS` rounds."""
    total = 0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        rounds = {"scan": equation.params.get("length"), "while": STEPS}.get(name) or 1
        inside = sum(made_by(each) for each in jaxprs_in_params(equation.params))
        total += rounds * inside + (name in CONVOLUTIONS)
    return total


def grown(found: dict[str, dict[str, float]], limits: dict[str, dict[str, float]]) -> list[Row]:
    """One row for every count; the last cell says whether it has grown."""
    lines = []
    for method, each in found.items():
        for name, value in each.items():
            limit = limits.get(method, {}).get(name)
            verdict = "NEW" if limit is None else "GREW" if value > limit * ROOM else ""
            lines.append(
                {"method": method, "count": name, "found": value, "limit": limit, "": verdict}
            )
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Count, compare, print; 1 if something grew."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--update", action="store_true", help=f"write {LIMITS.name}")
    parser.add_argument("--out", type=Path, default=Path("build/regress"))
    options = parser.parse_args(arguments)
    # Fast compilation: buffers and counts are decided before machine code is made.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=0"
    found = {method: counts(method) for method in METHODS}
    floor = supervised(SMALL.network(), SMALL._replace(tasks=1))
    found["supervised gradient"] = {
        "bytes": round(temporary(floor) * 1e6),
        "FLOPs": flops(floor),
    }
    write(options.out / "regress.json", {"counts": found})
    if options.update:
        LIMITS.write_text(json.dumps(found, indent=1) + "\n")
    lines = grown(found, json.loads(LIMITS.read_text()))
    show("Counts of a meta-step", lines)
    worse = [line for line in lines if line[""]]
    if worse:
        print(f"{len(worse)} counts have grown; if that is meant: benchmarks.regress --update")
    return int(bool(worse))


if __name__ == "__main__":
    raise SystemExit(main())
