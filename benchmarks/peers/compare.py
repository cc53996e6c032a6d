"""The same meta-step here, in plain PyTorch, and through other libraries, in one run.

    pip install 'memmeta[peers]'
    python -m benchmarks.peers.compare [--quick] [--cores 1 2] [--only a:maml:1 ...]
        [--vectors avx2] [--compiled] [--out DIR]

Same network, parameters, tasks and cores. Losses and gradient norms of the first meta-step are
compared before any time is; then one meta-step of each is timed in turn, again and again, and the
median and spread are printed. Workload a: 4 tasks, 5-way 1-shot, 15 queries a class, 28×28×1,
Conv4-64. Workload b32: 5-way 5-shot, 25 queries, 32×32×3, Conv4-64; b84: 84×84×3, Conv4-32; of the
paper's 32 tasks a step `--tasks` are taken, as all cost the same. The machine's matrix products and
bandwidth stand beside the seconds. Writes peers.json and peers.png.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from benchmarks.harness import pictures
from benchmarks.harness.arguments import make_parser
from benchmarks.harness.tables import Row, show, write
from benchmarks.harness.timing import bound_process, in_turn, peak_and_bandwidth
from benchmarks.problems.workloads import WORKLOADS, learner, meta_step, spread
from memmeta.few_shot.algorithms import Learner
from memmeta.meta import task_mesh

MODULE = "benchmarks.peers.compare"
Step = Callable[[], tuple[float, float]]
"""Makes one meta-step: the query loss and the norm of the meta-gradient."""


class Case(NamedTuple):
    """A method with T inner steps on a workload."""

    workload: str
    method: str
    steps: int
    aim: float | None = None  # the fastest peer's seconds over ours
    formulation: str = ""  # "recomputed": the peers compute features in each inner step, we once

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

QUICK = ["a:maml:1", "b32:memory_reduced:20"]
VECTORS = {
    "avx2": {
        "XLA_FLAGS": "--xla_cpu_max_isa=AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    }
}
"""What keeps JAX, PyTorch and their libraries to narrower vectors than the machine has."""
COMPILED = ("anil", "itd_bio", "memory_reduced", "fomaml")
"""What `torch.compile` takes: it differentiates no backward pass."""
PATIENCE = 8.0
"""Seconds of measuring after which one contestant is not measured again."""


def contestants(case: Case, tasks: int, compiled: bool) -> tuple[dict[str, Step], str]:
    """Name -> its meta-step; and the name of ours that must find the same numbers as the peers."""
    from benchmarks.peers import libraries, pytorch, vmapped

    workload = WORKLOADS[case.workload]
    workload = workload if case.workload == "a" else workload._replace(tasks=tasks)
    network, batch = workload.network(), jax.jit(workload.batch)()
    params = network.init(jax.random.key(0))
    mesh = task_mesh() if jax.device_count() > 1 else None

    def own(method: str) -> Step:
        return ours(learner(network, method, case.steps), params, batch, mesh)

    name = f"{case.method}, {case.formulation}" if case.formulation else case.method
    reference = f"memmeta, {case.formulation}" if case.formulation else "memmeta"
    found = {"memmeta": own(case.method)}
    if case.method == "imaml":  # the others estimate no error
        found["memmeta, with error estimate"] = found["memmeta"]
        found["memmeta"] = own("imaml, no estimate")
    if case.formulation:
        found[reference] = own(name)
    for label, last in (("PyTorch", False), ("PyTorch, channels last", True)):
        plain = pytorch.METHODS[name]
        found[label] = pytorch.meta_step(plain, params, batch, case.steps, last)
    if compiled and name in COMPILED:
        step = pytorch.meta_step(
            pytorch.METHODS[name], params, batch, case.steps, last=True, compiled=True
        )
        found["PyTorch, compiled, channels last"] = step
    for label, method in libraries.available()[0].get(name, {}).items():
        found[label] = pytorch.meta_step(method, params, batch, case.steps)
    if name in vmapped.METHODS:
        at_once = pytorch.meta_step(vmapped.METHODS[name], params, batch, case.steps, together=True)
        found["PyTorch, vmap over tasks"] = at_once
    return found, reference


def ours(made: Learner, params: Any, batch: Any, mesh: Mesh | None) -> Step:
    """The library's meta-step from given parameters: a CPU takes one of these tasks at a time."""
    step = meta_step(made, "auto", mesh)
    theta = jax.eval_shape(made.init, jax.random.key(0))
    kept = [step.init({part: params[part] for part in theta})]
    placed = spread(batch, mesh)

    def one() -> tuple[float, float]:
        kept[0], metrics = step(kept[0], placed)
        return float(metrics.loss), float(metrics.gradient_norm)

    return one


def measure(case: Case, options: argparse.Namespace) -> list[Row]:
    """The rows of one comparison."""
    steps, reference = contestants(case, options.tasks, options.compiled)
    steps = {name: step for name, step in steps.items() if name not in options.without}
    first = {name: step() for name, step in steps.items()}
    seconds = in_turn(steps, options.repeats, options.cpu_time, PATIENCE)
    rows = []
    for name, found in first.items():
        apart = max(abs(a - b) / abs(b) for a, b in zip(found, first[reference], strict=True))
        same = apart <= case.tolerance or (name == "memmeta" and bool(case.formulation))
        median = float(np.median(seconds[name]))
        row: Row = {"case": case.name, "who": name, "loss": found[0], "gradient": found[1]}
        row |= {"same": "yes" if same else f"NO ({apart:.1e})", "median s": median}
        row |= {"from": seconds[name].min(), "to": seconds[name].max()}
        rows.append(row | {"over ours": median / float(np.median(seconds["memmeta"]))})
    return rows


def work(options: argparse.Namespace) -> None:
    """In a process of its own, bound to its cores: measure, and print rows as JSON.

    On a GPU both libraries use it; float32 is TF32 in both unless JAX is told otherwise.
    """
    import torch

    if jax.default_backend() != "cpu" and not torch.cuda.is_available():
        raise SystemExit(f"peers: this PyTorch does not know the {jax.devices()[0].device_kind}")
    config: Any = jax.config
    short = config.jax_default_matmul_precision is None
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = short
    torch.set_num_threads(jax.device_count())
    for case in chosen(options):
        for row in measure(case, options):
            print(json.dumps({"cores": jax.device_count(), **row}), flush=True)


def chosen(options: argparse.Namespace) -> list[Case]:
    """The comparisons asked for."""
    names = options.only or (QUICK if options.quick else [case.name for case in CASES])
    known = {case.name: case for case in CASES}
    return [known[name] for name in names]


def speeds() -> Row:
    """Of the machine, with the cores and vectors of this process."""
    product, bandwidth = peak_and_bandwidth()
    speed = {"sgemm GFLOP/s": product / 1e9, "memory GB/s": bandwidth / 1e9}
    return {"cores": jax.device_count(), **speed}


def in_process(arguments: list[str], cores: int, vectors: str | None) -> list[Row]:
    """Run `work` on so many cores; its rows, which are shown as they come."""
    rows, cache = [], Path(".jax_cache").absolute() / (vectors or "")
    more = VECTORS[vectors] if vectors else {}
    for row in bound_process(MODULE, arguments, cores, cores, cache, more):
        rows.append(row)
        print(*row.values(), file=sys.stderr, flush=True)
    return rows


def ratios(rows: list[Row], cases: list[Case]) -> list[Row]:
    """For each case: the fastest peer that found the same, over ours."""
    found = []
    for case in cases:
        row: Row = {"case": case.name, "aim": case.aim or ""}
        for cores in sorted({r["cores"] for r in rows}):
            here = [r for r in rows if (r["case"], r["cores"]) == (case.name, cores)]
            peers = [r for r in here if r["same"] == "yes" and not r["who"].startswith("memmeta")]
            if peers:
                best = min(peers, key=lambda r: r["median s"])
                row[f"{cores} cores"] = round(best["over ours"], 2)
                row[f"fastest peer, {cores}"] = best["who"]
                row[f"s, {cores}"] = round(best["median s"], 3)
                row[f"ours s, {cores}"] = round(best["median s"] / best["over ours"], 3)
        found.append(row)
    return found


def picture(table: list[Row], path: Path) -> None:
    """The fastest peer's time over ours as bars, and a mark at each aim."""
    places, names = np.arange(len(table)), [key for key in table[0] if key.endswith(" cores")]
    with pictures.panels(path, size=(9, 0.4 * len(table) + 1.2)) as (axes,):
        for number, name in enumerate(names):
            lengths, height = [row.get(name, np.nan) for row in table], 0.8 / len(names)
            offset = (number - (len(names) - 1) / 2) * height
            axes.barh(places + offset, lengths, height, label=name.replace("1 cores", "1 core"))
        axes.plot([row["aim"] or np.nan for row in table], places, "k|", ms=18, label="aim")
        axes.set(yticks=places, yticklabels=[row["case"] for row in table], xscale="log")
        pictures.plain_ticks(axes.xaxis, (1, 1.5, 2, 3, 5, 8))
        axes.set_xlabel("time of the fastest peer over ours")
        axes.invert_yaxis()
        axes.legend()


def main(arguments: list[str] | None = None) -> None:
    """Measure with each number of cores in turn; print, write, draw."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = make_parser(__doc__, "peers", quick=f"only {', '.join(QUICK)}", repeats=5)
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES])
    parser.add_argument("--cores", nargs="+", type=int, default=[1, 2], help="and threads")
    parser.add_argument("--tasks", type=int, default=8, help="of workloads b, default 8")
    parser.add_argument("--without", nargs="+", default=[], help="peers to leave out, by name")
    parser.add_argument("--vectors", choices=VECTORS, help="of both libraries; all there are")
    parser.add_argument("--compiled", action="store_true", help="torch.compile too, a minute each")
    parser.add_argument("--machine", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("torch") is None:
        print("peers: left out, PyTorch is not installed (pip install 'memmeta[peers]')")
        return
    if options.worker:
        return print(json.dumps(speeds())) if options.machine else work(options)
    from benchmarks.peers import libraries

    print("\n".join(libraries.available()[1]))
    run = partial(in_process, vectors=options.vectors)
    machines = [row for cores in options.cores for row in run([*arguments, "--machine"], cores)]
    show("The machine", machines)
    rows = [row for cores in options.cores for row in run(arguments, cores)]
    show("Seconds a meta-step", rows)
    table = ratios(rows, chosen(options))
    show("Time of the fastest peer over ours", table)
    write(options.out / "peers.json", {"machine": machines, "rows": rows, "ratios": table})
    picture(table, options.out / "peers.png")


if __name__ == "__main__":
    main()
