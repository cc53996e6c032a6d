"""Random affine maps of images: against another library's, and what must not change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import affine_transform

from memmeta.data import Augmentation, Warp

IMAGES = np.random.default_rng(0).integers(0, 256, (4, 9, 8, 2), np.uint8)


def test_a_warp_is_scipys_affine_transform():
    warp, key = Warp(angle=0.5, stretch=0.2, shear=0.3, shift=0.1), jax.random.key(3)
    found = np.asarray(jax.jit(warp)(key, jnp.asarray(IMAGES)))
    draws = np.asarray(jax.random.uniform(key, (4, 6), jnp.float32, -1, 1), np.float64)
    for image, result, (a, s, t, k, *b) in zip(IMAGES, found, draws, strict=True):
        cos, sin = np.cos(0.5 * a), np.sin(0.5 * a)
        stretch = np.array([[np.exp(0.2 * s), 0.3 * k], [0, np.exp(0.2 * t)]])
        matrix = np.array([[cos, -sin], [sin, cos]]) @ stretch
        middle = (np.array(image.shape[:2]) - 1) / 2
        offset = middle - matrix @ middle + 0.1 * np.array(image.shape[:2]) * b
        for channel in range(2):
            expected = affine_transform(
                image[..., channel].astype(float), matrix, offset, order=1, mode="grid-constant"
            )
            assert np.abs(result[..., channel] - expected).max() < 0.51  # rounded to whole numbers


def test_no_warp_changes_nothing():
    np.testing.assert_array_equal(Warp()(jax.random.key(0), jnp.asarray(IMAGES)), IMAGES)


def test_every_image_is_warped_by_itself():
    same = jnp.tile(jnp.asarray(IMAGES[:1]), (3, 1, 1, 1))
    found = np.asarray(Augmentation(Warp(angle=0.5))(jax.random.key(0), same))
    assert not np.array_equal(found[0], found[1])
    assert not np.array_equal(found[1], found[2])


def test_a_negative_figure_is_refused():
    with pytest.raises(ValueError, match="shear=-1: it must be 0 or more"):
        Warp(shear=-1)
