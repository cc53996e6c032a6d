r"""First-order estimators: the inner loop is not differentiated at all."""

import jax
import jax.numpy as jnp

from memmeta.hypergradient.error_estimate import (
    can_be_judged,
    coupling,
    given_curvature,
    judged,
)
from memmeta.hypergradient.estimator import Estimator, TaskGradient, per_task
from memmeta.hypergradient.report import unsolved_report
from memmeta.hypergradient.structural_zeros import ends_seen, start_seen
from memmeta.inner import InnerLoop
from memmeta.problem import Context, Params, Problem, Scalar


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

    def rule(problem: Problem, inner: InnerLoop, start: Params, context: Context) -> TaskGradient:
        state = inner.run(problem, start, context)
        loss, pull_back, aux = jax.vjp(problem.outer_loss, state.params, context, has_aux=True)
        start_bar, context_bar = pull_back(jnp.ones_like(loss))
        report = unsolved_report(state)
        if estimate_error and can_be_judged(problem, inner):
            report = report._replace(
                error_estimate=_error(problem, state.params, (start_bar, context_bar), context)
            )
        return TaskGradient(loss, aux, context_bar, start_bar, report)

    return per_task(rule, "first_order", ends_seen)


def _error(
    problem: Problem, params: Params, outer: tuple[Params, Context], context: Context
) -> Scalar:
    """That of v̂ = 0: all of ∂_φ f is left over."""
    gain = coupling(problem, params, outer[0], context)
    curvature = given_curvature(problem, context, gain)
    nothing = jax.tree.map(jnp.zeros_like, params)
    return judged(problem, params, nothing, outer, context, curvature, gain).estimate


def reptile() -> Estimator:
    r"""Reptile: towards the adapted parameters; the outer loss is reported, not differentiated.

    $$\nabla F_i \approx \frac{\partial \phi_0}{\partial\theta}^{\top}
      (\phi_0 - \phi_K)$$

    It is no estimate of a hypergradient: its `error_estimate` stays infinite.

    Returns:
        The estimator.

    Source: Nichol, Achiam, Schulman (2018), Algorithm 2.

    Example:
        >>> estimator = reptile()
    """

    def rule(problem: Problem, inner: InnerLoop, start: Params, context: Context) -> TaskGradient:
        state = inner.run(problem, start, context)
        loss, aux = problem.outer_loss(state.params, context)
        start_bar = jax.tree.map(jnp.subtract, start, state.params)
        return TaskGradient(loss, aux, None, start_bar, unsolved_report(state))

    return per_task(rule, "reptile", start_seen)
