"""Rankers by clusters: patches that represent many, far from other such patches, come first."""

from typing import Sequence, Tuple, Union

import torch
from torch import Tensor

from ltrp_timm.rankers.base import PatchSizeRanker
from ltrp_timm.rankers.contrast import grid_of
from ltrp_timm.selection.coverage import density_peaks, patch_pixels


class DpcKnnRanker(PatchSizeRanker):
    """The centres of density-peak clusters of the patches' pixels: no weights, no labels.

    For any K, the K best patches are the centres of ``dpc_knn`` with K clusters. It keeps one patch
    of each kind and so covers an image; it does not look for objects.
    Cost: the distances of all pairs of patches.

    Args:
        patch_size: side of a patch in pixels, or (height, width).
        neighbours: number of neighbours for the density, the patch itself included.
        side: average each patch to side x side pixels first; 0 keeps its pixels.
        img_size: its image size, (H, W) or one side; None accepts any size.

    Raises:
        ValueError: An argument is out of range.

    Source: Du, Ding, Jia (2016), density peaks clustering based on k nearest neighbours.

    >>> DpcKnnRanker(patch_size=8)(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 4, 4])
    """

    own_args = ("patch_size", "img_size", "neighbours", "side")

    def __init__(
        self,
        patch_size: Union[int, Sequence[int]] = 16,
        neighbours: int = 5,
        side: int = 0,
        img_size: Union[int, Sequence[int], None] = None,
    ) -> None:
        super().__init__(patch_size, img_size)
        if neighbours < 1 or side < 0:
            raise ValueError(
                f"neighbours must be at least 1 and side at least 0, got {neighbours} and {side}."
            )
        self.neighbours, self.side = neighbours, side

    def forward(self, images: Tensor) -> Tensor:
        """images (B, C, H, W), pixels in [0, 1] -> score map (B, h, w) float32."""
        return cluster_scores(images, self.patch_size, self.neighbours, self.side)


def cluster_scores(
    images: Tensor, patch_size: Tuple[int, int], neighbours: int, side: int
) -> Tensor:
    """images (B, C, H, W) -> (B, h, w) float32: how well each patch represents a cluster."""
    h, w = grid_of(images, patch_size)
    rows, cols = h * patch_size[0], w * patch_size[1]
    tokens = patch_pixels(images[:, :, :rows, :cols], (h, w), side)
    return density_peaks(tokens, neighbours).reshape(-1, h, w)


torch.fx.wrap("cluster_scores")
