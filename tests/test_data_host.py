"""Data on the host give the episodes of data on the device; augmentation against plain NumPy."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memmeta.data import (
    Augmentation,
    DataError,
    Dataset,
    Episodes,
    HostDataset,
    HostEpisodes,
    Warp,
    load,
    load_host,
    normalisation,
    sampler,
)

CLASSES, EXAMPLES = 6, 5


def make_dataset():
    """Random images; classes of different sizes, padded with zeros."""
    count = np.array([5, 4, 5, 3, 5, 4], np.int32)
    inputs = np.random.default_rng(0).integers(0, 256, (CLASSES, EXAMPLES, 6, 6, 3), np.uint8)
    inputs[np.arange(EXAMPLES) >= count[:, None]] = 0
    return Dataset(
        inputs=jnp.asarray(inputs),
        count=jnp.asarray(count),
        group=jnp.zeros(CLASSES, jnp.int32),
        family=jnp.zeros((CLASSES, EXAMPLES), jnp.int32),
        name="noise",
        split="train",
        class_names=tuple("abcdef"),
        group_names=("",),
        family_names=("",),
    )


def on_host():
    """The same on the host: padding has rows of its own."""
    dataset = make_dataset()
    numbers = np.arange(CLASSES * EXAMPLES, dtype=np.int32).reshape(CLASSES, EXAMPLES)
    rows = np.asarray(dataset.inputs).reshape(-1, *dataset.example_shape)
    return HostDataset(replace(dataset, inputs=numbers), rows)


AUGMENTATION = Augmentation(Warp(0.2), 2, True, mean=(0.4, 0.5, 0.6), deviation=(0.2, 0.3, 0.4))
SPECS = [
    Episodes(ways=3, shots=1, queries=2),
    Episodes(ways=(2, 4), shots=(1, 2), queries=1, augmentation=AUGMENTATION),
]


@pytest.mark.parametrize("spec", SPECS, ids=["plain", "padded and augmented"])
def test_the_same_episodes_as_on_the_device(spec):
    dataset, key = make_dataset(), jax.random.key(0)
    # only the examples that are there, class after class, as in a cache
    rows = np.concatenate([x[:n] for x, n in zip(dataset.inputs, dataset.count, strict=True)])
    starts = np.cumsum(dataset.count) - dataset.count
    numbers = starts[:, None] + np.arange(EXAMPLES)
    index = jax.tree.map(np.asarray, dataset)
    index = type(index)(**{**vars(index), "inputs": np.minimum(numbers, len(rows) - 1)})
    host = HostDataset(index, rows)
    sample = jax.jit(spec.sample_batch, static_argnums=2)
    expected, on_device = (sample(data, key, 8) for data in (dataset, host.to_device()))
    drawer = HostEpisodes(spec)
    drawer.check(host)
    halves = [drawer.sample_batch(host, key, 4, first) for first in (0, 4)]
    joined = jax.tree.map(lambda *parts: jnp.concatenate(parts), *halves)
    for found in (on_device, joined):
        for leaf, like in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
            assert leaf.dtype == like.dtype
            np.testing.assert_array_equal(leaf, like)


def test_a_stream_is_the_batches_in_order():
    host, drawer = on_host(), HostEpisodes(SPECS[0])
    keys = [jax.random.key(seed) for seed in range(5)]
    stream = drawer.stream(host, iter(keys), tasks=4)
    for key, found in zip(keys, stream, strict=True):
        expected = drawer.sample_batch(host, key, 4)
        np.testing.assert_array_equal(found.query_inputs, expected.query_inputs)
    assert list(drawer.stream(host, [], tasks=4)) == []


def test_a_stream_is_ahead_of_its_reader():
    """The next two batches are asked for before the first is taken."""
    host, asked = on_host(), []

    def keys():
        for seed in range(5):
            asked.append(seed)
            yield jax.random.key(seed)

    stream = HostEpisodes(SPECS[0]).stream(host, keys(), tasks=4)
    next(stream)
    assert asked == [0, 1, 2]
    next(stream)
    assert asked == [0, 1, 2, 3]
    stream.close()


def test_a_failure_in_a_stream_is_raised_where_it_is_read():
    host = on_host()
    broken = HostDataset(host.index, host.rows[:1])
    with pytest.raises(IndexError):
        list(HostEpisodes(SPECS[0]).stream(broken, [jax.random.key(0)], tasks=4))


def test_too_few_classes_are_refused_as_on_the_device():
    with pytest.raises(DataError, match="ways=7 is too many for noise/train"):
        HostEpisodes(Episodes(ways=7, queries=2)).check(on_host())


def test_embedded_data_on_the_host():
    assert sampler(load_host("glyphs", "test"), shots=2) == HostEpisodes(Episodes(shots=2))
    host = load_host("glyphs", "test")
    assert host.example_shape == (28, 28, 1)
    np.testing.assert_array_equal(host.to_device().inputs, load("glyphs", "test").inputs)
    with pytest.raises(DataError, match="tides: its curves are generated on the device"):
        load_host("tides", "test")


def test_crops_are_windows_of_the_padded_image():
    images = make_dataset().inputs[0]
    many = jnp.tile(images[:1], (400, 1, 1, 1))
    found = np.asarray(Augmentation(crop_padding=2)(jax.random.key(0), many))
    padded = np.pad(np.asarray(images[0]), ((2, 2), (2, 2), (0, 0)))
    windows = [padded[i : i + 6, j : j + 6].tobytes() for i in range(5) for j in range(5)]
    counts = [sum(image.tobytes() == window for image in found) for window in windows]
    assert found.dtype == np.uint8
    assert sum(counts) == 400
    assert min(counts) > 2  # 16 expected of each of the 25


def test_flips_mirror_half_of_the_images():
    image = make_dataset().inputs[0, :1]
    found = Augmentation(flip=True)(jax.random.key(0), jnp.tile(image, (400, 1, 1, 1)))
    same = (np.asarray(found) == np.asarray(image)).all(axis=(1, 2, 3))
    mirrored = (np.asarray(found) == np.asarray(image[:, :, ::-1])).all(axis=(1, 2, 3))
    assert (same ^ mirrored).all()
    assert abs(same.mean() - 0.5) < 4 * 0.5 / 20


def test_normalisation_by_the_training_split():
    dataset = make_dataset()
    present = np.arange(EXAMPLES) < np.asarray(dataset.count)[:, None]
    pixels = np.asarray(dataset.inputs)[present].reshape(-1, 3) / 255
    mean, deviation = normalisation(dataset)
    np.testing.assert_allclose(mean, pixels.mean(axis=0))
    np.testing.assert_allclose(deviation, pixels.std(axis=0))
    images = dataset.inputs[0]
    found = Augmentation(mean=mean, deviation=deviation)(jax.random.key(0), images)
    assert found.dtype == jnp.float32
    expected = (np.asarray(images) / 255 - mean) / deviation
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # the same from floats between 0 and 1
    floats = images.astype(jnp.float32) / jnp.float32(255)
    again = Augmentation(mean=mean, deviation=deviation)(jax.random.key(0), floats)
    np.testing.assert_allclose(again, found, atol=1e-5)


def test_what_augmentation_and_normalisation_refuse():
    with pytest.raises(ValueError, match="crop_padding=-1: it must be 0 or more"):
        Augmentation(crop_padding=-1)
    with pytest.raises(ValueError, match="mean and deviation: give both or neither"):
        Augmentation(mean=(0.5,))
    blank = jax.tree.map(jnp.zeros_like, make_dataset())
    blank = type(blank)(**{**vars(blank), "count": make_dataset().count})
    with pytest.raises(DataError, match="a channel has the same value everywhere"):
        normalisation(blank)
    with pytest.raises(DataError, match="tides has curves"):
        sampler(load("tides", "train"), augmentation=AUGMENTATION)
