r"""Forward-over-reverse differentiation of the unrolled inner loop (MixFlow-MG)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jaxtyping import Array

from memmeta._shared.readable import named
from memmeta.hypergradient._estimator import per_task
from memmeta.hypergradient._gradient_rules import with_products
from memmeta.hypergradient._seam import Estimator
from memmeta.hypergradient._unrolled import checkpoint, through
from memmeta.inner import InnerLoop, InnerState
from memmeta.problem import Context, Params, Problem


@named
def mixed_mode(*, estimate_error: bool = True) -> Estimator:
    r"""The same gradient as `unrolled`, with Hessian products forward over reverse.

    The Hessian is symmetric, so the products reverse mode needs are a directional derivative:
    $$(\partial^2_{\phi\phi} g\, u, \; \partial^2_{c\phi} g\, u)
      = \frac{d}{d\epsilon} \nabla_{(\phi, c)}\, g(\phi + \epsilon u, c) \Big|_{\epsilon = 0}$$

    No inner backward pass is differentiated backwards, so what it kept is not kept again. Steps are
    rematerialised: memory grows as K states plus one step, as with `unrolled("step")`, with a
    smaller step.

    Args:
        estimate_error: see `unrolled`.

    Returns:
        The estimator.

    Source: Kemaev, Calian, Zintgraf, Farquhar, van Hasselt, "Scalable Meta-Learning via Mixed-Mode
    Differentiation" (2025), equations 6 and 7.

    Example:
        >>> estimator = mixed_mode()
    """

    def products(
        both: Callable[..., Any], params: Params, context: Context, u: Params
    ) -> tuple[Params, Context]:
        change: tuple[Params, Context] = jax.jvp(lambda p: both(p, context), (params,), (u,))[1]
        return change

    def loop(
        problem: Problem, inner: InnerLoop, state: InnerState, context: Context, key: Array
    ) -> InnerState:
        return inner.advance(problem, state, context, key, inner.steps, checkpoint)

    for_steps = partial(with_products, products=products)
    return per_task(through(loop, estimate_error, for_steps), "mixed_mode")
