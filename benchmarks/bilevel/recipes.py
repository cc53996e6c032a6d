"""The library's recipes on the problems, with the same rates and draws as the code by hand."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jaxtyping import Array

import memmeta as mm
from benchmarks.bilevel.by_hand import Rates, View
from benchmarks.bilevel.problems import Example, blocks, numbered
from memmeta.linear_solve import cg
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
    }
    return made[name](example.problem, optax.sgd(rates.outer))


def exact(problem: mm.Problem, optimizer: optax.GradientTransformation) -> WarmStart:
    """Warm starts on all rows: ten inner steps, ten conjugate gradients."""
    estimator = mm.hypergradient.implicit(cg(STEPS), estimate_error=False)
    inner = mm.InnerLoop(mm.inner.accelerated(), STEPS)
    return WarmStart(mm.make_meta_step(problem, inner, estimator, optimizer), 1)


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


def first_state(step: WarmStart, example: Example, key: Array) -> Any:
    """Of the meta-step, for one task: all of the data."""
    return step.init(example.theta, one_task(example.data), key)


def one_task(data: Any) -> Any:
    """The data with a leading axis of tasks."""
    return jax.tree.map(lambda leaf: leaf[None], data)
