"""Hypergradient estimators: one file each, all behind the seam of `estimator`."""

from memmeta.hypergradient.catalogue import ESTIMATORS
from memmeta.hypergradient.estimator import Estimator, Hypergradient, per_task
from memmeta.hypergradient.evolution_strategies import evolution_strategies
from memmeta.hypergradient.finite_difference import finite_difference
from memmeta.hypergradient.first_order import first_order, reptile
from memmeta.hypergradient.forward_mode import forward_mode
from memmeta.hypergradient.hessian_free import hessian_free
from memmeta.hypergradient.implicit import implicit
from memmeta.hypergradient.implicit_solution import implicit_solution
from memmeta.hypergradient.mixed_mode import mixed_mode
from memmeta.hypergradient.report import Report
from memmeta.hypergradient.sample_space import sample_space
from memmeta.hypergradient.truncated import truncated
from memmeta.hypergradient.unrolled import unrolled
from memmeta.hypergradient.warm import Memory, Scheduled, Warm

__all__ = [
    "ESTIMATORS",
    "Estimator",
    "Hypergradient",
    "Memory",
    "Report",
    "Scheduled",
    "Warm",
    "evolution_strategies",
    "finite_difference",
    "first_order",
    "forward_mode",
    "hessian_free",
    "implicit",
    "implicit_solution",
    "mixed_mode",
    "per_task",
    "reptile",
    "sample_space",
    "truncated",
    "unrolled",
]
