"""Augmentation of sampled images on the device, and the training split's mean and deviation."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, Shaped

from memmeta.data._dataset import DataError, Dataset
from memmeta.data._host import HostDataset, on_host
from memmeta.data._warp import Warp


@dataclass(frozen=True)
class Augmentation:
    """Random augmentation of each image of an episode, followed by a fixed normalisation.

    Each image is augmented independently. Rotated images as classes of their own, as in
    `load("omniglot", ...)`, are not an augmentation: they are part of the data set.

    Args:
        warp: a random affine map, applied first; None for none.
        crop_padding: width in pixels of a black border that is added before a crop of the original
            size is taken at random; 0 for no crop.
        flip: whether to mirror left and right with probability 1/2.
        mean: value of each channel that is subtracted last, for pixels scaled to 0 to 1; see
            `normalisation`.
        deviation: value of each channel that is then divided by. Give both this and `mean`, or
            neither.

    Raises:
        ValueError: `crop_padding` is negative, or only one of `mean` and `deviation` is given.

    Example:
        >>> images = jnp.zeros((2, 8, 8, 3), jnp.uint8)
        >>> augment = Augmentation(Warp(shear=0.1), crop_padding=2, flip=True)
        >>> augment(jax.random.key(0), images).shape
        (2, 8, 8, 3)
    """

    warp: Warp | None = None
    crop_padding: int = 0
    flip: bool = False
    mean: tuple[float, ...] | None = None
    deviation: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.crop_padding < 0:
            raise ValueError(f"crop_padding={self.crop_padding}: it must be 0 or more")
        if (self.mean is None) != (self.deviation is None):
            raise ValueError("mean and deviation: give both or neither")

    def __call__(
        self, key: PRNGKeyArray, images: Shaped[Array, "images height width channels"]
    ) -> Shaped[Array, "images height width channels"]:
        """Augment a batch of images; a pure function.

        Args:
            key: the PRNG key.
            images: uint8 from 0 to 255, or floating-point from 0 to 1.

        Returns:
            The augmented images: float32 if they are normalised, otherwise of the same dtype.
        """
        warp_key, crop_key, flip_key = jax.random.split(key, 3)
        if self.warp is not None:
            images = self.warp(warp_key, images)
        if self.crop_padding:
            images = _crop(crop_key, images, self.crop_padding)
        if self.flip:
            mirrored = jax.random.bernoulli(flip_key, 0.5, (len(images), 1, 1, 1))
            images = jnp.where(mirrored, images[:, :, ::-1], images)
        if self.mean is None:
            return images
        scale = jnp.float32(255 if images.dtype == jnp.uint8 else 1)
        mean, deviation = (jnp.asarray(x, jnp.float32) for x in (self.mean, self.deviation))
        normal: Array = (images.astype(jnp.float32) / scale - mean) / deviation
        return normal


def _crop(key: PRNGKeyArray, images: Array, padding: int) -> Array:
    corners = jax.random.randint(key, (len(images), 2), 0, 2 * padding + 1, jnp.int32)
    widths = ((padding, padding), (padding, padding), (0, 0))

    def crop(image: Array, corner: Array) -> Array:
        start = (corner[0], corner[1], jnp.int32(0))
        return jax.lax.dynamic_slice(jnp.pad(image, widths), start, image.shape)

    return jax.vmap(crop)(images, corners)


def normalisation(
    train: Dataset | HostDataset,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The mean and the standard deviation of each channel, over all pixels of the training split.

    Args:
        train: the training split, of uint8 images.

    Returns:
        `mean` and `deviation` for `Augmentation`, for pixels scaled to 0 to 1.

    Raises:
        DataError: the examples are not uint8 images, or a channel is constant.

    Example:
        >>> import memmeta.data
        >>> mean, deviation = normalisation(memmeta.data.load("glyphs", "train"))
        >>> f"{mean[0]:.3f} {deviation[0]:.3f}"
        '0.149 0.325'
    """
    host = on_host(train) if isinstance(train, Dataset) else train
    if host.rows.dtype != np.uint8 or host.rows.ndim != 4:
        raise DataError(f"{host.name}: {host.rows.dtype} {host.rows.shape}, expected uint8 images")
    levels = np.arange(256) / 255
    counts = np.zeros(
        (host.rows.shape[-1], 256), np.int64
    )  # integers: exact for any number of pixels
    for numbers, count in zip(
        np.asarray(host.index.inputs), np.asarray(host.index.count), strict=True
    ):
        images = host.rows[numbers[:count]]
        for channel, histogram in enumerate(counts):
            histogram += np.bincount(images[..., channel].ravel(), minlength=256)
    shares = counts / counts.sum(axis=1, keepdims=True)
    mean = shares @ levels
    deviation = np.sqrt((shares * (levels - mean[:, None]) ** 2).sum(axis=1))
    if not deviation.all():
        raise DataError(f"{host.name}: a channel has the same value everywhere")
    return tuple(mean.tolist()), tuple(deviation.tolist())
