"""The convolution and the pool against XLA's own, in float64, to the second derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from memmeta.models import _convolution_forms as forms
from memmeta.models._convolution import conv
from memmeta.models._pooling import max_pool

SHAPES = [  # examples, height, width, channels, kernel rows, kernel columns, filters
    (2, 5, 4, 3, 3, 3, 2),
    (7, 2, 7, 1, 3, 3, 4),
    (7, 2, 2, 3, 3, 3, 2),
    (2, 6, 5, 2, 5, 3, 2),
    (2, 4, 4, 3, 1, 1, 5),
]


@pytest.fixture(autouse=True)
def few_positions(monkeypatch):
    """Let small test images be summed in several chunks."""
    monkeypatch.setattr(forms, "POSITIONS", 16)
    jax.clear_caches()
    yield
    jax.clear_caches()


def reference(images, kernel):
    return lax.conv_general_dilated(
        images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def draw(shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def assert_same(found, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10), found, expected
    )


def derivatives(function, primals, tangents):
    """Value, gradient, and the Hessian-vector product in two orders of the modes."""

    def gradient(*primals):
        return jax.grad(lambda *p: jnp.sum(jnp.sin(function(*p)) ** 2), (0, 1))(*primals)

    def along_tangents(*primals):
        return sum(jnp.vdot(g, t) for g, t in zip(gradient(*primals), tangents, strict=True))

    return (
        function(*primals),
        gradient(*primals),
        jax.jvp(gradient, primals, tangents)[1],
        jax.grad(along_tangents, (0, 1))(*primals),
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_conv_and_its_derivatives_equal_xlas(x64, shape):
    examples, height, width, channels, rows, columns, filters = shape
    primals = (draw((examples, height, width, channels)), draw((rows, columns, channels, filters)))
    tangents = jax.tree.map(lambda x: draw(x.shape, 2), primals)
    found, expected = (
        jax.jit(lambda f=f: derivatives(f, primals, tangents))() for f in (conv, reference)
    )
    assert_same(found, expected)


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (1, 3)])
def test_under_vmap_and_its_derivatives(x64, axes):
    primals = (draw((3, 2, 5, 4, 2)), draw((3, 3, 3, 2, 4)))
    if axes == (1, 3):
        primals = (jnp.moveaxis(primals[0], 0, 1), jnp.moveaxis(primals[1], 0, 3))
    primals = tuple(x if i is not None else x[0] for x, i in zip(primals, axes, strict=True))
    tangents = jax.tree.map(lambda x: draw(x.shape, 2), primals)
    found, expected = (
        jax.jit(lambda f=f: derivatives(jax.vmap(f, axes), primals, tangents))()
        for f in (conv, reference)
    )
    assert_same(found, expected)


def test_gradient_per_task_and_nested_vmap(x64):
    images, kernels = draw((2, 3, 2, 5, 4, 2)), draw((3, 3, 3, 2, 2))

    def gradients(function):
        def one(images, kernel):
            return jax.grad(lambda k: jnp.sum(jnp.sin(function(images, k))))(kernel)

        shared = jax.vmap(jax.vmap(one, (0, None)), (0, None))(images, kernels[0])
        return shared, jax.vmap(jax.vmap(one), (0, None))(images, kernels)

    assert_same(jax.jit(lambda: gradients(conv))(), jax.jit(lambda: gradients(reference))())


def test_forms_of_both_platforms_agree(x64):
    images, kernels = draw((3, 5, 6, 4, 2)), draw((3, 3, 5, 2, 4))
    cotangents = draw((3, 5, 6, 4, 4), 1)

    @jax.jit
    def cpu():
        gradient = forms.kernel_gradient_in_turn(images, cotangents, (3, 5))
        return forms.convolve_in_turn(images, kernels), gradient

    @jax.jit
    def others():
        gradient = forms.kernel_gradient_together(images, cotangents, (3, 5))
        return forms.convolve_together(images, kernels), gradient

    assert_same(cpu(), others())


def test_shared_kernel_gradient_builds_no_kernel_per_task():
    tasks, kernel = 7, jnp.ones((3, 3, 2, 4))
    images = jnp.ones((tasks, 2, 6, 6, 2))

    def loss(kernel):
        return jnp.mean(jax.vmap(lambda x: jnp.sum(conv(x, kernel) ** 2))(images))

    assert "7,3,3,2,4" not in str(jax.make_jaxpr(jax.grad(loss))(kernel))
    text = jax.jit(jax.grad(loss)).lower(kernel).compile().as_text()
    for shape in ("[7,3,3,2,4]", "[7,2,3,3,4]", "[7,18,4]", "[7,4,18]"):
        assert shape not in text


def test_no_patches_are_stored_for_the_backward_pass():
    images, kernel = jnp.ones((64, 16, 16, 8)), jnp.ones((3, 3, 8, 8))
    gradient = jax.jit(jax.grad(lambda k: jnp.sum(conv(images, k) ** 2)))
    temporary = gradient.lower(kernel).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 3 * images.nbytes  # patches alone would be 9


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map(check_vma):
    mesh = jax.make_mesh((2,), ("tasks",), axis_types=(jax.sharding.AxisType.Auto,))
    images, kernel = draw((4, 3, 5, 4, 2)), draw((3, 3, 2, 3))

    def loss(kernel, images):
        return jnp.mean(jax.vmap(lambda x: jnp.mean(jnp.sin(conv(x, kernel))))(images))

    @jax.shard_map(
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("tasks")),
        out_specs=PartitionSpec(),
        check_vma=check_vma,
    )
    def sharded(kernel, images):
        return lax.pmean(loss(kernel, images), "tasks")

    found = jax.jit(jax.grad(sharded))(kernel, images)
    np.testing.assert_allclose(found, jax.jit(jax.grad(loss))(kernel, images), atol=1e-6)


def test_even_kernel_is_refused():
    with pytest.raises(ValueError, match="kernel: height and width must be odd, found 2x3"):
        conv(jnp.ones((1, 4, 4, 1)), jnp.ones((2, 3, 1, 1)))


@pytest.mark.parametrize("shape", [(2, 4, 6, 3), (1, 5, 7, 2), (1, 3, 2, 1)])
def test_max_pool_and_its_derivatives_equal_xlas(x64, shape):
    images = draw(shape)

    def windows(images):
        return lax.reduce_window(images, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")

    primals = (images, jnp.ones(shape[-1]))
    tangents = jax.tree.map(lambda x: draw(x.shape, 2), primals)
    found, expected = (
        jax.jit(lambda f=f: derivatives(lambda x, s: f(x) * s, primals, tangents))()
        for f in (max_pool, windows)
    )
    assert_same(found, expected)


def test_max_pool_shares_the_derivative_among_equals():
    gradient = jax.grad(lambda x: max_pool(x).sum())
    ties = jnp.asarray([[2.0, 2.0], [1.0, 2.0]]).reshape(1, 2, 2, 1)
    np.testing.assert_allclose(gradient(ties).ravel(), [1 / 3, 1 / 3, 0, 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(gradient(jnp.zeros((1, 2, 2, 1))).ravel(), [0.25] * 4)
    assert jnp.isnan(gradient(ties.at[0, 0, 0, 0].set(jnp.nan))).any()
