"""memmeta: bilevel meta-learning in JAX with memory that does not grow with the inner loop."""

from memmeta import algorithms, data, hypergradient, inner, linear_solve, models
from memmeta.evaluate import confidence_interval, evaluate
from memmeta.hypergradient import implicit_solution
from memmeta.inner import InnerLoop, accelerated, gradient_descent
from memmeta.meta_step import MetaState, MetaStep, Metrics, make_meta_step
from memmeta.problem import Problem, Task

__all__ = [
    "InnerLoop",
    "MetaState",
    "MetaStep",
    "Metrics",
    "Problem",
    "Task",
    "accelerated",
    "algorithms",
    "confidence_interval",
    "data",
    "evaluate",
    "gradient_descent",
    "hypergradient",
    "implicit_solution",
    "inner",
    "linear_solve",
    "make_meta_step",
    "models",
]
