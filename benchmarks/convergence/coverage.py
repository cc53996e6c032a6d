"""Certificates: how often, and by how much, they are above the true errors."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from benchmarks.convergence.experiment import Experiment, evaluated
from benchmarks.convergence.fits import Claim, over_seeds
from benchmarks.problems import stopped
from benchmarks.problems.stopped import Drawn

KINDS: dict[str, Callable[[Array], Drawn]] = {
    "softmax heads": partial(stopped.head, squared=False),
    "squared heads": partial(stopped.head, squared=True),
    "quadratics": stopped.quadratic,
}
ROUNDING = 1e-9
"""Share of a bound, and length, that the reference itself may be wrong by."""
SEEN = 1e-6
"""Smaller errors say nothing of a ratio: the reference is no better."""
TOGETHER = 500


def certificates(keys: Array, quick: bool) -> Experiment:
    """Bounds beside errors: two answers each of thousands of problems stopped at random."""
    claims, lines, curves = [], [], {}
    for name, draw in KINDS.items():
        found = answers(draw, keys[0], 100 if quick else 5000)
        size, seen = found.error.size, found.error > SEEN
        covered = found.error <= found.bound + ROUNDING * (1 + found.bound)
        share = over_seeds(np.array([covered.mean()]))
        claims.append(Claim(f"share of errors under the bound, {name}", "= 1", share, all(covered)))
        ratio, plain = (x[seen] / found.error[seen] for x in (found.bound, found.plain))
        median = over_seeds(np.array([np.median(ratio)]))
        claims.append(Claim(f"median of bound / error, {name}", "≤ 10", median, median.value <= 10))
        for how, x in ((name, ratio), (f"{name}, no solver", plain)):
            shares = np.linspace(0.01, 0.99, 99)
            curves[how] = (100 * shares, np.quantile(x, shares)[None])
            at = ", ".join(f"{np.quantile(x, q):.3g}" for q in (0.5, 0.9, 0.99))
            lines.append(f"{how:24} {size} answers, bound / error at 50, 90, 99 %: {at}")
    axes = ("% of the answers", "bound / true error")
    return Experiment("Certificates", axes, curves, claims, tuple(lines))


def solves(keys: Array, quick: bool) -> Experiment:
    """Bounds on what linear solves add beside what they add, at a chance of 10⁻⁶ each."""
    draw = partial(stopped.quadratic, size=60)
    claims, lines, curves = [], [], {}
    for steps in (15, 30, 45):
        name = f"{steps} steps"
        errors = partial(stopped.solve_errors_of, steps=steps)
        # One after the other: XLA (jax 0.10.2, CPU) was seen to stop for good in a batch of them.
        found = answers(draw, keys[0], 25 if quick else 250, errors, 1)
        known = np.isfinite(found.bound)
        covered = found.error <= found.bound + ROUNDING * (1 + found.bound)
        share = over_seeds(np.array([covered.mean()]))
        claims.append(Claim(f"share of errors under the bound, {name}", "= 1", share, all(covered)))
        seen = known & (found.error > SEEN)
        ratio, shares = found.bound[seen] / found.error[seen], np.linspace(0.01, 0.99, 99)
        curves[name] = (100 * shares, np.quantile(ratio, shares)[None])
        at = ", ".join(f"{np.quantile(ratio, q):.3g}" for q in (0.5, 0.9, 0.99))
        lines.append(
            f"{name}: {found.error.size} answers, {known.mean():.0%} with a finite bound, "
            f"bound / error of these at 50, 90, 99 %: {at}"
        )
    axes = ("% of the answers with a finite bound", "bound / what the solve adds")
    return Experiment("The linear solve alone", axes, curves, claims, tuple(lines))


def answers(
    draw: Callable[[Array], Drawn],
    key: Array,
    count: int,
    errors_of: Callable[[Drawn, Array], Any] = stopped.errors_of,
    together: int = TOGETHER,
) -> Any:
    """The errors and bounds of `count` problems, all in one row."""

    def one(key: Array) -> Any:
        keys = jax.random.split(key)
        return errors_of(draw(keys[0]), keys[1])

    def all_of_them(keys: Array) -> Any:
        return jax.lax.map(one, keys, batch_size=together)

    found = evaluated(all_of_them, jax.random.split(key, count), quick=True)
    return jax.tree.map(lambda x: np.asarray(x).reshape(-1), found)
