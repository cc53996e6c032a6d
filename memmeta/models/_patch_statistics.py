"""Mean and variance of a convolution's output, from its input alone.

A convolution is linear in the patches it looks at, y = kᵀx, so its statistics are those of the
patches: where a patch has fewer entries than there are filters, those are cheaper to compute.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from memmeta._shared.trees import accumulator
from memmeta.models._image_chunks import map_chunks


def convolution_statistics(
    images: Float[Array, "examples height width channels"],
    kernel: Float[Array, "rows columns channels filters"],
    weights: Float[Array, " examples"],
) -> tuple[Float[Array, " filters"], Float[Array, " filters"]]:
    r"""`batch_statistics` of conv(images, kernel), without computing it.

    $$\text{mean}_f = k_f^\top m, \quad \text{variance}_f = k_f^\top C k_f, \qquad
      m = \sum_n p_n \overline{x_n}, \;
      C = \sum_n p_n \overline{(x_n - m)(x_n - m)^\top}$$

    with x_n the patches of image n, a bar for the mean over positions, p = weights / sum(weights).

    Args:
        images: any floating dtype; the sums are float32 or wider.
        kernel: of odd height and width.
        weights: how much each example counts, at least zero.

    Returns:
        Mean and variance of each filter; zeros if all weights are zero.

    Example:
        >>> import jax.numpy as jnp
        >>> from memmeta.models._patch_statistics import convolution_statistics
        >>> images = jnp.arange(16.0).reshape(1, 4, 4, 1)
        >>> mean, variance = convolution_statistics(images, jnp.ones((1, 1, 1, 2)), jnp.ones(1))
        >>> mean.tolist(), variance.tolist()
        ([7.5, 7.5], [21.25, 21.25])
    """
    wide = images.astype(accumulator(images.dtype))
    total = weights.sum()
    share = (weights / jnp.where(total > 0, total, 1)).astype(wide.dtype)
    # Around the mean pixel: a variance as the difference of large second moments is inexact.
    # The result does not depend on the centre: its derivative is zero.
    centre = lax.stop_gradient(share @ wide.mean((1, 2)))
    rows, columns = kernel.shape[:2]
    moments = map_chunks(lambda x: _moments(x - centre, -centre, (rows, columns)), wide)
    moments = jnp.tensordot(share, moments, 1)
    mean, second = moments[-1, :-1], moments[:-1, :-1]
    taps = kernel.astype(wide.dtype).reshape(-1, kernel.shape[-1])
    covariance = second - jnp.outer(mean, mean)
    mean = mean + jnp.tile(centre, len(taps) // len(centre))
    return mean @ taps, jnp.sum(taps * (covariance @ taps), 0)


def _moments(
    images: Float[Array, "examples height width channels"],
    outside: Float[Array, " channels"],
    window: tuple[int, int],
) -> Float[Array, "examples taps_1 taps_1"]:
    """The mean of x xᵀ over each image's patches x, with a 1 appended to each."""
    _, height, width, _ = images.shape
    rows, columns = window
    around = ((0, 0), (rows // 2, rows // 2), (columns // 2, columns // 2), (0, 0))
    # `outside`, the zero padding less the centre, surrounds each image
    planes = (jnp.pad(images - outside, around) + outside).transpose(0, 3, 1, 2)
    shifts = [
        planes[:, :, row : row + height, column : column + width]
        for row in range(rows)
        for column in range(columns)
    ]
    patches = jnp.concatenate([*shifts, jnp.ones_like(shifts[0][:, :1])], 1)
    flat = patches.reshape(*patches.shape[:2], -1)
    return flat @ flat.swapaxes(1, 2) / (height * width)
