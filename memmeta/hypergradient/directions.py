r"""Estimates of a gradient from directional derivatives along drawn directions.

    ∇̂F_i = 1/m Σ_j d_ij u_j,    d_ij = ⟨∇F_i, u_j⟩,    u_j ∈ {−1, 1}^dim θ at random

so E u uᵀ = I and the estimate is unbiased. The directions are the same for all tasks of a
meta-step: one tangent of the size of θ, whatever the number of tasks.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, PyTree

from memmeta import trees
from memmeta.hypergradient.error_estimate import can_be_judged, loop_error
from memmeta.hypergradient.estimator import Embedded, bind, embedded
from memmeta.hypergradient.over_tasks import over_tasks
from memmeta.hypergradient.report import Report, unsolved_report
from memmeta.inner import InnerLoop, InnerState, widened
from memmeta.problem import Batch, Context, MetaParams, Problem, Scalar


def losses_and_reports(
    problem: Problem,
    inner: InnerLoop,
    meta_params: MetaParams,
    tasks: Batch,
    estimate_error: bool,
) -> tuple[Float[Array, " tasks"], PyTree, Report]:
    """f_i(θ, φ_K), aux and report of every task, with an `error_estimate` where asked for."""
    chunk = embedded(problem, meta_params, tasks)

    def one_task(active: Context, passive: Context) -> tuple[Scalar, PyTree, Report]:
        task = bind(chunk.problem, passive)
        state = inner.run(task, chunk.start, active)
        loss, aux = task.outer_loss(state.params, active)
        return loss, aux, reported(task, inner, chunk, state, active, estimate_error)

    return over_tasks(one_task, chunk.active, chunk.passive)


def reported(
    task: Problem,
    inner: InnerLoop,
    chunk: Embedded,
    state: InnerState,
    active: Context,
    estimate_error: bool,
) -> Report:
    """The report of one task's loop, with the error of its exact gradient where asked for."""
    report = unsolved_report(state)
    if not estimate_error or not can_be_judged(task, inner):
        return report
    start_counts = bool(jax.tree.leaves(chunk.moving(chunk.start)))
    error = loop_error(task, chunk.start, state.params, active, start_counts)
    return report._replace(error_estimate=error)


class AlongDirections(NamedTuple):
    """What drawn directions say of a chunk of tasks.

    Attributes:
        gradient: Σ_i w_i ∇̂F_i over the usable tasks.
        usable: [tasks] whether every directional derivative was finite.
        standard_error: [tasks] estimated expected length of ∇̂F_i − ∇F_i.
    """

    gradient: MetaParams
    usable: Bool[Array, " tasks"]
    standard_error: Float[Array, " tasks"]


def task_losses(
    problem: Problem, inner: InnerLoop, floats: MetaParams, others: MetaParams, tasks: Batch
) -> Float[Array, " tasks"]:
    """f_i(θ, φ_K) of every task: what is differentiated, as a function of θ."""
    theta = trees.merge(floats, others)
    start = problem.init(theta)
    wide_problem, wide, _ = widened(problem, start)

    def one_task(task: Batch) -> Scalar:
        context = problem.embed(theta, task)
        return wide_problem.outer_loss(inner.run(wide_problem, wide, context).params, context)[0]

    return over_tasks(one_task, tasks)


def along_directions(
    derivatives: Callable[[MetaParams], Float[Array, " tasks"]],
    floats: MetaParams,
    weights: Float[Array, " tasks"],
    key: Key[Array, ""],
    directions: int,
) -> AlongDirections:
    r"""Average over drawn directions; memory does not grow with their number.

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

    def add(gradient: MetaParams, drawn: tuple) -> tuple[MetaParams, None]:
        share, direction = drawn[0], draw(drawn[1])
        return jax.tree.map(lambda g, u: g + share.astype(g.dtype) * u, gradient, direction), None

    gradient, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, floats), (shares, numbers))
    error = jnp.sqrt((size - 1) * jnp.mean(along**2, axis=0) / directions)
    return AlongDirections(gradient, usable, error)


def check_directions(directions: int) -> None:
    """Refuse a number of directions that is none."""
    if not isinstance(directions, int) or directions < 1:
        raise ValueError(f"directions: expected a whole number, 1 or more, found {directions!r}.")
