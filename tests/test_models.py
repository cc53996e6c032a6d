"""Networks: shapes, batch statistics, how the head starts."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memmeta.models import conv4, mlp, resnet12

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
    chex.assert_type(jax.tree.leaves(params), jnp.float32)
    images = jax.random.randint(jax.random.key(1), (6, *shape), 0, 256).astype(jnp.uint8)
    found = jax.jit(network.body)(params["body"], images, jnp.ones(6))
    chex.assert_shape(found, (6, features))
    chex.assert_type(found, jnp.float32)
    assert (network.features, network.ways) == (features, 5)
    chex.assert_shape(network.head(params["head"], found), (6, 5))
    scaled = jax.jit(network.body)(params["body"], images.astype(jnp.float32) / 255, jnp.ones(6))
    np.testing.assert_allclose(found, scaled, atol=1e-5 if dtype == jnp.float32 else 0.2)


@pytest.mark.parametrize("name", NETWORKS)
def test_head_starts_from_zeros_or_at_the_scale_asked(name):
    """With standard deviation head_scale / sqrt(features): the same draw, scaled."""
    build, _, features = NETWORKS[name]
    zeros, small, large = (
        build(head_scale=scale).init(jax.random.key(0))["head"] for scale in (0.0, 1e-3, 1.0)
    )
    chex.assert_trees_all_equal(zeros, jax.tree.map(jnp.zeros_like, zeros))
    assert not large["bias"].any()
    chex.assert_trees_all_close(small, jax.tree.map(lambda x: 1e-3 * x, large), rtol=1e-5)
    draws = large["kernel"].size  # a chi-squared of so many: within four standard deviations
    variance = features * np.mean(np.square(large["kernel"]))
    assert abs(variance - 1) < 4 * (2 / draws) ** 0.5


@pytest.mark.parametrize("name", ["conv4", "resnet12"])
def test_weights_pick_the_examples_that_give_the_statistics(name):
    build, shape, _ = NETWORKS[name]
    network = build()
    params = network.init(jax.random.key(0))["body"]
    images = 3 + 2 * jax.random.normal(jax.random.key(1), (8, *shape))
    weights, body = jnp.repeat(jnp.asarray([1.0, 0.0]), 4), jax.jit(network.body)
    found = body(params, images, weights)
    np.testing.assert_allclose(found[:4], body(params, images[:4], jnp.ones(4)), atol=1e-4)
    changed = body(params, images.at[6].set(100.0), weights)
    np.testing.assert_allclose(changed[:6], found[:6], atol=1e-6)
    assert np.any(changed[6] != found[6])
    doubled = body(params, images, 2 * weights)  # only their ratios count
    np.testing.assert_allclose(doubled, found, atol=1e-5)
    chex.assert_tree_all_finite(body(params, images, jnp.zeros(8)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: conv4(0), "ways: expected a whole number, 1 or more, below 2³¹, found 0"),
        (
            lambda: conv4(5, head_scale=-1.0),
            "head_scale: expected a finite number, 0 or more, found -1.0",
        ),
        (lambda: conv4(5, image_shape=(15, 28, 1)), "image_shape: 15x28 cannot be halved 4 times"),
        (lambda: resnet12(5, image_shape=(12, 12, 3)), "image_shape: 12x12 cannot be halved 4"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
