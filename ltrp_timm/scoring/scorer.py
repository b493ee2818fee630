"""From pixels to scores and kept patches, with a ranker alone or as in front of a model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor

from ltrp_timm.layers import InputBridge, resize_score_map
from ltrp_timm.models.open_model import open_model
from ltrp_timm.models.timm_interface import pixels_per_token
from ltrp_timm.rankers import create_ranker, ranker_class
from ltrp_timm.selection import check_selection_args, choose_keep_indices

_PIXELS = ((0.0,), (1.0,))


@dataclass(frozen=True)
class Scorer:
    """What turns a batch of images into scores.

    Attributes:
        ranker: the ranker, in eval mode.
        config: timm's data configuration of the images.
        grid_size: (h, w) in patches.
        patch_size: (height, width) of a patch in pixels.
        score: images normalised by ``config`` (B, 3, H, W) -> scores (B, N) float32.
    """

    ranker: Any
    config: dict[str, Any]
    grid_size: tuple[int, int]
    patch_size: tuple[int, int]
    score: Callable[[Tensor], Tensor]

    def transform(self) -> Any:
        """timm's evaluation transform up to pixels (3, H, W) uint8: pictures can still be drawn."""
        return timm.data.create_transform(**self.config, is_training=False, normalize=False)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) uint8 -> float32, as the rest of timm's transform would."""
        shape = (1, 3, 1, 1)
        mean, std = (
            torch.tensor(self.config[name], device=pixels.device).expand(3).reshape(shape)
            for name in ("mean", "std")
        )
        return (pixels.float() / 255.0 - mean) / std


def ranker_alone(
    name: str, weights: Any, args: dict[str, Any], img_size: int, patch_size: int, device: str
) -> Scorer:
    """A ranker on images of one size, cut into a grid of patches of one size.

    Raises:
        ValueError: the image is smaller than a patch; and all that ``create_ranker`` raises.
    """
    side = img_size // patch_size
    if side < 1:
        raise ValueError(f"images of {img_size} pixels are smaller than a patch of {patch_size}.")
    if not weights and ranker_class(name).follows_patch_size:
        args = {"patch_size": patch_size, **args}
    ranker = create_ranker(name, weights, **args).to(device).eval()
    # the transform normalises as the ranker wants it; only a size of its own is left to bridge
    mean, std = ranker.mean or _PIXELS[0], ranker.std or _PIXELS[1]
    config = _data_config((img_size, img_size), mean, std)
    bridge = InputBridge(_PIXELS, _PIXELS, ranker.img_size).to(device)

    def score(images: Tensor) -> Tensor:
        return resize_score_map(ranker(bridge(images)), side, side)

    return Scorer(ranker, config, (side, side), (patch_size, patch_size), score)


def ranker_of_model(
    name: str,
    weights: Any,
    args: dict[str, Any],
    model_name: str,
    img_size: int | None,
    device: str,
) -> Scorer:
    """A ranker in front of a timm ViT, on its images and its grid; that ViT itself never runs.

    Raises:
        TypeError: patches cannot be dropped from the model.
    """
    model, _ = open_model(
        model_name,
        pretrained=False,
        ranker=name,
        ranker_weights=weights,
        ranker_args=args,
        img_size=img_size,
    )
    model = model.to(device)
    config = model.data_config()
    size = tuple(config["input_size"][-2:])
    grid = model.grid_size(torch.empty(1, 3, *size, device="meta"))
    return Scorer(model.ranker, config, grid, pixels_per_token(model.backbone), model.patch_scores)


def _data_config(size: tuple[int, int], mean: Any, std: Any) -> dict[str, Any]:
    return {
        "input_size": (3, *size),
        "interpolation": "bicubic",
        "mean": tuple(mean),
        "std": tuple(std),
        "crop_pct": 1.0,
        "crop_mode": "center",
    }


def rank_batch(
    scorer: Scorer, pixels: Tensor, keep_ratio: float, selection: str, device: str
) -> tuple[Tensor, Tensor]:
    """Pixels (B, 3, H, W) uint8 -> scores (B, N) float32 and keep indices (B, K), on the CPU."""
    with torch.inference_mode():
        images = scorer.normalise(pixels.to(device))
        scores = scorer.score(images)
        args = check_selection_args(selection, None)
        keep = choose_keep_indices(
            scores, None, keep_ratio, selection, args, scorer.grid_size, images
        )
    return scores.cpu(), keep.cpu()
