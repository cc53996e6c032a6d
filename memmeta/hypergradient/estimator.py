r"""The seam every hypergradient estimator fits: what it is given, and what it says.

An `Estimator` is a function of one chunk of tasks. Most of them are rules for one task in the space
of its context; `per_task` makes a chunk estimator of such a rule: it runs `embed` once for the
whole chunk, and pulls the rules' cotangents back through it once, so that no array of shape
(tasks, *meta_params) is ever built.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, PyTree

from memmeta import trees
from memmeta.hypergradient.over_tasks import over_tasks
from memmeta.hypergradient.report import Report
from memmeta.hypergradient.structural_zeros import Seen, refuse_structural_zeros
from memmeta.hypergradient.warm import Memory, unpacked
from memmeta.inner import InnerLoop, widened
from memmeta.problem import Batch, Context, MetaParams, Params, Problem, Scalar


class TaskGradient(NamedTuple):
    """What a rule says of one task.

    Attributes:
        loss: f, the outer loss.
        aux: the outer loss's auxiliary output.
        context: cotangent of the context, or None for zero.
        start: cotangent of φ₀, or None for zero.
        report: see `Report`.
        memory: φ̂ and v̂ for the next meta-step, from rules that were given a `Memory`.
    """

    loss: Scalar
    aux: PyTree
    context: Context | None
    start: Params | None
    report: Report
    memory: Memory | None = None


class Hypergradient(NamedTuple):
    """What an estimator says of a chunk of tasks.

    Attributes:
        gradient: Σ_i w_i ∇F_i over the usable tasks, like the inexact leaves of the meta-parameters
            (None elsewhere).
        usable: [tasks] whether everything about the task was finite; the others are left out.
        loss: [tasks] f_i.
        aux: the outer losses' auxiliary outputs, each with a leading axis of tasks.
        report: see `Report`, each entry [tasks].
        memory: of each task, where the batch was `Warm`.
    """

    gradient: MetaParams
    usable: Bool[Array, " tasks"]
    loss: Float[Array, " tasks"]
    aux: PyTree
    report: Report
    memory: Memory | None = None


TaskRule: TypeAlias = Callable[[Problem, InnerLoop, Params | Memory, Context], TaskGradient]
Estimator: TypeAlias = Callable[
    [Problem, InnerLoop, MetaParams, Batch, Float[Array, " tasks"], Key[Array, ""]],
    Hypergradient,
]
"""(problem, inner, θ, tasks, weights, key) -> Hypergradient.

The key is one for all chunks of a meta-step, so that chunking changes no random direction.
"""


class Embedded(NamedTuple):
    """A chunk of tasks in the space of their contexts.

    Attributes:
        problem: as a function of wide parameters (see `memmeta.inner.widened`) and whole contexts.
        start: φ₀, wide.
        active: the contexts' leaves that depend on θ, with a leading axis of tasks.
        passive: the other leaves.
        moving: of something like φ₀, the leaves where φ₀ depends on θ.
        pull_back: (cotangents of `active`, summed over tasks by it; cotangent of φ₀) -> that of θ.
    """

    problem: Problem
    start: Params
    active: Context
    passive: Context
    moving: Callable[[Params], Params]
    pull_back: Callable[[Context, Params], MetaParams]


def embedded(problem: Problem, meta_params: MetaParams, tasks: Batch) -> Embedded:
    """Run `embed` and `init` once for a chunk of tasks, ready to be pulled back through."""
    floats, others = trees.split_inexact(meta_params)

    def embed(floats: MetaParams) -> tuple[Context, Params]:
        theta = trees.merge(floats, others)
        return over_tasks(partial(problem.embed, theta), tasks), problem.init(theta)

    dependent, start_dependent = trees.dependence(embed, floats)

    def active_parts(floats: MetaParams) -> tuple[tuple, tuple]:
        contexts, start = embed(floats)
        active, passive = trees.split(contexts, dependent)
        moving, _ = trees.split(start, start_dependent)
        wide = jax.tree.map(lambda x: x.astype(trees.accumulator(x.dtype)), moving)
        return (active, wide), (passive, start)

    (active, _), transposed, (passive, start) = jax.vjp(active_parts, floats, has_aux=True)
    problem, wide, _ = widened(problem, start)

    def moving(start_bar: Params) -> Params:
        # flags first: φ₀'s cotangent has None where φ₀ has no floating-point leaf
        return jax.tree.map(lambda kept, bar: bar if kept else None, start_dependent, start_bar)

    def pull_back(active_bar: Context, start_bar: Params) -> MetaParams:
        (gradient,) = transposed((active_bar, moving(start_bar)))
        return gradient

    return Embedded(problem, wide, active, passive, moving, pull_back)


def per_task(
    rule: TaskRule, name: str, seen: Seen | None = None, remembers: bool = False
) -> Estimator:
    r"""Make a chunk estimator of a rule for one task.

    $$\sum_i w_i \nabla F_i = \Big(\frac{\partial (c_1 \dots c_n, \phi_0)}{\partial\theta}\Big)^\top
      (w_1 \bar c_1 \dots w_n \bar c_n, \textstyle\sum_i w_i \bar\phi_{0,i})$$

    Args:
        rule: (problem, inner, φ₀, context) -> `TaskGradient`, for one task. The context it sees
            holds only the leaves that depend on θ; the rest is bound into the problem. φ₀ is in
            float32 at least.
        name: of the estimator, for errors.
        seen: what the rule differentiates; meta-parameters that none of it depends on are refused.
            None means that the rule sees every effect.
        remembers: whether the rule takes a `Memory` in place of φ₀, and gives one back.

    Returns:
        The estimator.
    """

    def estimator(
        problem: Problem,
        inner: InnerLoop,
        meta_params: MetaParams,
        tasks: Batch,
        weights: Float[Array, " tasks"],
        key: Key[Array, ""],
    ) -> Hypergradient:
        tasks, memory = unpacked(tasks, name, remembers)
        if seen is not None:
            refuse_structural_zeros(problem, inner, meta_params, tasks, name, seen)
        chunk = embedded(problem, meta_params, tasks)

        def one_task(active: Context, passive: Context, memory: Memory | None) -> TaskGradient:
            start = chunk.start if memory is None else memory
            return rule(bind(chunk.problem, passive), inner, start, active)

        found = over_tasks(one_task, chunk.active, chunk.passive, memory)
        context_bar = _or_zeros(found.context, chunk.active)
        start_bar = _or_zeros(found.start, jax.vmap(lambda _: chunk.start)(weights))
        usable = jax.vmap(trees.all_finite)((found.loss, context_bar, start_bar)) & (weights > 0)
        context_bar = weighted(context_bar, weights, usable)
        start_bar = weighted(start_bar, weights, usable)
        start_bar = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), start_bar)
        gradient = chunk.pull_back(context_bar, start_bar)
        report = _with_start(found, chunk)
        return Hypergradient(gradient, usable, found.loss, found.aux, report, found.memory)

    return estimator


def _with_start(found: TaskGradient, chunk: Embedded) -> Report:
    """The start leaves no trace at the inner solution: what is said of it is all error."""
    estimate, moving = found.report.error_estimate, None
    if found.start is not None:
        moving = chunk.moving(found.start)
    if not jax.tree.leaves(moving):
        return found.report
    estimate += jax.vmap(trees.norm)(moving).astype(estimate.dtype)
    estimate = jnp.where(jnp.isfinite(estimate), estimate, jnp.inf)
    return found.report._replace(error_estimate=estimate)


def weighted(tree: PyTree, weights: Float[Array, " tasks"], usable: Array) -> PyTree:
    """w_i times task i's entries, and zero for a task that is not usable."""

    def one(leaf: Array) -> Array:
        shape = (-1,) + (1,) * (leaf.ndim - 1)
        return jnp.where(usable.reshape(shape), weights.reshape(shape).astype(leaf.dtype) * leaf, 0)

    return jax.tree.map(one, tree)


def _or_zeros(cotangent: PyTree | None, like: PyTree) -> PyTree:
    return jax.tree.map(jnp.zeros_like, like) if cotangent is None else cotangent


def bind(problem: Problem, passive: Context) -> Problem:
    """The same problem as a function of the context's active leaves alone."""

    def bound(function: Callable) -> Any:
        return lambda *arguments: function(*arguments[:-1], trees.merge(arguments[-1], passive))

    functions = {field.name: getattr(problem, field.name) for field in fields(problem)}
    of_context = {
        name: bound(function)
        for name, function in functions.items()
        if function is not None and name not in ("embed", "init")
    }
    return replace(problem, **of_context)
