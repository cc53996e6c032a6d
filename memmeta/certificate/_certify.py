r"""The rigorous bound of one task: at φ̂ and v̂ themselves, or by way of a better answer.

A better answer φ̃, ṽ turns most of the bound into a length that is measured,

    ‖∇̂F_i − ∇F_i‖  ≤  ‖∇̂F_i − ∇̃F_i‖  +  the bound at φ̃ and ṽ

and what is loose in the bound multiplies residuals that are next to nothing there. Nothing is asked
of the linear solver that finds φ̃ and ṽ: what it left over is measured. Derived in docs/theory.md.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from memmeta._shared import trees
from memmeta.certificate._bound import Measured, bound, distance_bound, measure
from memmeta.certificate._estimate import Certificate, residuals
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

NEWTON_STEPS = 16
"""At most so many from φ̂ to φ̃."""

REDUCTION = 1e-5
"""Of ‖∇_φ g‖ from φ̂ to φ̃, which is enough: what is loose in the bound multiplies this."""

STALLED = 0.99
"""A step that leaves more than this share of ‖∇_φ g‖ has met rounding, and is the last."""

RATES = tuple(4.0**-k for k in range(6))
"""Of a Newton step, the one that leaves the smallest ‖∇_φ g‖ is taken."""

ROUNDING = 8
"""Units of rounding of ‖∇̂F_i‖ that are added: the rest can be all but equal to the error."""


def certify(problem: Problem, params: Params, solution: Params, context: Context) -> Certificate:
    """The rigorous bound of one task.

    Args:
        problem: with `structure.deviations` and `strong_convexity`; a `structure.solver` makes the
            bound sharper.
        params: φ̂.
        solution: v̂, like `params`.
        context: of the task.

    Returns:
        `total`, the bound on ‖∇̂F_i − ∇F_i‖ in context space (in θ where `Deviations.embedding` says
        so); its two parts `inner`, of the inner loop that stopped early, and `linear`, of the
        linear solve; `distance`, the bound on ‖φ̂ − φ*‖; `rigorous`, True.

    Raises:
        ValueError: the problem gives no μ or no deviations.

    Example:
        >>> from memmeta.certificate import Constants, deviations_from
        >>> from memmeta.problem import Structure
        >>> problem = Problem(
        ...     embed=lambda theta, batch: theta,
        ...     inner_loss=lambda phi, c: 0.5 * jnp.sum((phi - c) ** 2),
        ...     outer_loss=lambda phi, c: (0.5 * jnp.sum(phi**2), {}),
        ...     init=jnp.zeros_like,
        ...     strong_convexity=lambda c: jnp.float32(1.0),
        ...     structure=Structure(deviations=deviations_from(lambda phi, radius, c: Constants(
        ...         *map(jnp.float32, (0.0, 1.0, 0.0, 0.0, 1.0, 1.0))
        ...     ))),
        ... )
        >>> float(certify(problem, jnp.ones(1), jnp.zeros(1), jnp.zeros(1)).total)
        2.0
    """
    measured = measure(problem, params, solution, context)
    split = SplitContext(*trees.split_inexact(context))
    return certify_measured(problem, params, measured, split)


def certify_measured(
    problem: Problem, params: Params, measured: Measured, context: SplitContext
) -> Certificate:
    """`certify` where φ̂ and v̂ are already measured, as inside an estimator."""
    found, _ = _at(problem, params, measured, context.whole)
    if problem.structure.solver is None:
        return found
    better = _refined(problem, params, measured.solution, context)
    sharper: Certificate = trees.where(better.total < found.total, better, found)
    return sharper._replace(distance=jnp.fmin(better.distance, found.distance))


def _at(
    problem: Problem, params: Params, measured: Measured, context: Context
) -> tuple[Certificate, Scalar]:
    """The bound at φ̂ and v̂, and that on ‖∂c/∂θ‖."""
    deviations, strong_convexity = problem.structure.deviations, problem.strong_convexity
    if deviations is None or strong_convexity is None:
        raise ValueError(
            "problem: a rigorous bound needs strong_convexity and structure.deviations; found "
            "None. Give them to Problem(...) (a ridge or a proximal term gives μ, "
            "certificate.deviations_from makes deviations of Lipschitz constants), or use "
            "certificate.estimate."
        )
    mu = strong_convexity(context).astype(measured.gradient.dtype)
    radius = distance_bound(measured.gradient, mu)
    near = jnp.where(jnp.isfinite(radius), radius, 0)
    found = deviations(problem, params, measured.solution, near, context)
    return bound(found, radius, measured.residual), found.embedding


def _refined(problem: Problem, params: Params, v: Params, context: SplitContext) -> Certificate:
    r"""The bound at φ̂ and v̂ by way of φ̃ and ṽ.

    $$\tilde v = \hat v + e + d, \qquad \tilde H e = \hat r, \qquad
      \tilde H d = \Delta(\partial_\phi f - H \hat v)$$
    $$\underbrace{\|\hat\nabla F_i - \tilde\nabla F_i - \tilde M e\|}_{\text{inner}} +
      \underbrace{\|\tilde M e\|}_{\text{linear}} + \text{the bound at } \tilde\phi, \tilde v$$

    with φ̃ from Newton steps, M = ∂²_cφ g, H = ∂²_φφ g, and Δ for a value at φ̃ minus that at φ̂.
    Derived in docs/theory.md, section "By way of a better answer".
    """
    here = residuals(problem, params, v, outer_gradients(problem, params, context), context)
    near = _newton(problem, params, context.whole)
    there = residuals(problem, near, v, outer_gradients(problem, near, context), context)
    change = jax.tree.map(jnp.subtract, there, here)

    _, product = hessian_product(problem, near, context.whole)
    solve = partial(_solve, problem, product, near, context.whole)
    both = jax.tree.map(lambda *b: jnp.stack(b), here.params, change.params)
    e_and_d = jax.vmap(solve)(both)
    images = jax.vmap(lambda u: products(problem, near, u, context))(e_and_d)
    linear = jax.tree.map(lambda m: m[0], images.mixed)
    inner = jax.tree.map(lambda m, c: m[1] - c, images.mixed, change.context)

    left = jax.tree.map(lambda r, h: r - jnp.sum(h, axis=0), there.params, images.hessian)
    solution = jax.tree.map(lambda v, x: v + jnp.sum(x, axis=0), v, e_and_d)
    measured = Measured(trees.norm(there.inner), trees.norm(left), solution)
    rest, embedding = _at(problem, near, measured, context.whole)
    size = trees.norm(here.context)
    rounded = ROUNDING * jnp.finfo(size.dtype).eps * size
    return Certificate(
        embedding * (trees.norm(inner) + rounded) + rest.inner,
        embedding * trees.norm(linear) + rest.linear,
        trees.norm(jax.tree.map(jnp.subtract, params, near)) + rest.distance,
        jnp.bool_(True),
    )


def _newton(problem: Problem, params: Params, context: Context) -> Params:
    """φ̃: Newton steps from φ̂, each at the rate that leaves the smallest ‖∇_φ g‖."""

    def slope(params: Params) -> Scalar:
        return trees.norm(jax.grad(problem.inner_loss)(params, context))

    def moved(params: Params, change: Params, rate: Scalar) -> Params:
        return jax.tree.map(lambda p, c: p - rate.astype(p.dtype) * c, params, change)

    first = slope(params)

    def unfinished(carry: tuple[Array, Params, Scalar, Scalar]) -> Bool[Array, ""]:
        steps, _, before, now = carry
        return (steps < NEWTON_STEPS) & (now > REDUCTION * first) & (now < STALLED * before)

    def step(
        carry: tuple[Array, Params, Scalar, Scalar],
    ) -> tuple[Array, Params, Scalar, Scalar]:
        steps, params, _, before = carry
        gradient, product = hessian_product(problem, params, context)
        change = _solve(problem, product, params, context, gradient)
        rates = jnp.array([*RATES, 0.0])
        left = jax.vmap(lambda rate: slope(moved(params, change, rate)))(rates)
        best = jnp.nanargmin(left)
        return steps + 1, moved(params, change, rates[best]), before, left[best]

    start = (jnp.int32(0), params, jnp.full_like(first, jnp.inf), first)
    return jax.lax.while_loop(unfinished, step, start)[1]


def _solve(
    problem: Problem,
    product: Callable[[Params], Params],
    params: Params,
    context: Context,
    b: Params,
) -> Params:
    """∂²_φφ g(φ)⁻¹ b, by the solver that the problem names."""
    solver = problem.structure.solver
    assert solver is not None
    value: Params = solver(product, b, problem=problem, params=params, context=context).value
    return value
