r"""Reverse-mode differentiation of the last inner steps only."""

import jax
from jaxtyping import Array

from memmeta._shared import checks
from memmeta._shared.readable import named
from memmeta.hypergradient._estimator import per_task
from memmeta.hypergradient._seam import Chunk, Estimator, Hypergradient
from memmeta.hypergradient._structural_zeros import loop_seen, steps_seen
from memmeta.hypergradient._unrolled import through
from memmeta.inner import InnerLoop, InnerState
from memmeta.problem import Context, MetaParams, Problem


@named
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
    checks.count("last", last)

    def loop(
        problem: Problem, inner: InnerLoop, state: InnerState, context: Context, key: Array
    ) -> InnerState:
        if inner.steps <= last:
            return inner.advance(problem, state, context, key, inner.steps)
        # the context too: what it did to the first K − k steps is left out
        fixed, fixed_context = jax.lax.stop_gradient((state, context))
        state = inner.advance(problem, fixed, fixed_context, key, inner.steps - last)
        return inner.advance(problem, jax.lax.stop_gradient(state), context, key, last)

    def estimator(
        problem: Problem, inner: InnerLoop, meta_params: MetaParams, chunk: Chunk
    ) -> Hypergradient:
        seen = steps_seen if inner.steps > last else loop_seen
        whole = per_task(through(loop, estimate_error), "truncated", seen)
        return whole(problem, inner, meta_params, chunk)

    return estimator
