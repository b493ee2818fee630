"""A ranker that ignores the image: the baseline for every other one."""

from typing import Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from ltrp_timm.rankers.base import PatchSizeRanker
from ltrp_timm.rankers.contrast import grid_of
from ltrp_timm.selection.rules import seeded_scores


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
