"""A 2x2 max pool whose backward pass is one comparison: no padding, no scatter, no sorting."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_jvp
def max_pool(
    images: Float[Array, "examples height width channels"],
) -> Float[Array, "examples half_height half_width channels"]:
    """Largest value of each 2x2 window; a last odd row or column is left out.

    The derivative of a window is shared equally by all values that are its largest.

    Example:
        >>> import jax.numpy as jnp
        >>> from memmeta.models._pooling import max_pool
        >>> max_pool(jnp.arange(25.0).reshape(1, 5, 5, 1))[0, :, :, 0].tolist()
        [[6.0, 8.0], [16.0, 18.0]]
        >>> ties = jnp.array([[2.0, 2.0], [1.0, 2.0]]).reshape(1, 2, 2, 1)
        >>> jax.grad(lambda x: 3 * max_pool(x).sum())(ties).ravel().tolist()
        [1.0, 1.0, 0.0, 1.0]
    """
    windows = _windows(images)
    rows = jnp.maximum(windows[:, :, 0], windows[:, :, 1])
    return jnp.maximum(rows[:, :, :, 0], rows[:, :, :, 1])


def with_even_sides(
    images: Float[Array, "examples height width channels"],
) -> Float[Array, "examples even_height even_width channels"]:
    """Repeat a last odd row or column, so that `max_pool` keeps it.

    Example:
        >>> import jax.numpy as jnp
        >>> from memmeta.models._pooling import max_pool, with_even_sides
        >>> max_pool(with_even_sides(jnp.arange(9.0).reshape(1, 3, 3, 1)))[0, :, :, 0].tolist()
        [[4.0, 5.0], [7.0, 8.0]]
    """
    _, height, width, _ = images.shape
    return jnp.pad(images, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")


def _windows(images: Array) -> Array:
    examples, height, width, channels = images.shape
    even = images[:, : height // 2 * 2, : width // 2 * 2]
    return even.reshape(examples, height // 2, 2, width // 2, 2, channels)


@max_pool.defjvp
def _max_pool_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    windows = _windows(primals[0])
    largest = max_pool(primals[0])
    winners = (windows == largest[:, :, None, :, None]).astype(largest.dtype)
    # Counted corner by corner: a reduction over windows would be a pass of its own on a CPU.
    corners = [windows[:, :, row, :, column] for row in range(2) for column in range(2)]
    count = sum((corner == largest).astype(largest.dtype) for corner in corners)
    return largest, (_windows(tangents[0]) * winners).sum((2, 4)) / count
