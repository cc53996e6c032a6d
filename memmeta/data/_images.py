"""Image files as arrays of one shape; the only module that needs Pillow."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from memmeta.data._dataset import DataError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
EIGHT_BITS = ("1", "CMYK", "HSV", "L", "LA", "LAB", "P", "PA", "RGB", "RGBA", "RGBX", "YCbCr")
PIP = "pip install 'memmeta[images]'"


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(f"reading image files needs Pillow: {PIP}") from error
    return Image


def read_image(path: Path, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Read an image file, in RGB and resized to `size` x `size` pixels (Lanczos; not cropped).

    Args:
        path: the file.
        size: pixels a side.

    Returns:
        The image.

    Raises:
        DataError: Pillow is missing, or the file is no whole image of 8 bits a channel.
    """
    image_module = _pillow()
    failures = (OSError, ValueError, SyntaxError, image_module.DecompressionBombError)
    try:
        with image_module.open(path) as image:
            if image.mode not in EIGHT_BITS:
                raise ValueError(f"mode {image.mode}, expected 8 bits a channel")
            return resized(np.asarray(image.convert("RGB")), size)
    except failures as error:
        raise DataError(
            f"{path}: not a whole image that can be used ({error}); replace or remove it and run "
            "again (what was converted is kept)"
        ) from error


def resized(
    image: UInt8[np.ndarray, "height width channels"], size: int
) -> UInt8[np.ndarray, "size size channels"]:
    """Resize an image to `size` x `size` pixels (Lanczos; not cropped).

    Args:
        image: of one channel (grey) or three.
        size: pixels a side.

    Returns:
        The image; the very same pixels where it has that size.
    """
    if image.shape[:2] == (size, size):
        return image
    image_module = _pillow()
    grey = image.shape[-1] == 1
    small = image_module.fromarray(image[..., 0] if grey else image).resize(
        (size, size), image_module.Resampling.LANCZOS
    )
    return np.asarray(small).reshape(size, size, image.shape[-1])
