"""The convolution and the pool against XLA's own, in float64, to the second derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memmeta.models.convolution import conv, direct_convolution, max_pool, patches_times_matrix

SHAPES = [  # examples, height, width, channels, kernel rows, kernel columns, filters
    (2, 5, 4, 3, 3, 3, 2),
    (1, 1, 1, 2, 3, 3, 3),
    (3, 2, 7, 1, 3, 3, 4),
    (2, 6, 5, 2, 5, 3, 2),
    (2, 4, 4, 3, 1, 1, 5),
]


def draw(shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", [conv, patches_times_matrix])
def test_equals_direct_convolution(form, shape):
    examples, height, width, channels, rows, columns, filters = shape
    with jax.enable_x64(True):
        images, kernel = (
            draw((examples, height, width, channels)),
            draw((rows, columns, channels, filters), 1),
        )
        tangents = jax.tree.map(lambda x: draw(x.shape, 2), (images, kernel))

        def derivatives(form):
            def loss(images, kernel):
                return jnp.sum(jnp.sin(form(images, kernel)) ** 2)

            gradient = jax.grad(loss, (0, 1))

            def hvp_reverse(primals):
                return jax.grad(
                    lambda p: sum(
                        jnp.vdot(g, t) for g, t in zip(gradient(*p), tangents, strict=True)
                    )
                )(primals)

            primals = (images, kernel)
            return (
                form(images, kernel),
                gradient(*primals),
                jax.jvp(gradient, primals, tangents)[1],
                hvp_reverse(primals),
            )

        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10),
            jax.jit(lambda: derivatives(form))(),
            jax.jit(lambda: derivatives(direct_convolution))(),
        )


@pytest.mark.parametrize("kernels_per_task", [False, True])
def test_under_vmap_equals_one_task_at_a_time(kernels_per_task):
    with jax.enable_x64(True):
        images = draw((3, 2, 5, 4, 2))
        kernel = draw((3, 3, 3, 2, 4) if kernels_per_task else (3, 3, 2, 4), 1)
        axes = (0, 0 if kernels_per_task else None)

        def gradients(form):
            def loss(images, kernel):
                return jnp.sum(jnp.sin(jax.vmap(form, axes)(images, kernel)))

            return jax.grad(loss, (0, 1))(images, kernel)

        one_by_one = gradients(direct_convolution)
        for mine, other in zip(gradients(conv), one_by_one, strict=True):
            np.testing.assert_allclose(mine, other, rtol=1e-10, atol=1e-10)


def array_shapes(jaxpr):
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield variable.aval.shape
        for inner in jax.core.jaxprs_in_params(equation.params):
            yield from array_shapes(inner)


def test_shared_kernel_gradient_builds_no_kernel_per_task():
    tasks, kernel = 7, jnp.ones((3, 3, 2, 4))
    images = jnp.ones((tasks, 2, 6, 6, 2))

    def loss(kernel):
        return jnp.mean(jax.vmap(lambda x: jnp.sum(conv(x, kernel) ** 2))(images))

    text = jax.jit(jax.grad(loss)).lower(kernel).compile().as_text()
    assert "[3,3,2,4]" in text
    for shape in ("[7,3,3,2,4]", "[7,18,4]", "[7,4,18]", "[7,9,2,4]", "[9,7,2,4]"):
        assert shape not in text


def test_even_kernel_is_refused():
    with pytest.raises(ValueError, match="kernel: height and width must be odd, found 2x3"):
        conv(jnp.ones((1, 4, 4, 1)), jnp.ones((2, 3, 1, 1)))


@pytest.mark.parametrize("shape", [(2, 4, 6, 3), (1, 5, 7, 2), (1, 3, 2, 1)])
def test_max_pool_equals_reduce_window(shape):
    images = jax.random.normal(jax.random.key(0), shape)
    expected = jax.lax.reduce_window(
        images, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
    )
    np.testing.assert_array_equal(max_pool(images), expected)
