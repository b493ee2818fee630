"""Rankers by clusters: patches that stand for many, far from others that do, come first."""

from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn

from ltrp_timm.layers.sizes import grid_of, to_img_size, to_pair
from ltrp_timm.rankers.base import PatchSizeRanker
from ltrp_timm.selection import density_peaks, patch_pixels


class DpcKnnRanker(PatchSizeRanker, nn.Module):
    """The centres of density-peak clusters of the patches' pixels: no weights, no labels.

    The K best patches are the K centres of ``dpc_knn`` with K clusters, whatever K is. It keeps one
    of each kind, so it covers an image; it does not look for objects.
    Cost: the distances of all pairs of patches.

    Args:
        patch_size: side of a patch in pixels, or (height, width).
        neighbours: that make the density, the patch itself included.
        side: average each patch to so many pixels a side first; 0 takes all of them.
        img_size: the size it looks at, (H, W) or one side, whatever the backbone's is; None takes
            images as they come.

    Raises:
        ValueError: an argument is out of its range.

    Source: Du, Ding, Jia (2016), density peaks clustering based on k nearest neighbours.

    >>> DpcKnnRanker(patch_size=8)(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 4, 4])
    """

    def __init__(
        self,
        patch_size: Union[int, Sequence[int]] = 16,
        neighbours: int = 5,
        side: int = 0,
        img_size: Union[int, Sequence[int], None] = None,
    ) -> None:
        super().__init__()
        if neighbours < 1 or side < 0:
            raise ValueError(
                f"neighbours must be at least 1 and side at least 0, got {neighbours} and {side}."
            )
        self.patch_size = to_pair(patch_size)
        self.neighbours, self.side = neighbours, side
        self.img_size: Optional[Tuple[int, int]] = to_img_size(img_size, self.patch_size)
        self.mean: Optional[List[float]] = [0.0]
        self.std: Optional[List[float]] = [1.0]

    def config(self) -> Dict[str, Any]:
        """Arguments of ``create_ranker`` that rebuild this ranker."""
        return {**self.sizes(), "neighbours": self.neighbours, "side": self.side}

    def forward(self, images: Tensor) -> Tensor:
        """images (B, C, H, W), pixels in [0, 1] -> score map (B, h, w) float32."""
        return cluster_scores(images, self.patch_size, self.neighbours, self.side)

    def extra_repr(self) -> str:
        """Arguments for ``print(module)``."""
        return f"patch_size={self.patch_size}, neighbours={self.neighbours}, side={self.side}"


def cluster_scores(
    images: Tensor, patch_size: Tuple[int, int], neighbours: int, side: int
) -> Tensor:
    """images (B, C, H, W) -> (B, h, w) float32: how well each patch stands for a cluster."""
    h, w = grid_of(images, patch_size)
    rows, cols = h * patch_size[0], w * patch_size[1]
    tokens = patch_pixels(images[:, :, :rows, :cols], (h, w), side)
    return density_peaks(tokens, neighbours).reshape(-1, h, w)


torch.fx.wrap("cluster_scores")
