r"""First-order estimators: the inner loop is not differentiated at all."""

import jax
import jax.numpy as jnp

from memmeta.hypergradient.estimator import Estimator, TaskGradient, per_task
from memmeta.hypergradient.report import unsolved_report
from memmeta.hypergradient.structural_zeros import ends_seen, start_seen
from memmeta.inner import InnerLoop
from memmeta.problem import Context, Params, Problem


def first_order() -> Estimator:
    r"""FOMAML: dφ_K/dφ₀ counts as the identity.

    $$\nabla F_i \approx \partial_\theta f_i(\theta, \phi_K)
      + \frac{\partial \phi_0}{\partial\theta}^{\top} \partial_\phi f_i(\theta, \phi_K)$$

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
        return TaskGradient(loss, aux, context_bar, start_bar, unsolved_report(state))

    return per_task(rule, "first_order", ends_seen)


def reptile() -> Estimator:
    r"""Reptile: towards the adapted parameters; the outer loss is reported, not differentiated.

    $$\nabla F_i \approx \frac{\partial \phi_0}{\partial\theta}^{\top}
      (\phi_0 - \phi_K)$$

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
