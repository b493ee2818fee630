"""The weight-free ranker that finds what is unlike the border of the image."""

from typing import Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ltrp_timm.rankers.base import PatchSizeRanker
from ltrp_timm.rankers.contrast import centre_distance, grid_of, patch_statistics
from ltrp_timm.selection.rules import mean_rank

NEIGHBOURS = 4


class BorderRanker(PatchSizeRanker):
    """Distance of each patch to the most similar patches on the border of the image.

    What has nothing like it on the border is probably an object; sky, grass and wall may all be on
    the border at once. A patch is described by the mean and the spread of its pixels. Scores are
    rank(distance to the nearest border patches) + 0.4 * rank(distance to the border's mean)
    + 0.4 * rank(nearness to the centre). No weights, no training, no labels. Ranks are taken within
    an image; so scores are not comparable between images.

    Args:
        patch_size: side of a patch in pixels, or (height, width).
        img_size: its image size, (H, W) or one side; None accepts any size.

    Raises:
        ValueError: `img_size` is smaller than a patch.
    """

    name = "border"

    def forward(self, images: Tensor) -> Tensor:
        """images (B, C, H, W), pixels in [0, 1] -> score map (B, h, w) float32."""
        return border_scores(images, self.patch_size)


def border_scores(images: Tensor, patch_size: Tuple[int, int]) -> Tensor:
    """images (B, C, H, W) -> (B, h, w) float32: the weighted sum of three ranks."""
    h, w = grid_of(images, patch_size)
    mean, variance = patch_statistics(images, patch_size, h, w)
    grey = mean.mean(1, keepdim=True)
    described = torch.cat([grey, mean - grey, variance.sqrt()], dim=1)  # (B, 2 C + 1, h, w)
    spread = described.std([2, 3], correction=0, keepdim=True)
    described = described / spread.clamp(min=1e-3)
    nearest, to_mean = border_distances(described)
    distances = torch.cat([_smoothed(nearest), to_mean])
    # whole steps, far above rounding noise: flat patches must tie
    distances = torch.nan_to_num((distances * 1024.0).round(), nan=-1.0)
    centre = centre_distance(h, w, images.device).expand(images.shape[0], -1, -1)
    ranks = mean_rank(torch.cat([distances, centre]).flatten(1)).reshape(3, -1, h, w)
    nearest, to_mean, centre = ranks.unbind(0)
    return torch.add(nearest, to_mean - centre, alpha=0.4)


torch.fx.wrap("border_scores")


def border_distances(described: Tensor) -> Tuple[Tensor, Tensor]:
    """Distances of patches (B, D, h, w) to the border, each (B, h, w).

    Returns:
        The mean distance to the four nearest border patches, and the distance to their mean. A
        border patch is its own nearest one.
    """
    h, w = described.shape[2], described.shape[3]
    rows, sides = described[:, :, :: max(h - 1, 1)], described[:, :, 1:-1, :: max(w - 1, 1)]
    border = torch.cat([rows.flatten(2), sides.flatten(2)], dim=2)  # (B, D, R)
    described = described.flatten(2)
    patches = described.transpose(1, 2)
    squares = patches.square().sum(2, keepdim=True) + border.square().sum(1, keepdim=True)
    squares = torch.baddbmm(squares, patches, border, alpha=-2.0).clamp(min=0.0)  # (B, N, R)
    nearest = squares.topk(min(NEIGHBOURS, border.shape[2]), dim=2, largest=False)[0]
    to_mean = torch.linalg.vector_norm(described - border.mean(2, keepdim=True), dim=1)
    return nearest.sqrt().mean(2).reshape(-1, h, w), to_mean.reshape(-1, h, w)


def _smoothed(scores: Tensor) -> Tensor:
    """scores (B, h, w) -> (B, h, w), averaged over 3 x 3 patches where the grid is fine.

    Up to 8 x 8 patches a neighbour is often another object and nothing is averaged; from 14 x 14 on
    the mean counts alone.
    """
    weight = (min(scores.shape[1], scores.shape[2]) - 8) / 6.0
    if weight <= 0.0:
        return scores
    around = F.avg_pool2d(scores, 3, stride=1, padding=1, count_include_pad=False)
    return torch.lerp(scores, around, min(weight, 1.0))
