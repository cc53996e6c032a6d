r"""How wrong an implicit hypergradient can be, from what was measured at the inner solution.

Nothing is assumed of how φ̂ and v̂ were found: any inner solver, any linear solver, stopped however
early. The derivation is in docs/theory.md.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from memmeta import trees
from memmeta.inner import hessian_product
from memmeta.lanczos import extreme_eigenvalues
from memmeta.problem import Constants, Context, Deviations, Params, Problem, Scalar


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


class Measured(NamedTuple):
    """What is measured of one task at φ̂ and v̂.

    Attributes:
        gradient: ‖∇_φ g(φ̂)‖.
        residual: ‖∂_φ f − (∂²_φφ g) v̂‖, undamped and absolute.
        solution: v̂; where only `Constants` are used, its norm will do.
    """

    gradient: Scalar
    residual: Scalar
    solution: Params


def distance_bound(gradient: Scalar, strong_convexity: Scalar) -> Scalar:
    r"""How far φ̂ can be from the minimiser of a strongly convex function.

    $$\|\hat\phi - \phi^*\| \le \|\nabla_\phi g(\hat\phi)\| / \mu$$

    Args:
        gradient: ‖∇_φ g(φ̂)‖.
        strong_convexity: μ; the bound is infinite for 0.

    Returns:
        The bound.

    Example:
        >>> round(float(distance_bound(jnp.float32(0.1), jnp.float32(0.5))), 3)
        0.2
    """
    return _divided(gradient, strong_convexity)


def bound(constants: Constants, strong_convexity: Scalar, measured: Measured) -> Certificate:
    r"""The rigorous bound, a posteriori.

    $$\|\hat\nabla F_i - \nabla F_i\| \le
      A \frac{\|\nabla_\phi g\|}{\mu} + B \frac{\|r\|}{\mu}, \qquad r = \partial_\phi f -
      \partial^2_{\phi\phi} g \, \hat v, \quad B = C_{c\phi}$$
    $$A = L_{cf} + L_{c\phi} \|\hat v\| +
      \frac{C_{c\phi}}{\mu} \big(L_{\phi f} + L_{\phi\phi} \|\hat v\|\big)$$

    all times `constants.embedding`. Derived in docs/theory.md, section "Certificate".

    Args:
        constants: valid within `distance_bound` of φ̂ (or everywhere).
        strong_convexity: μ > 0, valid everywhere; the bound is infinite for 0.
        measured: at φ̂ and v̂.

    Returns:
        The `Certificate`, rigorous up to rounding.

    Example:
        >>> constants = Constants(*map(jnp.float32, (0.0, 1.0, 0.0, 0.0, 2.0, 1.0)))
        >>> measured = Measured(*map(jnp.float32, (0.1, 0.01, 3.0)))
        >>> round(float(bound(constants, jnp.float32(0.5), measured).total), 3)
        0.84
    """
    sensitivity = _divided(constants.coupling, strong_convexity)
    distance = distance_bound(measured.gradient, strong_convexity)
    along = distance * trees.norm(measured.solution)
    deviations = Deviations(
        outer_context=constants.outer_context * distance,
        outer_params=constants.outer_params * distance,
        mixed=constants.mixed * along,
        hessian=sensitivity * constants.hessian * along,
        sensitivity=sensitivity,
        embedding=constants.embedding,
    )
    return bound_from(deviations, distance, measured.residual)


def bound_from(deviations: Deviations, distance: Scalar, residual: Scalar) -> Certificate:
    r"""The rigorous bound from what can have changed between φ̂ and φ*.

    $$\|\hat\nabla F_i - \nabla F_i\| \le \|\Delta \partial_c f\| + \|\Delta M \hat v\| +
      \|M^* {H^*}^{-1} \Delta H \hat v\| + \|M^* {H^*}^{-1}\| \,
      (\|\Delta \partial_\phi f\| + \|r\|)$$

    times `deviations.embedding`. Derived in docs/theory.md, section "Certificate".

    Args:
        deviations: valid for every φ* within the distance.
        distance: bound on ‖φ̂ − φ*‖; where it is not finite nothing is promised.
        residual: ‖r‖.

    Returns:
        The `Certificate`, rigorous up to rounding.
    """
    d = deviations
    inner = d.outer_context + d.mixed + d.hessian + d.sensitivity * d.outer_params
    # r = 0 and an infinite distance together promise nothing either
    possible = jnp.isfinite(distance)
    inner = jnp.where(possible, d.embedding * inner, jnp.inf)
    linear = jnp.where(possible, d.embedding * d.sensitivity * residual, jnp.inf)
    return Certificate(_inf_for_nan(inner), _inf_for_nan(linear), distance, jnp.bool_(True))


def certifiable(problem: Problem) -> bool:
    """Whether a problem gives what `certify` needs."""
    known = problem.constants is not None or problem.deviations is not None
    return known and problem.strong_convexity is not None


def certify(problem: Problem, params: Params, solution: Params, context: Context) -> Certificate:
    """The rigorous bound of one task, from its `Problem.deviations` or else its `constants`.

    Args:
        problem: with one of them, and `strong_convexity`.
        params: φ̂.
        solution: v̂, like `params`.
        context: of the task.

    Returns:
        The `Certificate` in context space (in θ where `Constants.embedding` says so).

    Raises:
        ValueError: the problem gives no μ or no constants.

    Example:
        >>> problem = Problem(
        ...     embed=lambda theta, batch: theta,
        ...     inner_loss=lambda phi, c: 0.5 * jnp.sum((phi - c) ** 2),
        ...     outer_loss=lambda phi, c: (0.5 * jnp.sum(phi**2), {}),
        ...     init=jnp.zeros_like,
        ...     strong_convexity=lambda c: jnp.float32(1.0),
        ...     constants=lambda phi, radius, c: Constants(
        ...         *map(jnp.float32, (0.0, 1.0, 0.0, 0.0, 1.0, 1.0))
        ...     ),
        ... )
        >>> float(certify(problem, jnp.ones(1), jnp.zeros(1), jnp.zeros(1)).total)
        2.0
    """
    return certify_measured(problem, params, measure(problem, params, solution, context), context)


def certify_measured(
    problem: Problem, params: Params, measured: Measured, context: Context
) -> Certificate:
    """`certify` where φ̂ and v̂ are already measured, as inside an estimator."""
    if not certifiable(problem):
        raise ValueError(
            "problem: a rigorous bound needs strong_convexity, and constants or deviations; found "
            "None. Give them to Problem(...) (a ridge or a proximal term gives μ), or use "
            "certificate.estimate."
        )
    assert problem.strong_convexity is not None
    mu = problem.strong_convexity(context).astype(measured.gradient.dtype)
    radius = distance_bound(measured.gradient, mu)
    if problem.deviations is not None:
        near = jnp.where(jnp.isfinite(radius), radius, 0)
        found = problem.deviations(problem, params, measured.solution, near, context)
        return bound_from(found, radius, measured.residual)
    assert problem.constants is not None
    return bound(problem.constants(params, radius, context), mu, measured)


def measure(problem: Problem, params: Params, solution: Params, context: Context) -> Measured:
    """‖∇_φ g‖, ‖r‖ and ‖v̂‖ at φ̂ and v̂; arguments as for `certify`."""
    gradient, product = hessian_product(problem, params, context)
    outer = jax.grad(lambda phi: problem.outer_loss(phi, context)[0])(params)
    residual = jax.tree.map(jnp.subtract, outer, product(solution))
    return Measured(trees.norm(gradient), trees.norm(residual), solution)


def estimate(
    problem: Problem, params: Params, solution: Params, context: Context, steps: int = 10
) -> Certificate:
    r"""The same formula with constants measured at φ̂: an estimate, not a bound.

    μ is the smallest Ritz value of `steps` Lanczos steps from ∇_φ g (an overestimate of the
    smallest eigenvalue), C_cφ comes from power steps on (∂²_cφ g)ᵀ∂²_cφ g, and the Lipschitz terms
    are derivatives along d = ∇_φ g / ‖∇_φ g‖ only:

    $$\big\| D_d [\partial_c f - \partial^2_{c\phi} g \, \hat v] \big\| \tfrac{\|\nabla g\|}{\mu} +
      \tfrac{C_{c\phi}}{\mu} \big( \big\| D_d [\partial_\phi f - \partial^2_{\phi\phi} g \, \hat v]
      \big\| \tfrac{\|\nabla g\|}{\mu} + \|r\| \big)$$

    Costs about 3 · `steps` Hessian-vector products. For losses whose constants nobody can give.

    Args:
        problem: any.
        params: φ̂.
        solution: v̂.
        context: of the task; its inexact leaves are what the error is measured in.
        steps: of Lanczos and of the power iteration.

    Returns:
        The `Certificate`, marked as not rigorous; infinite where the curvature is not positive.

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
    active, passive = trees.split_inexact(context)

    def slopes(phi: Params, active: Context) -> tuple[Params, Params]:
        """∂_φ f − ∂²_φφ g v̂ and ∂_c f − ∂²_cφ g v̂ with v̂ held fixed."""

        def difference(phi: Params, active: Context) -> Scalar:
            whole = trees.merge(active, passive)
            along = jax.jvp(lambda p: problem.inner_loss(p, whole), (phi,), (solution,))[1]
            return problem.outer_loss(phi, whole)[0] - along

        return jax.grad(difference, argnums=(0, 1))(phi, active)

    gradient, product = hessian_product(problem, params, context)
    measured = measure(problem, params, solution, context)
    length = jnp.where(measured.gradient > 0, measured.gradient, 1)
    direction = jax.tree.map(lambda g: g / length.astype(g.dtype), gradient)
    _, (in_params, in_context) = jax.jvp(lambda p: slopes(p, active), (params,), (direction,))
    mu, _ = extreme_eigenvalues(product, gradient, steps)
    mu = mu.astype(measured.gradient.dtype)
    constants = Constants(
        outer_context=trees.norm(in_context),
        outer_params=trees.norm(in_params),
        mixed=jnp.zeros_like(mu),
        hessian=jnp.zeros_like(mu),
        coupling=_coupling(problem, params, (active, passive), direction, steps),
        embedding=jnp.ones_like(mu),
    )
    return bound(constants, jnp.maximum(mu, 0), measured)._replace(rigorous=jnp.bool_(False))


def _coupling(
    problem: Problem, params: Params, context: tuple, direction: Params, steps: int
) -> Scalar:
    """‖∂²_cφ g(φ̂)‖ by power steps on its Gram operator."""
    active, passive = context

    def inner_gradient(active: Context) -> Params:
        return jax.grad(problem.inner_loss)(params, trees.merge(active, passive))

    _, forward = jax.linearize(inner_gradient, active)
    backward = jax.linear_transpose(forward, active)

    def body(vector: Params, _: None) -> tuple[Params, Scalar]:
        length = trees.norm(vector)
        length = jnp.where(length > 0, length, 1)
        (image,) = backward(jax.tree.map(lambda x: x / length.astype(x.dtype), vector))
        return forward(image), trees.norm(image)

    still = trees.norm(direction) == 0  # a converged φ̂ gives no direction
    first = jax.tree.map(lambda d: jnp.where(still, 1, d).astype(d.dtype), direction)
    _, lengths = jax.lax.scan(body, first, length=steps)
    return jnp.max(lengths)


def _divided(numerator: Scalar, mu: Scalar) -> Scalar:
    return jnp.where(mu > 0, numerator / jnp.where(mu > 0, mu, 1), jnp.inf)


def _inf_for_nan(value: Array) -> Array:
    return jnp.where(jnp.isnan(value), jnp.inf, value)
