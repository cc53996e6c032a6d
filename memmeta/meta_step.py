"""The meta-step: hypergradients of chunks of tasks summed in a scan, one outer update, one jit."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int32, Key, PyTree

from memmeta import trees
from memmeta.hypergradient.estimator import Estimator, Report
from memmeta.inner import InnerLoop
from memmeta.problem import Batch, MetaParams, Problem, Scalar


class MetaState(NamedTuple):
    """Everything a run carries from one meta-step to the next, as one pytree.

    Attributes:
        step: meta-steps done.
        meta_params: θ.
        optimizer: state of the outer optimiser.
        key: PRNG key of the run; every random draw of step t comes from fold_in(key, t).
    """

    step: Int32[Array, ""]
    meta_params: MetaParams
    optimizer: optax.OptState
    key: Key[Array, ""]


class TaskMetrics(NamedTuple):
    """The figures of every single task of a meta-step, each with a leading axis of tasks.

    Attributes:
        loss: f_i, the query loss.
        aux: auxiliary outputs of the outer loss.
        report: see `memmeta.hypergradient.Report`.
        usable: whether the task was finite and took part in the averages.
    """

    loss: Float[Array, " tasks"]
    aux: PyTree
    report: Report
    usable: Bool[Array, " tasks"]


class Metrics(NamedTuple):
    """What a meta-step reports. Averages are over the usable tasks.

    Attributes:
        loss: mean query loss.
        aux: mean auxiliary outputs.
        report: mean report; `smallest_curvature` is the minimum.
        gradient_norm: ‖(1/n) Σ_i ∇F_i‖.
        masked: tasks left out because something about them was not finite.
        tasks: the same figures task by task (None once they have been averaged away).
    """

    loss: Scalar
    aux: PyTree
    report: Report
    gradient_norm: Scalar
    masked: Int32[Array, ""]
    tasks: TaskMetrics | None


@dataclass(frozen=True)
class MetaStep:
    """One outer iteration, made by `make_meta_step`; call it, or trace `update` in a program.

    Attributes:
        problem: the bilevel problem.
        inner: the inner loop.
        estimator: of the hypergradient.
        optimizer: the outer optimiser.
        task_chunk: tasks worked on at once; None means all.
    """

    problem: Problem
    inner: InnerLoop
    estimator: Estimator
    optimizer: optax.GradientTransformation
    task_chunk: int | None = None

    def init(self, meta_params: MetaParams, key: Key[Array, ""] | None = None) -> MetaState:
        """The state of a new run.

        Args:
            meta_params: θ at the start. Copied: the state is donated at each step, θ stays yours.
            key: PRNG key of the run; default `jax.random.key(0)`.

        Returns:
            The state at step 0.

        Raises:
            ValueError: θ has no leaf that can be differentiated.
        """
        floats, _ = trees.split_inexact(meta_params)
        if not jax.tree.leaves(floats):
            raise ValueError(
                "meta_params: found no floating-point leaf, expected at least one array to learn."
            )
        copied = jax.tree.map(jnp.array, meta_params)
        key = jnp.copy(jax.random.key(0) if key is None else key)
        return MetaState(
            jnp.int32(0), copied, self.optimizer.init(trees.split_inexact(copied)[0]), key
        )

    def __call__(self, state: MetaState, tasks: Batch) -> tuple[MetaState, Metrics]:
        """One compiled meta-step; `state` is donated.

        Args:
            state: from `init` or the previous call.
            tasks: one batch of tasks, a pytree whose leaves have a leading axis of tasks.

        Returns:
            The next state, and the metrics of this step.

        Raises:
            ValueError: the tasks have no common leading axis, or `task_chunk` does not divide it.
        """
        return self.compiled(state, tasks)

    @cached_property
    def compiled(self) -> Callable[[MetaState, Batch], tuple[MetaState, Metrics]]:
        """`update` under `jax.jit` with the state donated; `.lower(...)` shows what it costs."""
        return jax.jit(self.update, donate_argnums=0)

    def update(self, state: MetaState, tasks: Batch) -> tuple[MetaState, Metrics]:
        """`__call__` as a pure function that is not yet compiled."""
        gradient, metrics = self.gradient(state, tasks)
        floats, others = trees.split_inexact(state.meta_params)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes, users may be strict
            updates, optimizer = self.optimizer.update(gradient, state.optimizer, floats)
            updated = (optax.apply_updates(floats, updates), optimizer)
        any_usable = jnp.any(metrics.tasks.usable)
        floats, optimizer = jax.tree.map(
            lambda new, old: jnp.where(any_usable, new, old), updated, (floats, state.optimizer)
        )
        following = MetaState(state.step + 1, trees.merge(floats, others), optimizer, state.key)
        return following, metrics

    def gradient(self, state: MetaState, tasks: Batch) -> tuple[MetaParams, Metrics]:
        r"""The mean hypergradient of a batch, accumulated chunk by chunk.

        $$\frac{1}{n} \sum_{\text{chunks}} \sum_{i \in \text{chunk}} \nabla F_i$$

        Args:
            state: θ and the PRNG key are used.
            tasks: one batch of tasks.

        Returns:
            The gradient, like the inexact leaves of θ, and the metrics.
        """
        count = trees.leading_size(tasks, "tasks")
        chunk = _checked_chunk(self.task_chunk, count)
        draw = jax.random.fold_in(state.key, state.step)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(draw, jnp.arange(count))
        finite = jax.vmap(trees.all_finite)(tasks)
        tasks = jax.tree.map(_zero_where_not(finite), tasks)
        batch = (tasks, finite.astype(jnp.float32), keys)
        chunks = jax.tree.map(lambda x: x.reshape(count // chunk, chunk, *x.shape[1:]), batch)

        def add_chunk(total: MetaParams, chunk: tuple) -> tuple[MetaParams, TaskMetrics]:
            found = self.estimator(self.problem, self.inner, state.meta_params, *chunk)
            # The last resort: a product that overflowed in the pull-back of finite cotangents.
            sound = trees.all_finite(found.gradient)
            total = jax.tree.map(lambda t, g: t + jnp.where(sound, g, 0), total, found.gradient)
            usable = found.usable & sound
            return total, TaskMetrics(found.loss, found.aux, found.report, usable)

        zeros = jax.tree.map(jnp.zeros_like, trees.split_inexact(state.meta_params)[0])
        total, per_task = jax.lax.scan(add_chunk, zeros, chunks)
        per_task = jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), per_task)
        used = jnp.maximum(jnp.sum(per_task.usable), 1)
        gradient = jax.tree.map(lambda g: g / used.astype(g.dtype), total)
        return gradient, _averages(per_task, used, gradient)


def _averages(tasks: TaskMetrics, used: Array, gradient: MetaParams) -> Metrics:
    def shown(leaf: Array, blank: float) -> Array:
        return jnp.where(tasks.usable.reshape((-1,) + (1,) * (leaf.ndim - 1)), leaf, blank)

    def mean(leaf: Array) -> Array:
        dtype = trees.accumulator(leaf.dtype) if trees.is_inexact(leaf) else jnp.float32
        total = jnp.sum(shown(leaf, 0).astype(dtype), axis=0)
        return total / used.astype(dtype)

    report = jax.tree.map(mean, tasks.report)
    smallest = jnp.min(shown(tasks.report.smallest_curvature, jnp.inf))
    return Metrics(
        loss=mean(tasks.loss),
        aux=jax.tree.map(mean, tasks.aux),
        report=report._replace(smallest_curvature=smallest),
        gradient_norm=trees.norm(gradient),
        masked=jnp.sum(~tasks.usable).astype(jnp.int32),
        tasks=tasks,
    )


def _zero_where_not(finite: Bool[Array, " tasks"]) -> Callable[[Array], Array]:
    """Blank the inputs of non-finite tasks: 0 · NaN in a pull-back would poison the other tasks."""

    def blank(leaf: Array) -> Array:
        if not trees.is_inexact(leaf):
            return leaf
        return jnp.where(finite.reshape((-1,) + (1,) * (leaf.ndim - 1)), leaf, 0)

    return blank


def _checked_chunk(task_chunk: int | None, count: int) -> int:
    if count == 0:
        raise ValueError("tasks: found no task, expected at least one.")
    chunk = count if task_chunk is None else task_chunk
    if count % chunk:
        divisors = [d for d in range(1, count + 1) if count % d == 0]
        raise ValueError(
            f"task_chunk: {chunk} does not divide the {count} tasks of a step. "
            f"Choose one of {', '.join(map(str, divisors))}, or None for all at once."
        )
    return chunk


def make_meta_step(
    problem: Problem,
    inner: InnerLoop,
    estimator: Estimator,
    optimizer: optax.GradientTransformation,
    *,
    task_chunk: int | None = None,
) -> MetaStep:
    r"""Make the function that does one outer iteration.

    $$\theta_{t+1} = \theta_t - \text{optimizer}\Big(\frac1n \sum_i \nabla F_i(\theta_t)\Big)$$

    Args:
        problem: the bilevel problem.
        inner: the inner loop.
        estimator: of the hypergradient, from `memmeta.hypergradient`.
        optimizer: the outer optimiser, any optax gradient transformation.
        task_chunk: tasks worked on at once. Memory grows with it, and not with the number of tasks;
            it changes nothing but rounding. None means all.

    Returns:
        A `MetaStep`: `init(meta_params) -> state`, `step(state, tasks) -> (state, metrics)`.

    Raises:
        ValueError: `task_chunk` is less than 1.

    Source: Yang, Ma, Yu (AAAI 2025), Algorithm 1.

    Example:
        >>> import optax, memmeta as mm
        >>> problem = mm.Problem(
        ...     embed=lambda theta, batch: (theta, batch),
        ...     inner_loss=lambda phi, c: 0.5 * jnp.sum((phi - c[0]) ** 2),
        ...     outer_loss=lambda phi, c: (0.5 * jnp.sum((phi - c[1]) ** 2), {}),
        ...     init=jnp.zeros_like,
        ... )
        >>> step = make_meta_step(
        ...     problem, mm.InnerLoop(steps=10), mm.hypergradient.implicit(), optax.sgd(0.5)
        ... )
        >>> state = step.init(jnp.zeros(2))
        >>> for _ in range(20):
        ...     state, metrics = step(state, jnp.array([[1.0, 2.0], [3.0, 4.0]]))
        >>> state.meta_params.round(2).tolist()
        [2.0, 3.0]
    """
    if task_chunk is not None and (not isinstance(task_chunk, int) or task_chunk < 1):
        raise ValueError(f"task_chunk: expected None or at least 1, found {task_chunk!r}.")
    return MetaStep(problem, inner, estimator, optimizer, task_chunk)
