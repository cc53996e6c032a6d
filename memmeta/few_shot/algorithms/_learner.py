"""A few-shot method as one object, and where its meta-parameters start."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optax
from jax.sharding import Mesh
from jaxtyping import Array, Key

from memmeta._shared import checks
from memmeta.hypergradient import Estimator
from memmeta.inner import InnerLoop
from memmeta.meta._evaluation import Evaluation, evaluate
from memmeta.meta._metrics import DEFAULT_GUARD, Guard
from memmeta.meta._step import MetaStep, ReportLevel, TaskChunk, make_meta_step
from memmeta.models import Network
from memmeta.problem import Batch, MetaParams, Problem


@dataclass(frozen=True)
class Learner:
    """A few-shot method: a problem, an inner loop, an estimator, and a start.

    Attributes:
        problem: which parameters adapt, and to what losses.
        inner: the inner loop of training.
        estimator: of the hypergradient.
        init: PRNG key -> θ.
    """

    problem: Problem
    inner: InnerLoop
    estimator: Estimator
    init: Callable[[Key[Array, ""]], MetaParams]

    def __post_init__(self) -> None:
        fits, remedy = isinstance(self.inner, InnerLoop), "Write memmeta.InnerLoop(optax.sgd(0.1))."
        checks.require("inner", self.inner, fits, "a memmeta.InnerLoop", remedy)

    def make_meta_step(
        self,
        optimizer: optax.GradientTransformation | optax.MultiSteps,
        *,
        task_chunk: TaskChunk = "auto",
        mesh: Mesh | None = None,
        guard: Guard | None = DEFAULT_GUARD,
        strict: bool = False,
        report: ReportLevel = "light",
    ) -> MetaStep:
        """`memmeta.make_meta_step` with this method's problem, inner loop and estimator."""
        parts = (self.problem, self.inner, self.estimator, optimizer)
        options: Any = {"task_chunk": task_chunk, "mesh": mesh, "guard": guard}
        return make_meta_step(*parts, **options, strict=strict, report=report)

    def evaluate(
        self,
        meta_params: MetaParams,
        tasks: Batch,
        *,
        inner: InnerLoop | None = None,
        task_chunk: int | None = None,
    ) -> Evaluation:
        """`memmeta.evaluate` of this method's problem; by default with training's inner loop."""
        return evaluate(self.problem, inner or self.inner, meta_params, tasks, task_chunk)


def body_alone(network: Network) -> Callable[[Key[Array, ""]], MetaParams]:
    """The start of methods that do not learn the head: θ is {"body": ...}."""
    return lambda key: {"body": network.init(key)["body"]}
