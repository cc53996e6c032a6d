"""The methods of the table: a meta-step each, and what it costs in passes over the data."""

from collections.abc import Callable
from typing import Any, NamedTuple

import optax

import memmeta as mm
from benchmarks.hyper_cleaning.problem import Model, drawn, problem
from memmeta.hypergradient import Estimator, implicit, perturbed, truncated, unrolled
from memmeta.linear_solve import cg, neumann
from memmeta.meta import WarmStart, reset_every

WINDOW, COLD, LAST, PRODUCTS, DELTA = 10, 50, 5, 10, 0.1
"""Inner steps, warm and cold; those that `truncated` sees; products of a linear solve; δ."""


class Settings(NamedTuple):
    """What is set for a model.

    Attributes:
        rate: of the inner steps, with momentum where a method says so.
        outer: of Adam on the logits θ.
        drawn: the same where a meta-step sees a minibatch.
    """

    rate: float
    outer: float
    drawn: float


SETTINGS: dict[Model, Settings] = {
    "linear": Settings(0.05, 0.3, 0.01),
    "network": Settings(0.05, 0.3, 0.01),
}


class Drawn(NamedTuple):
    """A minibatch: rows of the training and of the validation examples, and of how many."""

    rows: int
    of: int


class Method(NamedTuple):
    """One row of the table.

    Attributes:
        step: its meta-step.
        gradients: of one meta-step, in passes over the training examples.
        products: Hessian-vector and mixed products of one, in the same unit.
    """

    step: WarmStart
    gradients: float
    products: float


def full_batch(
    model: Model, estimator: Estimator, steps: int, gradients: int, products: int, cold: bool
) -> Method:
    """An estimator of the list on all rows; cold: every meta-step starts from φ₀."""
    settings = SETTINGS[model]
    inner = mm.InnerLoop(optax.sgd(settings.rate, 0.9), steps)
    step = mm.make_meta_step(problem(model), inner, estimator, optax.adam(settings.outer))
    return Method(WarmStart(step, 1, reset=reset_every(1) if cold else None), gradients, products)


def with_cg(model: Model, batch: Drawn) -> Method:
    estimator = implicit(cg(PRODUCTS), estimate_error=False)
    return full_batch(model, estimator, WINDOW, WINDOW + 1, PRODUCTS + 1, cold=False)


def with_neumann(model: Model, batch: Drawn) -> Method:
    estimator = implicit(neumann(PRODUCTS), estimate_error=False)
    measured = 8  # power steps for the largest curvature
    return full_batch(model, estimator, WINDOW, WINDOW + 1, PRODUCTS + measured + 1, cold=False)


def with_unrolled(model: Model, batch: Drawn) -> Method:
    return full_batch(model, unrolled(), COLD, COLD + 1, 2 * COLD, cold=True)


def with_windows(model: Model, batch: Drawn) -> Method:
    return full_batch(model, unrolled(), WINDOW, WINDOW + 1, 2 * WINDOW, cold=False)


def with_truncated(model: Model, batch: Drawn) -> Method:
    return full_batch(model, truncated(LAST), COLD, COLD + 1, 2 * LAST, cold=True)


def with_perturbed(model: Model, batch: Drawn) -> Method:
    # Two more loops, whose gradients are of g and of f; then ∂_c at both ends.
    return full_batch(model, perturbed(DELTA), WINDOW, 5 * WINDOW + 3, 0, cold=False)


def with_soba(model: Model, batch: Drawn) -> Method:
    step = mm.recipes.soba(problem(model), **common(model, batch))
    return of_share(batch, step, gradients=2, products=2)


def with_ma_soba(model: Model, batch: Drawn) -> Method:
    step = mm.recipes.ma_soba(problem(model), **common(model, batch), average=0.1)
    return of_share(batch, step, gradients=2, products=2)


def with_saba(model: Model, batch: Drawn) -> Method:
    step = mm.recipes.saba(problem(model), **common(model, batch), batches=batch.of // batch.rows)
    return of_share(batch, step, gradients=2, products=2)


def with_amigo(model: Model, batch: Drawn) -> Method:
    counts = {"steps": WINDOW, "linear_steps": PRODUCTS}
    step = mm.recipes.amigo(problem(model), **common(model, batch), **counts)
    return of_share(batch, step, gradients=WINDOW + 1, products=PRODUCTS + 1)


def with_f2sa(model: Model, batch: Drawn) -> Method:
    rates = common(model, batch)
    del rates["linear_rate"]
    step = mm.recipes.f2sa(problem(model), **rates, delta=DELTA, steps=WINDOW)
    return of_share(batch, step, gradients=4 * WINDOW + 4, products=0)


def with_bome(model: Model, batch: Drawn) -> Method:
    rates = common(model, batch)
    del rates["linear_rate"]
    step = mm.recipes.bome(problem(model), **rates, steps=WINDOW, outer_rate=rates["rate"])
    return of_share(batch, step, gradients=WINDOW + 3, products=0)


def common(model: Model, batch: Drawn) -> dict[str, Any]:
    """What all recipes are given."""
    settings = SETTINGS[model]
    rates = {"rate": settings.rate, "linear_rate": settings.rate}
    return {"optimizer": optax.adam(settings.drawn), "view": drawn(batch.rows), **rates}


def of_share(batch: Drawn, step: WarmStart, gradients: int, products: int) -> Method:
    share = batch.rows / batch.of
    return Method(step, share * gradients, share * products)


METHODS: dict[str, Callable[[Model, Drawn], Method]] = {
    "implicit, CG": with_cg,
    "implicit, Neumann": with_neumann,
    "unrolled": with_unrolled,
    "unrolled, windows": with_windows,
    "truncated": with_truncated,
    "perturbed": with_perturbed,
    "SOBA": with_soba,
    "MA-SOBA": with_ma_soba,
    "SABA": with_saba,
    "AmIGO": with_amigo,
    "F2SA": with_f2sa,
    "BOME": with_bome,
}
"""By name: (model, minibatch of the recipes) -> the method."""
