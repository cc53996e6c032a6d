"""The inner loop and its solvers: any optax optimiser, or a rate from the curvature."""

from collections.abc import Callable

from memmeta._shared.readable import readable
from memmeta.inner._descent import accelerated, gradient_descent
from memmeta.inner._loop import InnerLoop, InnerState
from memmeta.inner._newton import newton
from memmeta.inner._solver import InnerSolver
from memmeta.inner._views import minibatch, step_by_step

SOLVERS: dict[str, Callable[[], InnerSolver]] = {
    "accelerated": accelerated,
    "gradient_descent": gradient_descent,
    "newton": newton,
}
"""Every solver, by name; the shared conformance test runs over this list."""

__all__ = [
    "SOLVERS",
    "InnerLoop",
    "InnerSolver",
    "InnerState",
    "accelerated",
    "gradient_descent",
    "minibatch",
    "newton",
    "step_by_step",
]

readable(__name__)
