r"""First-order estimators: the inner loop is not differentiated at all."""

from typing import Any

import jax
import jax.numpy as jnp

from memmeta._shared.readable import named
from memmeta.certificate._estimate import gain_along, given_curvature, residuals_with_error
from memmeta.hypergradient._estimator import TaskGradient, TaskStart, per_task, report_of_loop
from memmeta.hypergradient._seam import Estimator
from memmeta.hypergradient._structural_zeros import ends_seen, start_seen
from memmeta.hypergradient._unrolled import has_known_curvature
from memmeta.inner import InnerLoop
from memmeta.problem import Context, Params, Problem, Scalar, SplitContext


@named
def first_order(*, estimate_error: bool = False) -> Estimator:
    r"""FOMAML: dφ_K/dφ₀ counts as the identity.

    $$\nabla F_i \approx \partial_\theta f_i(\theta, \phi_K)
      + \frac{\partial \phi_0}{\partial\theta}^{\top} \partial_\phi f_i(\theta, \phi_K)$$

    Args:
        estimate_error: whether the report has an `error_estimate` where the problem gives its
            `strong_convexity`. It costs three mixed products and two gradients of f, so it is to be
            asked for.

    Returns:
        The estimator.

    Source: Finn, Abbeel, Levine (ICML 2017), section 5.2.

    Example:
        >>> estimator = first_order()
    """

    def rule(problem: Problem, inner: InnerLoop, begin: TaskStart) -> TaskGradient:
        context = begin.context.whole
        state = inner.run(problem, begin.params, context, begin.key, begin.earlier)

        def outer_loss(params: Params, active: Context) -> tuple[Scalar, Any]:
            return problem.outer_loss(params, begin.context.at(active))

        arguments = (state.params, begin.context.active)
        loss, pull_back, aux = jax.vjp(outer_loss, *arguments, has_aux=True)
        outer = pull_back(jnp.ones_like(loss))
        report = report_of_loop(state)
        wanted = estimate_error and begin.wanted.errors
        if wanted and has_known_curvature(problem, inner):
            error = _error(problem, state.params, outer, begin.context)
            report = report._replace(error_estimate=error)
        return TaskGradient(loss, aux, outer[1], outer[0], report, state)

    return per_task(rule, "first_order", ends_seen)


def _error(
    problem: Problem, params: Params, outer: tuple[Params, Context], context: SplitContext
) -> Scalar:
    """The error of v̂ = 0: all of ∂_φ f is left over."""
    gain = gain_along(problem, params, outer[0], context)
    curvature = given_curvature(problem, context.whole, gain)
    nothing = jax.tree.map(jnp.zeros_like, params)
    return residuals_with_error(problem, params, nothing, outer, context, curvature, gain)[1].total


@named
def reptile() -> Estimator:
    r"""Reptile: towards the adapted parameters; the outer loss is reported, not differentiated.

    $$\nabla F_i \approx \frac{\partial \phi_0}{\partial\theta}^{\top}
      (\phi_0 - \phi_K)$$

    It is no estimate of a hypergradient, and has no `error_estimate`.

    Returns:
        The estimator.

    Source: Nichol, Achiam, Schulman (2018), Algorithm 2.

    Example:
        >>> estimator = reptile()
    """

    def rule(problem: Problem, inner: InnerLoop, begin: TaskStart) -> TaskGradient:
        context = begin.context.whole
        state = inner.run(problem, begin.params, context, begin.key, begin.earlier)
        loss, aux = problem.outer_loss(state.params, context)
        start_bar = jax.tree.map(jnp.subtract, begin.params, state.params)
        return TaskGradient(loss, aux, None, start_bar, report_of_loop(state), state)

    return per_task(rule, "reptile", start_seen)
