"""The outer iteration: meta-steps, what they report and remember, evaluation, rates, devices."""

from memmeta.meta._evaluation import Evaluation, Interval, confidence_interval, evaluate
from memmeta.meta._explain import explain
from memmeta.meta._mesh import task_mesh
from memmeta.meta._metrics import Counts, Guard, Metrics, TaskMetrics, guard
from memmeta.meta._rates import Proposal, propose
from memmeta.meta._step import MetaState, MetaStep, make_meta_step
from memmeta.meta._warm_start import WarmStart, WarmState

__all__ = [
    "Counts",
    "Evaluation",
    "Guard",
    "Interval",
    "MetaState",
    "MetaStep",
    "Metrics",
    "Proposal",
    "TaskMetrics",
    "WarmStart",
    "WarmState",
    "confidence_interval",
    "evaluate",
    "explain",
    "guard",
    "make_meta_step",
    "propose",
    "task_mesh",
]
