"""Images of a data set in memory at another size, or with another number of channels."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from memmeta.data._dataset import DataError, Dataset
from memmeta.data._images import resized, with_channels
from memmeta.data._reading import Reading


def resized_dataset(dataset: Dataset, reading: Reading) -> Dataset:
    """A data set with the size and the channels of a `Reading`, where these are given.

    Args:
        dataset: a data set of images.
        reading: the size, the fit, the channels and the background.

    Returns:
        The data set; `dataset` itself where nothing changes.

    Raises:
        DataError: its examples are no images of 8 bits per channel.
    """
    shape = dataset.example_shape
    if reading.size is None and reading.channels is None:
        return dataset
    inputs = np.asarray(dataset.inputs)
    if len(shape) != 3 or shape[-1] not in (1, 3, 4) or inputs.dtype != np.uint8:
        raise DataError(
            f"channels and image_size: expected images of dtype uint8, found examples of shape "
            f"{shape} and dtype {inputs.dtype} in {dataset.name}"
        )
    size = (
        reading.size if reading.size is not None else (shape[0] if shape[0] == shape[1] else None)
    )
    flat = inputs.reshape(-1, *shape)

    def made(image: UInt8[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "h2 w2 c2"]:
        image = with_channels(image, reading.channels, reading.background)
        return image if size is None else resized(image, size, reading.fit)

    images = np.stack([made(image) for image in flat])
    return replace(
        dataset, inputs=jnp.asarray(images.reshape(*inputs.shape[:2], *images.shape[1:]))
    )
