"""Hypergradient estimators: one file each, all called in the same way."""

from memmeta._shared.readable import readable
from memmeta.hypergradient._catalogue import ESTIMATORS
from memmeta.hypergradient._estimator import TaskGradient, per_task, report_of_loop
from memmeta.hypergradient._evolution_strategies import evolution_strategies
from memmeta.hypergradient._finite_difference import finite_difference
from memmeta.hypergradient._first_order import first_order, reptile
from memmeta.hypergradient._fixed_point import fixed_point
from memmeta.hypergradient._forward_mode import forward_mode
from memmeta.hypergradient._hessian_free import hessian_free
from memmeta.hypergradient._implicit import implicit
from memmeta.hypergradient._implicit_solution import implicit_solution
from memmeta.hypergradient._mixed_mode import mixed_mode
from memmeta.hypergradient._perturbed import perturbed
from memmeta.hypergradient._sample_space import sample_space
from memmeta.hypergradient._seam import Chunk, Estimator, Hypergradient, Report, scheduled
from memmeta.hypergradient._truncated import truncated
from memmeta.hypergradient._unrolled import unrolled

__all__ = [
    "ESTIMATORS",
    "Chunk",
    "Estimator",
    "Hypergradient",
    "Report",
    "TaskGradient",
    "evolution_strategies",
    "finite_difference",
    "first_order",
    "fixed_point",
    "forward_mode",
    "hessian_free",
    "implicit",
    "implicit_solution",
    "mixed_mode",
    "per_task",
    "perturbed",
    "report_of_loop",
    "reptile",
    "sample_space",
    "scheduled",
    "truncated",
    "unrolled",
]

readable(__name__)
