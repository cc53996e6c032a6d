"""Conv4: the four-block network of most few-shot papers."""

from dataclasses import replace
from functools import partial
from typing import Literal, TypeAlias, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from memmeta._shared import checks
from memmeta.models._build import with_linear_head
from memmeta.models._convolution import conv
from memmeta.models._dtypes import as_float
from memmeta.models._image_chunks import map_chunks
from memmeta.models._network import Network, Params
from memmeta.models._normalization import batch_statistics, normalise
from memmeta.models._patch_statistics import convolution_statistics
from memmeta.models._pooling import max_pool, with_even_sides

Initialisation: TypeAlias = Literal["he_normal", "xavier_uniform"]
INITIALISERS = {
    "he_normal": (nn.initializers.he_normal(), nn.initializers.ones),
    "xavier_uniform": (nn.initializers.xavier_uniform(), nn.initializers.uniform(1.0)),
}
"""Of kernels and of batch-norm scales."""


class ConvBlock(nn.Module):
    """Convolution, batch normalisation, ReLU, 2x2 max pool.

    h = relu(max_pool(batch_norm(conv(x, K))))

    Computed in a cheaper order that gives the same numbers: ReLU commutes with the maximum, and so
    does a * y + b with a >= 0, so that what follows the convolution touches a quarter of the
    positions. The sign of a negative scale goes into the kernel: (-scale) * (-y). Where images have
    few channels, the batch statistics are computed from them alone, and the rest on a few images at
    a time and again in the backward pass: the convolution of all images, the largest array of the
    network, is never stored.
    """

    filters: int
    round_up: bool = False
    initialisation: Initialisation = "he_normal"

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "examples height width channels"],
        weights: Float[Array, " examples"],
    ) -> Float[Array, "examples half_height half_width filters"]:
        """Halve height and width, rounding as `round_up` says."""
        shape = (3, 3, images.shape[-1], self.filters)
        kernels, scales = INITIALISERS[self.initialisation]
        kernel = self.param("kernel", kernels, shape, jnp.float32)
        scale = self.param("scale", scales, (self.filters,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.filters,), jnp.float32)
        sign = jnp.where(scale < 0, -1, 1).astype(scale.dtype)
        kernel, scale = (sign * kernel).astype(images.dtype), sign * scale

        def pooled(hidden: Array, mean: Array, variance: Array) -> Array:
            largest = max_pool(with_even_sides(hidden) if self.round_up else hidden)
            return nn.relu(normalise(largest, mean, variance, scale, bias))

        if kernel[..., 0].size < self.filters:
            statistics = convolution_statistics(images, kernel, weights)
            return map_chunks(lambda some: pooled(conv(some, kernel), *statistics), images)
        hidden = conv(images, kernel)
        return pooled(hidden, *batch_statistics(hidden, weights))


class ConvBlocks(nn.Module):
    """Blocks of convolution, batch normalisation, ReLU and 2x2 max pooling; then flatten."""

    width: int
    depth: int
    dtype: DTypeLike
    round_up: bool
    initialisation: Initialisation

    @nn.compact
    def __call__(
        self,
        images: Shaped[Array, "examples height width channels"],
        weights: Float[Array, " examples"],
    ) -> Float[Array, "examples features"]:
        """Features, float32."""
        hidden = as_float(images, self.dtype)
        for _ in range(self.depth):
            hidden = ConvBlock(self.width, self.round_up, self.initialisation)(hidden, weights)
        return hidden.reshape(hidden.shape[0], -1).astype(jnp.float32)


def conv4(
    ways: int,
    *,
    width: int = 32,
    image_shape: tuple[int, int, int] = (28, 28, 1),
    depth: int = 4,
    head_scale: float = 0.0,
    dtype: DTypeLike = jnp.float32,
    round_up: bool = False,
    initialisation: Initialisation = "he_normal",
) -> Network:
    """Four blocks of conv3x3, batch norm, ReLU, maxpool2, then a linear head.

    Args:
        ways: how many classes.
        width: filters of every block; papers use 64 (Omniglot, CIFAR-FS, FC100) and 32
            (miniImageNet, tieredImageNet).
        image_shape: height, width and channels; each block halves height and width.
        depth: how many blocks.
        head_scale: 0 starts the head from zeros, as the implicit methods do; 1 draws it with
            standard deviation 1 / sqrt(features), for methods that learn the head's start.
        dtype: what the body computes in; parameters, statistics and the head stay float32.
        round_up: pool a last odd row or column too, instead of leaving it out as most papers do:
            a 28x28 image then gives 2x2 features of each filter in place of one.
        initialisation: "he_normal": normal kernels, batch-norm scales of one, a normal head.
            "xavier_uniform", as learn2learn has it: kernels U(±√(6 / (fan in + fan out))), scales
            U(0, 1), the head's kernel and bias U(±head_scale / √features).

    Returns:
        A `Network` of uint8 (scaled to [0, 1]) or float images.

    Raises:
        ValueError: the images are too small for `depth` halvings, or `initialisation` has another
            name.

    Source: Vinyals et al. 2016, Matching Networks, section 4.1; Finn et al. 2017, section 5.2.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from memmeta.models import conv4
        >>> network = conv4(5, width=8)
        >>> params = network.init(jax.random.key(0))
        >>> images = jnp.zeros((3, 28, 28, 1), jnp.uint8)
        >>> jax.jit(network.body)(params["body"], images, jnp.ones(3)).shape
        (3, 8)
    """
    checks.one_of("initialisation", initialisation, get_args(Initialisation))
    smallest = min(image_shape[:2]) >> depth
    if smallest < 1:
        raise ValueError(
            f"image_shape: {image_shape[0]}x{image_shape[1]} cannot be halved {depth} times; "
            f"use images of at least {1 << depth} pixels a side, or a smaller depth"
        )
    body = ConvBlocks(width, depth, dtype, round_up, initialisation)
    network = with_linear_head(body, ways, image_shape, head_scale)
    if initialisation == "he_normal":
        return network
    limit = head_scale * (network.features or 1) ** -0.5
    uniform = partial(jax.random.uniform, minval=-limit, maxval=limit)

    def init(key: Array) -> Params:
        params = network.init(key)
        head_key = jax.random.fold_in(key, 1)
        return {**params, "head": optax.tree.random_like(head_key, params["head"], uniform)}

    return replace(network, init=init)
