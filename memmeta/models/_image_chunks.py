"""A function of images on a few at a time, so that what it computes stays in a CPU's cache."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Images = Float[Array, "examples height width channels"]

POSITIONS = 3072
"""Examples × height × width of a chunk: at 64 filters the output of a convolution has 786 KB."""


def images_at_a_time(examples: int, height_times_width: int, positions: int) -> int:
    """How many images have about `positions` positions: two or more, best without a remainder.

    Example:
        >>> images_at_a_time(75, 28 * 28, 3072), images_at_a_time(5, 28 * 28, 3072)
        (5, 5)
        >>> images_at_a_time(7, 8, 16), images_at_a_time(11, 2, 16), images_at_a_time(1, 99, 16)
        (2, 11, 1)
    """
    target = min(examples, max(2, positions // height_times_width))
    near = range(min(examples, 2 * target), target // 2, -1)
    return next((chunk for chunk in near if examples % chunk == 0), target)


def map_chunks(function: Callable[[Images], Array], images: Images) -> Float[Array, "examples ..."]:
    """The results of a few images at a time, joined; the backward pass computes each again.

    Args:
        function: of some of the images; one result an image.
        images: all of them. On a GPU or TPU, quick at many at once, they are one chunk.

    Returns:
        As `function(images)`.

    Example:
        >>> map_chunks(lambda x: x.sum((1, 2, 3)), jnp.ones((7, 40, 40, 1))).tolist()
        [1600.0, 1600.0, 1600.0, 1600.0, 1600.0, 1600.0, 1600.0]
    """
    count, height, width, _ = images.shape
    recomputed = jax.checkpoint(function, prevent_cse=False)
    size = images_at_a_time(count, height * width, POSITIONS)
    if size >= count or jax.default_backend() != "cpu":
        whole_batch: Array = recomputed(images)
        return whole_batch
    whole = count // size * size
    found = lax.map(recomputed, images[:whole].reshape(-1, size, *images.shape[1:]))
    found = found.reshape(whole, *found.shape[2:])
    return found if whole == count else jnp.concatenate([found, recomputed(images[whole:])])
