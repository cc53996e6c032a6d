"""Tasks spread over devices: the same gradient, one all-reduce, and what a pod would do.

    python -m benchmarks.scaling.devices [--quick] [--peak FLOP/s] [--bandwidth B/s]
        [...] [--out DIR]

First, on simulated devices of a CPU: weak scaling (two tasks a device) and strong scaling (16 tasks
in all) of a small meta-step. The gradient is compared with that of one device; collectives and the
bytes they carry are read from the compiled program. Seconds stand in brackets where the devices are
more than the cores: they say nothing of scaling then. Then, for full-size workloads, the model of
`benchmarks.scaling.pod` up to 10,000 devices, and what limits it first. Writes scaling.json.
"""

from functools import cache
from typing import Any

import jax
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from benchmarks.harness.arguments import make_parser
from benchmarks.harness.programs import collectives, compiled
from benchmarks.harness.tables import Row, aim, cores, show, write
from benchmarks.harness.timing import in_turn
from benchmarks.problems import workloads
from benchmarks.problems.workloads import PAPERS_CIFAR, PAPERS_IMAGENET, Workload, learner
from benchmarks.scaling.pod import SOURCES, Chip, Work, curve, first_break, work
from memmeta.meta import task_mesh
from memmeta.models import resnet12

SMALL = Workload(ways=3, queries=4, image_shape=(8, 8, 1), width=8, depth=2)
METHODS = ("memory_reduced", "imaml", "maml")
COUNTS, QUICK_COUNTS = (1, 2, 4, 8), (1, 8)
STEPS, TASKS, EACH, ROUNDS = 3, 16, 2, 5
"""Inner steps; tasks in strong scaling; tasks a device in weak scaling; calls that are timed."""
POD = (1, 8, 32, 128, 1024, 4096, 10_000)
BATCH, HELD = 32, 4
"""Tasks in strong scaling, as in the paper; tasks a device in weak scaling."""


class Run:
    """One meta-step of gradient descent at rate 1 on so many devices: θ moves by the gradient."""

    def __init__(self, method: str, count: int, tasks: int) -> None:
        made = learner(SMALL.network(), method, STEPS)
        mesh = task_mesh(jax.devices()[:count]) if count > 1 else None
        step = made.make_meta_step(optax.sgd(1.0), task_chunk=1, mesh=mesh)
        theta = made.init(jax.random.key(0))
        batch = workloads.spread(jax.jit(SMALL._replace(tasks=tasks).batch)(), mesh)
        state = step.init(theta)
        program = compiled(step.update, state, batch)
        following, _ = jax.block_until_ready(program(state, batch))
        call = lambda: jax.block_until_ready(program(state, batch))  # noqa: E731
        seconds = in_turn({method: call}, ROUNDS)[method]
        before, after = (np.asarray(ravel_pytree(s.meta_params)[0]) for s in (state, following))
        self.gradient, self.seconds = before - after, float(np.median(seconds))
        self.messages, self.parameters = collectives(program), before.nbytes


run = cache(Run)


def measured(methods: tuple[str, ...], counts: tuple[int, ...]) -> dict[str, list[Row]]:
    """Strong and weak scaling of each method, one row a number of devices."""
    usable = cores() or 1
    tables: dict[str, list[Row]] = {"strong": [], "weak": []}
    for method in methods:
        for name, rows in tables.items():
            for count in counts:
                tasks = TASKS if name == "strong" else EACH * count
                alone, shared = run(method, 1, tasks), run(method, count, tasks)
                apart = np.linalg.norm(shared.gradient - alone.gradient)
                row: Row = {"method": method, "devices": count, "tasks": tasks}
                row["apart"] = float(apart / np.linalg.norm(alone.gradient))
                row["messages"] = ", ".join(kind for kind, _ in shared.messages) or "none"
                row["bytes"] = sum(size for _, size in shared.messages)
                row["bytes of θ"] = shared.parameters
                shown = f"{shared.seconds:.2g}"
                row["s"] = shown if count <= usable else f"({shown})"
                rows.append(row)
    return tables


def aims(tables: dict[str, list[Row]]) -> list[Row]:
    """What must hold whatever the devices."""
    several = [row for rows in tables.values() for row in rows if row["devices"] > 1]
    apart = max(row["apart"] for row in several)
    single = all(row["messages"] == "all-reduce" for row in several)
    extra = max(row["bytes"] - row["bytes of θ"] for row in several)
    return [
        aim("gradient against one device, worst", "≤ 1e-4", apart, apart <= 1e-4),
        aim("all-reduces in a meta-step", "1", float(single), single),
        aim("bytes reduced beside θ", "≤ 200", float(extra), extra <= 200),
    ]


def full_size(quick: bool) -> dict[str, Work]:
    """Counts of full-size meta-steps: traced for two devices with a task each."""
    mesh = task_mesh(jax.devices()[:2])
    large = PAPERS_IMAGENET
    networks = {"Conv4-64, 32×32×3": (PAPERS_CIFAR, PAPERS_CIFAR.network())}
    if not quick:
        residual = resnet12(large.ways, image_shape=large.image_shape)
        networks["ResNet-12, 84×84×3"] = (large, residual)
    found = {}
    for name, (load, network) in networks.items():
        for method, steps in (("memory_reduced", 20), ("imaml", 5), ("maml", 5)):
            made = learner(network, method, steps)
            step = made.make_meta_step(optax.adam(1e-3), task_chunk=None, mesh=mesh)
            theta = jax.eval_shape(made.init, jax.random.key(0))
            two = load._replace(tasks=2).shapes()
            found[f"{method}, T = {steps}, {name}"] = work(step, theta, two, steps)
    return found


def predictions(works: dict[str, Work], chip: Chip) -> dict[str, list[Row]]:
    """Every table of the model, printed."""
    print(f"\nA model, not a measurement. {chip}\n{SOURCES}")
    counted = [{"meta-step": name, **each._asdict()} for name, each in works.items()]
    show("What a meta-step asks for", counted)
    tables = {"work": counted}
    for name, each in works.items():
        for weak in (False, True):
            title = f"{name}: {'weak' if weak else 'strong'}"
            tables[title] = curve(each, chip, POD, HELD if weak else BATCH, weak)
            show(f"{title} scaling, ms", tables[title])
    tables["breaks"] = [
        {"meta-step": name, **first_break(each, chip, HELD, BATCH, POD[-1])}
        for name, each in works.items()
    ]
    show(
        "From how many devices on each stands in the way (none: not up to 10,000)", tables["breaks"]
    )
    return tables


def main(arguments: list[str] | None = None) -> None:
    """Print the tables and the aims, write scaling.json, draw scaling.png."""
    parser = make_parser(__doc__, "scaling", quick="fewer methods and devices")
    for name, default in Chip()._asdict().items():
        text = f"of the model; default {default:g}"
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
    options: Any = parser.parse_args(arguments)
    jax.config.update("jax_num_cpu_devices", COUNTS[-1])  # before JAX is asked for any
    chosen = (METHODS[:1], QUICK_COUNTS) if options.quick else (METHODS, COUNTS)
    tables = measured(*chosen)
    show(f"Strong scaling, {TASKS} tasks", tables["strong"])
    show(f"Weak scaling, {EACH} tasks a device", tables["weak"])
    lines = aims(tables)
    show("Aims", lines)
    chip = Chip(*(getattr(options, name) for name in Chip._fields))
    works = full_size(options.quick)
    model = predictions(works, chip)
    write(options.out / "scaling.json", {"measured": tables, "aims": lines, "model": model})


if __name__ == "__main__":
    main()
