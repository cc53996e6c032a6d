r"""Estimators for a chunk of tasks, from a rule for one task.

Most estimators are rules for one task in the space of its context. `per_task` runs `embed` once for
the whole chunk, and pulls the rules' cotangents back through it once, so that no array of shape
(tasks, *meta_params) is ever built.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from memmeta import _trees as trees
from memmeta.hypergradient._seam import Chunk, Estimator, Hypergradient, Memory, Report, Wanted
from memmeta.hypergradient._structural_zeros import Seen, loop_seen, refuse_structural_zeros
from memmeta.inner import InnerLoop, InnerState
from memmeta.inner._loop import widened
from memmeta.problem import Batch, Context, MetaParams, Params, Problem, Scalar, SplitContext


class TaskStart(NamedTuple):
    """What a rule is given of one task.

    Attributes:
        params: φ₀, or under a warm start φ̂ of the last meta-step; in float32 or wider.
        context: of the task.
        key: of the task, for inner solvers that draw.
        guess: under a warm start v̂ of the last meta-step; else None.
        wanted: which figures of the report are read.
    """

    params: Params
    context: SplitContext
    key: Key[Array, ""]
    guess: Params | None = None
    wanted: Wanted = Wanted()


class TaskGradient(NamedTuple):
    """What a rule returns for one task.

    Attributes:
        loss: f, the outer loss.
        aux: the outer loss's auxiliary output.
        context: cotangent of the context's active leaves, or None for zero.
        start: cotangent of φ₀, or None for zero.
        report: see `Report`.
        memory: φ̂ and v̂, from rules that a warm start can use.
    """

    loss: Scalar
    aux: PyTree
    context: Context | None
    start: Params | None
    report: Report
    memory: Memory | None = None


TaskRule: TypeAlias = Callable[[Problem, InnerLoop, TaskStart], TaskGradient]
"""(problem, inner, `TaskStart`) -> `TaskGradient`, for one task."""


class Embedded(NamedTuple):
    """A chunk of tasks in the space of their contexts.

    Attributes:
        problem: in parameters of float32 or wider, see `widened`.
        start: φ₀, wide.
        contexts: of all tasks, with a leading axis.
        dependent: (a tree like φ₀) -> its leaves at which φ₀ depends on θ, None elsewhere.
        pull_back: (cotangents of the active leaves of all tasks, cotangent of φ₀) -> that of θ.
    """

    problem: Problem
    start: Params
    contexts: SplitContext
    dependent: Callable[[Params], Params]
    pull_back: Callable[[Context, Params], MetaParams]


def embedded(problem: Problem, meta_params: MetaParams, tasks: Batch) -> Embedded:
    """Run `embed` and `init` once for a chunk of tasks, ready to be pulled back through."""
    floats, others = trees.split_inexact(meta_params)

    def embed(floats: MetaParams) -> tuple[Context, Params]:
        theta = trees.merge(floats, others)
        return over_tasks(partial(problem.embed, theta), tasks), problem.init(theta)

    by_leaf = trees.reach(embed, floats)
    reached, start_reached = jax.tree.map(lambda *flags: any(flags), *by_leaf)

    def active_parts(floats: MetaParams) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        contexts, start = embed(floats)
        active, passive = trees.split(contexts, reached)
        moving, _ = trees.split(start, start_reached)
        # a cotangent has its primal's dtype: wide, so that rules may return wide cotangents of φ₀
        wide = jax.tree.map(lambda x: x.astype(trees.accumulator(x.dtype)), moving)
        return (active, wide), (passive, start)

    (active, _), transposed, (passive, start) = jax.vjp(active_parts, floats, has_aux=True)
    problem, wide, _ = widened(problem, start)

    def dependent(like_start: Params) -> Params:
        # `tree.map` follows its first tree: the flags have a leaf wherever φ₀ has one, a cotangent
        # has None at integer leaves.
        return jax.tree.map(lambda keep, leaf: leaf if keep else None, start_reached, like_start)

    def pull_back(active_bar: Context, start_bar: Params) -> MetaParams:
        (gradient,) = transposed((active_bar, dependent(start_bar)))
        return gradient

    return Embedded(problem, wide, SplitContext(active, passive), dependent, pull_back)


def per_task(
    rule: TaskRule, name: str, seen: Seen = loop_seen, remembers: bool = False
) -> Estimator:
    r"""Make a chunk estimator of a rule for one task.

    $$\sum_i w_i \nabla F_i = \Big(\frac{\partial (c_1 \dots c_n, \phi_0)}{\partial\theta}\Big)^\top
      (w_1 \bar c_1 \dots w_n \bar c_n, \textstyle\sum_i w_i \bar\phi_{0,i})$$

    Args:
        rule: (problem, inner, begin) -> `TaskGradient`, for one task. Of it `begin` has φ₀ as
            `params`, the `context` (a `SplitContext` of the leaves that θ reaches and the others),
            a `key` for inner solvers that draw, and as `guess` v̂ of the last meta-step, None
            without a warm start.
        name: of the estimator, for errors.
        seen: what the rule differentiates; meta-parameters on which none of that depends are
            refused.
        remembers: whether the rule can start from φ̂ and v̂ of the last meta-step, and returns both.

    Returns:
        The estimator.
    """

    def estimator(
        problem: Problem, inner: InnerLoop, meta_params: MetaParams, chunk: Chunk
    ) -> Hypergradient:
        if not remembers:
            refuse_memory(chunk, name)
        refuse_structural_zeros(problem, inner, meta_params, chunk, name, seen)
        all_tasks = embedded(problem, meta_params, chunk.tasks)

        def one_task(context: SplitContext, key: Array, memory: Memory | None) -> TaskGradient:
            begin = TaskStart(all_tasks.start, context, key, wanted=chunk.wanted)
            if memory is not None:
                begin = begin._replace(params=memory.params, guess=memory.solution)
            found = rule(all_tasks.problem, inner, begin)
            return found if memory is not None else found._replace(memory=None)

        found = over_tasks(one_task, all_tasks.contexts, task_keys(chunk), chunk.memory)
        context_bar = _or_zeros(found.context, all_tasks.contexts.active)
        start_bar = _or_zeros(found.start, jax.vmap(lambda _: all_tasks.start)(chunk.weights))
        finite = jax.vmap(trees.all_finite)((found.loss, context_bar, start_bar))
        usable = finite & (chunk.weights > 0)
        context_bar = weighted(context_bar, chunk.weights, usable)
        start_bar = weighted(start_bar, chunk.weights, usable)
        start_bar = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), start_bar)
        gradient = all_tasks.pull_back(context_bar, start_bar)
        report = _with_error_of_start(found, all_tasks)
        return Hypergradient(gradient, usable, found.loss, found.aux, report, found.memory)

    return estimator


def _with_error_of_start(found: TaskGradient, all_tasks: Embedded) -> Report:
    """Add the norm of φ₀'s cotangent, which is zero at the solution: φ* does not depend on φ₀."""
    estimate, moving = found.report.error_estimate, None
    if found.start is not None:
        moving = all_tasks.dependent(found.start)
    if estimate is None or not jax.tree.leaves(moving):
        return found.report
    estimate += jax.vmap(trees.norm)(moving).astype(estimate.dtype)
    estimate = jnp.where(jnp.isfinite(estimate), estimate, jnp.inf)  # not known, see `Report`
    return found.report._replace(error_estimate=estimate)


def weighted(tree: PyTree, weights: Float[Array, " tasks"], usable: Array) -> PyTree:
    """w_i times task i's entries, and zero for a task that is not usable."""

    def one(leaf: Array) -> Array:
        shape = (-1,) + (1,) * (leaf.ndim - 1)
        # `where`, not a product with zero: 0 · NaN is NaN
        return jnp.where(usable.reshape(shape), weights.reshape(shape).astype(leaf.dtype) * leaf, 0)

    return jax.tree.map(one, tree)


def _or_zeros(cotangent: PyTree | None, like: PyTree) -> PyTree:
    return jax.tree.map(jnp.zeros_like, like) if cotangent is None else cotangent


def task_keys(chunk: Chunk) -> Key[Array, " tasks"]:
    """A key for each task, the same in whatever chunk and on whatever device it is."""
    return jax.vmap(lambda number: jax.random.fold_in(chunk.key, number))(chunk.numbers)


def refuse_memory(chunk: Chunk, name: str) -> None:
    """Raise where an estimator that keeps nothing of a task is given what was kept.

    Raises:
        ValueError: naming the estimator.
    """
    if chunk.memory is not None:
        raise ValueError(
            f"{name}: found a memory of its tasks (memmeta.meta.WarmStart), expected None: this "
            "estimator starts every task from φ₀. Use implicit()."
        )


def report_of_loop(state: InnerState) -> Report:
    """The figures that every estimator has, from the inner loop's last state."""
    norm, first = state.gradient_norm, state.first_gradient_norm
    reduction = jnp.where(first > 0, norm / jnp.where(first > 0, first, 1), 0)
    reduction = jnp.where(state.steps > 0, reduction, jnp.inf)
    return Report(norm, reduction, state.steps.astype(norm.dtype))


def over_tasks(function: Callable[..., Any], *arguments: PyTree) -> PyTree:
    """`jax.vmap(function)(*arguments)`; of one task without `vmap`.

    Under `vmap` over one task XLA (jax 0.10.2, CPU) copies arrays between layouts that are the same
    in memory, and a `cond` becomes a `select` that computes both branches.
    """
    if jax.tree.leaves(arguments)[0].shape[0] > 1:
        return jax.vmap(function)(*arguments)
    one = jax.tree.map(lambda leaf: jnp.squeeze(leaf, 0), arguments)
    return jax.tree.map(lambda leaf: jnp.expand_dims(leaf, 0), function(*one))
