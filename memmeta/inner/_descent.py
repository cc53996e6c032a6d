r"""Gradient descent, plain and accelerated, at a rate from the curvature."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from memmeta._shared import trees
from memmeta._shared.readable import named
from memmeta.inner._solver import InnerSolver, rounding
from memmeta.linear_solve._spectrum import power_iteration
from memmeta.problem import Context, Params, Problem, Scalar, hessian_product

POWER_STEPS = 8
"""Products to measure L, once a loop; the check of each step finds out that it was too small."""


class Curvature(NamedTuple):
    """State of both solvers: bounds on the curvature of the inner loss.

    Attributes:
        largest: L, a bound on the curvature or the best estimate so far.
        smallest: μ, a lower bound on it (0 when none is known).
        since_restart: steps since the momentum was last reset, a float because the momentum is
            computed from it.
        ahead: y_k, the point that the next gradient is taken at; None for `gradient_descent`.
    """

    largest: Scalar
    smallest: Scalar
    since_restart: Float[Array, ""]
    ahead: Any


def _measure(problem: Problem, params: Params, context: Context) -> Curvature:
    # The measured rate counts as a constant: derivatives of the steps leave d(rate)/dθ out. The
    # inputs are stopped, not the result: reverse mode would store the measurement's intermediate
    # values.
    fixed, context = jax.lax.stop_gradient((params, context))
    if problem.smoothness is None:
        largest = largest_curvature(problem, fixed, context)
    else:
        largest = problem.smoothness(context)
    bound = problem.strong_convexity
    smallest = jnp.zeros_like(largest) if bound is None else bound(context).astype(largest.dtype)
    return Curvature(largest, smallest, jnp.zeros_like(largest), params)


def largest_curvature(problem: Problem, params: Params, context: Context) -> Scalar:
    """The largest curvature of the inner loss at φ, by a few Hessian-vector products.

    Starts along the gradient, so no random key is needed. It is a positive lower estimate of the
    largest absolute eigenvalue of ∂²_φφ g(φ); the solvers that use it check every step.

    Example:
        >>> g = Problem(
        ...     embed=lambda theta, batch: batch,
        ...     inner_loss=lambda phi, c: jnp.sum(c * phi**2) / 2,
        ...     outer_loss=lambda phi, c: (jnp.sum(phi), {}),
        ...     init=lambda theta: theta,
        ... )
        >>> float(largest_curvature(g, jnp.ones(2), jnp.array([1.0, 5.0])).round(3))
        5.0
    """
    gradient, product = hessian_product(problem, params, context)
    # Start at ∇g + 10⁻³ ‖∇g‖ · 1 (ones where ∇g = 0): a gradient that is an eigenvector of a small
    # curvature would never meet the larger ones.
    ones = jax.tree.map(jnp.ones_like, gradient)
    scale = trees.norm(gradient) * 1e-3
    start = jax.tree.map(lambda g, one: g + scale.astype(g.dtype) * one, gradient, ones)
    start = jax.tree.map(lambda s, one: jnp.where(scale > 0, s, one), start, ones)
    return power_iteration(product, start, POWER_STEPS)


def _descend(
    problem: Problem, params: Params, context: Context, largest: Scalar
) -> tuple[Params, Bool[Array, ""], Scalar]:
    r"""One step φ − ∇g/L, refused where the descent lemma shows L to be too small.

    For every true bound L: $$g(\phi - \nabla g / L) \le g(\phi) - \|\nabla g\|^2 / 2L$$
    """
    loss, gradient = jax.value_and_grad(problem.inner_loss)(params, context)
    norm = trees.norm(gradient)
    proposal = jax.tree.map(lambda p, g: p - g / largest.astype(g.dtype), params, gradient)
    if problem.smoothness is not None:
        return proposal, jnp.bool_(True), norm
    # `rounding`: near the minimum the decrease is smaller than the loss can show
    promised = loss - norm.astype(loss.dtype) ** 2 / (2 * largest) + rounding(loss)
    accepted = problem.inner_loss(proposal, context) <= promised
    return trees.where(accepted, proposal, params), accepted, norm


@named
def gradient_descent() -> InnerSolver:
    r"""Gradient descent at the rate 1/L.

    It does not diverge, as long as `problem.smoothness`, where given, is a true bound.

    $$\phi_{k+1} = \phi_k - \tfrac1L \nabla_\phi g(\phi_k)$$

    L is `problem.smoothness` where given. Else it is measured at φ₀ and doubled, with the step
    refused, whenever a step decreases the loss by less than ‖∇g‖²/2L.

    Returns:
        The solver.

    Example:
        >>> from memmeta.inner import InnerLoop
        >>> loop = InnerLoop(gradient_descent(), steps=50)
    """

    def update(
        problem: Problem,
        params: Params,
        state: Curvature,
        context: Context,
        step: Array,
        key: Array,
    ) -> tuple[Params, Curvature, Scalar]:
        params, accepted, norm = _descend(problem, params, context, state.largest)
        largest = jnp.where(accepted, state.largest, 2 * state.largest)
        return params, state._replace(largest=largest, since_restart=state.since_restart + 1), norm

    def init(problem: Problem, params: Params, context: Context) -> Curvature:
        return _measure(problem, params, context)._replace(ahead=None)

    return InnerSolver(init, update, carried=False)


@named
def accelerated() -> InnerSolver:
    r"""Nesterov's accelerated gradient descent at the rate 1/L, the default inner solver.

    $$\phi_{k+1} = y_k - \tfrac1L \nabla_\phi g(y_k), \qquad
      y_{k+1} = \phi_{k+1} + \beta_k (\phi_{k+1} - \phi_k)$$

    with β = (√κ − 1)/(√κ + 1), κ = L/μ, where μ = `problem.strong_convexity` is known (error
    ∝ (1 − 1/√κ)^k), else β_k = k/(k + 3) (error ∝ 1/k²). L as in `gradient_descent`; a refused step
    also drops the momentum. Source: Nesterov, Introductory Lectures on Convex Optimization (2004),
    scheme 2.2.11.

    Returns:
        The solver.

    Example:
        >>> from memmeta.inner import InnerLoop
        >>> loop = InnerLoop(accelerated(), steps=50)
    """

    def update(
        problem: Problem,
        params: Params,
        state: Curvature,
        context: Context,
        step: Array,
        key: Array,
    ) -> tuple[Params, Curvature, Scalar]:
        following, accepted, norm = _descend(problem, state.ahead, context, state.largest)
        # μ = 0 where none is known: `tiny` keeps the unused branch below finite, and its derivative
        root = jnp.sqrt(
            state.largest / jnp.maximum(state.smallest, jnp.finfo(state.smallest.dtype).tiny)
        )
        known = (root - 1) / (root + 1)
        momentum = jnp.where(
            state.smallest > 0, known, state.since_restart / (state.since_restart + 3)
        )
        ahead = jax.tree.map(
            lambda new, old: new + momentum.astype(new.dtype) * (new - old), following, params
        )
        refused = state._replace(
            largest=2 * state.largest, since_restart=0 * state.since_restart, ahead=params
        )
        taken = state._replace(since_restart=state.since_restart + 1, ahead=ahead)
        return *trees.where(accepted, (following, taken), (params, refused)), norm

    return InnerSolver(_measure, update, carried=False)
