"""Conv4: the four-block network of most few-shot papers."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from memmeta.models.build import as_float, with_linear_head
from memmeta.models.convolution import conv, max_pool
from memmeta.models.network import Network
from memmeta.models.normalization import BatchNorm


class Conv(nn.Module):
    """Stride-1 SAME convolution without bias (batch normalisation follows and has one)."""

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


class ConvBlocks(nn.Module):
    """Blocks of convolution, batch normalisation, ReLU and 2x2 max pooling; then flatten."""

    width: int
    depth: int
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        images: Shaped[Array, "examples height width channels"],
        weights: Float[Array, " examples"],
    ) -> Float[Array, "examples features"]:
        """Features, float32."""
        hidden = as_float(images, self.dtype)
        for _ in range(self.depth):
            # The largest of a window before the ReLU: the same numbers, a quarter of the work.
            hidden = nn.relu(max_pool(BatchNorm()(Conv(self.width)(hidden), weights)))
        return hidden.reshape(hidden.shape[0], -1).astype(jnp.float32)


def conv4(
    ways: int,
    *,
    width: int = 32,
    image_shape: tuple[int, int, int] = (28, 28, 1),
    depth: int = 4,
    head_scale: float = 0.0,
    dtype: DTypeLike = jnp.float32,
) -> Network:
    """Four blocks of conv3x3, batch norm, ReLU, maxpool2, then a linear head.

    Args:
        ways: how many classes.
        width: filters of every block; papers use 64 (Omniglot, CIFAR-FS, FC100) and 32
            (miniImageNet, tieredImageNet).
        image_shape: height, width and channels; each block halves height and width, rounding down.
        depth: how many blocks.
        head_scale: 0 starts the head from zeros, as the implicit methods do; 1 draws it with
            standard deviation 1 / sqrt(features), for methods that learn the head's start.
        dtype: what the body computes in; parameters, statistics and the head stay float32.

    Returns:
        A `Network` of uint8 (scaled to [0, 1]) or float images.

    Raises:
        ValueError: if the images are too small for `depth` halvings.

    Source: Vinyals et al. 2016, Matching Networks, section 4.1; Finn et al. 2017, section 5.2.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from memmeta.models import conv4
        >>> network = conv4(5, width=8)
        >>> params = network.init(jax.random.key(0))
        >>> images = jnp.zeros((3, 28, 28, 1), jnp.uint8)
        >>> network.body(params["body"], images, jnp.ones(3)).shape
        (3, 8)
    """
    smallest = min(image_shape[:2]) >> depth
    if smallest < 1:
        raise ValueError(
            f"image_shape: {image_shape[0]}x{image_shape[1]} cannot be halved {depth} times; "
            f"use images of at least {1 << depth} pixels a side, or a smaller depth"
        )
    return with_linear_head(ConvBlocks(width, depth, dtype), ways, image_shape, head_scale)
