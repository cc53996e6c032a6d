"""Networks: shapes, batch statistics, how the head starts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from memmeta.models import _image_chunks as image_chunks
from memmeta.models import conv4, mlp, resnet12
from memmeta.models._conv4 import ConvBlock
from memmeta.models._convolution import conv
from memmeta.models._normalization import EPSILON, BatchNorm, batch_statistics
from memmeta.models._patch_statistics import convolution_statistics
from memmeta.models._pooling import max_pool

NETWORKS = {
    "conv4": (lambda **o: conv4(5, width=4, image_shape=(18, 16, 3), **o), (18, 16, 3), 4),
    "resnet12": (lambda **o: resnet12(5, widths=(4,), image_shape=(5, 4, 3), **o), (5, 4, 3), 4),
    "mlp": (lambda **o: mlp(5, (6, 4), (3, 2), **o), (3, 2), 4),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_shapes_and_dtypes(name, dtype):
    build, shape, features = NETWORKS[name]
    network = build(dtype=dtype)
    params = network.init(jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    images = jax.random.randint(jax.random.key(1), (6, *shape), 0, 256).astype(jnp.uint8)
    found = jax.jit(network.body)(params["body"], images, jnp.ones(6))
    assert found.shape == (6, features)
    assert found.dtype == jnp.float32
    assert (network.features, network.ways) == (features, 5)
    assert network.head(params["head"], found).shape == (6, 5)
    scaled = jax.jit(network.body)(params["body"], images.astype(jnp.float32) / 255, jnp.ones(6))
    np.testing.assert_allclose(found, scaled, atol=1e-5 if dtype == jnp.float32 else 0.2)


@pytest.mark.parametrize("name", NETWORKS)
def test_head_starts_from_zeros_or_at_the_scale_asked(name):
    build, _, features = NETWORKS[name]
    head = build(head_scale=0.0).init(jax.random.key(0))["head"]
    assert not head["kernel"].any()
    assert not head["bias"].any()
    head = build(head_scale=1e-3).init(jax.random.key(0))["head"]
    assert 1e-4 < head["kernel"].std() * features**0.5 < 1e-2
    assert not head["bias"].any()


@pytest.mark.parametrize("shape", [(6, 5, 4, 3), (8, 2)])
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_batch_statistics_closed_form(shape, offset):
    inputs = offset + jax.random.normal(jax.random.key(0), shape)
    weights = jnp.asarray([2.0, 1.0, 0.0, 0.0] + [1.0] * (shape[0] - 4))
    mean, variance = batch_statistics(inputs, weights)
    wide = np.asarray(inputs, np.float64).reshape(shape[0], -1, shape[-1])
    share = np.asarray(weights, np.float64)[:, None, None] / (weights.sum() * wide.shape[1])
    expected = (share * wide).sum((0, 1))
    np.testing.assert_allclose(mean, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(variance, (share * (wide - expected) ** 2).sum((0, 1)), rtol=2e-5)


def test_batch_norm_weights_pick_the_examples_that_give_the_statistics():
    inputs = 3 + 2 * jax.random.normal(jax.random.key(0), (8, 4, 4, 3))
    layer = BatchNorm()
    params = layer.init(jax.random.key(1), inputs, jnp.ones(8))
    weights = jnp.repeat(jnp.asarray([1.0, 0.0]), 4)
    found = layer.apply(params, inputs, weights)
    np.testing.assert_allclose(found[:4], layer.apply(params, inputs[:4], jnp.ones(4)), atol=1e-5)
    np.testing.assert_allclose(found[:4].mean((0, 1, 2)), 0, atol=1e-5)
    variance = inputs[:4].var((0, 1, 2))
    np.testing.assert_allclose(found[:4].var((0, 1, 2)), variance / (variance + EPSILON), rtol=1e-4)
    changed = layer.apply(params, inputs.at[6].set(100.0), weights)
    np.testing.assert_allclose(changed[:6], found[:6], atol=1e-6)
    assert jnp.isfinite(layer.apply(params, inputs, jnp.zeros(8))).all()


def test_batch_norm_derivatives_against_finite_differences():
    with jax.enable_x64(True):
        inputs = jax.random.normal(jax.random.key(0), (4, 3, 2, 2), jnp.float64)
        weights = jnp.asarray([1.0, 1.0, 1.0, 0.0])
        params = {"params": {"scale": jnp.asarray([0.5, -2.0]), "bias": jnp.asarray([1.0, 3.0])}}

        @jax.jit
        def loss(inputs, params):
            return jnp.sum(jnp.sin(BatchNorm().apply(params, inputs, weights)))

        check_grads(loss, (inputs, params), order=2, atol=1e-4, rtol=1e-4)


@pytest.fixture
def few_positions(monkeypatch):
    """Let small test images be worked on in several chunks, the last one smaller."""
    monkeypatch.setattr(image_chunks, "POSITIONS", 100)


@pytest.mark.parametrize("offset", [0.0, 300.0])
@pytest.mark.parametrize("shape", [(5, 7, 6, 2, 3, 5), (4, 5, 8, 1, 3, 3)])
def test_statistics_of_patches_are_those_of_the_convolution(x64, few_positions, shape, offset):
    examples, height, width, channels, rows, columns = shape
    images = offset + jax.random.normal(jax.random.key(0), (examples, height, width, channels))
    kernel = jax.random.normal(jax.random.key(1), (rows, columns, channels, 4))
    for weights in (jnp.asarray([2.0, 1.0, 0.0, 0.5, 1.0])[:examples], jnp.zeros(examples)):
        found = convolution_statistics(images, kernel, weights)
        expected = batch_statistics(conv(images, kernel), weights)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), found, expected)


def test_statistics_of_patches_in_half_precision_are_summed_wide():
    images = (3 + jax.random.normal(jax.random.key(0), (6, 9, 9, 1))).astype(jnp.bfloat16)
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 1, 16), jnp.bfloat16)
    found = convolution_statistics(images, kernel, jnp.ones(6))
    wide = conv(images.astype(jnp.float32), kernel.astype(jnp.float32))
    for a, b in zip(found, batch_statistics(wide, jnp.ones(6)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4)


@pytest.mark.parametrize(("filters", "round_up"), [(3, True), (20, False), (20, True)])
def test_conv_block_equals_the_order_it_is_defined_by(x64, few_positions, filters, round_up):
    images = jax.random.normal(jax.random.key(0), (5, 7, 6, 2))
    weights = jnp.asarray([1.0, 1.0, 1.0, 0.0, 1.0])
    start = jax.random.normal(jax.random.key(1), (2, filters))
    params = {
        "kernel": jax.random.normal(jax.random.key(2), (3, 3, 2, filters)),
        "scale": start[0],
        "bias": 0.1 * start[1],
    }

    def fast(params, images):
        return ConvBlock(filters, round_up).apply({"params": params}, images, weights)

    def plain(params, images):
        hidden = conv(images, params["kernel"])
        norm = {"params": {name: params[name] for name in ("scale", "bias")}}
        normed = jax.nn.relu(BatchNorm().apply(norm, hidden, weights))
        return max_pool(jnp.pad(normed, ((0, 0), (0, int(round_up)), (0, 0), (0, 0))))

    def derivatives(function):
        def gradient(*primals):
            return jax.grad(lambda *p: jnp.sum(jnp.sin(function(*p))), (0, 1))(*primals)

        tangents = jax.tree.map(jnp.ones_like, (params, images))
        return function(params, images), jax.jvp(gradient, (params, images), tangents)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9),
        jax.jit(lambda: derivatives(fast))(),
        jax.jit(lambda: derivatives(plain))(),
    )


def test_a_block_of_few_channels_keeps_nothing_the_size_of_its_convolution():
    images, block = jnp.ones((40, 32, 32, 1)), ConvBlock(16)
    params = block.init(jax.random.key(0), images[:1], jnp.ones(1))
    loss = jax.jit(jax.grad(lambda p: jnp.sum(block.apply(p, images, jnp.ones(40)) ** 2)))
    temporary = loss.lower(params).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 16 * images.nbytes


@pytest.mark.parametrize(
    ("examples", "positions", "expected"),
    [(150, 4, 6), (80, 3, 10), (75, 9, 3), (7, 8, 2), (1, 99, 1), (5, 1, 5), (11, 2, 11)],
)
def test_images_at_a_time(examples, positions, expected):
    assert image_chunks.images_at_a_time(examples, positions, 16) == expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: conv4(0), "ways: must be at least 1, found 0"),
        (lambda: conv4(5, head_scale=-1.0), "head_scale: must be at least 0, found -1.0"),
        (lambda: conv4(5, image_shape=(15, 28, 1)), "image_shape: 15x28 cannot be halved 4 times"),
        (lambda: resnet12(5, image_shape=(12, 12, 3)), "image_shape: 12x12 cannot be halved 4"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
