"""memmeta: bilevel meta-learning in JAX with memory that does not grow with the inner loop.

The core, `memmeta.problem` to `memmeta.meta`, is loaded here. The rooms for few-shot learning and
for whole runs, with the packages that they need, are loaded when they are first asked for.
"""

import importlib
from typing import Any

from memmeta import certificate, hypergradient, inner, linear_solve, meta
from memmeta._shared import checks
from memmeta.hypergradient import implicit_solution
from memmeta.inner import InnerLoop
from memmeta.linear_solve import optimistix_adjoint
from memmeta.meta import (
    MetaState,
    MetaStep,
    Metrics,
    confidence_interval,
    evaluate,
    explain,
    make_meta_step,
)
from memmeta.problem import Problem, Structure, Task

ON_FIRST_USE = {
    "algorithms": "memmeta.few_shot.algorithms",
    "data": "memmeta.data",
    "few_shot": "memmeta.few_shot",
    "models": "memmeta.models",
    "recipes": "memmeta.recipes",
    "runs": "memmeta.runs",
}

__all__ = [
    "InnerLoop",
    "MetaState",
    "MetaStep",
    "Metrics",
    "Problem",
    "Structure",
    "Task",
    "algorithms",
    "certificate",
    "confidence_interval",
    "data",
    "enable_compilation_cache",
    "evaluate",
    "explain",
    "few_shot",
    "hypergradient",
    "implicit_solution",
    "inner",
    "linear_solve",
    "make_meta_step",
    "meta",
    "models",
    "optimistix_adjoint",
    "recipes",
    "runs",
]


def enable_compilation_cache() -> None:
    """Keep compiled programs between runs of Python, as the command line does.

    They lie in a folder below the user's cache that nobody else can write to, or in that which the
    environment variable `JAX_COMPILATION_CACHE_DIR` names. Call it before the first compilation.
    """
    importlib.import_module("memmeta.runs._compiled").use_compilation_cache()


def __getattr__(name: str) -> Any:
    if name in ON_FIRST_USE:
        return importlib.import_module(ON_FIRST_USE[name])
    if name == "__version__":
        from importlib.metadata import version

        return version("memmeta")
    raise checks.no_attribute("memmeta", name, __all__)


def __dir__() -> list[str]:
    return sorted({*globals(), *ON_FIRST_USE})
