r"""An estimate of a hypergradient's error, from derivatives at φ̂ and at a second point.

φ̂ and v̂ may come from anywhere: v̂ from a linear solver, or from an unrolled loop, whose derivative
contains one (see `tilted`). No linear system is solved here.
"""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from memmeta._shared import trees
from memmeta.linear_solve import extreme_eigenvalues
from memmeta.linear_solve._solution import dot
from memmeta.linear_solve._spectrum import power_iteration
from memmeta.problem import (
    Context,
    Params,
    Problem,
    Scalar,
    SplitContext,
    hessian_product,
    outer_gradients,
    products,
)


class Certificate(NamedTuple):
    r"""A bound on ‖∇̂F_i − ∇F_i‖, or an estimate of it, in two parts that add up.

    Attributes:
        inner: the part of the inner loop that stopped early, ∝ ‖∇_φ g‖.
        linear: the part of the linear solve that stopped early, ∝ ‖∂_φ f − (∂²_φφ g) v̂‖.
        distance: the same for ‖φ̂ − φ*‖.
        rigorous: whether it is a bound (the constants were given) or an estimate (measured).
    """

    inner: Float[Array, "*tasks"]
    linear: Float[Array, "*tasks"]
    distance: Float[Array, "*tasks"]
    rigorous: Bool[Array, "*tasks"]

    @property
    def total(self) -> Float[Array, "*tasks"]:
        """The bound itself."""
        return self.inner + self.linear


class Residuals(NamedTuple):
    r"""∇_φ g, and the derivatives of f − ⟨∇_φ g, v̂⟩ with v̂ held fixed.

    Attributes:
        inner: ∇_φ g.
        params: r = ∂_φ f − ∂²_φφ g v̂, the linear solver's residual.
        context: ∂_c f − ∂²_cφ g v̂, the implicit hypergradient in the context.
    """

    inner: Params
    params: Params
    context: Context


def residuals(
    problem: Problem,
    params: Params,
    v: Params,
    outer: tuple[Params, Context],
    context: SplitContext,
) -> Residuals:
    """The residuals at φ̂, from `outer_gradients` there and one mixed product."""
    found = products(problem, params, v, context)
    return Residuals(
        found.gradient,
        *jax.tree.map(jnp.subtract, outer, (found.hessian, found.mixed)),
    )


def gain_along(
    problem: Problem, params: Params, direction: Params, context: SplitContext
) -> Scalar:
    r"""‖∂²_cφ g u‖ / ‖u‖: how strongly the context acts on ∇_φ g along one direction u."""
    return _ratio(products(problem, params, direction, context).mixed, direction)


def residuals_with_error(
    problem: Problem,
    params: Params,
    v: Params,
    outer: tuple[Params, Context],
    context: SplitContext,
    curvature: Scalar,
    gain: Scalar | None = None,
    residual: Scalar | None = None,
) -> tuple[Residuals, Certificate]:
    r"""The implicit hypergradient at φ̂ and v̂, and its error from a second point φ̂ − δ.

    With δ = ∇_φ g / μ̂ for the step to the inner solution, Δ for the change from φ̂ to φ̂ − δ, and r
    for ∂_φ f − ∂²_φφ g v̂ at φ̂,
    $$\underbrace{\|\Delta(\partial_c f - \partial^2_{c\phi} g\, \hat v)\| + \frac{C}{\hat\mu}
      \|\Delta(\partial_\phi f - \partial^2_{\phi\phi} g\, \hat v)\|}_{\text{inner}}
      + \underbrace{\frac{C}{\hat\mu} \|r\|}_{\text{linear}}, \qquad
      C = \|\partial^2_{c\phi} g\, \hat v\| / \|\hat v\|$$

    Its first term is the inner loop's error at fixed v̂, the others are those of v̂, through the
    inner loop and through r. An estimate: μ̂ may be too large where it was measured and not given,
    and ∂²_cφ g may act more strongly than along v̂. Two mixed products and a gradient of f.

    Args:
        problem: both losses are used.
        params: φ̂.
        v: v̂.
        outer: `outer_gradients` at φ̂.
        context: of one task.
        curvature: μ̂; where it is not positive, or not known, the estimate is infinite.
        gain: C, where it is known otherwise.
        residual: ‖r‖, where it is known otherwise.

    Returns:
        The residuals at φ̂, and the estimate.

    Source: first-order expansion of the error in Pedregosa (ICML 2016), Theorem 1.
    """
    known = (curvature > 0) & jnp.isfinite(curvature)
    here = residuals(problem, params, v, outer, context)
    rate = 1 / jnp.where(known, curvature, 1)
    moved = jax.tree.map(lambda p, g: p - rate.astype(g.dtype) * g, params, here.inner)
    # Without the barriers XLA (jax 0.10.2) starts all passes at once, and holds the intermediate
    # values of each.
    moved, here = jax.lax.optimization_barrier((moved, here))
    outer_there = outer_gradients(problem, moved, context)
    moved, outer_there = jax.lax.optimization_barrier((moved, outer_there))
    there = residuals(problem, moved, v, outer_there, context)

    change = jax.tree.map(jnp.subtract, there, here)
    if gain is None:
        gain = _ratio(jax.tree.map(jnp.subtract, outer[1], here.context), v)
    residual = trees.norm(here.params) if residual is None else residual
    by_inner = trees.norm(change.context) + gain * trees.norm(change.params) * rate
    by_linear = gain * residual * rate

    def unless_unknown(value: Scalar) -> Scalar:
        return jnp.where(known & jnp.isfinite(by_inner + by_linear), value, jnp.inf)

    distance = unless_unknown(trees.norm(here.inner) * rate)
    parts = unless_unknown(by_inner), unless_unknown(by_linear), distance
    return here, Certificate(*parts, rigorous=jnp.bool_(False))


def _ratio(image: Context, direction: Params) -> Scalar:
    norm = trees.norm(direction)
    return trees.norm(image) / jnp.where(norm > 0, norm, 1)


def estimate(
    problem: Problem, params: Params, solution: Params, context: Context, steps: int = 10
) -> Certificate:
    r"""An estimate of the error at φ̂ and v̂, for losses without known constants.

    `residuals_with_error` with a measured μ̂ and C: μ̂ is `Problem.strong_convexity`, or else the
    smallest Ritz value of `steps` Lanczos steps from ∇_φ g (an overestimate of the smallest
    eigenvalue), and C = ‖∂²_cφ g‖ comes from power steps on (∂²_cφ g)ᵀ∂²_cφ g.

    Costs about 3 · `steps` Hessian-vector products.

    Args:
        problem: any.
        params: φ̂.
        solution: v̂.
        context: of the task; its inexact leaves are what the error is measured in.
        steps: of Lanczos and of the power iteration.

    Returns:
        As `certify` returns it, with `rigorous` False; infinite where the curvature
        is not positive.

    Example:
        >>> problem = Problem(
        ...     embed=lambda theta, batch: theta,
        ...     inner_loss=lambda phi, c: 0.5 * jnp.sum((phi - c) ** 2),
        ...     outer_loss=lambda phi, c: (0.5 * jnp.sum(phi**2), {}),
        ...     init=jnp.zeros_like,
        ... )
        >>> found = estimate(problem, jnp.ones(2), jnp.zeros(2), jnp.zeros(2))
        >>> round(float(found.total), 2), bool(found.rigorous)
        (2.83, False)
    """
    split = SplitContext(*trees.split_inexact(context))
    gradient, product = hessian_product(problem, params, context)
    if problem.strong_convexity is None:
        curvature = extreme_eigenvalues(product, gradient, steps)[0]
    else:
        curvature = problem.strong_convexity(context)

    def inner_gradient(active: Context) -> Params:
        return jax.grad(problem.inner_loss)(params, split.at(active))

    _, forward = jax.linearize(inner_gradient, split.active)
    backward = jax.linear_transpose(forward, split.active)
    converged = trees.norm(gradient) == 0  # which gives no direction to start from
    first = jax.tree.map(lambda g: jnp.where(converged, 1, g).astype(g.dtype), gradient)
    gain = jnp.sqrt(power_iteration(lambda u: forward(*backward(u)), first, steps))
    outer = outer_gradients(problem, params, split)
    curvature = curvature.astype(gain.dtype)
    return residuals_with_error(problem, params, solution, outer, split, curvature, gain)[1]


def given_curvature(problem: Problem, context: Context, like: Scalar) -> Scalar:
    """μ, in the dtype of `like`."""
    assert problem.strong_convexity is not None
    return problem.strong_convexity(context).astype(like.dtype)


def tilted(problem: Problem, tilt: Params | None) -> Problem:
    r"""The problem with g + ⟨e, φ⟩ in place of g.

    At an inner solution dφ*/de = −[∂²_φφ g]⁻¹. So the cotangent of e after a loop is −v̂ of the
    linear solve that the loop amounts to, for any inner solver: with gradient descent, for
    instance, K terms of the Neumann series. Called with e = 0, so the values stay; None leaves the
    problem as it is.
    """
    if tilt is None:
        return problem

    def inner_loss(params: Params, context: Context) -> Scalar:
        loss = problem.inner_loss(params, context)
        return loss + dot(tilt, params).astype(loss.dtype)

    return replace(problem, inner_loss=inner_loss)


def error_of_given(
    problem: Problem, params: Params, v: Params, given: Context, context: SplitContext
) -> tuple[Scalar, Scalar]:
    r"""The error of a hypergradient c̄ that was not computed from its v̂.

    $$\|\bar c - \nabla_c\| + \|\nabla_c - \nabla F\|, \qquad
      \nabla_c = \partial_c f - \partial^2_{c\phi} g \, \hat v$$

    the first measured, the second by `residuals_with_error`. Returned with the curvature
    v̂ᵀ ∂²_φφ g v̂ / v̂ᵀv̂. The problem needs a `strong_convexity`.
    """
    # XLA (jax 0.10.2) would otherwise start here while the loop's backward pass still holds its
    # iterates.
    params, v, given = jax.lax.optimization_barrier((params, v, given))
    outer = outer_gradients(problem, params, context)
    norm = trees.norm(v)
    mu = given_curvature(problem, context.whole, norm)
    here, error = residuals_with_error(problem, params, v, outer, context, mu)
    quadratic = dot(v, jax.tree.map(jnp.subtract, outer[0], here.params))
    curvature = jnp.where(norm > 0, quadratic / jnp.where(norm > 0, norm, 1) ** 2, jnp.inf)
    total = trees.norm(jax.tree.map(jnp.subtract, given, here.context)) + error.total
    return jnp.where(jnp.isfinite(total), total, jnp.inf), curvature


def error_of_loop(
    problem: Problem, start: Params, params: Params, context: SplitContext, start_counts: bool
) -> Scalar:
    r"""The error of the exact gradient of a loop that is not differentiated in reverse.

    The residual of ∂_φ f is not known then, and is taken to be the same share of ∂_φ f as
    ∇_φ g(φ_K) is of ∇_φ g(φ₀); in the terms of `residuals_with_error`,
    $$\|r\| \approx \|\partial_\phi f\| \,
      \|\nabla_\phi g(\phi_K)\| / \|\nabla_\phi g(\phi_0)\|$$

    and v̂ is replaced by one step of steepest descent on the linear system, from zero. Three mixed
    products, two gradients of f and one of g. `start_counts`: whether φ₀ depends on θ; the residual
    then reaches θ through φ₀. The problem needs a `strong_convexity`.
    """
    outer = outer_gradients(problem, params, context)
    norm = trees.norm(outer[0])
    here = products(problem, params, outer[0], context)
    quadratic = dot(outer[0], here.hessian)
    scale = jnp.where(quadratic > 0, norm**2 / jnp.where(quadratic > 0, quadratic, 1), 0)
    first = trees.norm(jax.grad(problem.inner_loss)(start, context.whole))
    residual = norm * trees.norm(here.gradient) / jnp.where(first > 0, first, 1)
    v = jax.tree.map(lambda x: scale.astype(x.dtype) * x, outer[0])
    mu = given_curvature(problem, context.whole, norm)
    error = residuals_with_error(problem, params, v, outer, context, mu, residual=residual)[1].total
    error = error + residual if start_counts else error
    return jnp.where(jnp.isfinite(error), error, jnp.inf)
