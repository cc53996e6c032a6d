r"""Reverse-mode differentiation of the last inner steps only."""

import jax
from jaxtyping import Array, Float, Key

from memmeta.hypergradient.estimator import Estimator, Hypergradient, per_task
from memmeta.hypergradient.structural_zeros import steps_seen
from memmeta.hypergradient.unrolled import through
from memmeta.inner import InnerLoop, InnerState
from memmeta.problem import Batch, Context, MetaParams, Problem


def truncated(last: int, *, estimate_error: bool = True) -> Estimator:
    r"""`unrolled` through the last k steps; φ_{K−k} counts as a constant.

    $$\nabla F_i \approx \frac{d}{d\theta} f_i(\theta, \phi_K(\theta; \phi_{K-k})), \qquad
      \|\text{error}\| = O\big((1 - 1/\kappa)^k\big)$$

    Memory grows with k, not with K.

    Args:
        last: k, at least 1. K or more gives `unrolled`.
        estimate_error: see `unrolled`.

    Returns:
        The estimator.

    Raises:
        ValueError: `last` is less than 1.

    Source: Shaban, Cheng, Hatch, Boots (AISTATS 2019), equation 9.

    Example:
        >>> estimator = truncated(last=5)
    """
    if not isinstance(last, int) or last < 1:
        raise ValueError(f"last: expected a whole number of steps, 1 or more, found {last!r}.")

    def loop(problem: Problem, inner: InnerLoop, state: InnerState, context: Context) -> InnerState:
        if inner.steps <= last:
            return inner.advance(problem, state, context, inner.steps)
        fixed, fixed_context = jax.lax.stop_gradient((state, context))
        state = inner.advance(problem, fixed, fixed_context, inner.steps - last)
        return inner.advance(problem, jax.lax.stop_gradient(state), context, last)

    def estimator(
        problem: Problem,
        inner: InnerLoop,
        meta_params: MetaParams,
        tasks: Batch,
        weights: Float[Array, " tasks"],
        key: Key[Array, ""],
    ) -> Hypergradient:
        seen = steps_seen if inner.steps > last else None
        whole = per_task(through(loop, estimate_error), "truncated", seen)
        return whole(problem, inner, meta_params, tasks, weights, key)

    return estimator
