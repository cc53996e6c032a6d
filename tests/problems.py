"""Problems whose hypergradient is known: the ground truth of the tests."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

import memmeta as mm


class Quadratic(NamedTuple):
    r"""Tasks with g = ½ φᵀA_iφ − φᵀ(B_i θ) and f = ½‖φ − t_i‖² + ½‖θ‖², so φ* = A_i⁻¹ B_i θ."""

    hessian: jax.Array
    coupling: jax.Array
    target: jax.Array


def quadratic_tasks(key, tasks=5, inner=6, outer=4, condition=10.0):
    keys = jax.random.split(key, 3)
    basis = jnp.linalg.qr(jax.random.normal(keys[0], (tasks, inner, inner)))[0]
    curvatures = jnp.geomspace(1.0, condition, inner)
    hessian = jnp.einsum("tij,j,tkj->tik", basis, curvatures, basis)
    coupling = jax.random.normal(keys[1], (tasks, inner, outer))
    return Quadratic(hessian, coupling, jax.random.normal(keys[2], (tasks, inner)))


def quadratic_problem(inner=6, condition=10.0):
    def inner_loss(phi, context):
        drive, batch, _ = context
        return 0.5 * phi @ batch.hessian @ phi - phi @ drive

    def outer_loss(phi, context):
        _, batch, theta = context
        return 0.5 * jnp.sum((phi - batch.target) ** 2) + 0.5 * jnp.sum(theta**2), {"phi": phi}

    return mm.Problem(
        embed=lambda theta, batch: (batch.coupling @ theta, batch, theta),
        inner_loss=inner_loss,
        outer_loss=outer_loss,
        init=lambda theta: jnp.zeros(inner, theta.dtype),
        smoothness=lambda context: jnp.asarray(condition, context[0].dtype),
        strong_convexity=lambda context: jnp.asarray(1.0, context[0].dtype),
    )


def quadratic_hypergradient(theta, tasks):
    """∇F = θ + mean_i B_iᵀ A_i⁻¹ (A_i⁻¹ B_i θ − t_i), in closed form."""
    phi = jnp.linalg.solve(tasks.hessian, (tasks.coupling @ theta)[..., None])[..., 0]
    v = jnp.linalg.solve(tasks.hessian, (phi - tasks.target)[..., None])[..., 0]
    return theta + jnp.mean(jnp.einsum("tij,ti->tj", tasks.coupling, v), axis=0)
