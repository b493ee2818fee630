"""A ranker that looks at nothing: the baseline every other one has to beat."""

from typing import Any, Dict, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn

from ltrp_timm.layers.sizes import grid_of, to_pair
from ltrp_timm.rankers.base import PatchSizeRanker
from ltrp_timm.selection import seeded_scores


class RandomRanker(PatchSizeRanker, nn.Module):
    """Uniform scores, a function of (seed, N): the same for every image and at every call.

    Args:
        patch_size: side of a patch in pixels, or (height, width).
        seed: chooses the map.
        generator: when set (also later, as an attribute), every call draws fresh scores per image
            from it; eager only.
    """

    name = "random"

    def __init__(
        self,
        patch_size: Union[int, Sequence[int]] = 16,
        seed: int = 0,
        generator: Optional[torch.Generator] = None,
    ) -> None:
        super().__init__()
        self.patch_size = to_pair(patch_size)
        self.seed = int(seed)
        self.generator = generator

    def config(self) -> Dict[str, Any]:
        """Arguments that rebuild this ranker; a generator's state is not kept."""
        return {"patch_size": list(self.patch_size), "seed": self.seed}

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
    """images (B, C, H, W), read for their shape and device only -> (B, h, w)."""
    h, w = grid_of(images, patch_size)
    return seeded_scores(images.shape[0], h * w, seed, images.device).reshape(images.shape[0], h, w)


torch.fx.wrap("random_map")
