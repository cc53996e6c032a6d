"""How cost grows: exponents of seconds, memory, compilation and rounding along eight sizes.

    python -m benchmarks.cost.growth [--quick] [--axes NAME ...] [--repeats N] [--cpu-time]
        [--out DIR]

A small meta-step (4 tasks, 5-way 1-shot, 5 queries a class, 16×16×1, two blocks of 16 filters, 5
inner steps, 5 of conjugate gradients, a task at a time), one size changed at a time. An exponent is
the slope of log cost against log size over the three largest sizes, by least squares; beside it
stand the least and the largest slope between two neighbours of these, seconds taken from one
quartile to the other. Bytes are temporary ones of the compiled program, of one device. Rounding is
by how much of its length the hypergradient moves when every image moves to a number next to it.
What breaks first is extrapolated to 100 times the largest size that was run, by laws whose slopes
are above zero and within 1 of each other. Machine code is made without optimisation, which saves
most of the compiler's time and leaves convolutions, products and buffers as they are. Writes
growth.json and growth.png.
"""

import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from benchmarks.harness import pictures
from benchmarks.harness.arguments import make_parser
from benchmarks.harness.programs import compiled, temporary_megabytes
from benchmarks.harness.tables import Row, show, write
from benchmarks.harness.timing import in_turn
from benchmarks.problems.workloads import Workload, learner, spread
from memmeta.meta import task_mesh

METHODS = ("memory_reduced", "imaml", "maml")
IMPLICIT = METHODS[:2]
PATIENCE, END = 1.0, 3
"""Seconds after which a program is timed no more; sizes that a law is fitted to."""
FAR, APART = 100.0, 1.0
"""How many times the largest size a law is followed, and by how much its slopes may differ then."""


class Size(NamedTuple):
    """A meta-step's sizes, all of which but one stay as they are here."""

    tasks: int = 4
    ways: int = 5
    shots: int = 1
    side: int = 16
    width: int = 16
    inner_steps: int = 5
    cg_steps: int = 5
    devices: int = 1

    def load(self) -> Workload:
        """The data and the network."""
        shape = (self.side, self.side, 1)
        return Workload(self.tasks, self.ways, self.shots, 5, shape, self.width, depth=2)


AXES: dict[str, tuple[int, ...]] = {
    "tasks": (4, 8, 16, 32),
    "ways": (5, 10, 20, 40),
    "shots": (1, 4, 16, 64),
    "side": (8, 16, 32, 64),
    "width": (8, 16, 32, 64),
    "inner_steps": (5, 20, 80, 320),
    "cg_steps": (5, 20, 80, 320),
    "devices": (1, 2, 4, 8),
}
SHARED_TASKS = 16
"""Of all devices together."""
COSTS = ("s", "MB", "compile s", "rounding")
LIMITS = {"s": 10.0, "MB": 16e3, "compile s": 300.0, "rounding": 0.01}
"""Where a cost is called broken: a meta-step of 10 s, 16 GB, 5 minutes, a hundredth."""
NAMES = {"s": "time", "MB": "memory", "compile s": "compilation", "rounding": "precision"}


class Program:
    """A method's meta-step at some sizes: gradient descent at rate 1, so that θ moves by −∇F."""

    def __init__(self, method: str, size: Size) -> None:
        load = size.load()
        options = {"cg_steps": size.cg_steps} if method in IMPLICIT else {}
        made = learner(load.network(), method, size.inner_steps, **options)
        mesh = task_mesh(jax.devices()[: size.devices]) if size.devices > 1 else None
        step = made.make_meta_step(optax.sgd(1.0), task_chunk=1, mesh=mesh)
        self.tasks = spread(jax.jit(load.batch)(), mesh)
        self.state = step.init(made.init(jax.random.key(0)))
        began = time.process_time()
        self.program = compiled(step.update, self.state, self.tasks)
        self.compilation = time.process_time() - began
        self.megabytes = temporary_megabytes(self.program)

    def __call__(self, tasks: Any = None) -> Any:
        return jax.block_until_ready(self.program(self.state, tasks or self.tasks)[0])

    def gradient(self, tasks: Any = None) -> np.ndarray:
        """∇F at the first θ."""
        before, after = (ravel_pytree(s.meta_params)[0] for s in (self.state, self(tasks)))
        return np.asarray(before, float) - np.asarray(after, float)

    def rounding(self) -> float:
        """‖change of ∇F‖ / ‖∇F‖ when each image moves to the next number above it."""
        up = lambda images: jnp.nextafter(images, jnp.float32(jnp.inf))  # noqa: E731
        support, query = up(self.tasks.support_inputs), up(self.tasks.query_inputs)
        moved = self.tasks._replace(support_inputs=support, query_inputs=query)
        gradient = self.gradient()
        return float(np.linalg.norm(self.gradient(moved) - gradient) / np.linalg.norm(gradient))


def sizes(axis: str, quick: bool) -> Iterator[tuple[int, Size]]:
    """The values of an axis, and all sizes with it."""
    usual = Size(tasks=SHARED_TASKS) if axis == "devices" else Size()
    for value in AXES[axis][: END if quick else None]:
        yield value, usual._replace(**{axis: value})


def methods(axis: str) -> tuple[str, ...]:
    """Those whose cost is measured along an axis."""
    by_axis = {"inner_steps": METHODS, "cg_steps": IMPLICIT}
    return by_axis.get(axis, ("memory_reduced", "maml"))


program = cache(Program)


def measured(axis: str, options: Any) -> list[Row]:
    """A row for each method and value of an axis."""
    rows: list[Row] = []
    for method in methods(axis):
        for value, size in sizes(axis, options.quick):
            made = program(method, size)
            row: Row = {"axis": axis, "method": method, "size": value, "MB": made.megabytes}
            row |= {"compile s": made.compilation, "rounding": made.rounding()}
            seconds = in_turn({0: made}, options.repeats, options.cpu_time, PATIENCE)[0]
            for name, share in (("from", 25), ("s", 50), ("to", 75)):
                row[name] = float(np.percentile(seconds, share))
            rows.append(row)
            print(*(f"{x:.4g}" if isinstance(x, float) else x for x in row.values()), flush=True)
    return rows


def law(rows: list[Row], cost: str) -> tuple[float, float, float]:
    """The exponent at the larger end, and the least and largest slope between neighbours there."""
    end = rows[-END:]
    low, high = ("from", "to") if cost == "s" else (cost, cost)
    log = lambda name: np.log([max(row[name], 1e-12) for row in end])  # noqa: E731
    along = np.log([row["size"] for row in end])
    slope = float(np.polyfit(along, log(cost), 1)[0])
    least = (log(low)[1:] - log(high)[:-1]) / np.diff(along)
    most = (log(high)[1:] - log(low)[:-1]) / np.diff(along)
    return slope, float(least.min()), float(most.max())


def first_break(rows: list[Row], found_laws: dict[str, tuple[float, float, float]]) -> str:
    """The cost that comes to its limit at the smallest size, and that size."""
    last, found = rows[-1], {}
    for cost, (exponent, least, most) in found_laws.items():
        if last[cost] >= LIMITS[cost]:
            found[cost] = float(last["size"])
        elif least > 0.05 and most - least <= APART:  # a cost that grows for certain, by a law
            found[cost] = last["size"] * (LIMITS[cost] / last[cost]) ** (1 / exponent)
    found = {cost: size for cost, size in found.items() if size <= FAR * last["size"]}
    if not found:
        return f"none up to {FAR:.0f} times"
    cost = min(found, key=found.__getitem__)
    return f"{NAMES[cost]}, at {found[cost]:.1g}"


def laws(rows: list[Row]) -> list[Row]:
    """A row for each axis and method: the exponents of all costs, and what breaks first."""
    lines = []
    for axis, method in dict.fromkeys((row["axis"], row["method"]) for row in rows):
        here = [row for row in rows if (row["axis"], row["method"]) == (axis, method)]
        found = {cost: law(here, cost) for cost in COSTS}
        line: Row = {"size": axis, "method": method, "up to": here[-1]["size"]}
        for cost, (slope, least, most) in found.items():
            shown = [f"{round(each, 2) + 0.0:.2f}" for each in (slope, least, most)]  # no -0.00
            line[NAMES[cost]] = "{} ({} to {})".format(*shown)
        # more devices are not a size that a limit is looked for in
        line["breaks first"] = "" if axis == "devices" else first_break(here, found)
        lines.append(line)
    return lines


def picture(rows: list[Row], path: Path) -> None:
    """Seconds (solid) and bytes (dashed) over those of the smallest size, a panel an axis."""
    axes = list(dict.fromkeys(row["axis"] for row in rows))
    with pictures.panels(path, len(axes), columns=4, size=(3.6, 3.2)) as panels:
        for panel, axis in zip(panels, axes, strict=True):
            for method in methods(axis):
                here = [row for row in rows if (row["axis"], row["method"]) == (axis, method)]
                for cost, style in (("s", "-"), ("MB", "--")):
                    values = [row[cost] / here[0][cost] for row in here]
                    label = method if cost == "s" else None
                    panel.plot(
                        [row["size"] for row in here],
                        values,
                        style,
                        marker=".",
                        color=f"C{METHODS.index(method)}",
                        label=label,
                    )
            panel.set(xscale="log", yscale="log", xlabel=axis.replace("_", " "))
            pictures.plain_ticks(panel.xaxis, [row["size"] for row in here])
            panel.legend(fontsize=8)
        panels[0].set_ylabel("over the smallest: s —, MB - -")


def main(arguments: list[str] | None = None) -> None:
    """Measure, fit, print, write, draw."""
    parser = make_parser(__doc__, "growth", quick="three sizes of each axis", repeats=7)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES), metavar="NAME")
    options = parser.parse_args(arguments)
    jax.config.update("jax_num_cpu_devices", AXES["devices"][-1])  # before JAX is asked for any
    rows = [row for axis in options.axes for row in measured(axis, options)]
    lines = laws(rows)
    clock = "CPU s" if options.cpu_time else "s"
    show(f"Exponents ({clock}), and the least and largest slope between neighbours", lines)
    write(options.out / "growth.json", {"rows": rows, "laws": lines})
    picture(rows, options.out / "growth.png")


if __name__ == "__main__":
    main()
