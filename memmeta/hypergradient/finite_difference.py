r"""Differences of inner solutions in place of their Jacobian (PZOBO)."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from memmeta import trees
from memmeta.hypergradient.differences import check_scale, shifted, step_length
from memmeta.hypergradient.directions import along_directions, check_directions, reported
from memmeta.hypergradient.estimator import (
    Embedded,
    Estimator,
    Hypergradient,
    TaskGradient,
    bind,
    embedded,
    weighted,
)
from memmeta.hypergradient.over_tasks import over_tasks
from memmeta.inner import InnerLoop, widened
from memmeta.problem import Batch, Context, MetaParams, Params, Problem


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
    check_directions(directions)
    check_scale(scale)

    def estimator(
        problem: Problem,
        inner: InnerLoop,
        meta_params: MetaParams,
        tasks: Batch,
        weights: Float[Array, " tasks"],
        key: Key[Array, ""],
    ) -> Hypergradient:
        floats, others = trees.split_inexact(meta_params)
        chunk = embedded(problem, meta_params, tasks)
        length = step_length(scale, floats)
        direct = partial(_direct_part, inner, chunk, estimate_error)
        found = over_tasks(direct, chunk.active, chunk.passive)

        def solutions(floats: MetaParams) -> Params:
            theta = trees.merge(floats, others)
            wide_problem, start, _ = widened(problem, problem.init(theta))
            contexts = over_tasks(partial(problem.embed, theta), tasks)
            return over_tasks(lambda c: inner.run(wide_problem, start, c).params, contexts)

        def derivatives(direction: MetaParams) -> Float[Array, " tasks"]:
            plus, minus = (solutions(shifted(floats, direction, sign * length)) for sign in (1, -1))
            change = jax.tree.map(lambda a, b: (a - b) / (2 * length), plus, minus)
            products = jax.tree.map(lambda c, o: jax.vmap(jnp.vdot)(c, o), change, found.start)
            return sum(jax.tree.leaves(products), jnp.zeros_like(found.loss))

        finite = jax.vmap(trees.all_finite)((found.loss, found.context, found.start))
        drawn = along_directions(
            derivatives, floats, jnp.where(finite, weights, 0), key, directions
        )
        context_bar = weighted(found.context, weights, drawn.usable)
        fixed = chunk.pull_back(context_bar, jax.tree.map(jnp.zeros_like, chunk.start))
        gradient = jax.tree.map(jnp.add, fixed, drawn.gradient)
        report = found.report._replace(standard_error=drawn.standard_error)
        return Hypergradient(gradient, drawn.usable, found.loss, found.aux, report)

    return estimator


def _direct_part(
    inner: InnerLoop, chunk: Embedded, estimate_error: bool, active: Context, passive: Context
) -> TaskGradient:
    """The inner loop of one task, and what of ∇F_i does not go through it; ∂_φ f as `start`."""
    task = bind(chunk.problem, passive)
    state = inner.run(task, chunk.start, active)
    loss, pull_back, aux = jax.vjp(task.outer_loss, state.params, active, has_aux=True)
    outer_params, outer_context = pull_back(jnp.ones_like(loss))
    report = reported(task, inner, chunk, state, active, estimate_error)
    return TaskGradient(loss, aux, outer_context, outer_params, report)
