"""Every estimator of the list in float32 on the device, against an answer from elsewhere.

Those that aim at the inner solution, or at steps that have come to it, against the exact
hypergradient, which the CPU computes in float64; those that draw directions or aim at neither,
against what the CPU makes of the same call.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import numpy as np

import memmeta as mm
from benchmarks.accelerator.meta_steps import said, side_by_side
from benchmarks.harness.programs import compiled
from benchmarks.harness.tables import Row
from benchmarks.problems.head_and_network import Example, exact_hypergradient, heads, networks
from memmeta.hypergradient import ESTIMATORS, Chunk

STEPS = 1000
BOUND, BOUND_OF_DIFFERENCES = 2e-4, 5e-3
"""Relative errors that float32 may leave: on a CPU at most 3e-5, and 9e-4 of differences."""


def numbers(tree: Any) -> np.ndarray:
    """All numbers of a tree as one vector of float64."""
    return np.concatenate([np.ravel(leaf).astype(float) for leaf in jax.tree.leaves(tree)])


def gradient_by(name: str, example: Example, device: jax.Device, quick: bool) -> Any:
    """A function that calls the estimator on a device, compiled."""
    estimator, inner = ESTIMATORS[name].make(), mm.InnerLoop(mm.inner.gradient_descent(), STEPS)

    def call(theta: Any, tasks: Any, key: Any) -> Any:
        return estimator(example.problem, inner, theta, Chunk.of(tasks, key=key)).gradient

    arguments = jax.device_put((example.theta, example.tasks, jax.random.key(0)), device)
    with jax.default_device(device):
        program = compiled(call, *arguments, quick=quick)
    return lambda: numbers(program(*arguments))


def rows(quick: bool) -> Iterator[Row]:
    """Error of each estimator relative to the length of what it is compared with."""
    device, cpu = jax.devices()[0], jax.devices("cpu")[0]
    with jax.default_device(cpu), jax.default_matmul_precision("highest"):
        problems = {"head": heads(), "network": networks()}
        exact = {name: numbers(exact_hypergradient(each)[0]) for name, each in problems.items()}

    def compared(name: str) -> Row:
        entry = ESTIMATORS[name]
        problem = "head" if entry.heads else "network"
        by_itself = entry.aim == "own" or entry.random
        with jax.default_matmul_precision("highest"):
            found = gradient_by(name, problems[problem], device, quick)()
            reference = exact[problem]
            if by_itself:
                reference = gradient_by(name, problems[problem], cpu, quick)()
        error = float(np.linalg.norm(found - reference) / np.linalg.norm(reference))
        against = "a CPU's answer" if by_itself else "exact"
        bound = BOUND_OF_DIFFERENCES if entry.error else BOUND
        row: Row = {"estimator": name, "problem": problem, "against": against, "error": error}
        return row | {"bound": bound, "": "holds" if error <= bound else "MISSED"}

    made = side_by_side([partial(compared, name) for name in ESTIMATORS])
    for name, found in zip(ESTIMATORS, made, strict=True):
        failed = isinstance(found, Exception)
        yield {"estimator": name, "said": said(found), "": "FAILED"} if failed else found
