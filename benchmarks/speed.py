"""Seconds of a meta-step, and what share of the machine's matrix products they are worth.

    python -m benchmarks.speed [--quick] [--only a:maml:1 ...] [--cores 1 2] [--one-device]
        [--repeats N] [--cpu-time] [--cache DIR] [--out DIR]

Seconds of a meta-step for several T, one task at a time on each device; the first call's seconds
apart (with an empty compilation cache and again with a warm one); direct-convolution FLOP/s over
the best sgemm measured in the same process; memory_reduced at K = 200 over K = 20. The programs are
timed in turn, again and again; the median and the spread are printed. With several cores the tasks
are spread over as many CPU devices, so that two tasks are worked on at once; `--one-device` leaves
the cores to XLA's own threads instead. `--cache` keeps compiled programs for the next call, which
then has no empty cache to time. `--cpu-time`, for one core of a machine that does other work too,
counts the process's own CPU seconds. Writes speed.json and speed.png.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tables import Row, aim, show, write

METHODS = [
    *(("a", method, steps) for method in ("memory_reduced", "anil", "fomaml") for steps in (1, 5)),
    *(("a", "maml", steps) for steps in (1, 5, 10, 50)),
    *(("a", method, 5) for method in ("imaml", "imaml, no estimate")),
    *(("b32", "memory_reduced", steps) for steps in (20, 200)),
    ("b84", "memory_reduced", 20),
]
NAMES = [":".join(map(str, run)) for run in METHODS]
QUICK = ["a:maml:1", "b32:memory_reduced:20", "b32:memory_reduced:200"]
TASKS = 8
"""Of the workloads b; the paper's 32 cost four times as much."""


def prepared(workload: str, method: str, steps: int) -> tuple[Callable[[], None], Any]:
    """A function that makes one meta-step, and the workload."""
    import jax

    from benchmarks.workloads import WORKLOADS, learner, meta_step
    from memmeta.meta import _mesh as devices

    load = WORKLOADS[workload]._replace(tasks=4 if workload == "a" else TASKS)
    made = learner(load.network(), method, steps)
    mesh = devices.task_mesh(jax.devices()) if jax.device_count() > 1 else None
    step = meta_step(made, 1, mesh)
    tasks = devices.place(mesh, jax.jit(load.batch)(), jax.sharding.PartitionSpec(devices.TASKS))
    kept = [step.init(made.init(jax.random.key(0)))]

    def one() -> None:
        kept[0], _ = step(kept[0], tasks)
        jax.block_until_ready(kept[0])

    return one, load


def in_turn(
    calls: dict[Any, Callable[[], Any]], repeats: int, cpu_time: bool = False
) -> dict[Any, np.ndarray]:
    """Seconds of each call, measured round by round.

    Args:
        calls: by name.
        repeats: rounds.
        cpu_time: this process's CPU seconds, which on one core are seconds less what other
            processes took of it.
    """
    clock = time.process_time if cpu_time else time.perf_counter
    seconds: dict[Any, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            began = clock()
            call()
            seconds[name].append(clock() - began)
    return {name: np.array(each) for name, each in seconds.items()}


def convolution_flops(load: Any) -> float:
    """Of one supervised gradient by direct convolution: forwards, kernels, images but the first."""
    height, width, channels = load.image_shape
    total = 0.0
    for block in range(load.depth):
        each = 2.0 * height * width * 9 * channels * load.width
        total += each * (3 if block else 2)
        height, width, channels = height // 2, width // 2, load.width
    return total * load.images * load.tasks


def sgemm() -> Callable[[], Any]:
    """A product of two matrices of 2,048 rows, on as many cores as there are."""
    import jax
    import jax.numpy as jnp

    matrix = jnp.ones((2048, 2048))
    multiply = jax.jit(jnp.dot)
    return lambda: multiply(matrix, matrix).block_until_ready()


def work(options: argparse.Namespace) -> None:
    """In a process of its own, bound to its cores: measure and print JSON."""
    import jax

    names = options.only or (QUICK if options.quick else NAMES)
    runs = [METHODS[NAMES.index(name)] for name in names]
    calls: dict[Any, Callable[[], Any]] = {"sgemm": sgemm()}
    first, loads = {}, {}
    for run in runs:
        began = time.perf_counter()
        calls[run], loads[run] = prepared(*run)
        calls[run]()
        first[run] = time.perf_counter() - began
    if options.first:
        print(json.dumps([[*run, first[run]] for run in runs]))
        return
    calls["sgemm"]()
    seconds = in_turn(calls, options.repeats, options.cpu_time)
    peak = 2 * 2048**3 / seconds["sgemm"].min()
    rows: list[Row] = []
    for run in runs:
        workload, method, steps = run
        median = float(np.median(seconds[run]))
        row: Row = {"workload": workload, "method": method, "T": steps}
        row |= {"s": median, "from": seconds[run].min(), "to": seconds[run].max()}
        row |= {"first call s": round(first[run], 2)}
        share = convolution_flops(loads[run]) / median / peak
        # of the other methods the arithmetic is not that of one supervised gradient
        row["of sgemm"] = round(share, 3) if method in ("memory_reduced", "anil") else ""
        rows.append(row)
    print(json.dumps({"rows": rows, "sgemm GFLOP/s": peak / 1e9, "devices": jax.device_count()}))


def in_process(arguments: list[str], cores: int, devices: int, cache: Path) -> Any:
    """Run `work` on so many cores, with so many CPU devices; what it printed last."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_COMPILATION_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "benchmarks.speed", *arguments, "--worker"]
    some = sorted(os.sched_getaffinity(0))[:cores]
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=environment,
        preexec_fn=lambda: os.sched_setaffinity(0, some),
    )
    return json.loads(done.stdout.splitlines()[-1])


def aims(found: dict[int, Any]) -> list[Row]:
    """The lines of `docs/performance.md` that this file measures."""
    lines = []
    for cores, each in found.items():
        at = {(r["workload"], r["method"], r["T"]): r for r in each["rows"]}
        if not {("b32", "memory_reduced", k) for k in (20, 200)} <= set(at):
            continue
        name = f"{cores} core{'s' * (cores > 1)}"
        short, long = (at["b32", "memory_reduced", k] for k in (20, 200))
        ratio = long["s"] / short["s"]
        lines.append(
            aim(f"memory_reduced, K = 200 over 20, {name}", "≤ 1.05", ratio, ratio <= 1.05)
        )
        share = short["of sgemm"]
        lines.append(
            aim(f"memory_reduced on b32 over sgemm, {name}", "≥ 0.85", share, share >= 0.85)
        )
    return lines


def picture(found: dict[int, Any], path: Path) -> None:
    """Bars: seconds of a meta-step, one colour a number of cores."""
    from matplotlib.figure import Figure

    kinds = next(iter(found.values()))["rows"]
    figure = Figure(figsize=(8, 0.3 * len(kinds) + 1.5), layout="constrained")
    axes = figure.subplots()
    places, height = np.arange(len(kinds)), 0.8 / len(found)
    for i, (cores, each) in enumerate(found.items()):
        values = [r["s"] for r in each["rows"]]
        axes.barh(places + (i - (len(found) - 1) / 2) * height, values, height, label=f"{cores}")
    labels = [f"{r['workload']} {r['method']} T={r['T']}" for r in kinds]
    axes.set(yticks=places, yticklabels=labels, xlabel="seconds a meta-step")
    axes.invert_yaxis()
    axes.legend(title="cores")
    figure.savefig(path, dpi=90)


def main(arguments: list[str] | None = None) -> None:
    """Measure with each number of cores in turn; print, write, draw."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer methods")
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="WORKLOAD:METHOD:T")
    parser.add_argument("--one-device", action="store_true", help="whatever the number of cores")
    parser.add_argument("--cpu-time", action="store_true", help="seconds of the process's own")
    parser.add_argument("--cache", type=Path, help="where compiled programs are kept")
    parser.add_argument("--cores", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("build/speed"))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--first", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        return work(options)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        cache = options.cache.absolute() if options.cache else Path(folder)
        for cores in options.cores:
            devices = 1 if options.one_device else cores
            cold = (
                [] if options.cache else in_process([*arguments, "--first"], cores, devices, cache)
            )
            found[cores] = in_process(arguments, cores, devices, cache)
            for row, each in zip(found[cores]["rows"], cold, strict=False):
                row["without cache s"] = round(each[-1], 2)
            peak = found[cores]["sgemm GFLOP/s"]
            title = f"{cores} cores, {devices} devices, sgemm {peak:.0f} GFLOP/s"
            show(title, found[cores]["rows"])
    lines = aims(found)
    show("Aims", lines)
    write(options.out / "speed.json", {"cores": found, "aims": lines})
    picture(found, options.out / "speed.png")


if __name__ == "__main__":
    main()
