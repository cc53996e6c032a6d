"""The methods of the table: a meta-step each, and what it costs in passes over the data."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import optax

import memmeta as mm
from benchmarks.hyper_cleaning.problem import Model, drawn, problem
from memmeta.hypergradient import Estimator, implicit, perturbed, truncated, unrolled
from memmeta.linear_solve import cg, neumann
from memmeta.meta import WarmStart, reset_every

LAST, PRODUCTS, DELTA, ETA = 5, 10, 0.1, 1.0
"""Steps that `truncated` sees; products of a linear solve; δ; η of BOME."""


class Settings(NamedTuple):
    """What is chosen for a method.

    Attributes:
        rate: of the inner steps, of v, and of φ in BOME; on all rows with momentum, or of Adam
            where every meta-step starts from φ₀.
        outer: of Adam on the logits θ.
        steps: K, inner steps of a meta-step, where it is not one by definition.
    """

    rate: float
    outer: float
    steps: int = 10


Choice: TypeAlias = tuple[Settings, ...]
ON_DRAWS: Choice = (Settings(0.1, 0.03), Settings(0.05, 0.03), Settings(0.1, 0.01))
IMPLICIT: Choice = (Settings(0.2, 0.3), Settings(0.2, 1.0), Settings(0.05, 1.0))
WARM: Choice = (
    Settings(0.2, 1.0),
    Settings(0.2, 0.3),
    Settings(0.05, 1.0),
    Settings(0.2, 1.0, 5),
    Settings(0.2, 1.0, 3),
)
COLD: Choice = (Settings(0.01, 1.0, 20), Settings(0.01, 0.3, 20), Settings(0.01, 1.0, 10))
BOTH_MOVE: Choice = (Settings(0.1, 0.1), Settings(0.1, 0.1, 3), Settings(0.05, 0.1))
CHOICES: dict[str, Choice] = {
    "implicit, CG": IMPLICIT,
    "implicit, Neumann": IMPLICIT,
    "unrolled": COLD,
    "unrolled, windows": WARM,
    "truncated": COLD,
    "perturbed": WARM,
    "SOBA": ON_DRAWS,
    "MA-SOBA": ON_DRAWS,
    "SABA": ON_DRAWS,
    "AmIGO": ON_DRAWS,
    "F2SA": ON_DRAWS,
    "BOME": BOTH_MOVE,
}
"""What `benchmarks.hyper_cleaning.tune` tries; the first is what the table takes."""


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
    model: Model,
    settings: Settings,
    estimator: Estimator,
    products: int,
    cold: bool = False,
    gradients: int | None = None,
) -> Method:
    """An estimator of the list on all rows; cold: every meta-step starts from φ₀.

    gradients: of a meta-step; None: of the inner steps, and of f.
    """
    # In twenty steps from φ₀ Adam comes as far as momentum in forty.
    adam = optax.adam(settings.rate, eps_root=1e-8)
    solver = adam if cold else optax.sgd(settings.rate, 0.9)
    inner = mm.InnerLoop(solver, settings.steps)
    step = mm.make_meta_step(problem(model), inner, estimator, optax.adam(settings.outer))
    warm = WarmStart(step, 1, reset=reset_every(1) if cold else None)
    return Method(warm, gradients or settings.steps + 1, products)


def with_cg(model: Model, batch: Drawn, s: Settings) -> Method:
    return full_batch(model, s, implicit(cg(PRODUCTS), estimate_error=False), PRODUCTS + 1)


def with_neumann(model: Model, batch: Drawn, s: Settings) -> Method:
    measured = 8  # power steps for the largest curvature
    estimator = implicit(neumann(PRODUCTS), estimate_error=False)
    return full_batch(model, s, estimator, PRODUCTS + measured + 1)


def with_unrolled(model: Model, batch: Drawn, s: Settings) -> Method:
    return full_batch(model, s, unrolled(), 2 * s.steps, cold=True)


def with_windows(model: Model, batch: Drawn, s: Settings) -> Method:
    return full_batch(model, s, unrolled(), 2 * s.steps)


def with_truncated(model: Model, batch: Drawn, s: Settings) -> Method:
    return full_batch(model, s, truncated(LAST), 2 * LAST, cold=True)


def with_perturbed(model: Model, batch: Drawn, s: Settings) -> Method:
    # Two more loops, whose gradients are of g and of f; then ∂_c at both ends.
    return full_batch(model, s, perturbed(DELTA), 0, gradients=5 * s.steps + 3)


def with_soba(model: Model, batch: Drawn, s: Settings) -> Method:
    step = mm.recipes.soba(problem(model), **common(batch, s), linear_rate=s.rate)
    return of_share(batch, step, gradients=2, products=2)


def with_ma_soba(model: Model, batch: Drawn, s: Settings) -> Method:
    rates = {"linear_rate": s.rate, "average": 0.1}
    step = mm.recipes.ma_soba(problem(model), **common(batch, s), **rates)
    return of_share(batch, step, gradients=2, products=2)


def with_saba(model: Model, batch: Drawn, s: Settings) -> Method:
    options = {"linear_rate": s.rate, "batches": batch.of // batch.rows}
    step = mm.recipes.saba(problem(model), **common(batch, s), **options)
    return of_share(batch, step, gradients=2, products=2)


def with_amigo(model: Model, batch: Drawn, s: Settings) -> Method:
    options = {"linear_rate": s.rate, "steps": s.steps, "linear_steps": PRODUCTS}
    step = mm.recipes.amigo(problem(model), **common(batch, s), **options)
    return of_share(batch, step, gradients=s.steps + 1, products=PRODUCTS + 1)


def with_f2sa(model: Model, batch: Drawn, s: Settings) -> Method:
    step = mm.recipes.f2sa(problem(model), **common(batch, s), delta=DELTA, steps=s.steps)
    return of_share(batch, step, gradients=4 * s.steps + 4, products=0)


def with_bome(model: Model, batch: Drawn, s: Settings) -> Method:
    options = {"steps": s.steps, "outer_rate": s.rate, "eta": ETA}
    step = mm.recipes.bome(problem(model), **common(batch, s), **options)
    return of_share(batch, step, gradients=s.steps + 3, products=0)


def common(batch: Drawn, settings: Settings) -> dict[str, Any]:
    """What all recipes are given."""
    optimizer = optax.adam(settings.outer)
    return {"optimizer": optimizer, "view": drawn(batch.rows), "rate": settings.rate}


def of_share(batch: Drawn, step: WarmStart, gradients: int, products: int) -> Method:
    share = batch.rows / batch.of
    return Method(step, share * gradients, share * products)


METHODS: dict[str, Callable[[Model, Drawn, Settings], Method]] = {
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
"""By name: (model, minibatch of the recipes, settings) -> the method."""
