"""Convolutional bodies against the same networks in XLA's own operations, to second derivatives."""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from assertions import relative_error
from jax import lax
from jax.sharding import PartitionSpec

from memmeta.models import conv4, resnet12

pytestmark = pytest.mark.slow


def plain_conv(images, kernel):
    return lax.conv_general_dilated(
        images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def plain_batch_norm(images, scale, bias, weights):
    """By the weighted mean and variance over examples and positions."""
    share = (weights / jnp.maximum(weights.sum(), 1)).astype(images.dtype)
    mean = share @ images.mean((1, 2))
    variance = share @ jnp.square(images - mean).mean((1, 2))
    return scale * (images - mean) / jnp.sqrt(variance + 1e-5) + bias


def plain_max_pool(images):
    return lax.reduce_window(images, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def plain_conv4(params, images, weights, round_up):
    for block in params.values():
        images = plain_batch_norm(
            plain_conv(images, block["kernel"]), block["scale"], block["bias"], weights
        )
        if round_up:
            odd = [(0, 0), *((0, side % 2) for side in images.shape[1:3]), (0, 0)]
            images = jnp.pad(images, odd, mode="edge")
        images = plain_max_pool(jax.nn.relu(images))
    return images.reshape(len(images), -1)


def plain_resnet12(params, images, weights):
    for block in params.values():

        def convolved(images, number, block=block):
            norm = block[f"BatchNorm_{number}"]
            hidden = plain_conv(images, block[f"Conv_{number}"]["kernel"])
            return plain_batch_norm(hidden, norm["scale"], norm["bias"], weights)

        hidden = images
        for number in (1, 2):
            hidden = jax.nn.leaky_relu(convolved(hidden, number), 0.1)
        images = plain_max_pool(convolved(hidden, 3) + convolved(images, 0))
        images = jax.nn.leaky_relu(images, 0.1)
    return images.mean((1, 2))


class Case(NamedTuple):
    """A network and its plain form: examples, image shape, filters."""

    examples: int
    shape: tuple[int, int, int]
    filters: int
    depth: int = 1
    round_up: bool = False

    def both(self, dtype=jnp.float64):
        options = {"image_shape": self.shape, "depth": self.depth, "round_up": self.round_up}
        network = conv4(2, width=self.filters, dtype=dtype, **options)
        return network, functools.partial(plain_conv4, round_up=self.round_up)


class Residual(Case):
    """The same of a ResNet."""

    def both(self, dtype=jnp.float64):
        widths = (self.filters,) * self.depth
        return resnet12(2, widths=widths, image_shape=self.shape, dtype=dtype), plain_resnet12


CASES = {
    "small": Case(3, (5, 4, 3), 2),
    "rounded up": Case(3, (5, 7, 2), 3, round_up=True),
    "images in several chunks": Case(7, (16, 16, 3), 4),
    "statistics of the patches, in several chunks": Case(7, (32, 32, 1), 10),
    "two blocks": Case(2, (8, 9, 1), 10, depth=2),
    "residual": Residual(3, (6, 4, 3), 4),
}


def drawn(case, dtype=jnp.float64, offset=0.0):
    """Parameters of both signs, images, and weights that leave an example out."""
    network, _ = case.both(dtype)
    params = network.init(jax.random.key(0))["body"]
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves) + 1)
    drawn = [jax.random.normal(k, x.shape, dtype) for k, x in zip(keys[1:], leaves, strict=True)]
    images = offset + jax.random.normal(keys[0], (case.examples, *case.shape), dtype)
    weights = jnp.ones(case.examples, jnp.float32).at[1].set(0).at[0].set(2)
    return jax.tree.unflatten(structure, drawn), images, weights


def derivatives(function, primals):
    """Value, gradient, and the Hessian-vector product in two orders of the modes."""
    tangents = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)), primals)
    tangents = jax.tree.map(lambda t, x: t.reshape(x.shape), tangents, primals)

    def gradient(*primals):
        return jax.grad(lambda *p: jnp.sum(jnp.sin(function(*p)) ** 2), (0, 1))(*primals)

    def along_tangents(*primals):
        products = jax.tree.map(jnp.vdot, gradient(*primals), tangents)
        return sum(jax.tree.leaves(products))

    return (
        function(*primals),
        gradient(*primals),
        jax.jvp(gradient, primals, tangents)[1],
        jax.grad(along_tangents, (0, 1))(*primals),
    )


def narrow(function):
    """With features in float32, as bodies give them."""
    return lambda *arguments: function(*arguments).astype(jnp.float32)


def assert_same(found, expected, tolerance=1e-5):
    """Each derivative as a whole: features are float32, everything before them float64."""
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < tolerance


@pytest.mark.parametrize("name", CASES)
def test_bodies_and_their_derivatives_equal_xlas(x64, name):
    network, plain = CASES[name].both()
    params, images, weights = drawn(CASES[name])
    found, expected = (
        jax.jit(lambda p, x, f=f: derivatives(lambda p, x: f(p, x, weights), (p, x)))(
            params, images
        )
        for f in (network.body, narrow(plain))
    )
    assert_same(found, expected)


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)])
def test_under_vmap_and_its_derivatives(x64, axes):
    """One kernel for all tasks, or each its own."""
    case = CASES["small"]
    network, plain = case.both()
    params, images, weights = drawn(case)
    spread = lambda x: jnp.stack([x, 2 * x, x - 1])  # noqa: E731
    params = jax.tree.map(spread, params) if axes[0] == 0 else params
    images = spread(images) if axes[1] == 0 else images

    def both_orders(body):
        every = jax.vmap(lambda p, x: body(p, x, weights), axes)
        return jax.jit(lambda p, x: derivatives(every, (p, x)))(params, images)

    assert_same(both_orders(network.body), both_orders(narrow(plain)))


@pytest.mark.parametrize("name", ["statistics of the patches, in several chunks", "small"])
def test_bright_images_lose_no_digits(name):
    """A mean of 300 against a spread of 1: squares in float32 hold five digits of it."""
    network, _ = CASES[name].both(jnp.float32)
    params, images, weights = drawn(CASES[name], jnp.float32, offset=300.0)
    found = jax.jit(network.body)(params, images, weights)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), (params, images))
        expected = jax.jit(CASES[name].both()[1])(*wide, weights)
        assert relative_error(np.asarray(found, np.float64), expected) < 1e-3


def test_statistics_in_half_precision_are_summed_wide():
    """The error is that of rounding inputs, kernel and result, whatever the number of summands."""
    case = Case(6, (24, 24, 1), 16)
    network, plain = case.both(jnp.bfloat16)
    params, images, weights = drawn(case, jnp.bfloat16, offset=3.0)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (params, images))
    found = jax.jit(network.body)(wide[0], images, weights)
    assert relative_error(found, jax.jit(plain)(*wide, weights)) < 2 * jnp.finfo(jnp.bfloat16).eps


def test_a_shared_kernels_gradient_builds_no_kernel_per_task():
    tasks, network = 7, conv4(2, width=4, image_shape=(8, 8, 2), depth=1)
    images, weights = jnp.ones((tasks, 2, 8, 8, 2)), jnp.ones(2)
    params = network.init(jax.random.key(0))["body"]

    def loss(params):
        each = jax.vmap(lambda x: jnp.sum(network.body(params, x, weights) ** 2))
        return jnp.mean(each(images))

    assert "7,3,3,2,4" not in str(jax.make_jaxpr(jax.grad(loss))(params))
    text = jax.jit(jax.grad(loss)).lower(params).compile().as_text()
    for shape in ("[7,3,3,2,4]", "[7,2,3,3,4]", "[7,18,4]", "[7,4,18]"):
        assert shape not in text


def temporary_bytes(network, images):
    """Of the gradient of a sum of squares of the features."""
    params, weights = network.init(jax.random.key(0))["body"], jnp.ones(len(images))
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(network.body(p, images, weights) ** 2)))
    return gradient.lower(params).compile().memory_analysis().temp_size_in_bytes


def test_no_patches_are_stored_for_the_backward_pass():
    images = jnp.ones((64, 16, 16, 8))
    network = conv4(2, width=8, image_shape=images.shape[1:], depth=1)
    assert temporary_bytes(network, images) < 9 * images.nbytes  # the patches alone


def test_a_block_of_few_channels_keeps_nothing_the_size_of_its_convolution():
    images = jnp.ones((40, 32, 32, 1))
    network = conv4(2, width=16, image_shape=images.shape[1:], depth=1)
    assert temporary_bytes(network, images) < 16 * images.nbytes


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_shard_map(check_vma):
    mesh = jax.make_mesh((2,), ("tasks",), axis_types=(jax.sharding.AxisType.Auto,))
    case = CASES["small"]
    network, _ = case.both(jnp.float32)
    params, images, weights = drawn(case, jnp.float32)
    images = jnp.stack([images, -images, 2 * images, images + 1])

    def loss(params, images):
        each = jax.vmap(lambda x: jnp.mean(jnp.sin(network.body(params, x, weights))))
        return jnp.mean(each(images))

    @jax.shard_map(
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("tasks")),
        out_specs=PartitionSpec(),
        check_vma=check_vma,
    )
    def sharded(params, images):
        return lax.pmean(loss(params, images), "tasks")

    found, expected = (jax.jit(jax.grad(f))(params, images) for f in (sharded, loss))
    chex.assert_trees_all_close(found, expected, atol=1e-6)
