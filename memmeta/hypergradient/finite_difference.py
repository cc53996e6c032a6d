r"""Differences of inner solutions in place of their Jacobian (PZOBO)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from memmeta import trees
from memmeta.hypergradient.directions import along_directions, check_directions
from memmeta.hypergradient.estimator import (
    Estimator,
    Hypergradient,
    TaskGradient,
    bind,
    embedded,
    weighted,
)
from memmeta.hypergradient.evolution_strategies import shifted
from memmeta.hypergradient.report import unsolved_report
from memmeta.inner import InnerLoop, widened
from memmeta.problem import Batch, Context, MetaParams, Params, Problem


def finite_difference(directions: int = 1, scale: float = 1e-3) -> Estimator:
    r"""The Jacobian of φ_K by central differences along random directions, the rest exactly.

    $$\hat\nabla F_i = \partial_\theta f_i + \frac1m \sum_{j=1}^m \Big\langle
      \frac{\phi_K(\theta + \delta u_j) - \phi_K(\theta - \delta u_j)}{2\delta},\,
      \partial_\phi f_i \Big\rangle u_j$$

    Only the part of the gradient that goes through the inner loop is random, and no second
    derivative is taken. Bias O(δ²).

    Args:
        directions: m, drawn from {−1, 1}^dim θ, the same for all tasks of a meta-step.
        scale: δ.

    Returns:
        The estimator.

    Raises:
        ValueError: `directions` is less than 1, or `scale` is not positive.

    Source: Sow, Ji, Liang, "On the Convergence Theory for Hessian-Free Bilevel Algorithms"
    (PZOBO, NeurIPS 2022), equation 5, with central differences.

    Example:
        >>> estimator = finite_difference(directions=8, scale=1e-3)
    """
    check_directions(directions)
    if not scale > 0:
        raise ValueError(f"scale: expected a positive step length, found {scale}.")

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

        def direct(active: Context, passive: Context) -> TaskGradient:
            task = bind(chunk.problem, passive)
            state = inner.run(task, chunk.start, active)
            loss, pull_back, aux = jax.vjp(task.outer_loss, state.params, active, has_aux=True)
            outer_params, outer_context = pull_back(jnp.ones_like(loss))
            return TaskGradient(loss, aux, outer_context, outer_params, unsolved_report(state))

        found = jax.vmap(direct)(chunk.active, chunk.passive)

        def solutions(floats: MetaParams) -> Params:
            theta = trees.merge(floats, others)
            wide_problem, start, _ = widened(problem, problem.init(theta))
            contexts = jax.vmap(problem.embed, in_axes=(None, 0))(theta, tasks)
            return jax.vmap(lambda c: inner.run(wide_problem, start, c).params)(contexts)

        def derivatives(direction: MetaParams) -> Float[Array, " tasks"]:
            plus, minus = (solutions(shifted(floats, direction, sign * scale)) for sign in (1, -1))
            change = jax.tree.map(lambda a, b: (a - b) / (2 * scale), plus, minus)
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
