"""Score maps and kept patches as PIL images; the curves of a training.

Every picture shows what the model sees: the photo after timm's own resizing and cropping.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ltrp_timm._text import optional_import
from ltrp_timm.data.photos import Source, check_aspect, load_image
from ltrp_timm.models.ltrp import LTRPModel
from ltrp_timm.selection.cells import CellGrid, TokenLayout
from ltrp_timm.selection.rules import mean_rank
from ltrp_timm.weights.files import write_atomically

KEEP_RATIOS = (0.5, 0.3)

__all__ = [
    "keeping",
    "kept_patches",
    "load_image",
    "overview",
    "panels",
    "row",
    "score_map",
    "show_images",
    "stack_rows",
    "to_image",
    "to_tensor",
]

_Pixels = npt.NDArray[Any]

# dark violet, blue, teal, green, yellow: lightness increases steadily, also for the colour-blind
_RAMP = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], float)
_GREY = np.array([0.299, 0.587, 0.114])
_MIN_PANEL, _MAX_PANEL = 224, 264  # pixels; a row of five stays below 1400
_GAP = 8
_CAPTION = 24


def to_tensor(image: Source, model: LTRPModel) -> Tensor:
    """Prepare a picture of any size, or its path, with timm's evaluation transform for the model.

    Returns:
        (1, 3, H, W) float32, resized, cropped and normalised for the backbone, on the CPU.

    Raises:
        ValueError: The model does not take RGB pictures, ``load_image`` refuses the picture, or one
            side is more than 50 times the other.
    """
    from timm.data import create_transform

    in_chans = getattr(model, "in_chans", 3)
    if in_chans != 3:
        raise ValueError(f"pictures have 3 channels, the model takes {in_chans}.")
    picture = load_image(image)
    check_aspect(picture)
    transform = create_transform(**model.data_config(), is_training=False)
    tensor: Tensor = transform(picture)
    return tensor.unsqueeze(0)


def to_image(x: Tensor, model: LTRPModel) -> Image.Image:
    """The pixels that the model sees: the inverse of ``to_tensor``, except for the crop.

    ``x`` is one image, (1, 3, H, W) or (3, H, W), normalised for the backbone.

    Raises:
        ValueError: `x` has another shape.
    """
    if x.dim() not in (3, 4) or x.shape[-3] != 3 or (x.dim() == 4 and x.shape[0] != 1):
        raise ValueError(f"expected one image (1, 3, H, W), got {list(x.shape)}.")
    config = model.data_config()
    return show_images(x.reshape(1, *x.shape[-3:]), config["mean"], config["std"])[0]


def show_images(
    images: Tensor, mean: Sequence[float] = (0.0,), std: Sequence[float] = (1.0,)
) -> list[Image.Image]:
    """Turn images (B, 3, H, W), normalised by mean and std, back into pictures."""
    shift, scale = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    pixels = (images.detach().float().cpu() * scale + shift) * 255.0
    whole = pixels.round().clamp(0.0, 255.0).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(one) for one in whole]


def score_map(image: Image.Image, scores: Tensor, grid_size: tuple[int, int]) -> Image.Image:
    """Draw a heat map over the picture: violet is the lowest score, yellow the highest.

    Each patch is coloured by its rank; ties have one colour, and NaN is the lowest.

    Args:
        image: The ranked picture, whole patches only.
        scores: (N,), (1, N) or (h, w), higher = keep first.
        grid_size: (h, w).

    Returns:
        A picture of the same size.

    Raises:
        ValueError: `scores` or `image` does not fit the grid.

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
    """Draw the picture with its dropped patches dark and grey.

    Args:
        image: The ranked picture, whole patches only.
        keep_indices: (K,) or (1, K) integers, row by row from the upper left.
        grid_size: (h, w).

    Returns:
        A picture of the same size.

    Raises:
        ValueError: `image` does not fit the grid, or an index is outside of it.

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
    dim = 0.25 * (pixels @ _GREY)[..., None] + 36.0  # not black: a kept patch may be
    return _picture(np.where(_to_pixels(mask.reshape(h, w, 1), image), pixels, dim))


def token_picture(image: Image.Image, layout: TokenLayout) -> Image.Image:
    """Draw the picture as tokens of several scales see it: each outlined, in its own resolution.

    The layout is that of one image, as ``model.token_layout`` returns it.

    Raises:
        ValueError: `image` does not fit the grid, or the layout is of several images.

    >>> from ltrp_timm.selection.cells import all_fine
    >>> token_picture(Image.new("RGB", (32, 32)), all_fine((2, 2), torch.zeros(1, 3, 8, 8))).size
    (32, 32)
    """
    h, w = _check_grid(image, layout.grid_size)
    if len(layout.indices[0]) != 1:
        raise ValueError(f"expected the layout of one image, got {len(layout.indices[0])}.")
    owner = layout.token_of_patch()[0].cpu()
    scale = layout.scale.cpu()[owner].reshape(h, w, 1).numpy()
    pixels = _pixels(image)
    for each in layout.scales[1:]:
        small = image.resize((image.width // each, image.height // each), Image.Resampling.BOX)
        coarse = _pixels(small.resize(image.size, Image.Resampling.NEAREST))
        pixels = np.where(_to_pixels(scale == each, image), coarse, pixels)
    tokens = _to_pixels(owner.reshape(h, w, 1).numpy(), image)[..., 0]
    edge = np.zeros(tokens.shape, bool)
    edge[1:] |= tokens[1:] != tokens[:-1]
    edge[:, 1:] |= tokens[:, 1:] != tokens[:, :-1]
    return _picture(np.where(edge[..., None], 0.55 * pixels + 0.45 * 255, pixels))


def overview(
    image: Source,
    model: LTRPModel,
    keep_ratios: Sequence[float] = KEEP_RATIOS,
    captions: bool = True,
    coarse: bool = False,
) -> Image.Image:
    """Draw a row: the photo as the model sees it, its score map, what is kept at each ratio.

    Args:
        image: A picture of any size, or its path.
        model: Ranks and selects; its ``keep_ratio`` is restored.
        keep_ratios: One picture each.
        captions: Write a line above each picture.
        coarse: See ``panels``.

    Returns:
        The row; each picture is 224 to 264 pixels wide.

    Raises:
        ValueError: A ratio is outside of (0, 1], or ``to_tensor`` refuses the picture.
    """
    shown = panels(image, model, keep_ratios, coarse)
    return row([(picture, text if captions else "") for picture, text in shown])


def panels(
    image: Source,
    model: LTRPModel,
    keep_ratios: Sequence[float] = KEEP_RATIOS,
    coarse: bool = False,
) -> list[tuple[Image.Image, str]]:
    """The pictures of ``overview`` with their captions, at the size that the model sees.

    Args:
        image: A picture of any size, or its path.
        model: Ranks and selects; its ``keep_ratio`` is restored.
        keep_ratios: One picture each.
        coarse: Of a model that drops the rest, also show the tokens of a coarse rest, at ratios
            that pay for more than the coarsest ones.

    Returns:
        The photo, its score map, and what is kept at each ratio.

    Raises:
        ValueError: A ratio is outside of (0, 1], or ``to_tensor`` refuses the picture.
    """
    x = to_tensor(image, model)
    parameter = next(model.backbone.parameters())
    on_device = x.to(device=parameter.device, dtype=parameter.dtype)
    h, w = grid = model.grid_size(x)
    rows, cols = model.patch_size
    photo = to_image(x, model).crop((0, 0, w * cols, h * rows))  # whole patches, as they are cut
    name = getattr(model.ranker, "name", "") or type(model.ranker).__name__
    scores = model.patch_scores(on_device)
    found = [
        (photo, f"photo, {photo.width}x{photo.height}"),
        (score_map(photo, scores, grid), f"{name}: yellow = keep first"),
    ]
    for ratio in keep_ratios:
        with keeping(model, ratio):
            if model.rest == "coarse":
                shown = token_picture(photo, model.select_layout(scores, on_device))
            else:
                shown = kept_patches(photo, model.select(scores, on_device), grid)
            count = model.num_tokens()
        found.append((shown, f"keep {ratio:g}: {count} of {h * w}"))
        cells = CellGrid(grid) if coarse and model.rest == "drop" and min(grid) > 1 else None
        if cells is not None and ratio < 1 and cells.pays(ratio):
            layout = cells.layout(cells.cell_scores(scores), *cells.counts(ratio))
            caption = f"coarse rest: {layout.num_tokens} tokens"
            found.append((token_picture(photo, layout), caption))
    return found


def row(panels: Sequence[tuple[Image.Image, str]]) -> Image.Image:
    """Place pictures side by side, resized to a readable size, with captions above them."""
    return _paste([_panel(picture, caption) for picture, caption in panels], down=False)


@contextlib.contextmanager
def keeping(model: LTRPModel, keep_ratio: float) -> Iterator[None]:
    """Set the model's keep ratio for a while."""
    before = model.keep_ratio
    model.keep_ratio = keep_ratio
    try:
        yield
    finally:
        model.keep_ratio = before


def stack_rows(rows: Sequence[Image.Image]) -> Image.Image:
    """Place pictures one below the other on white; ValueError if there is none."""
    if not rows:
        raise ValueError("stack_rows needs at least one picture, got none.")
    return _paste(rows, down=True)


def _paste(pictures: Sequence[Image.Image], down: bool) -> Image.Image:
    widths, heights = zip(*(picture.size for picture in pictures))
    gaps = _GAP * (len(pictures) - 1)
    size = (max(widths), sum(heights) + gaps) if down else (sum(widths) + gaps, max(heights))
    out, place = Image.new("RGB", size, "white"), 0
    for picture in pictures:
        out.paste(picture, (0, place) if down else (place, 0))
        place += (picture.height if down else picture.width) + _GAP
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
    """Resize a picture to a readable size; write its caption above it."""
    width = min(max(picture.width, _MIN_PANEL), _MAX_PANEL)
    if width != picture.width:
        height = max(1, round(picture.height * width / picture.width))
        smooth = Image.Resampling.LANCZOS if width < picture.width else Image.Resampling.NEAREST
        picture = picture.resize((width, height), smooth)
    if not caption:
        return picture
    out = Image.new("RGB", (picture.width, picture.height + _CAPTION), "white")
    out.paste(picture, (0, _CAPTION))
    draw = ImageDraw.Draw(out)
    fonts = (ImageFont.load_default(size) for size in range(16, 8, -1))
    font = next((f for f in fonts if draw.textlength(caption, font=f) < out.width), None)
    draw.text((1, 3), caption, fill="black", font=font or ImageFont.load_default(8))
    return out


def require_matplotlib() -> Any:
    """matplotlib's Figure; ImportError if it is not installed."""
    name, reason = "matplotlib.figure", "curves need matplotlib"
    return optional_import(name, reason, "'ltrp-timm[demo]'").Figure


def plot_curves(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plot the loss beside its chance level, and the held-out metrics, over epochs."""
    scores = [n for n in rows[-1] if n.startswith("val_") and n not in ("val_loss", "val_chance")]
    figure = require_matplotlib()(figsize=(5 * (1 + bool(scores)), 4), layout="constrained")
    axes = figure.subplots(1, 1 + bool(scores), squeeze=False)[0]
    for name, style in (("loss", "-"), ("val_loss", "-"), ("chance", "--")):
        _plot(axes[0], rows, name, style)
    axes[0].set_ylabel("loss")
    for name in scores:
        _plot(axes[1], rows, name, "-")
    for axis in axes:
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend()
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def _plot(axis: Any, rows: Sequence[Mapping[str, Any]], name: str, style: str) -> None:
    points = [(row["epoch"], row[name]) for row in rows if row.get(name) is not None]
    if points:
        marker = "o" if len(points) < 20 and style == "-" else None
        label = {"loss": "training", "val_loss": "held out"}.get(name, name.removeprefix("val_"))
        axis.plot(*zip(*points), linestyle=style, marker=marker, label=label)
