"""Random problems whose inner loop and linear solve are stopped at random, and the true errors.

Heads on features whose scale and separation differ wildly, and quadratics of condition 1 to 1,000.
Loop and solve end anywhere between not a single step and as good as converged, half of the systems
are damped, and the solve is gradient descent or three steps of conjugate gradients.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

import memmeta as mm
from memmeta import certificate, linear_solve
from memmeta.certificate import Constants
from memmeta.few_shot import HeadContext, softmax_problem, squared_problem

MOST = 60


class Drawn(NamedTuple):
    """One problem: φ₀ and the context stand for a task."""

    problem: mm.Problem
    start: Any
    context: Any


class Errors(NamedTuple):
    """Of one answer φ̂, v̂: the true errors beside what was said of them.

    Attributes:
        error: ‖∇̂_c − ∇_c‖, from φ* and v* to rounding.
        bound: `certificate.certify`.
        plain: the same without `Structure.solver`.
        estimate: `certificate.estimate`.
        away: ‖φ̂ − φ*‖.
        distance: its bound.
    """

    error: Array
    bound: Array
    plain: Array
    estimate: Array
    away: Array
    distance: Array


class SolveErrors(NamedTuple):
    """Of one answer v̂ at φ̂: what its linear solve adds to the error.

    Attributes:
        error: ‖M (v̂ − A⁻¹ b)‖, by a dense solve.
        bound: `certificate.error_of_solve`, which is told no constant.
    """

    error: Array
    bound: Array


def head(key: Array, squared: bool) -> Drawn:
    """A head, a ridge from 10⁻³ to 3, on features of a scale from 0.03 to 5."""
    keys = jax.random.split(key, 3)
    ridge = 10 ** jax.random.uniform(keys[0], minval=-3.0, maxval=0.5)
    start = {"kernel": jax.random.normal(keys[2], (3, 3)), "bias": jnp.zeros(3)}
    return Drawn(head_problem(ridge, squared), start, random_features(keys[1]))


def head_problem(ridge: Array, squared: bool) -> mm.Problem:
    """A head's problem with a ridge that may be traced."""
    make = squared_problem if squared else softmax_problem
    base = make(lambda theta, batch: batch, lambda theta: theta, 1.0)
    describe, smoothness = base.structure.head, base.smoothness
    assert describe is not None
    assert smoothness is not None

    def inner_loss(params: Any, context: Any) -> Array:
        square = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
        return base.inner_loss(params, context) + 0.5 * (ridge - 1) * square

    structure = replace(base.structure, head=lambda c: replace(describe(c), ridge=ridge))
    return replace(
        base,
        inner_loss=inner_loss,
        smoothness=lambda context: smoothness(context) + (ridge - 1),
        strong_convexity=lambda context: ridge,
        structure=structure,
    )


def random_features(key: Array) -> HeadContext:
    """Features whose scale and separation differ wildly from task to task."""
    keys = jax.random.split(key, 4)
    scale = 10 ** jax.random.uniform(keys[0], minval=-1.5, maxval=0.7)
    support_targets, query_targets = jnp.arange(6) % 3, jnp.arange(9) % 3
    means = jax.random.normal(keys[1], (3, 3))
    support = scale * (means[support_targets] + jax.random.normal(keys[2], (6, 3)))
    query = scale * (means[query_targets] + jax.random.normal(keys[3], (9, 3)))
    return HeadContext(support, support_targets, query, query_targets)


def quadratic(key: Array, size: int = 6) -> Drawn:
    """g = ½ φᵀAφ − φᵀBc, f = ½ φᵀQQᵀφ − tᵀφ + φᵀPc: every constant is exact."""
    keys = jax.random.split(key, 8)
    basis = jnp.linalg.qr(jax.random.normal(keys[0], (size, size)))[0]
    condition = 10 ** jax.random.uniform(keys[1], minval=0.0, maxval=3.0)
    curvature = jnp.geomspace(1.0, condition, size) * jnp.exp(jax.random.normal(keys[2]))
    a = (basis * curvature) @ basis.T
    b, p = (jax.random.normal(k, (size, 4)) for k in keys[3:5])
    q, t = jax.random.normal(keys[5], (size, size)), jax.random.normal(keys[6], (size,))
    zero, one = jnp.zeros(()), jnp.ones(())
    norms = [jnp.linalg.norm(m, 2) for m in (p, q @ q.T, b)]
    constants = Constants(norms[0], norms[1], zero, zero, norms[2], one)
    problem = mm.Problem(
        embed=lambda theta, batch: theta,
        inner_loss=lambda phi, c: 0.5 * phi @ a @ phi - phi @ b @ c,
        outer_loss=lambda phi, c: (0.5 * phi @ (q @ q.T) @ phi - t @ phi + phi @ p @ c, {}),
        init=lambda theta: jnp.zeros(size),
        smoothness=lambda c: curvature[-1],
        strong_convexity=lambda c: curvature[0],
        structure=mm.Structure(
            deviations=certificate.deviations_from(lambda phi, radius, c: constants)
        ),
    )
    return Drawn(problem, jnp.zeros(size), jax.random.normal(keys[7], (4,)))


def context_gradient(problem: mm.Problem, phi: Any, v: Any, context: Any) -> Any:
    """∂_c f − ∂²_cφ g v over the floating-point leaves of the context."""
    leaves, structure = jax.tree.flatten(context)
    inexact = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]

    def difference(floats: list[Array]) -> Array:
        rest = iter(floats)
        filled = [next(rest) if f else x for x, f in zip(leaves, inexact, strict=True)]
        whole = jax.tree.unflatten(structure, filled)
        along = jax.jvp(lambda p: problem.inner_loss(p, whole), (phi,), (v,))[1]
        return problem.outer_loss(phi, whole)[0] - along

    return jax.grad(difference)([x for x, f in zip(leaves, inexact, strict=True) if f])


def exact(drawn: Drawn, steps: int = 25) -> tuple[Any, Any]:
    """φ* by damped Newton and v* by a dense solve."""
    problem, start, context = drawn
    flat, unflatten = ravel_pytree(start)

    def loss(x: Array) -> Array:
        return problem.inner_loss(unflatten(x), context)

    def newton(x: Array, _: None) -> tuple[Array, None]:
        direction = jnp.linalg.solve(jax.hessian(loss)(x), jax.grad(loss)(x))
        rates = jnp.exp2(-jnp.arange(12.0))
        losses = jax.vmap(lambda rate: loss(x - rate * direction))(rates)
        return x - rates[jnp.argmin(losses)] * direction, None

    x, _ = jax.lax.scan(newton, flat, length=steps)
    outer = jax.grad(lambda x: problem.outer_loss(unflatten(x), context)[0])(x)
    return unflatten(x), unflatten(jnp.linalg.solve(jax.hessian(loss)(x), outer))


def answers(drawn: Drawn, key: Array) -> tuple[Any, tuple[Any, Any]]:
    """φ̂, and two v̂ of its system, each of random early stopping."""
    problem, start, context = drawn
    assert problem.smoothness is not None
    keys = jax.random.split(key, 3)
    # from not a single step to as good as converged
    some = jax.random.bernoulli(keys[1], 0.9, (2,)).astype(int)
    inner_steps, linear_steps = jax.random.randint(keys[0], (2,), 0, MOST) * some
    damping = jnp.maximum(0, jax.random.uniform(keys[2], minval=-0.5, maxval=0.5))
    rate = 1 / (problem.smoothness(context) + damping)

    def descend(slope: Callable[[Any], Any], x: Any, count: Array) -> Any:
        def body(x: Any, k: Array) -> tuple[Any, None]:
            moved = jax.tree.map(lambda a, b: a - rate * b, x, slope(x))
            return jax.tree.map(lambda a, b: jnp.where(k < count, b, a), x, moved), None

        return jax.lax.scan(body, x, jnp.arange(MOST))[0]

    gradient = lambda p: jax.grad(problem.inner_loss)(p, context)  # noqa: E731
    phi = descend(gradient, start, inner_steps)
    outer = jax.grad(lambda p: problem.outer_loss(p, context)[0])(phi)
    product = lambda x: jax.jvp(gradient, (phi,), (x,))[1]  # noqa: E731

    def residual(x: Any) -> Any:
        return jax.tree.map(lambda h, y, b: h + damping * y - b, product(x), x, outer)

    zeros = jax.tree.map(jnp.zeros_like, outer)
    conjugate = linear_solve.cg(3)(product, outer).value
    return phi, (descend(residual, zeros, linear_steps), conjugate)


def errors_of(drawn: Drawn, key: Array) -> Errors:
    """The errors and bounds of both answers, with an axis of two."""
    problem, _, context = drawn
    plain = replace(problem, structure=replace(problem.structure, solver=None))
    phi_star, v_star = exact(drawn)
    truth = context_gradient(problem, phi_star, v_star, context)
    phi, solutions = answers(drawn, key)
    away = optax.tree.norm(jax.tree.map(jnp.subtract, phi, phi_star))

    def one(v: Any) -> Errors:
        found = context_gradient(problem, phi, v, context)
        bound = certificate.certify(problem, phi, v, context)
        return Errors(
            optax.tree.norm(jax.tree.map(jnp.subtract, found, truth)),
            bound.total,
            certificate.certify(plain, phi, v, context).total,
            certificate.estimate(problem, phi, v, context, steps=5).total,
            away,
            bound.distance,
        )

    return jax.vmap(one)(jax.tree.map(lambda *x: jnp.stack(x), *solutions))


def solve_errors_of(drawn: Drawn, key: Array, steps: int = 100) -> SolveErrors:
    """What the linear solves of both answers add to the error, with an axis of two."""
    problem, _, context = drawn
    keys = jax.random.split(key)
    phi, solutions = answers(drawn, keys[0])
    flat, unflatten = ravel_pytree(phi)
    hessian = jax.hessian(lambda x: problem.inner_loss(unflatten(x), context))(flat)
    outer = jax.grad(lambda x: problem.outer_loss(unflatten(x), context)[0])(flat)
    exact = unflatten(jnp.linalg.solve(hessian, outer))
    truth = context_gradient(problem, phi, exact, context)
    unknown = replace(problem, strong_convexity=None, structure=mm.Structure())

    def one(v: Any, key: Array) -> SolveErrors:
        found = context_gradient(problem, phi, v, context)
        return SolveErrors(
            optax.tree.norm(jax.tree.map(jnp.subtract, found, truth)),
            certificate.error_of_solve(unknown, phi, v, context, key, steps=steps),
        )

    both = jax.tree.map(lambda *x: jnp.stack(x), *solutions)
    return jax.vmap(one)(both, jax.random.split(keys[1]))
