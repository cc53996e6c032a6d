r"""Differences of inner solutions in place of their Jacobian (PZOBO)."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from memmeta._shared import checks, trees
from memmeta._shared.readable import named
from memmeta.hypergradient._differences import shifted, step_length
from memmeta.hypergradient._directions import along_directions, reported
from memmeta.hypergradient._estimator import (
    Embedded,
    TaskGradient,
    begin_task,
    embedded,
    kept,
    over_tasks,
    task_keys,
    weighted,
)
from memmeta.hypergradient._seam import Chunk, Estimator, Hypergradient, Memory
from memmeta.hypergradient._structural_zeros import loop_seen, refuse_structural_zeros
from memmeta.inner import InnerLoop
from memmeta.inner._loop import widened
from memmeta.problem import Context, MetaParams, Params, Problem, Scalar, SplitContext


@named
def finite_difference(
    directions: int = 1, scale: float | None = None, *, estimate_error: bool = False
) -> Estimator:
    r"""The Jacobian of φ_K by central differences along random directions, the rest exactly.

    $$\hat\nabla F_i = \partial_\theta f_i + \frac1m \sum_{j=1}^m \Big\langle
      \frac{\phi_K(\theta + \delta u_j) - \phi_K(\theta - \delta u_j)}{2\delta},\,
      \partial_\phi f_i \Big\rangle u_j$$

    Only the part of the gradient that goes through the inner loop is random, and no second
    derivative is taken. Bias O(δ²). A rate that the inner solver takes from the curvature moves
    with θ here, as in `evolution_strategies`.

    Args:
        directions: m, drawn from {−1, 1}^dim θ, the same for all tasks of a meta-step.
        scale: δ; None takes the step at which rounding and bias are alike, see `step_length`.
        estimate_error: see `forward_mode`; it takes second derivatives, so it is to be asked for.

    Returns:
        The estimator.

    Raises:
        ValueError: `directions` is less than 1, or `scale` is not positive.

    Source: Sow, Ji, Liang, "On the Convergence Theory for Hessian-Free Bilevel Algorithms"
    (PZOBO, NeurIPS 2022), equation 5, with central differences.

    Example:
        >>> estimator = finite_difference(directions=8)
    """
    checks.count("directions", directions)
    if scale is not None:
        checks.positive("scale", scale)

    def estimator(
        problem: Problem, inner: InnerLoop, meta_params: MetaParams, chunk: Chunk
    ) -> Hypergradient:
        refuse_structural_zeros(problem, inner, meta_params, chunk, "finite_difference", loop_seen)
        floats, others = trees.split_inexact(meta_params)
        all_tasks, keys = embedded(problem, meta_params, chunk.tasks), task_keys(chunk)
        step = step_length(scale, floats)
        estimating = estimate_error and chunk.wanted.errors
        direct = partial(_direct_part, inner, all_tasks, estimating)
        found = over_tasks(direct, all_tasks.contexts, keys, chunk.memory)
        memory = kept(chunk, inner, found.state, keys)

        def solutions(floats: MetaParams) -> Params:
            theta = trees.merge(floats, others)
            wide_problem, start, _ = widened(problem, problem.init(theta))
            contexts = over_tasks(partial(problem.embed, theta), chunk.tasks)

            def run(context: Context, key: Array, memory: Memory | None) -> Params:
                begin = begin_task(start, SplitContext(context, None), key, memory)
                return inner.run(wide_problem, begin.params, context, key, begin.earlier).params

            return over_tasks(run, contexts, keys, chunk.memory)

        def derivatives(direction: MetaParams) -> Float[Array, " tasks"]:
            plus, minus = (solutions(shifted(floats, direction, sign * step)) for sign in (1, -1))
            change = jax.tree.map(lambda a, b: (a - b) / (2 * step), plus, minus)
            products = jax.tree.map(lambda c, o: jax.vmap(jnp.vdot)(c, o), change, found.start)
            return sum(jax.tree.leaves(products), jnp.zeros_like(found.loss))

        finite = jax.vmap(trees.all_finite)((found.loss, found.context, found.start))
        drawn = along_directions(
            derivatives, floats, jnp.where(finite, chunk.weights, 0), chunk.key, directions
        )
        context_bar = weighted(found.context, chunk.weights, drawn.usable)
        fixed = all_tasks.pull_back(context_bar, jax.tree.map(jnp.zeros_like, all_tasks.start))
        gradient = jax.tree.map(jnp.add, fixed, drawn.gradient)
        report = found.report._replace(standard_error=drawn.standard_error)
        return Hypergradient(gradient, drawn.usable, found.loss, found.aux, report, memory)

    return estimator


def _direct_part(
    inner: InnerLoop,
    all_tasks: Embedded,
    estimate_error: bool,
    context: SplitContext,
    key: Array,
    memory: Memory | None,
) -> TaskGradient:
    """The inner loop of one task and ∂_c f at its end; `start` holds ∂_φ f."""
    problem, begin = all_tasks.problem, begin_task(all_tasks.start, context, key, memory)
    state = inner.run(problem, begin.params, context.whole, key, begin.earlier)

    def outer_loss(params: Params, active: Context) -> tuple[Scalar, Any]:
        return problem.outer_loss(params, context.at(active))

    loss, pull_back, aux = jax.vjp(outer_loss, state.params, context.active, has_aux=True)
    outer_params, outer_context = pull_back(jnp.ones_like(loss))
    report = reported(inner, all_tasks, begin, state, estimate_error)
    return TaskGradient(loss, aux, outer_context, outer_params, report, state)
