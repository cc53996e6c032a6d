r"""A cheap estimate of a hypergradient's error against that of the inner solution.

Nothing is assumed of how φ̂ and v̂ were found: a linear solver's v̂ serves, and so does the one that
an unrolled loop amounts to (see `tilted`). No system is solved here.
"""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from memmeta import trees
from memmeta.inner import InnerLoop
from memmeta.linear_solve.solution import dot
from memmeta.problem import Context, Params, Problem, Scalar


class Slopes(NamedTuple):
    r"""The derivatives of f − ⟨∇_φ g, v⟩ at a point, and that of g.

    Attributes:
        inner: ∇_φ g.
        params: ∂_φ f − ∂²_φφ g · v, what the linear solver left over.
        context: ∂_c f − ∂²_cφ g · v, the implicit hypergradient in the context.
    """

    inner: Params
    params: Params
    context: Context


class Judged(NamedTuple):
    """A hypergradient with an estimate of its error.

    Attributes:
        here: the slopes at φ̂.
        estimate: of ‖∂_c f − ∂²_cφ g · v̂ − ∇F‖; infinite where it is not known.
    """

    here: Slopes
    estimate: Scalar


def outer_slopes(problem: Problem, params: Params, context: Context) -> tuple[Params, Context]:
    """∂_φ f and ∂_c f."""
    return jax.grad(lambda p, c: problem.outer_loss(p, c)[0], argnums=(0, 1))(params, context)


def slopes(
    problem: Problem, params: Params, v: Params, outer: tuple[Params, Context], context: Context
) -> Slopes:
    """The derivatives at φ̂: one mixed product.

    Args:
        problem: its inner loss is used.
        params: φ̂.
        v: v̂.
        outer: ∂_φ f and ∂_c f at φ̂.
        context: of one task.
    """
    both = lambda p: jax.grad(problem.inner_loss, argnums=(0, 1))(p, context)  # noqa: E731
    (inner, _), products = jax.jvp(both, (params,), (v,))
    return Slopes(inner, *jax.tree.map(jnp.subtract, outer, products))


def coupling(problem: Problem, params: Params, direction: Params, context: Context) -> Scalar:
    r"""‖∂²_cφ g · d‖ / ‖d‖, how strongly the context acts on ∇_φ g along one direction."""
    zeros = jax.tree.map(jnp.zeros_like, (params, context))
    return _gain(slopes(problem, params, direction, zeros, context).context, direction)


def judged(
    problem: Problem,
    params: Params,
    v: Params,
    outer: tuple[Params, Context],
    context: Context,
    curvature: Scalar,
    gain: Scalar | None = None,
    left: Scalar | None = None,
) -> Judged:
    r"""The implicit hypergradient at φ̂ and v̂, and its error from a second look at φ̂ − δ.

    With δ = ∇_φ g / μ̂ for the way to the inner solution, Δ for the change from φ̂ to φ̂ − δ, and r
    for ∂_φ f − ∂²_φφ g v̂ at φ̂,
    $$\|\Delta(\partial_c f - \partial^2_{c\phi} g\, \hat v)\|
      + \frac{\|\partial^2_{c\phi} g\, \hat v\|}{\|\hat v\| \, \hat\mu}
      \big(\|\Delta(\partial_\phi f - \partial^2_{\phi\phi} g\, \hat v)\| + \|r\|\big)$$

    The first term is the inner loop's error at fixed v̂, the second that of v̂, through the inner
    loop and through r. An estimate: μ̂ may be too large where it was only met and not given, and
    ∂²_cφ g may act more strongly than along v̂. Two mixed products and a gradient of f.

    Args:
        problem: both losses are used.
        params: φ̂.
        v: v̂.
        outer: ∂_φ f and ∂_c f at φ̂, which are known by then.
        context: of one task.
        curvature: μ̂; where it is not positive, or not known, the estimate is infinite.
        gain: `coupling` along another direction, for a v̂ of zero.
        left: ‖r‖ of the v̂ that is meant, where the one given only stands for it.

    Returns:
        Both.

    Source: first-order expansion of the error in Pedregosa (ICML 2016), Theorem 1.
    """
    known = (curvature > 0) & jnp.isfinite(curvature)
    here = slopes(problem, params, v, outer, context)
    rate = 1 / jnp.where(known, curvature, 1)
    moved = jax.tree.map(lambda p, g: p - rate.astype(g.dtype) * g, params, here.inner)
    # each pass begins when the one before is done, and takes its memory
    moved, here = jax.lax.optimization_barrier((moved, here))
    outer_there = outer_slopes(problem, moved, context)
    moved, outer_there = jax.lax.optimization_barrier((moved, outer_there))
    there = slopes(problem, moved, v, outer_there, context)

    change = jax.tree.map(jnp.subtract, there, here)
    if gain is None:
        gain = _gain(jax.tree.map(jnp.subtract, outer[1], here.context), v)
    left = trees.norm(here.params) if left is None else left
    estimate = trees.norm(change.context) + gain * (trees.norm(change.params) + left) * rate
    return Judged(here, jnp.where(known & jnp.isfinite(estimate), estimate, jnp.inf))


def _gain(image: Context, direction: Params) -> Scalar:
    length = trees.norm(direction)
    return trees.norm(image) / jnp.where(length > 0, length, 1)


def can_be_judged(problem: Problem, inner: InnerLoop) -> bool:
    """Whether an estimator that meets no curvature can judge itself: μ is given.

    Without a step (a closed form in place of an inner loop) there is nothing to judge.
    """
    return problem.strong_convexity is not None and inner.steps > 0


def given_curvature(problem: Problem, context: Context, like: Scalar) -> Scalar:
    """μ, in the dtype of `like`."""
    assert problem.strong_convexity is not None
    return problem.strong_convexity(context).astype(like.dtype)


def tilted(problem: Problem, tilt: Params | None) -> Problem:
    r"""The problem with g + ⟨e, φ⟩ in place of g.

    At an inner solution dφ*/de = −[∂²_φφ g]⁻¹. So the cotangent of e after a loop is −v̂ of the
    linear solve that the loop amounts to, for any inner solver: with gradient descent, for
    instance, K terms of the Neumann series. The values are those of e = 0.

    Args:
        problem: the problem.
        tilt: e, zeros like φ; None leaves the problem as it is.
    """
    if tilt is None:
        return problem

    def inner_loss(params: Params, context: Context) -> Scalar:
        loss = problem.inner_loss(params, context)
        return loss + dot(tilt, params).astype(loss.dtype)

    return replace(problem, inner_loss=inner_loss)


def claimed(
    problem: Problem, params: Params, v: Params, context_bar: Context, context: Context
) -> tuple[Scalar, Scalar]:
    r"""The error of a hypergradient that was found otherwise than from its v̂.

    $$\|\bar c - \nabla_c\| + \|\nabla_c - \nabla F\|, \qquad
      \nabla_c = \partial_c f - \partial^2_{c\phi} g \, \hat v$$

    the first measured, the second by `judged`.

    Args:
        problem: with a `strong_convexity`.
        params: φ̂.
        v: v̂.
        context_bar: the hypergradient in the context.
        context: of one task.

    Returns:
        The estimate, and the curvature v̂ᵀ ∂²_φφ g v̂ / v̂ᵀv̂ met on the way.
    """
    # the loop's backward pass is over, and what it kept is let go of
    params, v, context_bar = jax.lax.optimization_barrier((params, v, context_bar))
    outer = outer_slopes(problem, params, context)
    length = trees.norm(v)
    curvature = given_curvature(problem, context, length)
    here, estimate = judged(problem, params, v, outer, context, curvature)
    bend = dot(v, jax.tree.map(jnp.subtract, outer[0], here.params))
    met = jnp.where(length > 0, bend / jnp.where(length > 0, length, 1) ** 2, jnp.inf)
    return trees.norm(jax.tree.map(jnp.subtract, context_bar, here.context)) + estimate, met


def loop_error(
    problem: Problem, start: Params, params: Params, context: Context, start_counts: bool
) -> Scalar:
    r"""The error of the exact gradient of a loop that nobody differentiates in reverse.

    What the loop has left of ∂_φ f is not known then. It is taken to be the share that the loop has
    left of ∇_φ g; in the terms of `judged`,
    $$\|r\| \approx \|\partial_\phi f\| \,
      \|\nabla_\phi g(\phi_K)\| / \|\nabla_\phi g(\phi_0)\|$$

    and v̂ stands along ∂_φ f, as long as one step of steepest descent makes it. Three mixed
    products, two gradients of f and one of g.

    Args:
        problem: with a `strong_convexity`.
        start: φ₀.
        params: φ_K.
        context: of one task.
        start_counts: whether φ₀ depends on θ: then what is left of ∂_φ f reaches θ through it.

    Returns:
        The estimate.
    """
    outer = outer_slopes(problem, params, context)
    length = trees.norm(outer[0])
    here = slopes(problem, params, outer[0], outer, context)
    bend = dot(outer[0], jax.tree.map(jnp.subtract, outer[0], here.params))
    scale = jnp.where(bend > 0, length**2 / jnp.where(bend > 0, bend, 1), 0)
    first = trees.norm(jax.grad(problem.inner_loss)(start, context))
    left = length * trees.norm(here.inner) / jnp.where(first > 0, first, 1)
    v = jax.tree.map(lambda x: scale.astype(x.dtype) * x, outer[0])
    curvature = given_curvature(problem, context, length)
    estimate = judged(problem, params, v, outer, context, curvature, left=left).estimate
    return estimate + left if start_counts else estimate
