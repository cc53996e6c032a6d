r"""A model of a meta-step on many chips, from counts of the traced program and a chip's figures.

    seconds = held · FLOPs / (peak · share)  or  products · launch, what is longer    (compute)
            + 2 · bytes · (N − 1) / N / bandwidth                                     (bandwidth)
            + d · N^(1/d) · latency                                                   (latency)

N chips in a torus of d dimensions hold ⌈tasks / N⌉ tasks each and add up their sums in one
all-reduce, once a meta-step, after the last task. Nothing of it is measured on a pod.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from benchmarks.harness.programs import equations, product_flops
from benchmarks.harness.tables import Row
from memmeta import MetaStep
from memmeta.problem import Batch, MetaParams


class Chip(NamedTuple):
    """What one device of a pod does and how it is connected."""

    peak: float = 4.59e14  # FLOP/s
    share: float = 0.2  # of the peak that is reached
    bandwidth: float = 6e11  # bytes a second out of a chip, over all its links
    latency: float = 1e-6  # seconds from a chip to its neighbour
    torus: int = 3  # dimensions of the network
    launch: float = 2e-6  # seconds that a matrix product takes at least


SOURCES = (
    "peak and bandwidth: TPU v5p, 459 TFLOP/s (bfloat16) and 1,200 GB/s both ways a chip, 3D torus "
    "(cloud.google.com/tpu/docs/v5p); share, latency and launch are assumptions"
)


class Work(NamedTuple):
    """What a meta-step asks of its devices."""

    flops: float  # of matrix products and convolutions, for one task
    products: int  # that come one after another, however many tasks are worked on at once
    parameters: int  # bytes of θ
    summed: int  # bytes of the all-reduce on two devices

    def reduced(self, count: int) -> int:
        """Bytes of the all-reduce over so many devices: each brings a curvature of its own."""
        return self.summed + 4 * (count - 2) if count > 1 else 0


def work(step: MetaStep, theta: MetaParams, tasks: Batch, steps: int) -> Work:
    """Count what a meta-step does by tracing it; nothing is compiled or run.

    Args:
        step: on a mesh of two devices, all tasks of a device at once.
        theta: meta-parameters, or their shapes.
        tasks: two tasks, or their shapes.
        steps: T, the rounds of a loop whose length the trace does not show.
    """
    state = jax.eval_shape(step.init, theta)
    jaxpr = jax.make_jaxpr(step.update)(state, tasks).jaxpr
    flops, products = arithmetic(jaxpr, steps)
    return Work(flops, products, _bytes(jax.tree.leaves(theta)), summed(jaxpr))


def arithmetic(jaxpr: Any, rounds: int) -> tuple[float, int]:
    """FLOPs of the products a traced program makes, and their number, see `equations`."""
    made = [(product_flops(equation), times) for equation, times in equations(jaxpr, rounds)]
    return sum(f * times for f, times in made), sum(times for f, times in made if f)


def summed(jaxpr: Any) -> int:
    """Bytes that a traced program adds up over devices, in no loop."""
    sums = [each for each, _ in equations(jaxpr, 1) if each.primitive.name.startswith("psum")]
    return sum(_bytes([variable.aval for variable in each.invars]) for each in sums)


def _bytes(arrays: list[Any]) -> int:
    return sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)


def predicted(work: Work, chip: Chip, count: int, tasks: int) -> Row:
    """The parts of a meta-step's time on so many devices, in ms, and what stands in the way."""
    held = math.ceil(tasks / count)
    arithmetic = held * work.flops / (chip.peak * chip.share)
    compute = max(arithmetic, work.products * chip.launch)
    volume = 2 * work.reduced(count) * (count - 1) / count / chip.bandwidth
    hops = chip.torus * count ** (1 / chip.torus) if count > 1 else 0
    latency = hops * chip.latency
    parts = {"compute": compute, "bandwidth": volume, "latency": latency}
    parts["ms"] = sum(parts.values())
    row: Row = {"devices": count, "tasks": tasks, "a device": held}
    row |= {"MB reduced": work.reduced(count) / 1e6}
    row |= {name: 1e3 * seconds for name, seconds in parts.items()}
    if tasks < count:
        limit = f"{count - tasks} devices have no task"
    elif volume + latency > compute:
        limit = "the all-reduce"
    elif compute > arithmetic:
        limit = "products too small for a chip"
    else:
        limit = ""
    return row | {"limit": limit}


def curve(work: Work, chip: Chip, counts: tuple[int, ...], tasks: int, weak: bool) -> list[Row]:
    """`predicted` for several numbers of devices, with the efficiency against one.

    With `weak` scaling so many `tasks` are on each device, else in a meta-step.
    """
    rows = []
    for count in counts:
        number = tasks * count if weak else tasks
        row = predicted(work, chip, count, number)
        alone = predicted(work, chip, 1, number)["ms"]
        ideal = predicted(work, chip, 1, tasks)["ms"] if weak else alone / count
        efficiency, limit = ideal / row["ms"], row.pop("limit")
        rows.append(row | {"efficiency": round(efficiency, 3), "limit": limit})
    return rows


def first_break(work: Work, chip: Chip, held: int, batch: int, most: int) -> Row:
    """From how many devices on, of at most `most`, each thing stands in the way, or "none".

    Strong scaling is of `batch` tasks in all, weak scaling of `held` tasks on each device.
    """
    counts = (*(2**power for power in range(40) if 2**power < most), most)

    def first(weak: bool, reached: Callable[[Row], bool]) -> int | str:
        rows = curve(work, chip, counts, held if weak else batch, weak)
        return next((row["devices"] for row in rows if reached(row)), "none")

    def limited(text: str) -> Callable[[Row], bool]:
        return lambda row: row["limit"].endswith(text)

    return {
        "strong: products too small": first(False, limited("too small for a chip")),
        "efficiency 1/2 or less": first(False, lambda row: row["efficiency"] <= 0.5),
        "no task left": first(False, limited("no task")),
        "weak: all-reduce over compute": first(True, limited("the all-reduce")),
        "weak: efficiency below 0.9": first(True, lambda row: row["efficiency"] < 0.9),
    }
