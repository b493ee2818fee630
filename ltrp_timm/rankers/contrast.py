"""The weight-free ranker: texture, colour contrast to the border, nearness to the centre."""

import math
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn

from ltrp_timm.layers.sizes import grid_of, to_img_size, to_pair
from ltrp_timm.rankers.base import PatchSizeRanker
from ltrp_timm.selection import mean_rank

PARTS: Dict[str, float] = {"std": 1.0, "colour": 1.0, "centre": 0.7}


class ContrastRanker(PatchSizeRanker, nn.Module):
    """rank(patch std) + rank(colour contrast to the border) + 0.7 * rank(nearness to the centre).

    No weights, no training, no labels; ranks are taken within an image, ties share their mean rank.
    It knows nothing about content, and its scores do not compare between images.

    Args:
        patch_size: side of a patch in pixels, or (height, width).
        parts: which of "std", "colour" and "centre" count; a mapping sets their weights.
        img_size: the size it looks at, (H, W) or one side, whatever the backbone's is; None takes
            images as they come.

    Raises:
        ValueError: no part, one of another name, or an ``img_size`` smaller than a patch.
    """

    name = "contrast"

    def __init__(
        self,
        patch_size: Union[int, Sequence[int]] = 16,
        parts: Union[Sequence[str], Dict[str, float]] = ("std", "colour", "centre"),
        img_size: Union[int, Sequence[int], None] = None,
    ) -> None:
        super().__init__()
        weights = (
            dict(parts)
            if isinstance(parts, dict)
            else {part: PARTS.get(part, 0.0) for part in parts}
        )
        if not weights or any(part not in PARTS for part in weights):
            raise ValueError(f"parts must be some of {', '.join(PARTS)}, got {parts!r}.")
        self.patch_size = to_pair(patch_size)
        self.img_size: Optional[Tuple[int, int]] = to_img_size(img_size, self.patch_size)
        self.mean: Optional[List[float]] = [0.0]  # it works on pixels in [0, 1]
        self.std: Optional[List[float]] = [1.0]
        self.std_weight = float(weights.get("std", 0.0))
        self.colour_weight = float(weights.get("colour", 0.0))
        self.centre_weight = float(weights.get("centre", 0.0))
        total = abs(self.std_weight) + abs(self.colour_weight) + abs(self.centre_weight)
        if not 0.0 < total < math.inf:
            raise ValueError(f"the weights of parts must be finite and not all 0, got {parts!r}.")

    def config(self) -> Dict[str, Any]:
        """Arguments that rebuild this ranker."""
        parts = {"std": self.std_weight, "colour": self.colour_weight, "centre": self.centre_weight}
        return {**self.sizes(), "parts": parts}

    def forward(self, images: Tensor) -> Tensor:
        """images (B, C, H, W), pixels in [0, 1] -> score map (B, h, w) float32."""
        return contrast_scores(
            images, self.patch_size, self.std_weight, self.colour_weight, self.centre_weight
        )

    def extra_repr(self) -> str:
        """Arguments for ``print(module)``."""
        return ", ".join(f"{name}={value}" for name, value in self.config().items())


def contrast_scores(
    images: Tensor,
    patch_size: Tuple[int, int],
    std_weight: float,
    colour_weight: float,
    centre_weight: float,
) -> Tensor:
    """images (B, C, H, W) -> (B, h, w) float32: the weighted sum of the ranks of the parts."""
    h, w = grid_of(images, patch_size)
    batch = images.shape[0]
    mean, variance = patch_statistics(images, patch_size, h, w)
    seen = in_levels(torch.cat([variance.mean(1).sqrt(), border_contrast(mean)]))
    parts = torch.cat([seen, centre_distance(h, w, images.device).expand(batch, -1, -1)])
    # all parts in one sort; NaN comes lowest
    ranks = mean_rank(torch.nan_to_num(parts.flatten(1), nan=-1.0)).reshape(3, batch, h, w)
    std, colour, centre = ranks.unbind(0)
    scores = torch.add(std * std_weight, colour, alpha=colour_weight)
    return torch.sub(scores, centre, alpha=centre_weight)


torch.fx.wrap("contrast_scores")


def patch_statistics(
    images: Tensor, patch_size: Tuple[int, int], h: int, w: int
) -> Tuple[Tensor, Tensor]:
    """Images (B, C, H, W) -> mean and variance over each patch's pixels, (B, C, h, w) float32."""
    rows, cols = patch_size
    pixels = images[:, :, : h * rows, : w * cols].float()
    pixels = pixels.reshape(images.shape[0], images.shape[1], h, rows, w, cols)
    mean = pixels.mean(5, keepdim=True).mean(3, keepdim=True)
    # in place and axis by axis: memory traffic is what this costs
    variance = (pixels - mean).square_().mean(5).mean(3)
    return mean.reshape(images.shape[0], images.shape[1], h, w), variance


def border_contrast(mean: Tensor) -> Tensor:
    """Mean colours (B, C, h, w) -> (B, h, w): distance to the mean of the outermost patches."""
    inside = mean[:, :, 1:-1, 1:-1]
    count = mean.shape[2] * mean.shape[3] - inside.shape[2] * inside.shape[3]
    ring = mean.sum([2, 3], keepdim=True) - inside.sum([2, 3], keepdim=True)
    return torch.linalg.vector_norm(torch.sub(mean, ring, alpha=1.0 / count), dim=1)


def centre_distance(h: int, w: int, device: torch.device) -> Tensor:
    """(1, h, w) squared distance of each patch from the centre, equal for mirrored places."""
    rows = torch.arange(1 - h, h, 2, device=device, dtype=torch.float32) / h
    cols = torch.arange(1 - w, w, 2, device=device, dtype=torch.float32) / w
    return rows.square().reshape(1, h, 1) + cols.square()


def in_levels(values: Tensor) -> Tensor:
    """Pixel values in [0, 1] as whole sixteenths of a grey level.

    Differences below that are rounding noise: flat patches must tie, not race.
    """
    return (values * 4080.0).round()  # 255 * 16
