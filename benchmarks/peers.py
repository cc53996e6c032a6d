"""The same meta-step here, in plain PyTorch, and through other libraries, in one run.

    pip install 'memmeta[peers]'
    python -m benchmarks.peers [--quick] [--threads 1 2] [--only a:maml:1 ...] [--out DIR]

Same network, parameters, tasks and threads. Losses and gradient norms of the first meta-step are
compared before any time is; then one meta-step of each is timed in turn, again and again, and the
median and spread are printed (with `--cpu-time`, for one thread on a machine that does other work
too, of the process's own CPU seconds). Workload a: 4 tasks, 5-way 1-shot, 15 queries a class,
28×28×1, Conv4-64. Workload b32: 5-way 5-shot, 25 queries, 32×32×3, Conv4-64; b84: 84×84×3,
Conv4-32; of the paper's 32 tasks a step `--tasks` are taken, as all cost the same. Writes
peers.json and peers.png.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.tables import Row, show, write


class Case(NamedTuple):
    """One comparison: a method with T inner steps on a workload, and the aim."""

    workload: str
    method: str
    steps: int
    aim: float | None = None
    formulation: str = ""

    @property
    def name(self) -> str:
        """As `--only` takes it."""
        ending = f":{self.formulation}" if self.formulation else ""
        return f"{self.workload}:{self.method}:{self.steps}{ending}"

    @property
    def tolerance(self) -> float:
        """Relative, of losses and gradient norms, in float32."""
        # Conjugate gradients after 50 steps of a network: PyTorch's own norm moves by 2 % from one
        # thread to two.
        return 0.03 if self.method == "imaml" and self.steps > 5 else 0.01


CASES = [
    *(Case("a", m, t, 1.5 if t < 10 else None) for m in ("maml", "anil", "fomaml") for t in (1, 5)),
    *(Case("a", "maml", t) for t in (10, 50)),
    *(Case("a", "imaml", t, 2.0) for t in (5, 50)),
    Case("b32", "memory_reduced", 20, 2.0),
    Case("b32", "memory_reduced", 20, 8.0, "recomputed"),
    Case("b32", "anil", 20),
    Case("b32", "anil", 20, None, "recomputed"),
    Case("b32", "itd_bio", 20),
    Case("b32", "itd_bio", 20, None, "recomputed"),
    Case("b84", "memory_reduced", 20),
]
"""All of them. A formulation "recomputed" is that of the peers: ours computes features once."""

QUICK = ["a:maml:1", "b32:memory_reduced:20"]
PATIENCE = 8.0
"""Seconds of measuring after which one contestant is not measured again."""


def contestants(case: Case, tasks: int, mesh: Any) -> tuple[dict[str, Callable], Callable]:
    """Name -> function that makes one meta-step; and ours that must find the same numbers."""
    import jax

    from benchmarks import peers_jaxopt, peers_libraries, peers_torch
    from benchmarks.workloads import WORKLOADS, learner

    workload = WORKLOADS[case.workload]
    if case.workload != "a":
        workload = workload._replace(tasks=tasks)
    network, batch = workload.network(), jax.jit(workload.batch)()
    params = network.init(jax.random.key(0))
    name = f"{case.method}, {case.formulation}" if case.formulation else case.method
    made = {"memmeta": ours(learner(network, case.method, case.steps), params, batch, mesh)}
    same = made["memmeta"]
    if case.method == "imaml":  # the others estimate no error
        lean = learner(network, "imaml, no estimate", case.steps)
        made["memmeta, with error estimate"] = same
        made["memmeta"] = same = ours(lean, params, batch, mesh)
    if case.formulation:
        same = ours(learner(network, name, case.steps), params, batch, mesh)
        made["memmeta, recomputed"] = same
    for last in (False, True):
        label = "PyTorch, channels last" if last else "PyTorch"
        plain = peers_torch.METHODS[name]
        made[label] = peers_torch.meta_step(plain, params, batch, case.steps, last)
    for label, method in peers_libraries.available()[0].get(name, {}).items():
        made[label] = peers_torch.meta_step(method, params, batch, case.steps, False)
    if importlib.util.find_spec("jaxopt") and name in peers_jaxopt.METHODS and case.steps <= 20:
        made["jaxopt"] = peers_jaxopt.meta_step(name, params, batch, case.steps)
    return made, same


def ours(made: Any, params: Any, batch: Any, mesh: Any) -> Callable[[], tuple[float, float]]:
    """A function that makes one meta-step."""
    import jax

    from benchmarks.workloads import meta_step
    from memmeta.meta import _mesh as devices

    step = meta_step(made, 1, mesh)
    theta = made.init(jax.random.key(0))
    kept = [step.init({part: params[part] for part in theta})]
    placed = devices.place(mesh, batch, jax.sharding.PartitionSpec(devices.TASKS))

    def one() -> tuple[float, float]:
        kept[0], metrics = step(kept[0], placed)
        return float(metrics.loss), float(metrics.gradient_norm)

    return one


def measure(case: Case, options: argparse.Namespace, mesh: Any) -> list[Row]:
    """The rows of one comparison."""
    made, same = contestants(case, options.tasks, mesh)
    made = {name: one for name, one in made.items() if name not in options.without}
    first = {name: one() for name, one in made.items()}
    wanted = first["memmeta"] if same is made["memmeta"] else first["memmeta, recomputed"]
    clock = time.process_time if options.cpu_time else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(options.repeats):
        for name, one in made.items():
            if sum(seconds[name]) > PATIENCE:
                continue
            began = clock()
            one()
            seconds[name].append(clock() - began)
    rows = []
    ours = float(np.median(seconds["memmeta"]))
    for name, found in first.items():
        apart = max(abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True))
        comparable = apart <= case.tolerance or (name == "memmeta" and bool(case.formulation))
        median = float(np.median(seconds[name]))
        rows.append(
            {
                "case": case.name,
                "who": name,
                "loss": found[0],
                "gradient": found[1],
                "same": "yes" if comparable else f"NO ({apart:.1e})",
                "median s": median,
                "from": min(seconds[name]),
                "to": max(seconds[name]),
                "over ours": median / ours,
            }
        )
    return rows


def work(options: argparse.Namespace, threads: int) -> None:
    """In a process of its own, bound to so many cores: measure, and print rows as JSON."""
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={threads}"
    import jax
    import torch

    from memmeta.meta import task_mesh

    torch.set_num_threads(threads)
    jax.config.update("jax_compilation_cache_dir", str(Path(".jax_cache").absolute()))
    mesh = task_mesh(jax.devices()) if threads > 1 else None
    for case in chosen(options):
        for row in measure(case, options, mesh):
            print(json.dumps({"threads": threads, **row}), flush=True)


def chosen(options: argparse.Namespace) -> list[Case]:
    names = options.only or (QUICK if options.quick else [case.name for case in CASES])
    known = {case.name: case for case in CASES}
    return [known[name] for name in names]


def in_process(arguments: list[str], threads: int) -> list[Row]:
    """Run `work` on the first cores this process may use."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    if len(cores) < threads:
        print(f"{threads} threads: left out, there are {len(cores)} cores")
        return []
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "benchmarks.peers",
        *arguments,
        "--worker",
        str(threads),
    ]
    rows = []
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            rows.append(json.loads(line))
            print(threads, *rows[-1].values(), file=sys.stderr, flush=True)
    if process.returncode:
        raise SystemExit(f"the measuring process ended with {process.returncode}")
    return rows


def ratios(rows: list[Row], cases: list[Case]) -> list[Row]:
    """For each case: the fastest peer on PyTorch that found the same, over ours."""
    found = []
    for case in cases:
        row: Row = {"case": case.name, "aim": case.aim or ""}
        for threads in sorted({r["threads"] for r in rows}):
            here = [r for r in rows if (r["case"], r["threads"]) == (case.name, threads)]
            peers = [
                r for r in here if r["same"] == "yes" and not r["who"].startswith(("mem", "jax"))
            ]
            if peers:
                best = min(peers, key=lambda r: r["median s"])
                row[f"{threads} threads"] = round(best["over ours"], 2)
                row[f"fastest peer, {threads}"] = best["who"]
                row[f"s, {threads}"] = round(best["median s"], 3)
                row[f"ours s, {threads}"] = round(best["median s"] / best["over ours"], 3)
        found.append(row)
    return found


def picture(table: list[Row], path: Path) -> None:
    """Bars: the fastest peer's time over ours, and a mark at each aim."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.4 * len(table) + 1.2), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(table))
    kinds = [key for key in table[0] if key.endswith("threads") and key[0].isdigit()]
    for i, kind in enumerate(kinds):
        height = 0.8 / len(kinds)
        values = [row.get(kind, np.nan) for row in table]
        axes.barh(places + (i - (len(kinds) - 1) / 2) * height, values, height, label=kind)
    aims = [(i, row["aim"]) for i, row in enumerate(table) if row["aim"]]
    axes.plot([a for _, a in aims], [i for i, _ in aims], "k|", markersize=18, label="aim")
    axes.axvline(1, color="0.6", linewidth=1)
    axes.set(yticks=places, yticklabels=[row["case"] for row in table], xscale="log")
    axes.set_xlabel("time of the fastest PyTorch-side peer over ours")
    axes.invert_yaxis()
    axes.legend()
    figure.savefig(path, dpi=90)


def main(arguments: list[str] | None = None) -> None:
    """Measure with each number of threads in turn; print, write, draw."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--tasks", type=int, default=8, help="of workloads b, default 8")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true", help="seconds of the process's own")
    parser.add_argument("--without", nargs="+", default=[], help="peers to leave out, by name")
    parser.add_argument("--out", type=Path, default=Path("build/peers"))
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("torch") is None:
        print("peers: left out, PyTorch is not installed (pip install 'memmeta[peers]')")
        return
    if options.worker:
        return work(options, options.worker)
    from benchmarks import peers_libraries

    print("\n".join(peers_libraries.available()[1]))
    rows = [row for threads in options.threads for row in in_process(arguments, threads)]
    show("Seconds a meta-step", rows)
    table = ratios(rows, chosen(options))
    show("Time of the fastest PyTorch-side peer over ours", table)
    options.out.mkdir(parents=True, exist_ok=True)
    write(options.out / "peers.json", {"rows": rows, "ratios": table})
    picture(table, options.out / "peers.png")


if __name__ == "__main__":
    main()
