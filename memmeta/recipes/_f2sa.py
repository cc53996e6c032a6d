r"""F²SA: no second derivative; the inner problem lives twice, with and without a little of f."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from memmeta import _checks
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
    counts 1/δ times. δ = 1/λ of the paper. The loss reported is f at φ, or between φ₊ and φ₋.

    Args:
        problem: the bilevel problem.
        optimizer: of θ, with its rate.
        rate: of φ.
        delta: δ.
        steps: K.
        p: 1 or 2.
        view: (context, key, step) -> what a step sees, of the data of both losses; None: all.
        size: inner problems, a task each.

    Returns:
        The meta-step, to be called as `step(state, tasks)`; φ in its state is a pair.

    Raises:
        ValueError: `rate` or `delta` is not positive, or `p` neither 1 nor 2.

    Source: Kwon, Kwon, Wright, Nowak, "A Fully First-Order Method for Stochastic Bilevel
    Optimization" (F²SA, ICML 2023), Algorithm 1; p = 2: Chen, Li, Chayti, Zhang, "Faster Gradient
    Methods for Highly-Smooth Stochastic Bilevel Optimization" (F²SA-p, ICLR 2026).

    Example:
        >>> import memmeta as mm
        >>> problem = mm.Problem(
        ...     embed=lambda theta, target: (theta, target),
        ...     inner_loss=lambda phi, c: 0.5 * jnp.sum((phi - c[0]) ** 2),
        ...     outer_loss=lambda phi, c: (0.5 * jnp.sum((phi - c[1]) ** 2), {}),
        ...     init=jnp.zeros_like,
        ... )
        >>> step = f2sa(problem, optax.sgd(0.1), rate=0.5, delta=0.01)
        >>> task = jnp.array([[1.0, 2.0]])
        >>> state = step.init(jnp.zeros(2), task)
        >>> for _ in range(200):
        ...     state, metrics = step(state, task)
        >>> state.meta.meta_params.round(2).tolist()
        [1.0, 2.0]
    """
    _checks.positive("delta", delta)
    _checks.count("steps", steps)
    _checks.one_of("p", p, (1, 2))
    lower = -delta if p == 2 else 0.0

    def tilted(problem: Problem, weight: float, params: Params, context: Context) -> Scalar:
        """g + weight · f."""
        inner, outer = problem.inner_loss(params, context), problem.outer_loss(params, context)[0]
        return inner + jnp.asarray(weight, inner.dtype) * outer.astype(inner.dtype)

    def difference(pair: tuple[Params, Params], context: Context) -> Scalar:
        """Its derivative by c, with φ₊ and φ₋ held fixed, is the hypergradient."""
        plus, minus = (
            tilted(problem, weight, params, context)
            for weight, params in zip((delta, lower), pair, strict=True)
        )
        return (plus - minus) / (delta - lower)

    def in_pairs(problem: Problem) -> Problem:
        def inner_loss(pair: tuple[Params, Params], context: Context) -> Scalar:
            plus = tilted(problem, delta, pair[0], context)
            return plus + tilted(problem, lower, pair[1], context)

        def outer_loss(pair: tuple[Params, Params], context: Context) -> tuple[Scalar, Any]:
            middle = pair[1] if p == 1 else jax.tree.map(lambda a, b: (a + b) / 2, *pair)
            return problem.outer_loss(middle, context)

        twice = lambda theta: (problem.init(theta), problem.init(theta))  # noqa: E731
        return Problem(problem.embed, inner_loss, outer_loss, twice)

    def rule(pairs: Problem, inner: InnerLoop, begin: TaskStart) -> TaskGradient:
        state = inner.run(pairs, begin.params, begin.context.whole, begin.key, begin.earlier)
        key = jax.random.fold_in(begin.key, OUTER)
        context, pull_back = drawn(view, begin.context, key, state.before // steps)
        pair = state.params
        slope = jax.grad(lambda active: difference(pair, context.at(active)))(context.active)
        loss, aux = pairs.outer_loss(pair, context.whole)
        report = report_of_loop(state)
        return TaskGradient(loss, aux, pull_back(slope), None, report, state)

    return made(
        in_pairs(problem), rule, "f2sa", optimizer, rate=rate, steps=steps, view=view, size=size
    )
