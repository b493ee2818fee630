"""Read pictures of any kind: a file, bytes, an open image or an array in, upright RGB out."""

import contextlib
import io
import os
import stat
import warnings
from typing import IO, Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from ltrp_timm._text import one_line, printable

MAX_ASPECT = 50  # a longer strip would be resized to gigabytes of pixels before it is cropped
Source: TypeAlias = (
    str | os.PathLike[str] | bytes | IO[bytes] | Image.Image | npt.NDArray[np.generic]
)


def load_image(source: Source, name: str | None = None) -> Image.Image:
    """Read a picture as RGB.

    The EXIF orientation is applied, transparency is put on white, and an animation gives its first
    frame. Grey values of more than 8 bits are scaled, not clipped: 16-bit values by the range of
    their type; 32-bit integers as 8-bit or 16-bit values and floats as values in [0, 1] or
    [0, 255] if they fit that range, otherwise from the lowest value to the highest.

    Args:
        source: a path, the bytes of a file, a file open for reading, a PIL image (not changed), or
            an array (H, W) or (H, W, C) with 1, 3 or 4 channels.
        name: what errors call the picture (default: its path).

    Returns:
        The picture, mode "RGB".

    Raises:
        ValueError: The picture cannot be read. One line gives its name and the reason: missing, not
            a regular file, empty, not an image, truncated, or so large that PIL suspects a
            decompression bomb.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged metadata is no reason to refuse a picture
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with _open(source) as image:
                image.load()
                return _to_rgb(image)
    except Exception as error:  # PIL's readers raise exceptions of many types on damaged files
        if name is None:
            name = str(source) if isinstance(source, (str, os.PathLike)) else "the picture"
        raise ValueError(f"{printable(name)}: {_reason(error)}") from error


def check_aspect(image: Image.Image) -> None:
    """Raise ValueError for a strip: resizing it by its shorter side would fill the memory."""
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ValueError(
            f"{image.width}x{image.height} pixels, over {MAX_ASPECT} times longer than wide."
        )


def _open(source: Any) -> Image.Image:
    if isinstance(source, Image.Image):
        image = source.copy()
        image.format = source.format
        return image
    if isinstance(source, np.ndarray):
        values = source[:, :, 0] if source.ndim == 3 and source.shape[2] == 1 else source
        return Image.fromarray(values.astype(np.float32) if values.dtype == np.float64 else values)
    if isinstance(source, (str, os.PathLike)):
        _check_file(source)
    elif isinstance(source, bytes):
        source = io.BytesIO(source)
    elif not hasattr(source, "read"):
        raise TypeError(f"expected a PIL image, an array or a file, got {type(source).__name__}.")
    return Image.open(source)


def _check_file(path: str | os.PathLike[str]) -> None:
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise ValueError("is a directory, not an image.")
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait forever
        raise ValueError("is not a regular file.")
    if status.st_size == 0:
        raise ValueError("is empty (0 bytes).")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "is not an image in a known format."
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}."
    if isinstance(error, (ValueError, TypeError)):
        return one_line(error)
    return f"cannot be read: {one_line(error)}"


def _to_rgb(image: Image.Image) -> Image.Image:
    """A loaded image of any mode -> RGB, upright; changes ``image``."""
    with contextlib.suppress(Exception):  # PIL turns first, then may fail to rewrite damaged EXIF
        ImageOps.exif_transpose(image, in_place=True)
    image.info.pop("exif", None)  # a second call must not turn again
    if image.mode.startswith(("I", "F")):
        image = _to_8_bit(image)
    elif image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, 32 bits or floats -> mode "L"; type and range decide what values mean."""
    values = np.asarray(image).astype(np.float64)
    values[~np.isfinite(values)] = 0.0
    low, high = values.min(), values.max()
    sixteen_bits = image.mode.startswith("I;16") or image.format in ("PNG", "PPM")
    if image.mode == "F" and low >= 0.0 and high <= 1.0:
        values = values * 255.0
    elif image.mode != "F" and low >= 0 and high <= 65535 and (sixteen_bits or high > 255):
        values = values / 257.0  # 65535 -> 255
    elif low < 0 or high > 255:
        values = (values - low) * (255.0 / (high - low))
    return Image.fromarray(values.round().astype(np.uint8))
