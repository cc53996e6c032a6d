"""Memory of a meta-step against inner steps, tasks, query images and width.

    python -m benchmarks.cost.memory [--quick] [--peak] [--out DIR]

The figures are the compiler's own: MB of temporary buffers of the whole meta-step, exact on every
platform and found without running anything. Beside them stands the floor, one plain supervised
gradient on the same images. `--peak` also runs some of the programs, each in a process of its own,
and prints by how much the process's resident memory rises. Writes memory.json and memory.png.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import jax

from benchmarks.harness import pictures
from benchmarks.harness.arguments import make_parser
from benchmarks.harness.programs import temporary_megabytes, two_at_a_time
from benchmarks.harness.tables import Row, aim, show, write
from benchmarks.problems.workloads import Workload, compiled_step, learner, meta_step, supervised
from memmeta.models import mlp

Key = tuple[str, str, int]
"""Table, line and column of a figure."""

BASE = Workload(width=32)
STEPS = (1, 10, 100, 1000)
TASKS = (1, 8, 64, 256)
QUERIES = (1, 15, 60)
WIDTHS = (16, 64)
METHODS = (
    "memory_reduced",
    "anil",
    "itd_bio",
    "itd_bio, recomputed",
    "fomaml",
    "imaml",
    "maml",
    "maml, remat by step",
    "maml, remat by root",
    "maml, mixed mode",
)
"""Those whose memory is drawn against T."""
FLAT = ("memory_reduced", "fomaml", "imaml")
"""Those that are compiled for the largest T too; where memory grows, the line is clear before."""
FRONT = ("memory_reduced", "imaml", "maml")
"""Those that the picture draws in front of the others."""


def of(method: str, steps: int, workload: Workload = BASE) -> float:
    """MB of a meta-step, one task at a time."""
    made = learner(workload.network(), method, steps)
    return temporary_megabytes(compiled_step(made, workload, chunk=1))


def floor(workload: Workload) -> float:
    """MB of one supervised gradient on the images of one task."""
    return temporary_megabytes(supervised(workload.network(), workload._replace(tasks=1)))


def wide_head(method: str, steps: int) -> float:
    """MB on a network with many parameters and few activations: three layers of 1,024 units."""
    workload = BASE._replace(queries=1)
    network = mlp(workload.ways, (1024, 1024, 1024), workload.image_shape)
    return temporary_megabytes(compiled_step(learner(network, method, steps), workload, chunk=1))


def against_steps(quick: bool) -> Iterable[tuple[Key, Callable[[], float]]]:
    """MB against T, of the convolutional network and of the dense one."""
    yield ("T", "floor", 1), partial(floor, BASE)
    for method in METHODS[:1] + METHODS[4:7] if quick else METHODS:
        for steps in STEPS if method in FLAT and not quick else STEPS[:3]:
            yield ("T", method, steps), partial(of, method, steps)
    for method in ("imaml", "maml, remat by step", "maml, mixed mode"):
        for steps in (1, 100):
            yield ("dense, T", method, steps), partial(wide_head, method, steps)


def against_sizes(quick: bool) -> Iterable[tuple[Key, Callable[[], float]]]:
    """MB against the number of tasks, of query images, and against the width."""
    for method in ("memory_reduced", "imaml"):
        for count in TASKS if method == "memory_reduced" and not quick else TASKS[1::2]:
            larger = BASE._replace(tasks=count, width=16)
            yield ("tasks", method, count), partial(of, method, 10, larger)
    changed = [("queries", n, BASE._replace(queries=n)) for n in QUERIES[:: 2 if quick else 1]]
    changed += [("width", n, BASE._replace(width=n)) for n in WIDTHS[:: 2 if quick else 1]]
    for axis, value, workload in changed:
        yield (axis, "floor", value), partial(floor, workload)
        for method in FLAT:
            yield (axis, method, value), partial(of, method, 10, workload)


def rows(found: dict[Key, float], table: str) -> list[Row]:
    """One table: a row for each method, a column for each value."""
    here = {key[1:]: megabytes for key, megabytes in found.items() if key[0] == table}
    columns = sorted({column for _, column in here})
    lines: dict[str, Row] = {}
    for (method, column), megabytes in here.items():
        row = lines.setdefault(method, {"MB": method} | {str(c): "" for c in columns})
        row[str(column)] = round(megabytes, 2)
    return list(lines.values())


def aims(found: dict[Key, float]) -> list[Row]:
    """The lines of `docs/performance.md` that this file measures."""
    lines = []

    def add(what: str, over: Key, under: Key, wanted: str, low: float, high: float) -> None:
        if over in found and under in found:
            ratio = found[over] / found[under]
            lines.append(aim(what, wanted, ratio, low <= ratio <= high))

    for method in FLAT:
        last = max(steps for table, line, steps in found if (table, line) == ("T", method))
        ends = ("T", method, last), ("T", method, 1)
        add(f"{method}: T = {last} over T = 1", *ends, "1.00", 0, 1.005)
    supervised_gradient = "memory_reduced over a supervised gradient"
    add(supervised_gradient, ("T", "memory_reduced", 10), ("T", "floor", 1), "≤ 1.1", 0, 1.1)
    add("imaml over fomaml, T = 10", ("T", "imaml", 10), ("T", "fomaml", 10), "≤ 2", 0, 2)
    for table, network in (("T", "Conv4"), ("dense, T", "dense")):
        for other in ("maml, remat by step", "maml, mixed mode"):
            what = f"{other} over imaml, T = 100, {network}"
            add(what, (table, other, 100), (table, "imaml", 100), "≥ 8", 8, float("inf"))
    what = "itd_bio, recomputed over memory_reduced, T = 100"
    ends = ("T", "itd_bio, recomputed", 100), ("T", "memory_reduced", 100)
    add(what, *ends, "≥ 8", 8, float("inf"))
    for method in ("memory_reduced", "imaml"):
        ends = ("tasks", method, 256), ("tasks", method, 8)
        add(f"{method}: 256 tasks over 8", *ends, "≤ 1.05", 0, 1.05)
    return lines


def picture(found: dict[Key, float], path: Path) -> None:
    """MB against T, one line a method, and the floor."""
    with pictures.panels(path) as (axes,):
        axes.axhline(found["T", "floor", 1], color="0.5", ls=":", label="a supervised gradient")
        methods = dict.fromkeys(line for table, line, _ in found if table == "T")
        for method in sorted(methods, key=lambda method: method not in FRONT):
            if method != "floor":
                points = [(k, v) for (t, m, k), v in found.items() if (t, m) == ("T", method)]
                width, order = (3.0, 2) if method in FRONT else (1.0, 1)
                xs, ys = zip(*points, strict=True)
                axes.plot(xs, ys, marker="o", lw=width, zorder=order, label=method)
        axes.set(xscale="log", yscale="log", xlabel="inner steps T", ylabel="MB, a task at a time")
        pictures.plain_ticks(axes.xaxis, STEPS)
        pictures.plain_ticks(axes.yaxis, (5, 10, 20, 50, 100, 200))
        axes.legend()


PEAK = ("memory_reduced", "imaml", "maml")


def peak(method: str, steps: int) -> float:
    """MB that resident memory rises by while a process makes two meta-steps (Linux)."""
    made = learner(BASE.network(), method, steps)
    step = meta_step(made, 1)
    state, tasks = step.init(made.init(jax.random.key(0))), jax.jit(BASE.batch)()
    program = compiled_step(made, BASE, chunk=1, quick=False)
    jax.block_until_ready((state, tasks))
    Path("/proc/self/clear_refs").write_text("5")  # forget the compiler's own peak
    before = _kilobytes("VmRSS")
    for _ in range(2):
        state, _ = program(state, tasks)
    jax.block_until_ready(state)
    return round((_kilobytes("VmHWM") - before) / 1e3, 2)


def _kilobytes(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(field)))


def measured_peaks(quick: bool) -> list[Row]:
    """Peak resident MB above what the process held before its first meta-step, beside compiled."""
    lines = []
    for method in PEAK[:1] if quick else PEAK:
        for steps in (1, 100):
            command = [sys.executable, "-m", "benchmarks.cost.memory", "--one", method, str(steps)]
            found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            lines.append({"method": method, "T": steps, **json.loads(found.splitlines()[-1])})
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Print the tables and the aims, write memory.json, draw memory.png."""
    parser = make_parser(__doc__, "memory", quick="fewer methods and sizes")
    parser.add_argument("--peak", action="store_true", help="measure resident memory too (Linux)")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        method, steps = options.one[0], int(options.one[1])
        print(json.dumps({"compiled": round(of(method, steps), 2), "peak": peak(method, steps)}))
        return
    calls = dict([*against_steps(options.quick), *against_sizes(options.quick)])
    found = two_at_a_time(calls)
    tables = {table: rows(found, table) for table in dict.fromkeys(key[0] for key in calls)}
    for axis, table in tables.items():
        show(f"MB against {axis}", table)
    lines = aims(found)
    show("Aims", lines)
    peaks = measured_peaks(options.quick) if options.peak else []
    show("Peak resident MB", peaks)
    write(options.out / "memory.json", {"MB": tables, "aims": lines, "peaks": peaks})
    picture(found, options.out / "memory.png")


if __name__ == "__main__":
    main()
