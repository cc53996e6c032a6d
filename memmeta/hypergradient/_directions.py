r"""Estimates of a gradient from directional derivatives along random directions.

    ∇̂F_i = 1/m Σ_j d_ij u_j,    d_ij = ⟨∇F_i, u_j⟩,    u_j ∈ {−1, 1}^dim θ at random

so E u uᵀ = I and the estimate is unbiased. The directions are the same for all tasks of a
meta-step: one tangent of the size of θ, whatever the number of tasks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, PyTree

from memmeta._shared import trees
from memmeta.certificate._estimate import error_of_loop
from memmeta.hypergradient._estimator import (
    Embedded,
    TaskStart,
    begin_task,
    embedded,
    kept,
    over_tasks,
    report_of_loop,
    task_keys,
)
from memmeta.hypergradient._seam import Chunk, Memory, Report
from memmeta.hypergradient._unrolled import has_known_curvature
from memmeta.inner import InnerLoop, InnerState
from memmeta.inner._loop import widened
from memmeta.inner._solver import require_derivative_at_zero
from memmeta.problem import Batch, MetaParams, Problem, Scalar, SplitContext


def losses_and_reports(
    problem: Problem,
    inner: InnerLoop,
    meta_params: MetaParams,
    chunk: Chunk,
    estimate_error: bool,
) -> tuple[Float[Array, " tasks"], PyTree, Report, Memory | None]:
    """f_i(θ, φ_K), aux, report and memory of every task; an `error_estimate` where asked for."""
    all_tasks, keys = embedded(problem, meta_params, chunk.tasks), task_keys(chunk)

    def one_task(context: SplitContext, key: Array, memory: Memory | None) -> tuple[Any, ...]:
        begin = begin_task(all_tasks.start, context, key, memory)
        state = inner.run(all_tasks.problem, begin.params, context.whole, key, begin.earlier)
        loss, aux = all_tasks.problem.outer_loss(state.params, context.whole)
        return loss, aux, reported(inner, all_tasks, begin, state, estimate_error), state

    loss, aux, report, state = over_tasks(one_task, all_tasks.contexts, keys, chunk.memory)
    return loss, aux, report, kept(chunk, inner, state, keys)


def reported(
    inner: InnerLoop,
    all_tasks: Embedded,
    begin: TaskStart,
    state: InnerState,
    estimate_error: bool,
) -> Report:
    """The report of one task's loop.

    Where asked for with an estimate of how far the gradient of the steps is from that of the inner
    solution.
    """
    report, problem, start = report_of_loop(state), all_tasks.problem, begin.params
    if not estimate_error or not has_known_curvature(problem, inner):
        return report
    start_counts = begin.earlier is None and bool(jax.tree.leaves(all_tasks.dependent(start)))
    error = error_of_loop(problem, start, state.params, begin.context, start_counts)
    return report._replace(error_estimate=error)


class AlongDirections(NamedTuple):
    """The estimate from random directions for a chunk of tasks.

    Attributes:
        gradient: Σ_i w_i ∇̂F_i over the usable tasks.
        usable: [tasks] whether every directional derivative was finite.
        standard_error: [tasks] estimate of the root mean square of ‖∇̂F_i − ∇F_i‖.
    """

    gradient: MetaParams
    usable: Bool[Array, " tasks"]
    standard_error: Float[Array, " tasks"]


def task_losses(
    problem: Problem,
    inner: InnerLoop,
    meta_params: MetaParams,
    chunk: Chunk,
    differentiated: bool,
) -> Callable[[MetaParams], Float[Array, " tasks"]]:
    """f_i(θ, φ_K) of every task as a function of the inexact leaves of θ."""
    _, others = trees.split_inexact(meta_params)

    def losses(floats: MetaParams) -> Float[Array, " tasks"]:
        theta = trees.merge(floats, others)
        wide_problem, wide, _ = widened(problem, problem.init(theta))
        if differentiated:
            require_derivative_at_zero(inner.steps_of, wide, reverse=False)

        def one_task(task: Batch, key: Array, memory: Memory | None) -> Scalar:
            context = problem.embed(theta, task)
            begin = begin_task(wide, SplitContext(context, None), key, memory)
            params = inner.run(wide_problem, begin.params, context, key, begin.earlier).params
            return wide_problem.outer_loss(params, context)[0]

        all_losses: Array = over_tasks(one_task, chunk.tasks, task_keys(chunk), chunk.memory)
        return all_losses

    return losses


def along_directions(
    derivatives: Callable[[MetaParams], Float[Array, " tasks"]],
    floats: MetaParams,
    weights: Float[Array, " tasks"],
    key: Key[Array, ""],
    directions: int,
) -> AlongDirections:
    r"""Average over random directions; memory does not grow with their number.

    Args:
        derivatives: u -> d_i, the directional derivative of every task's loss.
        floats: the inexact leaves of θ.
        weights: [tasks] w_i.
        key: all directions come from it.
        directions: m.

    Returns:
        The estimate. Because ‖u‖² = dim θ, its variance is (dim θ − 1) ‖∇F_i‖² / m, and the mean of
        d_ij² over j estimates ‖∇F_i‖² without bias.
    """
    leaves, structure = jax.tree.flatten(floats)
    size = sum(leaf.size for leaf in leaves)

    def draw(index: Array) -> MetaParams:
        keys = jax.random.split(jax.random.fold_in(key, index), len(leaves))
        signs = [
            jax.random.rademacher(k, leaf.shape, leaf.dtype)
            for k, leaf in zip(keys, leaves, strict=True)
        ]
        return jax.tree.unflatten(structure, signs)

    numbers = jnp.arange(directions)
    along = jax.lax.map(lambda index: derivatives(draw(index)), numbers)
    usable = jnp.all(jnp.isfinite(along), axis=0) & (weights > 0)
    shares = jnp.where(usable, along * weights.astype(along.dtype), 0).sum(axis=1) / directions

    # drawn again instead of kept: memory must not grow with m
    def add(gradient: MetaParams, drawn: tuple[Any, ...]) -> tuple[MetaParams, None]:
        share, direction = drawn[0], draw(drawn[1])
        return jax.tree.map(lambda g, u: g + share.astype(g.dtype) * u, gradient, direction), None

    gradient, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, floats), (shares, numbers))
    error = jnp.sqrt((size - 1) * jnp.mean(along**2, axis=0) / directions)
    return AlongDirections(gradient, usable, error)
