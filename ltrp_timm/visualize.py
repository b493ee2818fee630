"""Photos in, pictures out: score maps and kept patches, as PIL images.

Every picture shows what the model sees: the photo after timm's own resizing and cropping.
"""

import contextlib
import os
import stat
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError
from torch import Tensor

from ltrp_timm.model import LTRPModel
from ltrp_timm.rankers.contrast import mean_rank
from ltrp_timm.selection import num_keep

KEEP_RATIOS = (0.7, 0.5, 0.25)

_Pixels = npt.NDArray[Any]

# dark violet, blue, teal, green, yellow: lightness rises steadily, also for the colour-blind
_RAMP = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], float)
_GREY = np.array([0.299, 0.587, 0.114])
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
_MAX_ASPECT = 50  # a strip of pixels would be resized to gigabytes before it is cropped
_MIN_PANEL, _MAX_PANEL = 224, 264  # pixels; a row of five stays below 1400
_GAP = 8
_CAPTION = 24


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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged metadata is no reason to refuse a photo
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
                return _to_rgb(image)
    except Exception as error:  # what PIL's readers raise on damaged files has no common type
        raise ValueError(f"{printable(path)}: {_reason(error)}") from error


def printable(path: str | os.PathLike[str]) -> str:
    r"""A file's name on one line: control and undecodable characters as escapes.

    >>> printable("two" + chr(10) + "lines.png")
    'two\\nlines.png'
    """
    text = str(path)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(error: BaseException) -> str:
    """What an exception says, on one line; its type when it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


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


def data_config(model: LTRPModel) -> dict[str, Any]:
    """timm's data configuration of a model, with the image size that it has now."""
    from timm.data import resolve_model_data_config

    config: dict[str, Any] = resolve_model_data_config(model)
    size = getattr(model.backbone.patch_embed, "img_size", None)
    if size is not None:  # the cfg keeps the published size after img_size=… and set_input_size
        config["input_size"] = (config["input_size"][0], *size)
    return config


def to_tensor(image: Image.Image, model: LTRPModel) -> Tensor:
    """A picture as the model wants it, through timm's evaluation transform.

    Args:
        image: of any size; it is resized and cropped.
        model: says size, crop, interpolation, mean and std.

    Returns:
        (1, 3, H, W) float32, normalised for the backbone, on the CPU.

    Raises:
        ValueError: the model takes no RGB pictures, or the picture is a strip more than 50 times
            longer than wide.
    """
    from timm.data import create_transform

    in_chans = getattr(model, "in_chans", 3)
    if in_chans != 3:
        raise ValueError(f"pictures have 3 channels, the model takes {in_chans}.")
    if max(image.size) > _MAX_ASPECT * min(image.size):
        raise ValueError(
            f"a picture may be at most {_MAX_ASPECT} times longer than wide, got "
            f"{image.width}x{image.height}."
        )
    transform = create_transform(**data_config(model), is_training=False)
    tensor: Tensor = transform(image.convert("RGB"))
    return tensor.unsqueeze(0)


def to_image(x: Tensor, model: LTRPModel) -> Image.Image:
    """The inverse of ``to_tensor`` but for the crop: the pixels that the model sees.

    Args:
        x: (1, 3, H, W) or (3, H, W), normalised for the backbone.
        model: says mean and std.

    Raises:
        ValueError: any other shape.
    """
    if x.dim() not in (3, 4) or x.shape[-3] != 3 or (x.dim() == 4 and x.shape[0] != 1):
        raise ValueError(f"expected one image (1, 3, H, W), got {list(x.shape)}.")
    config = data_config(model)
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    pixels = x.detach().reshape(x.shape[-3:]).float().cpu() * std + mean
    pixels = (pixels * 255.0).round().clamp(0.0, 255.0)
    return Image.fromarray(pixels.to(torch.uint8).permute(1, 2, 0).numpy())


def score_map(image: Image.Image, scores: Tensor, grid_size: tuple[int, int]) -> Image.Image:
    """A heat map over the photo, one colour per patch: violet the lowest score, yellow the highest.

    Colours go by rank, ties share theirs: only the order of scores means anything. NaN counts as
    the lowest.

    Args:
        image: the picture that was ranked, whole patches only.
        scores: (N,), (1, N) or (h, w), higher = keep first.
        grid_size: (h, w).

    Returns:
        A picture of the same size.

    Raises:
        ValueError: scores or picture do not fit the grid.

    >>> score_map(Image.new("RGB", (32, 32)), torch.arange(4.0), (2, 2)).size
    (32, 32)
    """
    h, w = _check_grid(image, grid_size)
    if scores.numel() != h * w:
        raise ValueError(f"a grid of {h}x{w} needs {h * w} scores, got {list(scores.shape)}.")
    values = scores.detach().float().cpu().reshape(1, -1)
    ranks = mean_rank(torch.nan_to_num(values, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf))
    levels = (ranks - ranks.min()) / (ranks.max() - ranks.min()).clamp(min=1e-6)
    heat = _to_pixels(_ramp(levels.reshape(h, w).double().numpy()), image)
    grey = (_pixels(image) @ _GREY)[..., None]
    return _picture(0.7 * heat + 0.3 * grey)


def kept_patches(
    image: Image.Image, keep_indices: Tensor, grid_size: tuple[int, int]
) -> Image.Image:
    """The photo with its kept patches as they are and the dropped ones dark and grey.

    Args:
        image: the picture that was ranked, whole patches only.
        keep_indices: (K,) or (1, K) integers, row by row from the upper left.
        grid_size: (h, w).

    Returns:
        A picture of the same size.

    Raises:
        ValueError: the picture does not fit the grid, or indices lie outside it.

    >>> kept_patches(Image.new("RGB", (32, 32)), torch.tensor([0, 3]), (2, 2)).size
    (32, 32)
    """
    h, w = _check_grid(image, grid_size)
    keep = keep_indices.detach().cpu()
    if keep.is_floating_point() or keep.dim() not in (1, 2) or (keep.dim() == 2 and len(keep) != 1):
        raise ValueError(
            f"expected integers (K,) or (1, K), got {keep.dtype} of shape {list(keep.shape)}."
        )
    if keep.numel() and (int(keep.min()) < 0 or int(keep.max()) >= h * w):
        raise ValueError(
            f"keep_indices must lie in 0 … {h * w - 1} on a grid of {h}x{w}, got "
            f"{int(keep.min())} … {int(keep.max())}."
        )
    mask = np.zeros(h * w, bool)
    mask[keep.flatten().numpy()] = True
    pixels = _pixels(image)
    dim = 0.25 * (pixels @ _GREY)[..., None] + 36.0  # never black: that is a kept colour
    return _picture(np.where(_to_pixels(mask.reshape(h, w, 1), image), pixels, dim))


def overview(
    image: Image.Image,
    model: LTRPModel,
    keep_ratios: Sequence[float] = KEEP_RATIOS,
    captions: bool = True,
) -> Image.Image:
    """One row: the photo as the model sees it, its score map, what is kept at each ratio.

    Args:
        image: of any size.
        model: ranks and selects; its own ``keep_ratio`` is as before afterwards.
        keep_ratios: one picture each.
        captions: a line of text above each picture.

    Returns:
        The row, each picture 224 to 264 pixels wide whatever the model's input size.

    Raises:
        ValueError: a ratio outside (0, 1], or a picture that ``to_tensor`` refuses.
    """
    x = to_tensor(image, model)
    parameter = next(model.backbone.parameters())
    on_device = x.to(device=parameter.device, dtype=parameter.dtype)
    h, w = grid = model.grid_size(x)
    rows, cols = model.backbone.patch_embed.feat_ratio(as_scalar=False)
    photo = to_image(x, model).crop((0, 0, w * cols, h * rows))  # whole patches, as they are cut
    name = getattr(model.ranker, "name", "") or type(model.ranker).__name__
    scores = model.patch_scores(on_device)
    panels = [
        (photo, f"photo, {photo.width}x{photo.height}"),
        (score_map(photo, scores, grid), f"{name}: yellow = keep first"),
    ]
    for ratio in keep_ratios:
        with keeping(model, ratio):
            kept = kept_patches(photo, model.keep_indices(on_device), grid)
        panels.append((kept, f"keep {ratio:g}: {num_keep(h * w, ratio)} of {h * w}"))
    return _side_by_side([_panel(shown, text if captions else "") for shown, text in panels])


@contextlib.contextmanager
def keeping(model: LTRPModel, keep_ratio: float) -> Iterator[None]:
    """The model at another keep ratio, for a while."""
    before = model.keep_ratio
    model.keep_ratio = keep_ratio
    try:
        yield
    finally:
        model.keep_ratio = before


def stack_rows(rows: Sequence[Image.Image]) -> Image.Image:
    """Pictures one below the other on white.

    Raises:
        ValueError: there are none.
    """
    if not rows:
        raise ValueError("stack_rows needs at least one picture, got none.")
    height = sum(row.height for row in rows) + _GAP * (len(rows) - 1)
    out = Image.new("RGB", (max(row.width for row in rows), height), "white")
    top = 0
    for row in rows:
        out.paste(row, (0, top))
        top += row.height + _GAP
    return out


def _check_grid(image: Image.Image, grid_size: tuple[int, int]) -> tuple[int, int]:
    h, w = grid_size
    if h < 1 or w < 1 or image.height % h or image.width % w:
        raise ValueError(
            f"a picture of {image.width}x{image.height} (width x height) does not divide into "
            f"{h}x{w} patches; pass what the model sees: to_image(to_tensor(image, model), model)."
        )
    return h, w


def _pixels(image: Image.Image) -> _Pixels:
    """(H, W, 3) float64 in 0 … 255."""
    return np.asarray(image.convert("RGB")).astype(np.float64)


def _picture(pixels: _Pixels) -> Image.Image:
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def _to_pixels(patches: _Pixels, image: Image.Image) -> _Pixels:
    """One value or colour per patch (h, w, C) -> per pixel (H, W, C)."""
    rows, cols = image.height // patches.shape[0], image.width // patches.shape[1]
    return patches.repeat(rows, axis=0).repeat(cols, axis=1)


def _ramp(levels: _Pixels) -> _Pixels:
    """Levels (h, w) in [0, 1] -> colours (h, w, 3), linear between the anchors."""
    places = np.linspace(0.0, 1.0, len(_RAMP))
    return np.stack([np.interp(levels, places, channel) for channel in _RAMP.T], axis=-1)


def _panel(picture: Image.Image, caption: str) -> Image.Image:
    """A picture brought to a size for reading, its caption above."""
    if picture.width > _MAX_PANEL or picture.width < _MIN_PANEL:
        width = _MAX_PANEL if picture.width > _MAX_PANEL else _MIN_PANEL
        height = max(1, round(picture.height * width / picture.width))
        shrinks = picture.width > width
        filter_ = Image.Resampling.LANCZOS if shrinks else Image.Resampling.NEAREST
        picture = picture.resize((width, height), filter_)
    if not caption:
        return picture
    out = Image.new("RGB", (picture.width, picture.height + _CAPTION), "white")
    out.paste(picture, (0, _CAPTION))
    draw = ImageDraw.Draw(out)
    fonts = (ImageFont.load_default(size) for size in range(16, 8, -1))
    font = next((f for f in fonts if draw.textlength(caption, font=f) < out.width), None)
    draw.text((1, 3), caption, fill="black", font=font or ImageFont.load_default(8))
    return out


def _side_by_side(panels: Sequence[Image.Image]) -> Image.Image:
    width = sum(panel.width for panel in panels) + _GAP * (len(panels) - 1)
    out = Image.new("RGB", (width, max(panel.height for panel in panels)), "white")
    left = 0
    for panel in panels:
        out.paste(panel, (left, 0))
        left += panel.width + _GAP
    return out
