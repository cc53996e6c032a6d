"""The inner loop and what makes its steps: any optax optimiser, or solvers that cannot diverge."""

from memmeta.inner.descent import accelerated, gradient_descent, power_iteration
from memmeta.inner.loop import InnerLoop, InnerState, widened
from memmeta.inner.newton import newton
from memmeta.inner.second_order import hessian_product
from memmeta.inner.solver import InnerSolver, from_optax

__all__ = [
    "InnerLoop",
    "InnerSolver",
    "InnerState",
    "accelerated",
    "from_optax",
    "gradient_descent",
    "hessian_product",
    "newton",
    "power_iteration",
    "widened",
]
