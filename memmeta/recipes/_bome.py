r"""BOME: descent of f with a barrier that makes the value function's gap fall; first-order."""

import jax
import jax.numpy as jnp
import optax

from memmeta._shared import checks
from memmeta.hypergradient import TaskGradient, report_of_loop
from memmeta.hypergradient._estimator import TaskStart, drawn
from memmeta.inner import InnerLoop
from memmeta.inner._views import View
from memmeta.linear_solve._solution import dot
from memmeta.meta import WarmStart
from memmeta.problem import Context, Params, Problem
from memmeta.recipes._directions import made, moved, outer_at


def bome(
    problem: Problem,
    optimizer: optax.GradientTransformation,
    *,
    rate: float,
    steps: int,
    outer_rate: float,
    eta: float = 0.5,
    view: View | None = None,
    size: int = 1,
) -> WarmStart:
    r"""BOME: φ and θ descend f together, subject to the gap of the inner problem closing.

    With φ̂ after K steps on g from φ, held fixed, and q = g(φ) − g(φ̂),

    $$(\phi, \theta) \leftarrow (\phi, \theta) - \xi \, (\nabla f + \lambda \nabla q), \qquad
      \lambda = \max\big(0, \; \eta - \langle \nabla f, \nabla q\rangle \,/\, \|\nabla q\|^2\big)$$

    Gradients are by (φ, c): where `embed` passes θ on as it is, by (φ, θ).

    Arguments that are not listed are those of `soba`, and so is what it returns.

    Args:
        optimizer: of θ, with its rate ξ.
        rate: of the K steps to φ̂.
        steps: K.
        outer_rate: ξ of φ.
        eta: η, how fast the gap has to close.

    Raises:
        ValueError: a rate or `eta` is not positive, or `steps` no whole number above 0.

    Source: Liu, Ye, Wright, Stone, Liu, "BOME! Bilevel Optimization Made Easy: A Simple First-Order
    Approach" (NeurIPS 2022), Algorithm 1, with their φ_k = η ‖∇q‖².

    Example:
        >>> import optax
        >>> def make(problem, view):
        ...     rates = {"rate": 0.1, "outer_rate": 0.01}
        ...     return bome(problem, optax.sgd(0.01), **rates, steps=10, view=view)
    """
    checks.positive("outer_rate", outer_rate)
    checks.positive("eta", eta)
    checks.count("steps", steps)

    def rule(problem: Problem, inner: InnerLoop, begin: TaskStart) -> TaskGradient:
        phi = begin.params
        ahead = inner.run(problem, phi, begin.context.whole, begin.key, begin.earlier)
        context, pull_back = drawn(view, begin.context, begin.key, ahead.before)

        def gap(params: Params, active: Context) -> jax.Array:
            """q, with φ̂ held fixed."""
            whole = context.at(active)
            return problem.inner_loss(params, whole) - problem.inner_loss(ahead.params, whole)

        outer = outer_at(problem, phi, context)
        slope_f = (outer.params, outer.context)
        slope_q = jax.grad(gap, argnums=(0, 1))(phi, context.active)
        square = dot(slope_q, slope_q)
        share = dot(slope_f, slope_q) / jnp.where(square > 0, square, 1)
        weight = jnp.maximum(0, eta - share)
        along = jax.tree.map(lambda f, q: f + weight.astype(q.dtype) * q, slope_f, slope_q)
        state = ahead._replace(params=moved(phi, outer_rate, along[0]))
        report = report_of_loop(ahead)
        return TaskGradient(outer.loss, outer.aux, pull_back(along[1]), None, report, state)

    return made(problem, rule, "bome", optimizer, rate=rate, steps=steps, view=view, size=size)
