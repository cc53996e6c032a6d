"""Two forms of the two sums of a stride-1 SAME convolution, chosen by platform in `_convolution`.

    y[n, h, w, f] = sum_{r, s, c} x[n, h + r - R // 2, w + s - S // 2, c] K[r, s, c, f]
    G[r, s, c, f] = sum_{n, h, w} x[n, h + r - R // 2, w + s - S // 2, c] g[n, h, w, f]

The second is the kernel's gradient for a cotangent g of y. Every array has a leading axis of tasks,
each with its own kernel. A GPU or TPU wants both sums as XLA writes them. A CPU is quick at the
first and, the way XLA asks for the second, about a hundred times slower at that; it is quick again
once the second is asked for as a first, with channels in the place of examples and examples in the
place of channels, a few images at a time so that what is worked on stays in the cache.

With few filters it is quick at the first for an even number of channels alone: with 32 filters and
3 channels 16 GFLOP/s, with 4 channels 110 (jaxlib 0.10). Hence the zeros that are added here.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from memmeta._shared.trees import accumulator

Images = Float[Array, "tasks examples height width channels"]
Cotangents = Float[Array, "tasks examples height width filters"]
Kernels = Float[Array, "tasks rows columns channels filters"]

# Positions (examples x height x width) a kernel gradient sums at a time on a CPU: at 64 channels
# 256 KB of images and as much of cotangents. Half and twice as many run within 5 % of the same.
POSITIONS = 1024
FEW_FILTERS = 32


def convolve_one(
    images: Float[Array, "examples height width channels"],
    kernel: Float[Array, "rows columns channels filters"],
) -> Float[Array, "examples height width filters"]:
    """XLA's convolution with one kernel."""
    return lax.conv_general_dilated(
        images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def convolve_together(images: Images, kernels: Kernels) -> Cotangents:
    """All tasks in one (grouped) convolution."""
    return jax.vmap(convolve_one)(images, kernels)


def convolve_in_turn(images: Images, kernels: Kernels) -> Cotangents:
    """One task after the other: grouped convolutions are slow on a CPU.

    Example:
        >>> keys = jax.random.split(jax.random.key(0), 2)
        >>> images = jax.random.normal(keys[0], (3, 5, 6, 4, 3))
        >>> kernels = jax.random.normal(keys[1], (3, 3, 5, 3, 4))
        >>> found, same = convolve_in_turn(images, kernels), convolve_together(images, kernels)
        >>> bool(jnp.allclose(found, same, atol=1e-5))
        True
    """
    channels, filters = kernels.shape[-2:]
    if channels > 1 and channels % 2 and filters <= FEW_FILTERS:
        images, kernels = _with_zeros(images, -1, 1), _with_zeros(kernels, -2, 1)
    return _in_turn(convolve_one, images, kernels)


def kernel_gradient_together(
    images: Images, cotangents: Cotangents, window: tuple[int, int]
) -> Kernels:
    """The transpose of `convolve_together`, as XLA writes it."""

    def one(images: Array, cotangents: Array) -> Array:
        shape = (*window, images.shape[-1], cotangents.shape[-1])
        transpose = jax.linear_transpose(
            lambda kernel: convolve_one(images, kernel), jax.ShapeDtypeStruct(shape, images.dtype)
        )
        gradient: Array = transpose(cotangents)[0]
        return gradient

    return jax.vmap(one)(images, cotangents)


def kernel_gradient_in_turn(
    images: Images, cotangents: Cotangents, window: tuple[int, int]
) -> Kernels:
    """One task after the other, each a few images at a time.

    Example:
        >>> keys = jax.random.split(jax.random.key(0), 2)
        >>> images = jax.random.normal(keys[0], (2, 7, 16, 16, 2))
        >>> cotangents = jax.random.normal(keys[1], (2, 7, 16, 16, 4))
        >>> found = kernel_gradient_in_turn(images, cotangents, (3, 5))
        >>> same = kernel_gradient_together(images, cotangents, (3, 5))
        >>> bool(jnp.allclose(found, same, atol=1e-3))
        True
    """
    return _in_turn(
        lambda x, g: _kernel_gradient_by_chunks(x, g, window), images, cotangents
    ).astype(images.dtype)


def _in_turn(function: Callable[[Array, Array], Array], first: Array, second: Array) -> Array:
    if first.shape[0] == 1:
        return function(first[0], second[0])[None]
    images: Array = lax.map(lambda pair: function(*pair), (first, second))
    return images


def _kernel_gradient_by_chunks(
    images: Float[Array, "examples height width channels"],
    cotangents: Float[Array, "examples height width filters"],
    window: tuple[int, int],
) -> Float[Array, "rows columns channels filters"]:
    """Sum the kernel's gradient over chunks of images, in float32 or wider."""
    examples, height, width, _ = images.shape
    chunk = _by_fours(min(examples, max(2, POSITIONS // (height * width))))
    whole = examples // chunk

    def gradient(start: Array | int, size: int) -> Array:
        return _kernel_gradient_as_convolution(
            _to_fours(lax.dynamic_slice_in_dim(images, start, size)),
            _to_fours(lax.dynamic_slice_in_dim(cotangents, start, size)),
            window,
        )

    total = gradient(0, chunk)
    if whole > 1:
        total, _ = lax.scan(
            lambda total, index: (total + gradient(index * chunk, chunk), None),
            total,
            jnp.arange(1, whole),
        )
    if whole * chunk < examples:
        total = total + gradient(whole * chunk, examples - whole * chunk)
    return total


def _by_fours(number: int) -> int:
    """The largest multiple of four up to `number`, from four on."""
    return number if number < 4 else number // 4 * 4


def _to_fours(images: Array) -> Array:
    """With as many images of zeros behind it as make a multiple of four, from three images on."""
    return _with_zeros(images, 0, -len(images) % 4 if len(images) > 2 else 0)


def _with_zeros(array: Array, axis: int, number: int) -> Array:
    """With zeros at the end of an axis."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, number)
    return jnp.pad(array, widths)


def _kernel_gradient_as_convolution(
    images: Float[Array, "examples height width channels"],
    cotangents: Float[Array, "examples height width filters"],
    window: tuple[int, int],
) -> Float[Array, "rows columns channels filters"]:
    """Convolve the images with the cotangents: channels are its examples, examples its channels."""
    # The barriers keep XLA from taking the transposes back into the convolution's layout.
    as_images, as_kernel = lax.optimization_barrier(
        (images.transpose(3, 1, 2, 0), cotangents.transpose(1, 2, 0, 3))
    )
    rows, columns = window
    gradient = lax.conv_general_dilated(
        as_images,
        as_kernel,
        (1, 1),
        ((rows // 2, rows // 2), (columns // 2, columns // 2)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=accumulator(images.dtype),
    )
    kernel: Array = lax.optimization_barrier(gradient).transpose(1, 2, 0, 3)
    return kernel
