"""Refuse, when traced, meta-parameters whose hypergradient would be zero by construction."""

from collections.abc import Callable
from typing import TypeAlias

import jax
from jaxtyping import Array, Key, PyTree

from memmeta._shared import trees
from memmeta.hypergradient._seam import Chunk
from memmeta.inner import InnerLoop
from memmeta.inner._loop import widened
from memmeta.problem import Context, MetaParams, Params, Problem

Seen: TypeAlias = Callable[[Problem, InnerLoop, Params, Context, Key[Array, ""]], PyTree]
"""(problem, inner, φ₀, context, key) -> the quantities an estimator differentiates."""


def loop_seen(
    problem: Problem, inner: InnerLoop, start: Params, context: Context, key: Array
) -> PyTree:
    """What unrolling differentiates: the outer loss at the end of the loop."""
    return problem.outer_loss(inner(problem, start, context, key), context)[0]


def losses_seen(
    problem: Problem, inner: InnerLoop, start: Params, context: Context, key: Array
) -> PyTree:
    """What an implicit rule differentiates: both losses, at a point held fixed."""
    start = jax.lax.stop_gradient(start)
    return problem.inner_loss(start, context), problem.outer_loss(start, context)[0]


def steps_seen(
    problem: Problem, inner: InnerLoop, start: Params, context: Context, key: Array
) -> PyTree:
    """What a truncated loop differentiates: both losses and a step, at a point held fixed."""
    wide_problem, wide, _ = widened(problem, start)
    state = jax.lax.stop_gradient(inner.start(wide_problem, wide, context))
    step = inner.advance(wide_problem, state, context, key, 1)
    return losses_seen(problem, inner, start, context, key), step


def ends_seen(
    problem: Problem, inner: InnerLoop, start: Params, context: Context, key: Array
) -> PyTree:
    """What a first-order rule differentiates: the start, and the outer loss at a fixed point."""
    return start, problem.outer_loss(jax.lax.stop_gradient(start), context)[0]


def start_seen(
    problem: Problem, inner: InnerLoop, start: Params, context: Context, key: Array
) -> PyTree:
    """What Reptile differentiates: the start alone."""
    return start


def refuse_structural_zeros(
    problem: Problem,
    inner: InnerLoop,
    meta_params: MetaParams,
    chunk: Chunk,
    name: str,
    seen: Seen,
) -> None:
    """Raise where an estimator's answer would be zero whatever the data.

    At the inner solution, for instance, φ* depends on θ only through the inner loss: where the
    inner loop started and with what rate it ran do not appear in it.

    Raises:
        ValueError: naming each meta-parameter on which nothing that the estimator differentiates
            depends, with the remedy.
    """
    floats, others = trees.split_inexact(meta_params)
    task = jax.tree.map(lambda leaf: leaf[0], chunk.tasks)

    def quantities(floats: MetaParams) -> PyTree:
        theta = trees.merge(floats, others)
        return seen(problem, inner, problem.init(theta), problem.embed(theta, task), chunk.key)

    reach = trees.reach(quantities, floats)
    paths = jax.tree_util.tree_leaves_with_path(floats)
    missing = [
        jax.tree_util.keystr(path) or "meta_params"
        for (path, _), outputs in zip(paths, reach, strict=True)
        if not any(jax.tree.leaves(outputs))
    ]
    if missing:
        raise ValueError(
            f"{name}: the hypergradient of {', '.join(missing)} is zero by construction: nothing "
            "this estimator differentiates depends on it (for an implicit one: an initialisation "
            "or an inner learning rate leaves no trace at the inner solution). Add a proximal term "
            "to inner_loss (as in iMAML), leave it out of the meta-parameters, or use an estimator "
            "that differentiates all steps, such as unrolled(); of a learned rate, see that the "
            "inner solver reads it."
        )
