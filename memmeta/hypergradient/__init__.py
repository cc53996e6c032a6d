"""Hypergradient estimators: one file each, all behind the seam of `estimator`."""

from memmeta.hypergradient.estimator import Estimator, Hypergradient, Report, per_task
from memmeta.hypergradient.implicit import implicit
from memmeta.hypergradient.unrolled import unrolled

__all__ = ["Estimator", "Hypergradient", "Report", "implicit", "per_task", "unrolled"]
