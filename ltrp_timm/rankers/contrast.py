"""The weight-free ranker: texture, colour contrast to the border, nearness to the centre."""

import math
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn

from ltrp_timm.rankers.base import PatchSizeRanker, grid_of, to_pair

PARTS: Dict[str, float] = {"std": 1.0, "colour": 1.0, "centre": 0.7}


class ContrastRanker(PatchSizeRanker, nn.Module):
    """rank(patch std) + rank(colour contrast to the border) + 0.7 * rank(nearness to the centre).

    No weights, no training, no labels; ranks are taken within an image, ties share their mean rank.
    The defaults are the best of the analytic scores measured on real photos against object masks;
    it knows nothing about content.

    Args:
        patch_size: side of a patch in pixels, or (height, width).
        parts: which of "std", "colour" and "centre" count; a mapping sets their weights.

    Raises:
        ValueError: no part, or one of another name.
    """

    name = "contrast"

    def __init__(
        self,
        patch_size: Union[int, Sequence[int]] = 16,
        parts: Union[Sequence[str], Dict[str, float]] = ("std", "colour", "centre"),
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
        return {"patch_size": list(self.patch_size), "parts": parts}

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
    mean, variance = patch_statistics(images, patch_size, h, w)
    scores = torch.zeros(images.shape[0], h * w, device=images.device)
    if std_weight != 0.0:
        scores = scores + std_weight * mean_rank(quantise(variance.mean(1).sqrt()))
    if colour_weight != 0.0:
        scores = scores + colour_weight * mean_rank(quantise(border_contrast(mean, h, w)))
    if centre_weight != 0.0:
        scores = scores + centre_weight * mean_rank(-centre_distance(h, w, images.device))
    return scores.reshape(images.shape[0], h, w)


torch.fx.wrap("contrast_scores")


def patch_statistics(
    images: Tensor, patch_size: Tuple[int, int], h: int, w: int
) -> Tuple[Tensor, Tensor]:
    """Images (B, C, H, W) -> mean and variance over each patch's pixels, (B, C, N) float32."""
    rows, cols = patch_size
    pixels = images[:, :, : h * rows, : w * cols].float()
    pixels = pixels.reshape(images.shape[0], images.shape[1], h, rows, w, cols)
    mean = pixels.mean(5, keepdim=True).mean(3, keepdim=True)
    # in place and axis by axis: memory traffic is what this costs
    variance = (pixels - mean).square_().mean(5).mean(3)
    return mean.flatten(2), variance.flatten(2)


def border_contrast(mean: Tensor, h: int, w: int) -> Tensor:
    """Mean colours (B, C, N) -> (B, N): distance to the mean colour of the outermost patches."""
    rows = torch.arange(h, device=mean.device).unsqueeze(1)
    cols = torch.arange(w, device=mean.device).unsqueeze(0)
    ring = ((rows == 0) | (rows == h - 1) | (cols == 0) | (cols == w - 1)).flatten().to(mean.dtype)
    border = (mean * ring).sum(dim=2, keepdim=True) / ring.sum()
    return (mean - border).square().sum(dim=1).sqrt()


def centre_distance(h: int, w: int, device: torch.device) -> Tensor:
    """(1, N) squared distance of each patch from the centre, equal for mirrored places."""
    rows = (2 * torch.arange(h, device=device) - (h - 1)).to(torch.float32).abs() / h
    cols = (2 * torch.arange(w, device=device) - (w - 1)).to(torch.float32).abs() / w
    return (rows.square().unsqueeze(1) + cols.square().unsqueeze(0)).flatten().unsqueeze(0)


def quantise(values: Tensor) -> Tensor:
    """Round pixel values in [0, 1] to sixteenths of a grey level; NaN becomes the lowest.

    Differences below that are rounding noise: flat patches must tie, not race.
    """
    levels = 255.0 * 16.0
    return torch.nan_to_num((values * levels).round(), nan=-1.0)


def mean_rank(values: Tensor) -> Tensor:
    """values (B, N) -> ranks in (0, 1): 0.5/N the lowest, ties share their mean rank."""
    count = values.shape[1]
    if not torch.jit.is_scripting():
        if (
            torch.onnx.is_in_onnx_export()
        ):  # searchsorted has no ONNX operator; counting pairs gives the same
            pairs = values.unsqueeze(2) - values.unsqueeze(1)
            return (pairs.sign().sum(dim=2) + count) / (2 * count)
    values = values.contiguous()  # searchsorted warns of anything else
    ordered = values.sort(dim=1)[0]
    below = torch.searchsorted(ordered, values, right=False)
    up_to = torch.searchsorted(ordered, values, right=True)
    return (below + up_to).to(torch.float32) / (2 * count)
