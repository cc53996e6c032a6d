"""ResNet12: the deeper network of few-shot papers since 2018."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from memmeta.models._build import with_linear_head
from memmeta.models._convolution import conv
from memmeta.models._dtypes import as_float
from memmeta.models._network import Network
from memmeta.models._normalization import BatchNorm
from memmeta.models._pooling import max_pool


class Conv(nn.Module):
    """Stride-1 SAME convolution without bias: batch normalisation follows and has one."""

    filters: int
    size: int = 3

    @nn.compact
    def __call__(
        self, images: Float[Array, "examples height width channels"]
    ) -> Float[Array, "examples height width filters"]:
        """Convolve; the kernel is float32 and is cast to the images' dtype."""
        shape = (self.size, self.size, images.shape[-1], self.filters)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape, jnp.float32)
        return conv(images, kernel.astype(images.dtype))


class ResidualBlock(nn.Module):
    """Three convolutions with batch norm beside a 1x1 shortcut; leaky ReLU; 2x2 max pooling."""

    filters: int

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "examples height width channels"],
        weights: Float[Array, " examples"],
    ) -> Float[Array, "examples half_height half_width filters"]:
        """Halve height and width."""
        shortcut = BatchNorm()(Conv(self.filters, size=1)(images), weights)
        hidden = images
        for _ in range(2):
            hidden = nn.leaky_relu(BatchNorm()(Conv(self.filters)(hidden), weights), 0.1)
        hidden = BatchNorm()(Conv(self.filters)(hidden), weights)
        return nn.leaky_relu(max_pool(hidden + shortcut), 0.1)


class ResidualBlocks(nn.Module):
    """Residual blocks, then the mean over positions."""

    widths: tuple[int, ...]
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        images: Shaped[Array, "examples height width channels"],
        weights: Float[Array, " examples"],
    ) -> Float[Array, "examples features"]:
        """Features, float32."""
        hidden = as_float(images, self.dtype)
        for width in self.widths:
            hidden = ResidualBlock(width)(hidden, weights)
        return hidden.astype(jnp.float32).mean((1, 2))


def resnet12(
    ways: int,
    *,
    widths: tuple[int, ...] = (64, 160, 320, 640),
    image_shape: tuple[int, int, int] = (84, 84, 3),
    head_scale: float = 0.0,
    dtype: DTypeLike = jnp.float32,
) -> Network:
    """Four residual blocks of three convolutions each, mean over positions, a linear head.

    Args:
        ways: how many classes.
        widths: filters of each block; (64, 128, 256, 512) is the narrower common choice.
        image_shape: height, width and channels; each block halves height and width, rounding down.
        head_scale: 0 starts the head from zeros; see `conv4`.
        dtype: what the body computes in; parameters, statistics and the head stay float32.

    Returns:
        A `Network` of uint8 (scaled to [0, 1]) or float images. No DropBlock: the body is a
        function of its arguments alone.

    Raises:
        ValueError: if the images are too small to be halved once a block.

    Source: Lee et al. 2019, Meta-Learning with Differentiable Convex Optimization, section 4.1.

    Example:
        >>> from memmeta.models import resnet12
        >>> resnet12(5, widths=(4, 8), image_shape=(8, 8, 3)).features
        8
    """
    if min(image_shape[:2]) >> len(widths) < 1:
        raise ValueError(
            f"image_shape: {image_shape[0]}x{image_shape[1]} cannot be halved {len(widths)} times; "
            f"use images of at least {1 << len(widths)} pixels a side, or fewer widths"
        )
    return with_linear_head(ResidualBlocks(widths, dtype), ways, image_shape, head_scale)
