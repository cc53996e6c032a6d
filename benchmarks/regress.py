"""Counts of cost that must not grow: a check for continuous integration, without a clock.

    python -m benchmarks.regress [--update] [--out DIR]

For some methods on a small workload: bytes of temporary buffers and FLOPs of the compiled meta-step
as its compiler counts them (a loop's body once), instructions of the optimised program,
convolutions and passes through the network made in a meta-step, forwards and backwards (a loop's
body as often as it runs), and compilations in three calls; and the counts of
`benchmarks.cost.lean`. Compared with `regress.json` beside this file; ends with an error when one
has grown by more than 1 %. `--update` writes what was found there instead, for a change that is
meant to cost more (or less).
"""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from benchmarks.harness.arguments import make_parser
from benchmarks.harness.programs import (
    CONVOLUTION,
    KERNEL_GRADIENT,
    equations,
    flops,
    instructions,
    temporary_megabytes,
)
from benchmarks.harness.tables import Row, show, write
from benchmarks.problems import ridges
from benchmarks.problems.workloads import Workload, compiled_step, learner, meta_step, supervised
from memmeta.models import Network

LIMITS = Path(__file__).with_suffix(".json")
SMALL = Workload(tasks=2, ways=3, queries=4, image_shape=(8, 8, 1), width=8, depth=2)
STEPS = 3
COMPILED = ("memory_reduced", "imaml", "maml")
TRACED = ("anil", "itd_bio", "fomaml")
"""Of these only what can be counted without compiling."""
ROOM = 1.01
BODY = "network_body"


def traced(method: str) -> dict[str, float]:
    """Counts of a method's program as it was written."""
    step = meta_step(made := learner(with_named_body(SMALL.network()), method, STEPS), 1)
    state = jax.eval_shape(lambda: step.init(made.init(jax.random.key(0))))
    program = jax.make_jaxpr(step.update)(state, SMALL.shapes()).jaxpr
    kinds = {"convolutions": is_convolution, "passes": is_pass}
    return {name: made_by(program, counts) for name, counts in kinds.items()}


def compiled(method: str) -> dict[str, float]:
    """Counts of the program that the compiler makes of it, and how often it compiles."""
    step = meta_step(made := learner(SMALL.network(), method, STEPS), 1)
    state, tasks = step.init(made.init(jax.random.key(0))), jax.jit(SMALL.batch)()
    program = compiled_step(made, SMALL, chunk=1)
    for _ in range(3):
        state, _ = step(state, tasks)
    called: Any = step.compiled
    return {
        "bytes": round(temporary_megabytes(program) * 1e6),
        "FLOPs": flops(program),
        "HLO": instructions(program),
        "compilations": called._cache_size(),
    }


def with_named_body(network: Network) -> Network:
    """The same network, whose passes can be told in a traced program."""

    def network_body(*arguments: Any) -> Any:
        return network.body(*arguments)

    assert network_body.__name__ == BODY
    return replace(network, body=jax.jit(network_body))


def is_convolution(equation: Any) -> bool:
    """Whether an equation of a traced program makes a convolution or a kernel's gradient."""
    return equation.primitive.name in (CONVOLUTION, KERNEL_GRADIENT)


def is_pass(equation: Any) -> bool:
    """Whether it goes once through the network's body: forwards, along a tangent, or backwards."""
    return BODY in str(equation.params.get("name"))


def made_by(jaxpr: Any, counts: Callable[[Any], bool]) -> int:
    """How many such equations a program runs; loops of unknown length make `STEPS` rounds."""
    return sum(times for equation, times in equations(jaxpr, STEPS) if counts(equation))


def grown(found: dict[str, dict[str, float]], limits: dict[str, dict[str, float]]) -> list[Row]:
    """One row for every count; the last cell says whether it has grown."""
    lines = []
    for method, each in found.items():
        for name, value in each.items():
            limit = limits.get(method, {}).get(name)
            verdict = "NEW" if limit is None else "GREW" if value > limit * ROOM else ""
            row: Row = {"method": method, "count": name, "found": value}
            lines.append(row | {"limit": limit, "": verdict})
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Count, compare, print; 1 if something grew."""
    parser = make_parser(__doc__, "regress")
    parser.add_argument("--update", action="store_true", help=f"write {LIMITS.name}")
    options = parser.parse_args(arguments)
    # Fast compilation: buffers and counts are decided before machine code is made.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=0"
    found = {method: traced(method) for method in (*COMPILED, *TRACED)}
    for method in COMPILED:
        found[method] |= compiled(method)
    floor = supervised(SMALL.network(), SMALL._replace(tasks=1))
    size = round(temporary_megabytes(floor) * 1e6)
    found["supervised gradient"] = {"bytes": size, "FLOPs": flops(floor)}
    found |= {f"ridges, {name}": each for name, each in ridges.counts().items()}
    write(options.out / "regress.json", {"counts": found})
    if options.update:
        LIMITS.write_text(json.dumps(found, indent=1) + "\n")
    lines = grown(found, json.loads(LIMITS.read_text()))
    show("Counts of a meta-step", lines)
    worse = sum(bool(line[""]) for line in lines)
    if worse:
        print(f"{worse} counts have grown; if that is meant: python -m benchmarks.regress --update")
    return int(worse > 0)


if __name__ == "__main__":
    raise SystemExit(main())
