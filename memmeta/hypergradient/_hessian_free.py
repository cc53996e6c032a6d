r"""The unrolled inner loop with Hessian products by differences of inner gradients (HF-MAML)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from memmeta._shared import checks, trees
from memmeta._shared.readable import named
from memmeta.hypergradient._differences import shifted, step_length
from memmeta.hypergradient._estimator import per_task
from memmeta.hypergradient._gradient_rules import with_products
from memmeta.hypergradient._seam import Chunk, Estimator, Hypergradient
from memmeta.hypergradient._unrolled import checkpoint, through
from memmeta.inner import InnerLoop, InnerState
from memmeta.problem import Context, MetaParams, Params, Problem


@named
def hessian_free(scale: float | None = None, *, estimate_error: bool = False) -> Estimator:
    r"""`unrolled` without second derivatives: central differences of first ones.

    $$\partial^2 g\, u \approx \frac{\|u\|}{2\delta} \big(\nabla g(\phi + \delta u / \|u\|, c)
      - \nabla g(\phi - \delta u / \|u\|, c)\big)$$

    for both the Hessian and the mixed product. Error O(δ²) plus rounding over δ. Memory grows as K
    states plus one first-order step.

    Args:
        scale: δ, the length of the step in φ; None takes the one at which both errors are alike,
            about ε^(2/3), see `step_length`.
        estimate_error: see `unrolled`; it takes two Hessian products, so it is to be asked for.

    Returns:
        The estimator.

    Raises:
        ValueError: `scale` is not positive.

    Source: Fallah, Mokhtari, Ozdaglar (AISTATS 2020), Algorithm 3 (HF-MAML), for any number of
    steps and any inner solver.

    Example:
        >>> estimator = hessian_free()
    """
    if scale is not None:
        checks.positive("scale", scale)

    def loop(
        problem: Problem, inner: InnerLoop, state: InnerState, context: Context, key: Array
    ) -> InnerState:
        return inner.advance(problem, state, context, key, inner.steps, checkpoint)

    def estimator(
        problem: Problem, inner: InnerLoop, meta_params: MetaParams, chunk: Chunk
    ) -> Hypergradient:
        # Rules see φ in float32 at least; its losses, and so their rounding, see its own dtype.
        step = step_length(scale, jax.eval_shape(problem.init, meta_params))
        for_steps = partial(with_products, products=partial(_products, step))
        whole = per_task(through(loop, estimate_error, for_steps), "hessian_free")
        return whole(problem, inner, meta_params, chunk)

    return estimator


def _products(
    scale: float, both: Callable[..., Any], params: Params, context: Context, u: Params
) -> tuple[Params, Context]:
    norm = trees.norm(u)
    step = scale / jnp.where(norm > 0, norm, 1)  # of u = 0 any step gives zero
    plus, minus = (both(shifted(params, u, sign * step), context) for sign in (1.0, -1.0))
    quotients: tuple[Params, Context] = jax.tree.map(
        lambda a, b: (a - b) / (2 * step).astype(a.dtype), plus, minus
    )
    return quotients
