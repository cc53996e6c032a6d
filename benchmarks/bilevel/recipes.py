"""The library's recipes on the problems, with the same rates and draws as the code by hand."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import optax
from jaxtyping import Array

import memmeta as mm
from benchmarks.bilevel.by_hand import Rates, View
from benchmarks.bilevel.problems import Example, blocks, numbered
from memmeta.hypergradient import Estimator, unrolled
from memmeta.linear_solve import LinearSolution, LinearSolver, cg
from memmeta.meta import WarmStart

STEPS = 10
"""Of φ and of v in the methods that make several a meta-step."""
RATES = {
    "quadratic": Rates(inner=0.1, linear=0.1, outer=0.02),
    "logistic": Rates(inner=0.5, linear=0.5, outer=0.5),
}


def step_of(name: str, example: Example, view: View, rates: Rates) -> WarmStart:
    """A recipe, or the exact method for comparison, as a meta-step."""
    given: dict[str, Any] = {"rate": rates.inner, "view": view}
    both = given | {"linear_rate": rates.linear}
    made: dict[str, Callable[..., WarmStart]] = {
        "soba": lambda *to: mm.recipes.soba(*to, **both),
        "ma_soba": lambda *to: mm.recipes.ma_soba(*to, **both, average=rates.average),
        "saba": lambda *to: mm.recipes.saba(*to, **both, batches=rates.blocks),
        "f2sa": lambda *to: mm.recipes.f2sa(*to, **given, delta=rates.delta),
        "amigo": lambda *to: mm.recipes.amigo(*to, **both, steps=STEPS, linear_steps=STEPS),
        "bome": lambda *to: mm.recipes.bome(*to, **given, steps=STEPS, outer_rate=rates.inner),
        "implicit, CG, all rows": exact,
        "f2sa, p = 1": lambda *to: mm.recipes.f2sa(*to, **given, delta=rates.delta, p=1),
        "implicit, CG, a block": partial(on_a_block, rates.inner, implicit(from_zero)),
        "unrolled, a block": partial(on_a_block, rates.inner, unrolled()),
    }
    return made[name](example.problem, optax.sgd(rates.outer))


def exact(problem: mm.Problem, optimizer: optax.GradientTransformation) -> WarmStart:
    """Warm starts on all rows: ten inner steps, ten conjugate gradients."""
    inner = mm.InnerLoop(mm.inner.accelerated(), STEPS)
    return WarmStart(mm.make_meta_step(problem, inner, implicit(cg(STEPS)), optimizer), 1)


def on_a_block(
    rate: float, estimator: Estimator, problem: mm.Problem, optimizer: optax.GradientTransformation
) -> WarmStart:
    """Warm starts for data that are one block, another one in each meta-step."""
    inner = mm.InnerLoop(optax.sgd(rate), STEPS)
    return WarmStart(mm.make_meta_step(problem, inner, estimator, optimizer, check_tasks=False), 1)


def implicit(solver: LinearSolver) -> Estimator:
    """Without figures of its error."""
    return mm.hypergradient.implicit(solver, estimate_error=False)


def from_zero(product: Any, b: Any, *, start: Any = None, **where: Any) -> LinearSolution:
    """Conjugate gradients that do not go on from the last meta-step's v."""
    return cg(STEPS)(product, b, **where)


def view_of(name: str, rows: int) -> View:
    """SABA is given the number of a block, the others draw one."""
    return numbered(rows) if name == "saba" else blocks(rows)


COSTS = {
    "soba": 4,
    "ma_soba": 4,
    "saba": 4,
    "f2sa": 8,
    "amigo": 2 * STEPS + 2,
    "bome": STEPS + 3,
    "implicit, CG, all rows": 2 * STEPS + 2,
}
"""Gradients and products of one meta-step, on a block each (of the last: on all rows)."""
BESIDE_PEERS = {
    "f2sa, p = 1": 6,
    "implicit, CG, a block": 2 * STEPS + 2,
    "unrolled, a block": 2 * STEPS + 1,
}
"""The same of those that are there for other libraries' sake."""


def first_state(step: WarmStart, example: Example, key: Array) -> Any:
    """Of the meta-step, for one task: all of the data."""
    return step.init(example.theta, one_task(example.data), key)


def one_task(data: Any) -> Any:
    """The data with a leading axis of tasks."""
    return jax.tree.map(lambda leaf: leaf[None], data)
