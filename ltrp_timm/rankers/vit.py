"""The paper's ranker: a plain ViT with one logit per patch position from its class token."""

from functools import partial
from typing import Any, Optional, Sequence, Union

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import LayerNorm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ltrp_timm.layers.bridge import sincos_pos_embed, to_pair
from ltrp_timm.rankers.base import Ranker
from ltrp_timm.slots.base import TokenSlot, run_with_slots


class VitRanker(Ranker, VisionTransformer):
    """The published ranker: class token -> Linear(D, N), fixed position table, LayerNorm eps 1e-5.

    Its state dict has the plain names of the published checkpoints (``blocks.0.attn.qkv.weight``,
    ``head.weight``). Its grid is fixed: for other image sizes, the image and the map are resized.

    Args:
        img_size: its only image size.
        patch_size: side of a patch in pixels.
        embed_dim: D.
        depth: number of blocks.
        num_heads: attention heads.
        in_chans: channels of an image.
        mean: normalisation of its images, for pixels in [0, 1].
        std: see ``mean``.

    Source: LTRP (CVPR 2024, arXiv 2404.00680), section on the ranking model.
    """

    name = "vit_small"  # the registered sizes are this class with other numbers
    own_args = (
        *("patch_size", "img_size", "embed_dim", "depth", "num_heads"),
        *("in_chans", "mean", "std"),
    )
    learned = True
    follows_patch_size = False

    def __init__(
        self,
        img_size: Union[int, Sequence[int]] = 224,
        patch_size: Union[int, Sequence[int]] = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        in_chans: int = 3,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        size, patch = to_pair(img_size), to_pair(patch_size)
        grid = (size[0] // patch[0], size[1] // patch[1])
        super().__init__(
            img_size=size,
            patch_size=patch,
            in_chans=in_chans,
            num_classes=grid[0] * grid[1],
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            norm_layer=partial(LayerNorm, eps=1e-5),
            device=device,
            dtype=dtype,
        )
        with torch.no_grad():
            self.pos_embed.copy_(sincos_pos_embed(embed_dim, grid))
        self.pos_embed.requires_grad_(False)
        self.patch_drop = TokenSlot(self.num_prefix_tokens)
        self.img_size, self.patch_size = size, patch
        self.mean, self.std = list(mean), list(std)
        self.depth, self.num_heads = depth, num_heads

    def forward(self, x: Tensor, visible_indices: Optional[Tensor] = None) -> Tensor:
        """images (B, C, H, W) -> score map (B, h, w).

        Args:
            x: images of ``img_size``.
            visible_indices: (B, V) int64, ascending; if given, only these patches are encoded, and
                only their scores are meaningful (the published "asymmetric" training).
        """
        h, w = self.patch_embed.grid_size
        if torch.jit.is_scripting():
            self.patch_drop.keep_indices = visible_indices
            tokens = self.forward_features(x)
        else:
            tokens = self._visible_features(x, visible_indices)
        return self.forward_head(tokens).reshape(-1, h, w)

    @torch.jit.unused
    def _visible_features(self, x: Tensor, visible_indices: Optional[Tensor]) -> Tensor:
        return run_with_slots([self.patch_drop], visible_indices, self.forward_features, x)
