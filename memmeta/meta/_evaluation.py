"""Evaluating meta-parameters: adapt to each task from θ, then the loss of its query examples."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key, PyTree

from memmeta._shared import trees
from memmeta.inner import InnerLoop
from memmeta.problem import Batch, MetaParams, Problem


class Evaluation(NamedTuple):
    """Query figures after adaptation, task by task.

    Attributes:
        loss: [tasks] f_i(φ_K).
        aux: the outer loss's auxiliary outputs, each [tasks, ...].
        usable: [tasks] whether the loss is finite; leave the others out of averages, and say so.
    """

    loss: Float[Array, " tasks"]
    aux: PyTree
    usable: Bool[Array, " tasks"]


def evaluate(
    problem: Problem,
    inner: InnerLoop,
    meta_params: MetaParams,
    tasks: Batch,
    task_chunk: int | None = None,
    key: Key[Array, ""] | None = None,
) -> Evaluation:
    """Adapt to each task and evaluate the outer loss. Pure: put it under `jax.jit`.

    Args:
        problem: the bilevel problem.
        inner: the inner loop; may make more steps than in training.
        meta_params: θ.
        tasks: a pytree whose leaves have a leading axis of tasks.
        task_chunk: tasks worked on at once; None means all.
        key: for inner solvers that draw; default `jax.random.key(0)`.

    Returns:
        Figures task by task: `loss`, [tasks] f_i(φ_K); `aux`, the outer loss's auxiliary outputs,
        each [tasks, ...]; `usable`, [tasks] whether the loss is finite: leave the others out of
        averages, and say so.

    Example:
        >>> import memmeta as mm
        >>> problem = mm.Problem(
        ...     embed=lambda theta, batch: theta * batch,
        ...     inner_loss=lambda phi, c: 0.5 * jnp.sum((phi - c) ** 2),
        ...     outer_loss=lambda phi, c: (jnp.sum(phi), {}),
        ...     init=lambda theta: jnp.zeros(2),
        ... )
        >>> evaluate(problem, mm.InnerLoop(), 2.0, jnp.ones((3, 2))).loss.round(3).tolist()
        [4.0, 4.0, 4.0]
    """

    count = trees.leading_size(tasks, "tasks")
    if problem.structure.check is not None:
        problem.structure.check(tasks)
    key = jax.random.key(0) if key is None else key

    def one_task(numbered: tuple[Array, Batch]) -> Evaluation:
        number, task = numbered
        context = problem.embed(meta_params, task)
        start, own_key = problem.init(meta_params), jax.random.fold_in(key, number)
        params = inner(problem, start, context, own_key)
        loss, aux = problem.outer_loss(params, context)
        return Evaluation(loss, aux, jnp.isfinite(loss))

    numbered = (jnp.arange(count), tasks)
    found: Evaluation = jax.lax.map(one_task, numbered, batch_size=task_chunk or count)
    return found


class Interval(NamedTuple):
    """A mean and the half-width of its 95 % interval."""

    mean: float
    half_width: float

    def __str__(self) -> str:
        return f"{self.mean:.4g} ± {self.half_width:.2g}"


def confidence_interval(values: Float[Array, " tasks"] | Float[np.ndarray, " tasks"]) -> Interval:
    r"""The mean over tasks with its 95 % interval.

    $$\bar x \pm 1.96 \, s / \sqrt n$$

    Args:
        values: one figure per task, at least two.

    Returns:
        The interval: its `mean` and `half_width`, two numbers; `str` writes mean ± half-width.

    Raises:
        ValueError: fewer than two values.

    Example:
        >>> print(confidence_interval(np.array([0.9, 1.0, 0.8, 0.9])))
        0.9 ± 0.08
    """
    array = np.asarray(values, np.float64)
    if array.size < 2:
        raise ValueError(f"values: an interval needs at least 2 tasks, found {array.size}.")
    spread = array.std(ddof=1) / np.sqrt(array.size)
    return Interval(float(array.mean()), float(1.96 * spread))
