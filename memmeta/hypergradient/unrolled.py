r"""Reverse-mode differentiation of the unrolled inner loop: MAML, ANIL, ITD-BiO."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from memmeta.hypergradient.estimator import Estimator, TaskGradient, per_task, unsolved_report
from memmeta.inner import InnerLoop
from memmeta.problem import Context, Params, Problem, Scalar


def unrolled() -> Estimator:
    r"""The exact gradient of f(φ_K(θ), θ) through all K steps; memory grows with K.

    $$\nabla F_i = \frac{d}{d\theta} f_i(\theta, \phi_K(\theta))$$

    Returns:
        The estimator.

    Source: Finn, Abbeel, Levine (ICML 2017), equation 1, for any number of steps.

    Example:
        >>> estimator = unrolled()
    """

    def rule(
        problem: Problem, inner: InnerLoop, start: Params, context: Context, key: Array
    ) -> TaskGradient:
        def final_loss(start: Params, context: Context) -> tuple[Scalar, tuple]:
            state = inner.advance(
                problem, inner.start(problem, start, context), context, inner.steps
            )
            loss, aux = problem.outer_loss(state.params, context)
            return loss, (aux, unsolved_report(state))

        loss, pull_back, (aux, report) = jax.vjp(final_loss, start, context, has_aux=True)
        start_bar, context_bar = pull_back(jnp.ones_like(loss))
        return TaskGradient(loss, aux, context_bar, start_bar, report)

    return per_task(rule, "unrolled")
