"""The inner solution as a function: every transformation of JAX, against its closed form."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import memmeta as mm
from memmeta.hypergradient import implicit_solution

MATRIX = np.random.default_rng(0).normal(size=(6, 3))


def ridge_loss(phi, context):
    """g = ½‖M φ − t‖² + ½ ρ ‖φ‖², so φ* = (MᵀM + ρ I)⁻¹ Mᵀ t."""
    error = MATRIX.astype(phi.dtype) @ phi - context["target"]
    return 0.5 * jnp.sum(error**2) + 0.5 * context["ridge"] * jnp.sum(phi**2)


def closed_form(context):
    matrix = jnp.asarray(MATRIX)
    left = matrix.T @ matrix + context["ridge"] * jnp.eye(3)
    return jnp.linalg.solve(left, matrix.T @ context["target"])


def a_context():
    return {"target": jnp.linspace(-1.0, 2.0, 6), "ridge": jnp.asarray(0.7)}


def solution(context):
    inner = mm.InnerLoop(mm.inner.newton(None), steps=3)
    return implicit_solution(ridge_loss, inner, mm.linear_solve.cg(6))(jnp.zeros(3), context)


def score(function):
    return lambda context: jnp.sum(jnp.sin(function(context)))


TRANSFORMS = {
    "grad": lambda f: jax.grad(score(f)),
    "jvp": lambda f: lambda c: jax.jvp(f, (c,), (jax.tree.map(jnp.ones_like, c),)),
    "jacfwd": jax.jacfwd,
    "jacrev": jax.jacrev,
    "hessian": lambda f: jax.hessian(score(f)),
    "grad of grad": lambda f: jax.grad(
        lambda c: sum(jnp.sum(x**2) for x in jax.tree.leaves(jax.grad(score(f))(c)))
    ),
    "third derivative": lambda f: jax.jacfwd(
        jax.hessian(lambda r: score(f)({"target": jnp.linspace(-1.0, 2.0, 6), "ridge": r["ridge"]}))
    ),
    "vmap": lambda f: (
        lambda c: jax.vmap(lambda r: jax.grad(score(f))({"target": c["target"], "ridge": r}))(
            jnp.array([0.3, 0.7, 2.0])
        )
    ),
    "scan": lambda f: jax.grad(
        lambda c: jax.lax.scan(
            lambda total, r: (
                total + score(f)({"target": c["target"], "ridge": r * c["ridge"]}),
                None,
            ),
            0.0,
            jnp.array([0.5, 1.0]),
        )[0]
    ),
    "checkpoint": lambda f: jax.grad(jax.checkpoint(score(f))),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transformation(name, x64):
    found = jax.jit(TRANSFORMS[name](solution))(a_context())
    exact = jax.jit(TRANSFORMS[name](closed_form))(a_context())
    chex.assert_trees_all_close(found, exact, atol=1e-9)


class GradWithAndWithoutJit(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_grad(self):
        with jax.enable_x64(True):
            found = self.variant(jax.grad(score(solution)))(a_context())
            chex.assert_trees_all_close(
                found, jax.grad(score(closed_form))(a_context()), atol=1e-10
            )


def test_shard_map_over_eight_devices(x64):
    mesh = Mesh(np.array(jax.devices()), ("tasks",))
    ridges = jnp.linspace(0.5, 2.0, 8)

    def local(target, ridges):
        def total(target):
            each = jax.vmap(lambda r: score(solution)({"target": target, "ridge": r}))
            return jnp.sum(each(ridges))

        return jax.lax.psum(jax.grad(total)(target), "tasks")

    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(P(), P("tasks")), out_specs=P(), check_vma=False
    )
    target = a_context()["target"]
    found = jax.jit(sharded)(target, ridges)
    exact = jax.grad(lambda t: sum(score(closed_form)({"target": t, "ridge": r}) for r in ridges))(
        target
    )
    np.testing.assert_allclose(found, exact, atol=1e-9)


def test_memory_does_not_grow_with_inner_steps():
    def temporary_bytes(steps):
        inner = mm.InnerLoop(mm.inner.gradient_descent(), steps=steps)
        function = implicit_solution(ridge_loss, inner)
        gradient = jax.grad(lambda c: jnp.sum(function(jnp.zeros(3), c) ** 2))
        context = jax.tree.map(jnp.float32, a_context())
        return jax.jit(gradient).lower(context).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(1) == temporary_bytes(10) == temporary_bytes(1000)


def test_integer_and_key_leaves_and_half_precision():
    """Leaves that cannot be differentiated go through; bfloat16 parameters stay bfloat16."""

    def loss(phi, context):
        noise = jax.random.normal(context["key"], (2,))
        target = context["scale"] * noise[context["index"]]
        return 0.5 * jnp.sum((phi["x"].astype(jnp.float32) - target) ** 2)

    context = {"key": jax.random.key(1), "index": jnp.int32(1), "scale": jnp.float32(2.0)}
    start = {"x": jnp.zeros(3, jnp.bfloat16), "n": jnp.int32(4)}
    function = implicit_solution(loss, mm.InnerLoop(mm.inner.gradient_descent(), steps=5))

    def total(scale):
        return jnp.sum(function(start, context | {"scale": scale})["x"].astype(jnp.float32))

    found = jax.jit(lambda c: function(start, c))(context)
    noise = jax.random.normal(context["key"], (2,))[1]
    assert found["x"].dtype == jnp.bfloat16
    assert found["n"] == 4
    np.testing.assert_allclose(found["x"].astype(np.float32), 2 * noise, rtol=1e-2)
    np.testing.assert_allclose(jax.jit(jax.grad(total))(jnp.float32(2.0)), 3 * noise, rtol=1e-2)


def test_the_start_has_no_derivative():
    def final(start):
        context = jax.tree.map(jnp.float32, a_context())
        inner = mm.InnerLoop(mm.inner.newton(None), steps=3)
        return jnp.sum(implicit_solution(ridge_loss, inner)(start, context))

    np.testing.assert_array_equal(jax.jit(jax.grad(final))(jnp.ones(3)), np.zeros(3))
