r"""The unrolled inner loop with Hessian products by differences of inner gradients (HF-MAML)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from memmeta import trees
from memmeta.hypergradient.estimator import Estimator, per_task
from memmeta.hypergradient.gradient_rules import with_products
from memmeta.hypergradient.unrolled import checkpoint, through
from memmeta.inner import InnerLoop, InnerState
from memmeta.problem import Context, Params, Problem


def hessian_free(scale: float = 1e-3) -> Estimator:
    r"""`unrolled` without second derivatives: central differences of first ones.

    $$\partial^2 g\, u \approx \frac{\|u\|}{2\delta} \big(\nabla g(\phi + \delta u / \|u\|, c)
      - \nabla g(\phi - \delta u / \|u\|, c)\big)$$

    for both the Hessian and the mixed product. Error O(δ²) plus rounding over δ. Memory grows as K
    states plus one first-order step.

    Args:
        scale: δ, the length of the step in φ.

    Returns:
        The estimator.

    Raises:
        ValueError: `scale` is not positive.

    Source: Fallah, Mokhtari, Ozdaglar (AISTATS 2020), Algorithm 3 (HF-MAML), for any number of
    steps and any inner solver.

    Example:
        >>> estimator = hessian_free(scale=1e-3)
    """
    if not scale > 0:
        raise ValueError(f"scale: expected a positive step length, found {scale}.")

    def products(
        both: Callable, params: Params, context: Context, u: Params
    ) -> tuple[Params, Context]:
        length = trees.norm(u)
        step = scale / jnp.where(length > 0, length, 1)

        def shifted(sign: float) -> tuple[Params, Context]:
            moved = jax.tree.map(lambda p, x: p + (sign * step).astype(p.dtype) * x, params, u)
            return both(moved, context)

        return jax.tree.map(
            lambda plus, minus: (plus - minus) / (2 * step).astype(plus.dtype),
            shifted(1.0),
            shifted(-1.0),
        )

    def loop(problem: Problem, inner: InnerLoop, start: Params, context: Context) -> InnerState:
        state = inner.start(problem, start, context)
        ruled = with_products(problem, products)
        return inner.advance(ruled, state, context, inner.steps, checkpoint)

    return per_task(through(loop), "hessian_free")
