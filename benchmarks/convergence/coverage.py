"""Certificates: how often, and by how much, they are above the true errors."""

from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from jaxtyping import Array

from benchmarks.convergence.experiment import Experiment, evaluated
from benchmarks.convergence.fits import Claim, over_seeds
from benchmarks.problems import stopped
from benchmarks.problems.stopped import Drawn, Errors

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


def answers(draw: Callable[[Array], Drawn], key: Array, count: int) -> Errors:
    """The errors and bounds of `count` problems, all in one row."""

    def one(key: Array) -> Errors:
        keys = jax.random.split(key)
        return stopped.errors_of(draw(keys[0]), keys[1])

    def all_of_them(keys: Array) -> Errors:
        return jax.lax.map(one, keys, batch_size=TOGETHER)

    found = evaluated(all_of_them, jax.random.split(key, count), quick=True)
    flat: Errors = jax.tree.map(lambda x: np.asarray(x).reshape(-1), found)
    return flat
