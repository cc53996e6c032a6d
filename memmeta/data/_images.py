"""Image files as arrays of one shape, read with Pillow."""

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from memmeta.data._dataset import DataError
from memmeta.data._reading import Limits, Reading

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
# only these are decoded, whatever the file's suffix, because decoding EPS starts a program
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SIDE = 84  # pixels to which files of a folder are resized by default
GREY = ("1", "L", "LA", "La")
COLOURED = ("CMYK", "HSV", "LAB", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "YCbCr")
HEADERS = threading.Lock()
PIP = "pip install 'memmeta[images]'"


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(f"reading image files needs Pillow: {PIP}") from error
    return Image


def check_colour(colour: str) -> None:
    """Check the name of a colour.

    Raises:
        DataError: Pillow does not know the colour.
    """
    _pillow()
    from PIL import ImageColor

    try:
        ImageColor.getrgb(colour)
    except ValueError as error:
        raise DataError(f"background: expected a colour such as white, found {colour!r}") from error


def is_grey(path: Path, reading: Reading) -> bool:
    """Whether an image file has one channel besides transparency; only its header is read.

    Raises:
        DataError: as `read_image`, for whatever the header already shows.
    """
    image_module = _pillow()
    try:
        with _opened(image_module, path, reading.limits) as image:
            return image.mode in GREY
    except Exception as error:
        raise _unusable(path, error) from error


def read_image(path: Path, reading: Reading, channels: int = 3) -> UInt8[np.ndarray, "h w c"]:
    """Read an image file: turned upright, put on a background, cropped and resized.

    Args:
        path: the file.
        reading: the size, the fit, the background and the limits.
        channels: 3 for RGB, 1 for grey.

    Returns:
        The image, `[size, size, channels]`.

    Raises:
        DataError: Pillow is missing, or the file is not a complete image of 8 bits per channel.
    """
    image_module = _pillow()
    try:
        with _opened(image_module, path, reading.limits) as image:
            plain = _on_background(image_module, _upright(image), reading.background)
            plain = plain.convert("L" if channels == 1 else "RGB")
            pixels = np.asarray(plain)
    except Exception as error:  # Pillow's readers raise errors of many kinds
        raise _unusable(path, error) from error
    size = SIDE if reading.size is None else reading.size
    return resized(pixels.reshape(*pixels.shape[:2], channels), size, reading.fit)


def decoded(
    content: bytes, channels: int, where: str, limits: Limits
) -> UInt8[np.ndarray, "h w c"]:
    """Decode the bytes of an image file, without resizing the image.

    Args:
        content: the bytes.
        channels: 1 for grey, 3 for RGB, 4 for RGB and transparency.
        where: the name of the image in error messages.
        limits: limits on what the file may contain.

    Raises:
        DataError: as `read_image`.
    """
    image_module = _pillow()
    try:
        with _opened(image_module, io.BytesIO(content), limits) as image:
            pixels = np.asarray(image.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels]))
    except Exception as error:
        raise _unusable(where, error) from error
    return pixels.reshape(*pixels.shape[:2], channels)


@contextmanager
def _opened(image_module: Any, file: Path | io.BytesIO, limits: Limits) -> Iterator[Any]:
    with _header(image_module, file) as image:
        if image.width * image.height > limits.most_pixels:
            raise ValueError(
                f"{image.width} x {image.height} pixels, more than most_pixels={limits.most_pixels}"
            )
        if image.mode not in GREY + COLOURED:
            raise ValueError(f"mode {image.mode}, expected 8 bits a channel")
        yield image


def _header(image_module: Any, file: Path | io.BytesIO) -> Any:
    """An image of which only the header is read so far, however large it says it is."""
    with HEADERS:  # Pillow's own limit, which is the process's, would stand above `most_pixels`
        usual, image_module.MAX_IMAGE_PIXELS = image_module.MAX_IMAGE_PIXELS, None
        try:
            return image_module.open(file, formats=FORMATS)
        finally:
            image_module.MAX_IMAGE_PIXELS = usual


def _unusable(path: Path | str, error: Exception) -> DataError:
    text = " ".join(str(error).split()) or type(error).__name__
    return DataError(
        f"{path}: not a whole image that can be used ({text}); replace or remove it and run again "
        "(what was converted is kept)"
    )


def _upright(image: Any) -> Any:
    """The image turned the way up that its EXIF orientation asks for."""
    from PIL import ImageOps

    return ImageOps.exif_transpose(image)


def _on_background(image_module: Any, image: Any, background: str) -> Any:
    if not image.has_transparency_data:
        return image
    over = image.convert("RGBA")
    below = image_module.new("RGBA", over.size, background)
    return image_module.alpha_composite(below, over)


def with_channels(
    image: UInt8[np.ndarray, "height width channels"], channels: int | None, background: str
) -> UInt8[np.ndarray, "height width wanted"]:
    """Make an image grey or coloured; what is transparent shows the background.

    Args:
        image: an image of 1 (grey), 3 (RGB) or 4 channels (RGB and transparency).
        channels: 1 or 3; None leaves the image as it is.
        background: see `Reading`.

    Returns:
        The image.
    """
    if channels is None or image.shape[-1] == channels:
        return image
    image_module = _pillow()
    made = image_module.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    plain = _on_background(image_module, made, background).convert("L" if channels == 1 else "RGB")
    return np.asarray(plain).reshape(*image.shape[:2], channels)


def resized(
    image: UInt8[np.ndarray, "height width channels"], size: int, fit: str = "crop"
) -> UInt8[np.ndarray, "size size channels"]:
    """Make an image `size` x `size` pixels (Lanczos).

    Args:
        image: an image with one channel (grey) or three.
        size: the length of a side in pixels.
        fit: see `Reading`.

    Returns:
        The resized image; `image` itself where it has that size already.
    """
    height, width, channels = image.shape
    if (height, width) == (size, size):
        return image
    image_module = _pillow()
    box = None
    if fit == "crop":
        short = min(height, width)
        left, top = (width - short) / 2, (height - short) / 2
        box = (left, top, left + short, top + short)
    small = image_module.fromarray(image[..., 0] if channels == 1 else image).resize(
        (size, size), image_module.Resampling.LANCZOS, box=box
    )
    return np.asarray(small).reshape(size, size, channels)
