"""Where a meta-step's time goes: each of its products alone, beside what the machine can do.

    python -m benchmarks.cost.roofline [--quick] [--only b32:memory_reduced:20 ...]
        [--repeats N] [--cpu-time] [--out DIR]

On one core and one task: every convolution, kernel gradient and matrix product of the traced
meta-step, timed alone on arrays of its shapes. Its roof is the time that the machine's own matrix
product and bandwidth would take, max(FLOPs / peak, bytes / bandwidth), with bytes of arguments and
result once. What is left of the step's seconds is everything else: normalisation, pooling,
derivatives of both, reports, the update of θ. Writes roofline.json.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness.arguments import make_parser
from benchmarks.harness.programs import equations, product_flops
from benchmarks.harness.tables import Row, show, write
from benchmarks.harness.timing import bound_process, in_turn, peak_and_bandwidth
from benchmarks.problems.workloads import WORKLOADS, learner, meta_step

MODULE = "benchmarks.cost.roofline"
RUNS = ["a:memory_reduced:5", "a:fomaml:5", "a:imaml:5", "b32:memory_reduced:20"]
SMALL = 1e6
"""FLOPs; products of no more are left to the rest of the step."""


class Product(NamedTuple):
    """One product of a meta-step, by what it is."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    params: str


def products(step: Any, state: Any, tasks: Any, inner_steps: int) -> tuple[Counter, dict]:
    """How often each product is computed, and an equation of each."""
    traced = jax.make_jaxpr(step.update)(state, tasks)
    times: Counter[Product] = Counter()
    example: dict[Product, Any] = {}
    for equation, count in equations(traced.jaxpr, inner_steps):
        if product_flops(equation) > SMALL:
            shapes = tuple(variable.aval.shape for variable in equation.invars)
            what = Product(equation.primitive.name, shapes, str(equation.params))
            times[what] += count
            example[what] = equation
    return times, example


def alone(equation: Any) -> Callable[[], Any]:
    """The product by itself, on arrays of ones."""
    arrays = [jnp.ones(v.aval.shape, v.aval.dtype) for v in equation.invars]
    program = jax.jit(lambda *given: equation.primitive.bind(*given, **equation.params))
    program(*arrays).block_until_ready()
    return lambda: program(*arrays).block_until_ready()


def bytes_of(equation: Any) -> float:
    """Of its arguments and its result."""
    arrays = [variable.aval for variable in (*equation.invars, *equation.outvars)]
    return float(sum(array.size * array.dtype.itemsize for array in arrays))


def measured(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """A row for each product of a run, one for all of them, and one for the rest of the step."""
    workload_name, method, steps = name.split(":")
    workload = WORKLOADS[workload_name]._replace(tasks=1)
    made = learner(workload.network(), method, int(steps))
    step, tasks = meta_step(made, 1), jax.jit(workload.batch)()
    kept = [step.init(made.init(jax.random.key(0)))]
    times, example = products(step, kept[0], tasks, int(steps))

    def one() -> None:
        kept[0], _ = step(kept[0], tasks)
        jax.block_until_ready(kept[0])

    one()
    calls: dict[Any, Callable[[], Any]] = {"step": one}
    calls |= {what: alone(equation) for what, equation in example.items()}
    timed = in_turn(calls, options.repeats, options.cpu_time)
    seconds = {name: float(np.median(each)) for name, each in timed.items()}
    peak, bandwidth = peak_and_bandwidth()
    rows, total, least = [], 0.0, 0.0
    for what, count in times.most_common():
        flops, moved = product_flops(example[what]), bytes_of(example[what])
        roof = max(flops / peak, moved / bandwidth)
        total, least = total + count * seconds[what], least + count * roof
        sizes = " · ".join("×".join(map(str, shape)) for shape in what.shapes)
        row: Row = {"product": what.name.removeprefix("memmeta_"), "of": sizes, "times": count}
        row |= {"ms": 1e3 * count * seconds[what], "GFLOP/s": flops / seconds[what] / 1e9}
        row |= {"FLOP/byte": flops / moved, "of the roof": roof / seconds[what]}
        rows.append(row | {"of the step": count * seconds[what] / seconds["step"]})
    rows.sort(key=lambda row: -row["ms"])
    whole, rest = seconds["step"], seconds["step"] - total
    together = {"ms": 1e3 * total, "of the roof": least / total, "of the step": total / whole}
    rows.append({"product": "all of them", **together})
    rows.append({"product": "the rest", "ms": 1e3 * rest, "of the step": rest / whole})
    title = f"sgemm {peak / 1e9:.0f} GFLOP/s, {bandwidth / 1e9:.1f} GB/s"
    return {"run": name, "machine": title, "rows": rows}


def main(arguments: list[str] | None = None) -> None:
    """Measure each run in a process bound to one core; print and write."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = make_parser(__doc__, "roofline", quick=f"only {RUNS[0]}", repeats=9)
    parser.add_argument("--only", nargs="+", metavar="WORKLOAD:METHOD:T", help=", ".join(RUNS))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    runs = options.only or RUNS[: 1 if options.quick else None]
    if options.worker:
        for name in runs:
            print(json.dumps(measured(name, options)), flush=True)
        return
    found = {}
    for each in bound_process(MODULE, arguments, 1, 1, Path(".jax_cache").absolute()):
        found[each["run"]] = each["rows"]
        show(f"{each['run']}, one task, one core; {each['machine']}", each["rows"])
    write(options.out / "roofline.json", found)


if __name__ == "__main__":
    main()
