"""Reading photos of any kind: files in, upright RGB out."""

import contextlib
import os
import stat
import warnings
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

from ltrp_timm._text import one_line, printable

MAX_ASPECT = 50  # a longer strip of pixels would be resized to gigabytes before it is cropped
_ORIENTATION_TAG = 0x0112
_ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read a photo of any kind as RGB.

    The EXIF orientation is applied, transparency stands on white, an animation gives its first
    frame. Grey values of more than 8 bits are scaled, not clipped: 16-bit by the range of their
    type; 32-bit integers as 8-bit or 16-bit values and floats as values in [0, 1] or [0, 255]
    where they fit that range, else from the lowest to the highest one.

    Args:
        path: a file.

    Returns:
        The picture, mode "RGB".

    Raises:
        ValueError: one line with the file and the reason: missing, no regular file, empty, no
            image, truncated, or so many pixels that PIL takes it for a decompression bomb.
    """
    try:
        _check_file(path)
        return _decode(path)
    except Exception as error:  # what PIL's readers raise on damaged files has no common type
        raise ValueError(f"{printable(path)}: {_reason(error)}") from error


def check_aspect(image: Image.Image) -> None:
    """Check that a picture can be resized by its shorter side.

    Raises:
        ValueError: it is a strip more than 50 times longer than wide.
    """
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ValueError(
            f"a picture may be at most {MAX_ASPECT} times longer than wide, got "
            f"{image.width}x{image.height}."
        )


def decode_image(file: IO[bytes], name: str) -> Image.Image:
    """Read a photo from an open file, as ``load_image`` does.

    Raises:
        ValueError: one line with ``name`` and the reason.
    """
    try:
        return _decode(file)
    except Exception as error:
        raise ValueError(f"{printable(name)}: {_reason(error)}") from error


def _decode(source: str | os.PathLike[str] | IO[bytes]) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # damaged metadata is no reason to refuse a photo
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(source) as image:
            image.load()
            return _to_rgb(image)


def _check_file(path: str | os.PathLike[str]) -> None:
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise ValueError("is a directory, not an image.")
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise ValueError("is no regular file.")
    if status.st_size == 0:
        raise ValueError("is empty (0 bytes).")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "is not an image in a known format."
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}."
    if isinstance(error, ValueError):
        return one_line(error)
    return f"cannot be read: {one_line(error)}"


def _to_rgb(image: Image.Image) -> Image.Image:
    """A loaded image of any mode -> RGB, upright."""
    turn = _ORIENTATIONS.get(_orientation(image))
    if image.mode.startswith(("I", "F")):
        image = _to_8_bit(image)
    elif image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def is_turned(path: str | os.PathLike[str]) -> bool:
    """Whether ``load_image`` turns or flips what the file stores, because its EXIF says so.

    Raises:
        OSError: the file cannot be opened as an image.
    """
    with Image.open(path) as image:
        return _orientation(image) in _ORIENTATIONS


def _orientation(image: Image.Image) -> int:
    with contextlib.suppress(Exception):  # a damaged EXIF block says nothing
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    return 1


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, 32 bits or floats -> mode "L"; type, then range, tell what values mean."""
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
