"""The list of all estimators: what each aims at, and how its memory grows."""

from collections.abc import Callable
from typing import Literal, NamedTuple

from memmeta._shared.readable import Catalogue
from memmeta.hypergradient._evolution_strategies import evolution_strategies
from memmeta.hypergradient._finite_difference import finite_difference
from memmeta.hypergradient._first_order import first_order, reptile
from memmeta.hypergradient._fixed_point import fixed_point
from memmeta.hypergradient._forward_mode import forward_mode
from memmeta.hypergradient._hessian_free import hessian_free
from memmeta.hypergradient._implicit import implicit
from memmeta.hypergradient._mixed_mode import mixed_mode
from memmeta.hypergradient._perturbed import perturbed
from memmeta.hypergradient._sample_space import sample_space
from memmeta.hypergradient._seam import Estimator
from memmeta.hypergradient._truncated import truncated
from memmeta.hypergradient._unrolled import unrolled
from memmeta.linear_solve import direct, gmres, minres, neumann, woodbury


class Entry(NamedTuple):
    """One estimator of the list.

    Attributes:
        make: makes it.
        aim: what the answer is exact for: the inner "solution", the "steps" of the loop as it is
            run, or neither ("own").
        memory: growth with the number K of inner steps.
        random: whether it draws directions, so that it is unbiased but not exact.
        heads: whether it needs `Structure.head`.
        error: size of its bias in float64, relative to the gradient: 0 for rounding alone.
    """

    make: Callable[[], Estimator]
    aim: Literal["solution", "steps", "own"]
    memory: Literal["flat", "linear", "root", "logarithmic"]
    random: bool = False
    heads: bool = False
    error: float = 0.0


ESTIMATORS: Catalogue[Entry] = Catalogue(
    {
        "implicit": Entry(implicit, "solution", "flat"),
        "implicit-minres": Entry(lambda: implicit(minres(40)), "solution", "flat"),
        "implicit-neumann": Entry(lambda: implicit(neumann(1000)), "solution", "flat"),
        "implicit-direct": Entry(lambda: implicit(direct()), "solution", "flat"),
        "implicit-woodbury": Entry(lambda: implicit(woodbury()), "solution", "flat", heads=True),
        "fixed_point": Entry(lambda: fixed_point(gmres(40)), "solution", "flat"),
        "implicit-gmres": Entry(lambda: implicit(gmres(40)), "solution", "flat"),
        "perturbed": Entry(perturbed, "solution", "flat", error=1e-9),
        "sample_space-solution": Entry(
            lambda: sample_space("solution"), "solution", "flat", heads=True
        ),
        "sample_space-steps": Entry(lambda: sample_space("steps"), "steps", "flat", heads=True),
        "unrolled": Entry(unrolled, "steps", "linear"),
        "unrolled-step": Entry(lambda: unrolled("step"), "steps", "linear"),
        "unrolled-sqrt": Entry(lambda: unrolled("sqrt"), "steps", "root"),
        "unrolled-recursive": Entry(lambda: unrolled("recursive"), "steps", "logarithmic"),
        "mixed_mode": Entry(mixed_mode, "steps", "linear"),
        "hessian_free": Entry(hessian_free, "steps", "linear", error=1e-9),
        "forward_mode": Entry(forward_mode, "steps", "flat"),
        "forward_mode-random": Entry(lambda: forward_mode(4), "steps", "flat", random=True),
        "finite_difference": Entry(
            lambda: finite_difference(4), "steps", "flat", random=True, error=1e-9
        ),
        "evolution_strategies": Entry(
            evolution_strategies, "steps", "flat", random=True, error=1e-3
        ),
        "truncated": Entry(lambda: truncated(3), "own", "flat"),
        "first_order": Entry(first_order, "own", "flat"),
        "reptile": Entry(reptile, "own", "flat"),
    }
)
"""Every estimator, by name: the shared conformance and memory tests run over this list."""
