"""Memory of a meta-step against inner steps, tasks, query images and width.

    python -m benchmarks.memory [--quick] [--peak] [--out DIR]

The figures are the compiler's own: MB of temporary buffers of the whole meta-step, exact on every
platform and found without running anything. Beside them stands the floor, one plain supervised
gradient on the same images. `--peak` also runs some of the programs, each in a process of its own,
and prints by how much the process's resident memory rises. Writes memory.json and memory.png.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from benchmarks.tables import Row, aim, show, write
from benchmarks.workloads import (
    Workload,
    compiled_step,
    learner,
    meta_step,
    supervised,
    temporary,
)
from memmeta.models import mlp

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


def of(method: str, steps: int, workload: Workload = BASE) -> float:
    """MB of a meta-step, one task at a time."""
    made = learner(workload.network(), method, steps)
    return temporary(compiled_step(made, workload, chunk=1))


def floor(workload: Workload) -> float:
    """MB of one supervised gradient on the images of one task."""
    return temporary(supervised(workload.network(), workload._replace(tasks=1)))


def wide_head(method: str, steps: int) -> float:
    """MB on a network with many parameters and few activations: three layers of 1,024 units."""
    workload = BASE._replace(queries=1)
    network = mlp(workload.ways, (1024, 1024, 1024), workload.image_shape)
    return temporary(compiled_step(learner(network, method, steps), workload, chunk=1))


def all_at_once(calls: dict[str, Callable[[], float]]) -> dict[str, float]:
    """The compiler uses one core a program: two programs at a time."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(calls, pool.map(lambda call: call(), calls.values()), strict=True))


def sweep(quick: bool) -> dict[str, dict[str, float]]:
    """Every figure: name of the table -> "line, column" -> MB."""
    methods = METHODS[:1] + METHODS[4:7] if quick else METHODS
    calls: dict[str, dict[str, Callable[[], float]]] = {"T": {}, "tasks": {}, "queries": {}}
    calls |= {"width": {}, "dense, T": {}}
    for method in methods:
        longest = method in FLAT and not quick
        for count in STEPS if longest else STEPS[:3]:
            calls["T"][f"{method}|{count}"] = lambda m=method, t=count: of(m, t)
    for method in ("memory_reduced", "imaml"):
        for count in TASKS if method == "memory_reduced" and not quick else TASKS[1::2]:
            larger = BASE._replace(tasks=count, width=16)
            calls["tasks"][f"{method}|{count}"] = lambda m=method, w=larger: of(m, 10, w)
    for axis, values in (("queries", QUERIES), ("width", WIDTHS)):
        for value in values[::2] if quick else values:
            narrow = BASE._replace(width=value)
            changed = narrow if axis == "width" else BASE._replace(queries=value)
            calls[axis][f"floor|{value}"] = lambda w=changed: floor(w)
            for method in ("memory_reduced", "fomaml", "imaml"):
                calls[axis][f"{method}|{value}"] = lambda m=method, w=changed: of(m, 10, w)
    for method in ("imaml", "maml, remat by step", "maml, mixed mode"):
        for count in (1, 100):
            calls["dense, T"][f"{method}|{count}"] = lambda m=method, t=count: wide_head(m, t)
    calls["T"]["floor|1"] = lambda: floor(BASE)
    flat = {f"{table}/{name}": f for table, each in calls.items() for name, f in each.items()}
    found = all_at_once(flat)
    return {
        table: {name: found[f"{table}/{name}"] for name in each} for table, each in calls.items()
    }


def rows(table: dict[str, float]) -> list[Row]:
    """One row a method, one column a value."""
    lines: dict[str, Row] = {}
    columns = sorted({int(name.split("|")[1]) for name in table})
    for name, value in table.items():
        method, column = name.split("|")
        row = lines.setdefault(method, {"MB": method} | {str(c): "" for c in columns})
        row[column] = round(value, 2)
    return list(lines.values())


def aims(found: dict[str, dict[str, float]]) -> list[Row]:
    """The lines of `docs/performance.md` that are compiled bytes."""
    at = found["T"]
    last = max(int(name.split("|")[1]) for name in at)
    dense = found["dense, T"]
    lines = []
    for method in ("memory_reduced", "imaml"):
        ratio = at[f"{method}|{last}"] / at[f"{method}|1"]
        lines.append(aim(f"{method}: T = {last} over T = 1", "1.00", ratio, ratio < 1.005))
    ratio = at["memory_reduced|10"] / at["floor|1"]
    lines.append(aim("memory_reduced over a supervised gradient", "≤ 1.1", ratio, ratio <= 1.1))
    ratio = at["imaml|10"] / at["fomaml|10"]
    lines.append(aim("imaml over fomaml, T = 10", "≤ 2", ratio, ratio <= 2))
    for other in ("maml, remat by step", "maml, mixed mode"):
        if f"{other}|100" in at:
            ratio = at[f"{other}|100"] / at["imaml|100"]
            lines.append(aim(f"{other} over imaml, T = 100, Conv4", "≥ 8", ratio, ratio >= 8))
        ratio = dense[f"{other}|100"] / dense["imaml|100"]
        lines.append(aim(f"{other} over imaml, T = 100, dense", "≥ 8", ratio, ratio >= 8))
    if "itd_bio, recomputed|100" in at:
        ratio = at["itd_bio, recomputed|100"] / at["memory_reduced|100"]
        lines.append(
            aim("itd_bio, recomputed over memory_reduced, T = 100", "≥ 8", ratio, ratio >= 8)
        )
    for method in ("memory_reduced", "imaml"):
        ratio = found["tasks"][f"{method}|256"] / found["tasks"][f"{method}|8"]
        lines.append(aim(f"{method}: 256 tasks over 8", "≤ 1.05", ratio, ratio <= 1.05))
    return lines


def picture(found: dict[str, dict[str, float]], path: Path) -> None:
    """MB against T, one line a method, and the floor."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for row in rows(found["T"]):
        points = [(int(k), v) for k, v in row.items() if k != "MB" and v != ""]
        if row["MB"] == "floor":
            axes.axhline(points[0][1], color="0.5", linestyle=":", label="a supervised gradient")
        else:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=row["MB"])
    axes.set(xscale="log", yscale="log", xlabel="inner steps T", ylabel="MB, one task at a time")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=90)


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
    return (_kilobytes("VmHWM") - before) / 1e3


def _kilobytes(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith(field)))


def measured_peaks(quick: bool) -> list[Row]:
    """Peak resident MB above what the process held before its first meta-step, beside compiled."""
    lines = []
    for method in PEAK[:1] if quick else PEAK:
        for steps in (1, 100):
            command = [sys.executable, "-m", "benchmarks.memory", "--one", method, str(steps)]
            found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            lines.append({"method": method, "T": steps, **json.loads(found.splitlines()[-1])})
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Print the tables and the aims, write memory.json, draw memory.png."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer methods and sizes")
    parser.add_argument("--peak", action="store_true", help="measure resident memory too (Linux)")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("build/memory"))
    options = parser.parse_args(arguments)
    if options.one:
        method, steps = options.one
        compiled = round(of(method, int(steps)), 2)
        print(json.dumps({"compiled": compiled, "peak": round(peak(method, int(steps)), 2)}))
        return
    found = sweep(options.quick)
    for axis, table in found.items():
        show(f"MB against {axis}", rows(table))
    lines = aims(found)
    show("Aims", lines)
    peaks = measured_peaks(options.quick) if options.peak else []
    show("Peak resident MB", peaks)
    write(options.out / "memory.json", {"MB": found, "aims": lines, "peaks": peaks})
    picture(found, options.out / "memory.png")
    print(f"figures and picture in {options.out}")


if __name__ == "__main__":
    main()
