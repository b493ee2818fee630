"""Weight-free rankers of one statistic each, in units that compare between images."""

from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltrp_timm.layers.sizes import grid_of, to_img_size, to_pair
from ltrp_timm.rankers.base import PatchSizeRanker
from ltrp_timm.rankers.contrast import border_contrast, centre_distance, patch_statistics

STATISTICS = ("pixel_std", "gradient", "colour", "centre")


class StatisticRanker(PatchSizeRanker, nn.Module):
    """One statistic of each patch: no weights, no training, no labels.

    Unlike the ranks of ``contrast``, its scores compare between images, so that an adaptive budget
    can tell a busy image from an empty one. Pixels are in [0, 1].

    Args:
        statistic: "pixel_std", the standard deviation of the pixels within a channel; "gradient",
            the mean length of the step to the next pixel, right and below; "colour", the distance
            of the mean colour from that of the outermost patches; "centre", minus the squared
            distance from the middle of the grid, in half grids.
        patch_size: side of a patch in pixels, or (height, width).
        img_size: the size it looks at, (H, W) or one side, whatever the backbone's is; None takes
            images as they come.

    Raises:
        ValueError: no such statistic, or an ``img_size`` smaller than a patch.

    >>> StatisticRanker("gradient", patch_size=8)(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 4, 4])
    """

    def __init__(
        self,
        statistic: str,
        patch_size: Union[int, Sequence[int]] = 16,
        img_size: Union[int, Sequence[int], None] = None,
    ) -> None:
        super().__init__()
        if statistic not in STATISTICS:
            known = ", ".join(STATISTICS)
            raise ValueError(f"statistic must be one of {known}, got {statistic!r}.")
        self.statistic = statistic
        self.patch_size = to_pair(patch_size)
        self.img_size: Optional[Tuple[int, int]] = to_img_size(img_size, self.patch_size)
        self.mean: Optional[List[float]] = [0.0]
        self.std: Optional[List[float]] = [1.0]

    def config(self) -> Dict[str, Any]:
        """Arguments of ``create_ranker`` that rebuild this ranker; its name says the statistic."""
        return self.sizes()

    def forward(self, images: Tensor) -> Tensor:
        """images (B, C, H, W), pixels in [0, 1] -> score map (B, h, w) float32."""
        return statistic_scores(images, self.patch_size, self.statistic)

    def extra_repr(self) -> str:
        """Arguments for ``print(module)``."""
        return f"statistic={self.statistic!r}, patch_size={self.patch_size}"


def statistic_scores(images: Tensor, patch_size: Tuple[int, int], statistic: str) -> Tensor:
    """images (B, C, H, W) -> (B, h, w) float32: that statistic of each patch."""
    h, w = grid_of(images, patch_size)
    if statistic == "centre":
        return -centre_distance(h, w, images.device).expand(images.shape[0], -1, -1)
    if statistic == "gradient":
        return gradient_length(images, patch_size, h, w)
    mean, variance = patch_statistics(images, patch_size, h, w)
    if statistic == "colour":
        return border_contrast(mean)
    return variance.mean(1).sqrt()


torch.fx.wrap("statistic_scores")


def gradient_length(images: Tensor, patch_size: Tuple[int, int], h: int, w: int) -> Tensor:
    """images (B, C, H, W) -> (B, h, w): mean length over C of the step to the next pixels."""
    rows, cols = patch_size
    pixels = F.pad(images[:, :, : h * rows, : w * cols].float(), [0, 1, 0, 1], mode="replicate")
    inner = pixels[:, :, :-1, :-1]
    squares = (pixels[:, :, :-1, 1:] - inner).square() + (pixels[:, :, 1:, :-1] - inner).square()
    length = squares.sum(1).sqrt()
    return length.reshape(-1, h, rows, w, cols).mean(4).mean(2)
