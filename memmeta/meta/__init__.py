"""The outer iteration: meta-steps, what they report and remember, evaluation, rates, devices."""

from memmeta._shared.readable import readable
from memmeta.meta._evaluation import confidence_interval, evaluate
from memmeta.meta._explain import explain
from memmeta.meta._mesh import task_mesh
from memmeta.meta._metrics import Counts, Metrics, guard
from memmeta.meta._rates import propose
from memmeta.meta._reset import lifetimes, reset_every
from memmeta.meta._state import MetaState
from memmeta.meta._step import MetaStep, make_meta_step
from memmeta.meta._warm_start import WarmStart

__all__ = [
    "Counts",
    "MetaState",
    "MetaStep",
    "Metrics",
    "WarmStart",
    "confidence_interval",
    "evaluate",
    "explain",
    "guard",
    "lifetimes",
    "make_meta_step",
    "propose",
    "reset_every",
    "task_mesh",
]

readable(__name__)
