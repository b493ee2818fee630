"""Rankers to compare with: a random order, and the patches that represent many others."""

from typing import Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from ltrp_timm.rankers.base import PatchSizeRanker
from ltrp_timm.rankers.contrast import grid_of
from ltrp_timm.selection.coverage import density_peaks, patch_pixels
from ltrp_timm.selection.rules import seeded_scores


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


class RandomRanker(PatchSizeRanker):
    """Uniform scores, a function of (seed, N): the same for every image and every call.

    Args:
        patch_size: side of a patch in pixels, or (height, width).
        seed: chooses the map.
        generator: if set (also later, as an attribute), every call draws fresh scores per image
            from it; eager only.
    """

    name = "random"
    own_args = ("patch_size", "seed")  # a generator cannot be saved

    def __init__(
        self,
        patch_size: Union[int, Sequence[int]] = 16,
        seed: int = 0,
        generator: Optional[torch.Generator] = None,
    ) -> None:
        super().__init__(patch_size)
        self.mean = self.std = None  # images need no normalisation
        self.seed = int(seed)
        self.generator = generator

    def forward(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) -> score map (B, h, w) float32 in [0, 1)."""
        if not torch.jit.is_scripting():
            if self.generator is not None:
                h, w = grid_of(images, self.patch_size)
                draw = torch.rand(
                    images.shape[0], h, w, generator=self.generator, device=self.generator.device
                )
                return draw.to(images.device)
        return random_map(images, self.patch_size, self.seed)


def random_map(images: Tensor, patch_size: Tuple[int, int], seed: int) -> Tensor:
    """images (B, C, H, W), of which only shape and device are used -> (B, h, w)."""
    h, w = grid_of(images, patch_size)
    return seeded_scores(images.shape[0], h * w, seed, images.device).reshape(images.shape[0], h, w)


torch.fx.wrap("random_map")
