r"""The seam every hypergradient estimator fits: what it is given, what it says, how it is pulled back.

An `Estimator` is a function of one chunk of tasks. Most of them are rules for one task in the space
of its context; `per_task` makes a chunk estimator of such a rule: it runs `embed` once for the
whole chunk, and pulls the rules' cotangents back through it once, so that no array of shape
(tasks, *meta_params) is ever built.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, PyTree

from memmeta import trees
from memmeta.inner import InnerLoop, InnerState
from memmeta.problem import Batch, Context, MetaParams, Params, Problem, Scalar


class Report(NamedTuple):
    """How far a hypergradient can be trusted: the same figures for every estimator.

    Attributes:
        inner_gradient_norm: ‖∇_φ g‖, zero when the inner loop has converged: at φ̂ for implicit
            estimators, where the last step was made from for the others (one gradient saved).
        linear_residual: ‖∂_φ f − (∂²_φφ g) v‖ / ‖∂_φ f‖; 0 where no linear system is solved.
        smallest_curvature: the smallest pᵀ(∂²_φφ g)p / pᵀp met, infinite where none was; negative
            means that φ̂ is no minimum and the implicit function theorem does not hold.
        linear_iterations: Hessian-vector products that went into v.
    """

    inner_gradient_norm: Float[Array, "*tasks"]
    linear_residual: Float[Array, "*tasks"]
    smallest_curvature: Float[Array, "*tasks"]
    linear_iterations: Float[Array, "*tasks"]


def unsolved_report(state: InnerState) -> Report:
    """The report of an estimator that solves no linear system, from the inner loop's last state."""
    length = jax.lax.stop_gradient(state.gradient_norm)
    none = jnp.zeros_like(length)
    return Report(length, none, jnp.full_like(length, jnp.inf), none)


class TaskGradient(NamedTuple):
    """What a rule says of one task.

    Attributes:
        loss: f, the outer loss.
        aux: the outer loss's auxiliary output.
        context: cotangent of the context, or None for zero.
        start: cotangent of φ₀, or None for zero.
        report: see `Report`.
    """

    loss: Scalar
    aux: PyTree
    context: Context | None
    start: Params | None
    report: Report


class Hypergradient(NamedTuple):
    """What an estimator says of a chunk of tasks.

    Attributes:
        gradient: Σ_i w_i ∇F_i over the usable tasks, like the inexact leaves of the meta-parameters
            (None elsewhere).
        usable: [tasks] whether everything about the task was finite; the others are left out.
        loss: [tasks] f_i.
        aux: the outer losses' auxiliary outputs, each with a leading axis of tasks.
        report: see `Report`, each entry [tasks].
    """

    gradient: MetaParams
    usable: Bool[Array, " tasks"]
    loss: Float[Array, " tasks"]
    aux: PyTree
    report: Report


TaskRule: TypeAlias = Callable[[Problem, InnerLoop, Params, Context, Array], TaskGradient]
Estimator: TypeAlias = Callable[
    [Problem, InnerLoop, MetaParams, Batch, Float[Array, " tasks"], Key[Array, " tasks"]],
    Hypergradient,
]


def per_task(rule: TaskRule, name: str, through_start: bool = True) -> Estimator:
    r"""Make a chunk estimator of a rule for one task.

    $$\sum_i w_i \nabla F_i = \Big(\frac{\partial (c_1 \dots c_n, \phi_0)}{\partial\theta}\Big)^\top
      (w_1 \bar c_1 \dots w_n \bar c_n, \textstyle\sum_i w_i \bar\phi_{0,i})$$

    Args:
        rule: (problem, inner, φ₀, context, key) -> `TaskGradient`, for one task. The context it
            sees holds only the leaves that depend on θ; the rest is bound into the problem.
        name: of the estimator, for errors.
        through_start: whether the rule differentiates through φ₀ and the solver's steps. If not,
            meta-parameters that act through those alone are refused.

    Returns:
        The estimator.
    """

    def estimator(
        problem: Problem,
        inner: InnerLoop,
        meta_params: MetaParams,
        tasks: Batch,
        weights: Float[Array, " tasks"],
        keys: Key[Array, " tasks"],
    ) -> Hypergradient:
        if not through_start:
            refuse_structural_zeros(problem, meta_params, tasks, name)
        floats, others = trees.split_inexact(meta_params)

        def embed(floats: MetaParams) -> tuple[Context, Params]:
            theta = trees.merge(floats, others)
            contexts = jax.vmap(problem.embed, in_axes=(None, 0))(theta, tasks)
            return contexts, problem.init(theta)

        dependent, start_dependent = trees.dependence(embed, floats)

        def active_parts(floats: MetaParams) -> tuple[tuple, tuple]:
            contexts, start = embed(floats)
            active, passive = trees.split(contexts, dependent)
            return (active, trees.split(start, start_dependent)[0]), (passive, start)

        (active, _), pull_back, (passive, start) = jax.vjp(active_parts, floats, has_aux=True)

        def one_task(active: Context, passive: Context, key: Array) -> TaskGradient:
            return rule(bind(problem, passive), inner, start, active, key)

        found = jax.vmap(one_task)(active, passive, keys)
        context_bar = _or_zeros(found.context, active)
        start_bar = _or_zeros(found.start, jax.vmap(lambda _: start)(weights))
        start_bar, _ = trees.split(start_bar, start_dependent)
        usable = jax.vmap(trees.all_finite)((found.loss, context_bar, start_bar)) & (weights > 0)

        def weighted(leaf: Array) -> Array:
            shape = (-1,) + (1,) * (leaf.ndim - 1)
            weight = weights.reshape(shape).astype(leaf.dtype)
            return jnp.where(usable.reshape(shape), weight * leaf, 0)

        context_bar = jax.tree.map(weighted, context_bar)
        start_bar = jax.tree.map(lambda leaf: jnp.sum(weighted(leaf), axis=0), start_bar)
        (gradient,) = pull_back((context_bar, start_bar))
        return Hypergradient(gradient, usable, found.loss, found.aux, found.report)

    return estimator


def _or_zeros(cotangent: PyTree | None, like: PyTree) -> PyTree:
    return jax.tree.map(jnp.zeros_like, like) if cotangent is None else cotangent


def bind(problem: Problem, passive: Context) -> Problem:
    """The same problem as a function of the context's active leaves alone."""

    def bound(function: Callable | None) -> Any:
        if function is None:
            return None
        return lambda *arguments: function(*arguments[:-1], trees.merge(arguments[-1], passive))

    return replace(
        problem,
        inner_loss=bound(problem.inner_loss),
        outer_loss=bound(problem.outer_loss),
        smoothness=bound(problem.smoothness),
        strong_convexity=bound(problem.strong_convexity),
    )


def refuse_structural_zeros(
    problem: Problem, meta_params: MetaParams, tasks: Batch, name: str
) -> None:
    """Raise where an implicit hypergradient would be zero by construction.

    At the solution of the inner problem φ* depends on θ only through the inner loss: where the inner
    loop started and with what rate it ran leave no trace.

    Args:
        problem: the problem.
        meta_params: θ.
        tasks: one chunk of tasks.
        name: of the estimator.

    Raises:
        ValueError: naming each meta-parameter that appears in neither loss, with the remedy.
    """
    floats, others = trees.split_inexact(meta_params)
    task = jax.tree.map(lambda leaf: leaf[0], tasks)
    start = problem.init(meta_params)

    def losses(chosen: MetaParams, rest: MetaParams) -> tuple[Scalar, Scalar]:
        context = problem.embed(trees.merge(trees.merge(chosen, rest), others), task)
        return problem.inner_loss(start, context), problem.outer_loss(start, context)[0]

    paths = jax.tree_util.tree_leaves_with_path(floats)
    structure = jax.tree.structure(floats)
    missing = []
    for index, (path, _) in enumerate(paths):
        mask = jax.tree.unflatten(structure, [i == index for i in range(len(paths))])
        chosen, rest = trees.split(floats, mask)
        if not any(jax.tree.leaves(trees.dependence(lambda c, rest=rest: losses(c, rest), chosen))):
            missing.append(jax.tree_util.keystr(path) or "meta_params")
    if missing:
        raise ValueError(
            f"{name}: the hypergradient of {', '.join(missing)} is zero by construction: neither "
            "inner_loss nor outer_loss depends on it through the context (an initialisation or an "
            "inner learning rate leaves no trace at the inner solution). Add a proximal term to "
            "inner_loss (as in iMAML), leave it out of the meta-parameters, or use an estimator "
            "that differentiates the steps, such as unrolled()."
        )
