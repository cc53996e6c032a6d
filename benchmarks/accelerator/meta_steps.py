"""Seconds and memory of meta-steps: methods, precisions, tasks at once, and how they scale.

Every part is a list of cases. All programs of a part are compiled side by side, then timed in turn;
a case that fails (no memory left, for instance) becomes a row that says so.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.accelerator.products import PRECISIONS, best_product
from benchmarks.harness.programs import compiled, temporary_megabytes
from benchmarks.harness.tables import Row, cores
from benchmarks.harness.timing import in_turn
from benchmarks.problems.workloads import WORKLOADS, Workload, learner, meta_step
from memmeta.models import Network, mlp

ROUNDS, PATIENCE = 9, 2.0
"""Timed calls of each; seconds after which a case is timed no more."""
COMPILERS = 8
"""Programs that are compiled side by side, where there are as many cores."""


class Case(NamedTuple):
    """A method with T inner steps on a workload, so many tasks at once, in a precision."""

    workload: str
    method: str
    steps: int
    tasks: int | None = None  # None: as many as the workload has
    chunk: Any = "auto"
    precision: str = "TF32"

    def load(self, quick: bool) -> Workload:
        """The data; of a quick run small ones."""
        load = LOADS[self.workload]
        load = load._replace(tasks=self.tasks or load.tasks)
        return small(load) if quick else load

    def network(self, quick: bool) -> Network:
        """The network, whose body computes in the dtype of the precision."""
        load, dtype = self.load(quick), PRECISIONS[self.precision].dtype
        if self.workload == "dense":
            return mlp(load.ways, (40, 40), load.image_shape, dtype=dtype)
        return load.network(dtype=dtype)


DENSE = Workload(tasks=64, queries=1, image_shape=(2, 2, 1))
LOADS = WORKLOADS | {"dense": DENSE}

SPEED = [
    *(Case("a", method, 5) for method in ("memory_reduced", "anil", "fomaml", "maml", "imaml")),
    *(Case("b32", method, 20) for method in ("memory_reduced", "itd_bio")),
]
PRECISION = [Case("b84", "memory_reduced", 20, precision=precision) for precision in PRECISIONS]
CHUNKS = [
    *(Case("b32", "memory_reduced", 20, chunk=chunk) for chunk in ("auto", 1, 4, 32)),
    *(Case("a", "maml", 5, 16, chunk) for chunk in ("auto", 1, 4, 16)),
    *(Case("dense", "memory_reduced", 5, chunk=chunk) for chunk in ("auto", 1, 8, 64)),
]
TASKS = [Case("a", "memory_reduced", 5, tasks) for tasks in (1, 4, 16, 64, 256, 1024)]
STEPS = [Case("a", method, t) for method in ("memory_reduced", "imaml") for t in (1, 30, 1000)]
CASES = {
    "speed": SPEED,
    "precision": PRECISION,
    "chunks": CHUNKS,
    "scaling": TASKS + STEPS,
}
QUICK = {
    "speed": SPEED[:1] + SPEED[3:4],
    "precision": PRECISION,
    "chunks": [case._replace(tasks=4) for case in CHUNKS[:3]],
    "scaling": TASKS[:2] + [case._replace(steps=min(case.steps, 30)) for case in STEPS[:2]],
}


def small(load: Workload) -> Workload:
    """A few small images of each kind: to see that everything runs, not to measure anything."""
    channels = load.image_shape[2]
    sizes: dict[str, Any] = {"image_shape": (16, 16, channels), "width": 8, "depth": 2}
    tasks = min(load.tasks, 4)
    return load._replace(tasks=tasks, ways=3, shots=1, queries=2, **sizes)


class Program:
    """A case's meta-step, compiled, with its state.

    Attributes:
        seconds: that compiling took.
        megabytes: of temporary buffers, as the compiler states them.
        chunk: tasks worked on at once.
        first: loss and gradient norm of the first call.
    """

    def __init__(self, case: Case, quick: bool) -> None:
        load, began = case.load(quick), time.perf_counter()
        with jax.default_matmul_precision(PRECISIONS[case.precision].products):
            made = learner(case.network(quick), case.method, case.steps)
            step = meta_step(made, case.chunk)
            self.chunk = step.chunk(load.shapes())
            self.state, self.tasks = inputs(step, made, load)
            self.program = compiled(step.compiled, self.state, self.tasks, quick=quick)
        self.seconds = time.perf_counter() - began
        self.megabytes = temporary_megabytes(self.program)
        self.first: tuple[float, float] | None = None

    def __call__(self) -> None:
        self.state, metrics = self.program(self.state, self.tasks)
        jax.block_until_ready(self.state)
        self.first = self.first or (float(metrics.loss), float(metrics.gradient_norm))


def inputs(step: Any, made: Any, load: Workload) -> Any:
    """State and tasks, made on the CPU, so that making them takes no memory of the device."""
    with jax.default_device(jax.devices("cpu")[0]):
        found = step.init(made.init(jax.random.key(0))), jax.jit(load.batch)()
    return jax.block_until_ready(jax.device_put(found, jax.devices()[0]))


def said(error: Exception) -> str:
    """The first line of what went wrong."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:120]


def attempted(function: Callable[[], Any]) -> Any:
    """The function's result, or the exception: the other cases go on."""
    try:
        return function()
    except Exception as error:  # whatever a backend raises
        return error


def side_by_side(functions: Sequence[Callable[[], Any]]) -> Iterator[Any]:
    """Results or exceptions of functions that mostly compile, in order, each as soon as it can."""
    with ThreadPoolExecutor(min(COMPILERS, cores() or 1)) as pool:
        yield from pool.map(attempted, functions)


def rows(part: str, quick: bool) -> Iterator[Row]:
    """The figures of each case of a part."""
    cases = (QUICK if quick else CASES)[part]
    made = side_by_side([partial(Program, case, quick) for case in cases])
    found = dict(zip(cases, made, strict=True))
    for case, program in found.items():
        if isinstance(program, Program):  # the first call apart, and with it no memory
            failed = attempted(program)
            found[case] = failed or program
    ready: dict[Any, Any] = {c: p for c, p in found.items() if isinstance(p, Program)}
    seconds = in_turn(ready, 2 if quick else ROUNDS, patience=PATIENCE)
    products = {name: best_product(name, quick) for name in {case.precision for case in cases}}
    for case, program in found.items():
        load = case.load(quick)
        row: Row = {"workload": case.workload, "method": case.method, "T": case.steps}
        row |= {"tasks": load.tasks, "chunk": case.chunk, "precision": case.precision}
        if isinstance(program, Exception):
            yield row | {"said": said(program)}
            continue
        median = float(np.median(seconds[case]))
        row |= {"s": median, "from": seconds[case].min(), "to": seconds[case].max()}
        row |= {"at once": program.chunk, "MB": program.megabytes, "compile s": program.seconds}
        row |= dict(zip(("loss", "gradient"), program.first or (), strict=False))
        if case.method in ("memory_reduced", "anil"):  # one supervised gradient's arithmetic
            rate = load.convolution_flops / median
            row |= {"TFLOP/s": rate / 1e12, "of product": rate / products[case.precision]}
        yield row
