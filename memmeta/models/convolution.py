"""A 3x3 convolution and a 2x2 max pool that are fast where they run.

`lax.conv_general_dilated` is the right call on a GPU or TPU. On a CPU its backward pass is slow, and
per-task kernels (MAML adapts them) turn into grouped convolutions that are slower still. There the
same sum is written as patches times a matrix, so that forward and backward pass are matrix products.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def conv(
    images: Float[Array, "examples height width channels"],
    kernel: Float[Array, "rows columns channels filters"],
) -> Float[Array, "examples height width filters"]:
    """Convolve with stride 1 and SAME padding, in the form that suits the platform.

    y[n, h, w, f] = sum_{r, s, c} x[n, h + r - R // 2, w + s - S // 2, c] K[r, s, c, f]

    Args:
        images: x, any floating dtype.
        kernel: K, of odd height R and width S, of the same dtype.

    Returns:
        y, of the same dtype. Differentiable any number of times in both modes, and under `vmap`
        with shared or per-task kernels.

    Raises:
        ValueError: if the kernel's height or width is even.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from memmeta.models.convolution import conv
        >>> conv(jnp.ones((2, 5, 5, 3)), jnp.ones((3, 3, 3, 8))).shape
        (2, 5, 5, 8)
    """
    if kernel.shape[0] % 2 == 0 or kernel.shape[1] % 2 == 0:
        raise ValueError(
            f"kernel: height and width must be odd, found {kernel.shape[0]}x{kernel.shape[1]}; "
            "pad the kernel with a row or column of zeros"
        )
    return lax.platform_dependent(
        images, kernel, cpu=patches_times_matrix, default=direct_convolution
    )


def direct_convolution(
    images: Float[Array, "examples height width channels"],
    kernel: Float[Array, "rows columns channels filters"],
) -> Float[Array, "examples height width filters"]:
    """XLA's own convolution: what a GPU or TPU wants."""
    return lax.conv_general_dilated(
        images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def patches_times_matrix(
    images: Float[Array, "examples height width channels"],
    kernel: Float[Array, "rows columns channels filters"],
) -> Float[Array, "examples height width filters"]:
    """The same sum as one matrix product: what a CPU wants."""
    rows, columns, channels, filters = kernel.shape
    _, height, width, _ = images.shape
    padded = jnp.pad(images, ((0, 0), (rows // 2, rows // 2), (columns // 2, columns // 2), (0, 0)))
    patches = jnp.concatenate(
        [
            padded[:, row : row + height, column : column + width]
            for row in range(rows)
            for column in range(columns)
        ],
        axis=-1,
    )
    return patches @ kernel.reshape(rows * columns * channels, filters)


def max_pool(
    images: Float[Array, "examples height width channels"],
) -> Float[Array, "examples half_height half_width channels"]:
    """Largest value of each 2x2 window; a last odd row or column is left out.

    Example:
        >>> import jax.numpy as jnp
        >>> from memmeta.models.convolution import max_pool
        >>> max_pool(jnp.arange(25.0).reshape(1, 5, 5, 1))[0, :, :, 0].tolist()
        [[6.0, 8.0], [16.0, 18.0]]
    """
    examples, height, width, channels = images.shape
    even = images[:, : height // 2 * 2, : width // 2 * 2]
    windows = even.reshape(examples, height // 2, 2, width // 2, 2, channels)
    return windows.max(axis=(2, 4))
