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
from jaxtyping import Array, Bool, Float, Int32, Key, PyTree, UInt32

from memmeta._shared import trees
from memmeta._shared.readable import named
from memmeta.hypergradient._seam import Chunk, Estimator, Hypergradient, Memory, Report, Wanted
from memmeta.hypergradient._structural_zeros import Seen, loop_seen, refuse_structural_zeros
from memmeta.inner import InnerLoop, InnerState
from memmeta.inner._loop import Earlier, widened
from memmeta.inner._views import View, seen_by
from memmeta.problem import Batch, Context, MetaParams, Params, Problem, Scalar, SplitContext


class TaskStart(NamedTuple):
    """What a rule is given of one task.

    Attributes:
        params: φ₀, or under a warm start φ̂ of the last meta-step; in float32 or wider.
        context: of the task.
        key: of the task, for views and inner solvers that draw.
        earlier: under a warm start what else the inner loop goes on with; else None.
        guess: under a warm start v̂ of the last meta-step; else None.
        table: under a warm start of a rule that keeps one, zero in a new life; else None.
        wanted: which figures of the report are read.
    """

    params: Params
    context: SplitContext
    key: Key[Array, ""]
    earlier: Earlier | None = None
    guess: Any = None
    table: Any = None
    wanted: Wanted = Wanted()


class TaskGradient(NamedTuple):
    """What a rule returns for one task.

    Attributes:
        loss: f, the outer loss.
        aux: the outer loss's auxiliary output.
        context: cotangent of the context's active leaves, or None for zero.
        start: cotangent of φ₀, or None for zero.
        report: see `Report`.
        state: of the inner loop at its end, for a warm start to go on from.
        solution: v̂, likewise, of rules that have one.
        table: of rules that keep one, the `Row` to be written; where `TaskStart` has no table yet,
            an empty one.
    """

    loss: Scalar
    aux: PyTree
    context: Context | None
    start: Params | None
    report: Report
    state: InnerState | None = None
    solution: Any = None
    table: Any = None


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


@named
def per_task(rule: TaskRule, name: str, seen: Seen = loop_seen) -> Estimator:
    r"""Make a chunk estimator of a rule for one task.

    $$\sum_i w_i \nabla F_i = \Big(\frac{\partial (c_1 \dots c_n, \phi_0)}{\partial\theta}\Big)^\top
      (w_1 \bar c_1 \dots w_n \bar c_n, \textstyle\sum_i w_i \bar\phi_{0,i})$$

    Args:
        rule: (problem, inner, begin) -> `TaskGradient`, for one task. Of it `begin` has φ₀ as
            `params`, the `context` (a `SplitContext` of the leaves that θ reaches and the others),
            a `key` for views and inner solvers that draw, and `earlier` and `guess` (v̂) of the last
            meta-step, None without a warm start. Pass `earlier` to `inner.run` or `inner.start`.
        name: of the estimator, for errors.
        seen: what the rule differentiates; meta-parameters on which none of that depends are
            refused.

    Returns:
        The estimator.
    """

    def estimator(
        problem: Problem, inner: InnerLoop, meta_params: MetaParams, chunk: Chunk
    ) -> Hypergradient:
        refuse_structural_zeros(problem, inner, meta_params, chunk, name, seen)
        all_tasks = embedded(problem, meta_params, chunk.tasks)

        def one_task(context: SplitContext, key: Array, memory: Memory | None) -> TaskGradient:
            begin = begin_task(all_tasks.start, context, key, memory, chunk.wanted)
            return rule(all_tasks.problem, inner, begin)

        keys = task_keys(chunk)
        found = over_tasks(one_task, all_tasks.contexts, keys, chunk.memory)
        if chunk.memory is not None and found.state is None:
            raise ValueError(
                f"{name}: found a rule that returns no state of its inner loop, expected one under "
                "a warm start. Pass begin.earlier to inner.run, and return "
                "TaskGradient(..., state=state)."
            )
        memory = kept(chunk, inner, found.state, keys, found.solution, found.table)
        context_bar = _or_zeros(found.context, all_tasks.contexts.active)
        finite = jax.vmap(trees.all_finite)((found.loss, found.context, found.start))
        usable = finite & (chunk.weights > 0)
        context_bar = weighted(context_bar, chunk.weights, usable)
        start_bar = jax.tree.map(jnp.zeros_like, all_tasks.start)
        if found.start is not None:
            start_bar = weighted(found.start, chunk.weights, usable & begins_afresh(chunk))
            start_bar = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), start_bar)
        gradient = all_tasks.pull_back(context_bar, start_bar)
        report = _with_error_of_start(found, all_tasks)
        return Hypergradient(gradient, usable, found.loss, found.aux, report, memory)

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
    if chunk.memory is not None:
        return as_keys(chunk.memory.key, chunk.key)
    return jax.vmap(lambda number: jax.random.fold_in(chunk.key, number))(chunk.numbers)


def begin_task(
    start: Params,
    context: SplitContext,
    key: Key[Array, ""],
    memory: Memory | None,
    wanted: Wanted = Wanted(),
) -> TaskStart:
    """Where one task begins: at φ₀, or where it was left.

    Its gradient by φ₀ is that of a life that begins here: what is remembered counts as a constant.
    """
    if memory is None:
        return TaskStart(start, context, key, wanted=wanted)
    params = trees.where(memory.steps > 0, memory.params, start)
    earlier = Earlier(memory.solver, memory.steps, memory.first_gradient_norm)
    return TaskStart(params, context, key, earlier, memory.solution, memory.table, wanted)


def drawn(
    view: View | None, context: SplitContext, key: Key[Array, ""], step: Int32[Array, ""]
) -> tuple[SplitContext, Callable[[Context], Context]]:
    """A context through a view, and the way back for cotangents of its active leaves.

    A rule works on the drawn context alone, and goes back to the whole one once.
    """
    if view is None:
        return context, lambda cotangent: cotangent
    is_active = jax.tree.map(lambda _: True, context.active)
    is_active = trees.merge(is_active, jax.tree.map(lambda _: False, context.passive))

    def parts(active: Context) -> tuple[Context, Context]:
        return trees.split(seen_by(view, context.at(active), key, step), is_active)

    active, transposed, passive = jax.vjp(parts, context.active, has_aux=True)
    return SplitContext(active, passive), lambda cotangent: transposed(cotangent)[0]


def begins_afresh(chunk: Chunk) -> Bool[Array, " tasks"]:
    """Which tasks start from φ₀, so that where they start depends on θ."""
    if chunk.memory is None:
        return jnp.ones(chunk.weights.shape, bool)
    return chunk.memory.steps == 0


def kept(
    chunk: Chunk,
    inner: InnerLoop,
    state: InnerState | None,
    keys: Key[Array, " tasks"],
    solution: Any = None,
    table: Any = None,
) -> Memory | None:
    """The memory of a chunk after its inner loops; None where it came with none."""
    if chunk.memory is None or state is None:
        return None
    solver = state.solver if inner.steps_of.carried else None
    words, first = jax.random.key_data(keys), state.first_gradient_norm
    return Memory(state.params, solver, state.steps, first, words, solution, table)


def as_keys(words: UInt32[Array, "tasks words"], like: Key[Array, ""]) -> Key[Array, " tasks"]:
    """PRNG keys from their words."""
    keys: Array = jax.random.wrap_key_data(words, impl=jax.random.key_impl(like))
    return keys


def report_of_loop(state: InnerState) -> Report:
    """The figures that every estimator has, from the inner loop's last state."""
    norm, first = state.gradient_norm, state.first_gradient_norm
    made = state.steps - state.before
    reduction = jnp.where(first > 0, norm / jnp.where(first > 0, first, 1), 0)
    reduction = jnp.where(made > 0, reduction, jnp.inf)
    return Report(norm, reduction, made.astype(norm.dtype))


def over_tasks(function: Callable[..., Any], *arguments: PyTree) -> PyTree:
    """`jax.vmap(function)(*arguments)`; of one task without `vmap`.

    Under `vmap` over one task XLA (jax 0.10.2, CPU) copies arrays between layouts that are the same
    in memory, and a `cond` becomes a `select` that computes both branches.
    """
    if jax.tree.leaves(arguments)[0].shape[0] > 1:
        return jax.vmap(function)(*arguments)
    one = jax.tree.map(lambda leaf: jnp.squeeze(leaf, 0), arguments)
    return jax.tree.map(lambda leaf: jnp.expand_dims(leaf, 0), function(*one))
