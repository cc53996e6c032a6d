r"""F²SA: no second derivative; the inner problem lives twice, with and without a little of f."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from memmeta._shared import checks
from memmeta.hypergradient import TaskGradient, report_of_loop
from memmeta.hypergradient._estimator import TaskStart, drawn
from memmeta.inner import InnerLoop
from memmeta.inner._views import View
from memmeta.meta import WarmStart
from memmeta.problem import Context, Params, Problem, Scalar
from memmeta.recipes._directions import OUTER, made


def f2sa(
    problem: Problem,
    optimizer: optax.GradientTransformation,
    *,
    rate: float,
    delta: float,
    steps: int = 1,
    p: Literal[1, 2] = 2,
    view: View | None = None,
    size: int = 1,
) -> WarmStart:
    r"""F²SA: differences of gradients at two inner solutions that both live on.

    $$p = 1: \quad \frac{\partial_c (g + \delta f)(\phi_+) - \partial_c g(\phi)}{\delta}, \qquad
      p = 2: \quad
      \frac{\partial_c (g + \delta f)(\phi_+) - \partial_c (g - \delta f)(\phi_-)}{2 \delta}$$

    where K steps a meta-step follow φ₊ to the minimum of g + δ f, φ to that of g and φ₋ to that of
    g − δ f. The bias is O(δ) for p = 1 and O(δ²) for p = 2; what the steps leave of their slopes
    counts 1/δ times. δ = 1/λ of the paper. φ in the state is the pair that is compared. The loss
    reported is the mean of f at both, its auxiliary output that at φ, or φ₋.

    Arguments that are not listed are those of `soba`, and so is what it returns.

    Args:
        rate: of φ.
        delta: δ.
        steps: K.
        p: 1 or 2.

    Raises:
        ValueError: `rate` or `delta` is not positive, or `p` neither 1 nor 2.

    Source: Kwon, Kwon, Wright, Nowak, "A Fully First-Order Method for Stochastic Bilevel
    Optimization" (F²SA, ICML 2023), Algorithm 1; p = 2: Chen, Li, Chayti, Zhang, "Faster Gradient
    Methods for Highly-Smooth Stochastic Bilevel Optimization" (F²SA-p, ICLR 2026).

    Example:
        >>> import optax
        >>> def make(problem, view):
        ...     return f2sa(problem, optax.sgd(0.01), rate=0.1, delta=0.01, view=view)
    """
    checks.positive("delta", delta)
    checks.count("steps", steps)
    checks.one_of("p", p, (1, 2))
    lower = -delta if p == 2 else 0.0

    def tilted(weight: float, params: Params, context: Context) -> tuple[Scalar, Any]:
        """g + weight · f, and f with its auxiliary output."""
        inner = problem.inner_loss(params, context)
        outer, aux = problem.outer_loss(params, context)
        if weight == 0:
            return inner, (outer, aux)  # no gradient of f
        tilt = jnp.asarray(weight, inner.dtype) * outer.astype(inner.dtype)
        return inner + tilt, (outer, aux)

    def difference(pair: tuple[Params, Params], context: Context) -> tuple[Scalar, Any]:
        """Its derivative by c, with φ₊ and φ₋ held fixed, is the hypergradient."""
        plus, (above, _) = tilted(delta, pair[0], context)
        minus, (below, aux) = tilted(lower, pair[1], context)
        return (plus - minus) / (delta - lower), ((above + below) / 2, aux)

    def in_pairs(problem: Problem) -> Problem:
        def inner_loss(pair: tuple[Params, Params], context: Context) -> Scalar:
            return tilted(delta, pair[0], context)[0] + tilted(lower, pair[1], context)[0]

        def outer_loss(pair: tuple[Params, Params], context: Context) -> tuple[Scalar, Any]:
            outer: tuple[Scalar, Any] = difference(pair, context)[1]
            return outer

        twice = lambda theta: (problem.init(theta), problem.init(theta))  # noqa: E731
        return Problem(problem.embed, inner_loss, outer_loss, twice)

    def rule(pairs: Problem, inner: InnerLoop, begin: TaskStart) -> TaskGradient:
        whole = begin.context.whole
        state = inner.start(pairs, begin.params, whole, begin.earlier)
        state = inner.advance(pairs, state, whole, begin.key, steps)
        key = jax.random.fold_in(begin.key, OUTER)
        context, pull_back = drawn(view, begin.context, key, state.before // steps)
        pair = state.params
        slope, (loss, aux) = jax.grad(
            lambda active: difference(pair, context.at(active)), has_aux=True
        )(context.active)
        report = report_of_loop(state)
        return TaskGradient(loss, aux, pull_back(slope), None, report, state)

    return made(
        in_pairs(problem), rule, "f2sa", optimizer, rate=rate, steps=steps, view=view, size=size
    )
