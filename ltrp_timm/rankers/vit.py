"""The paper's ranker: a plain ViT whose class token gives one logit per patch position."""

from functools import partial
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
from timm.layers import LayerNorm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from ltrp_timm.rankers.base import IMAGENET_MEAN, IMAGENET_STD, Ranker, to_pair
from ltrp_timm.slots import TokenSlot, run_with_slots


def sincos_pos_embed(
    embed_dim: int, grid_size: Tuple[int, int], num_prefix_tokens: int = 1
) -> Tensor:
    """The fixed sine-cosine position table of MAE.

    Args:
        embed_dim: D, a multiple of 4.
        grid_size: (h, w) in patches.
        num_prefix_tokens: rows of zeros in front.

    Returns:
        (1, P + N, D) float32; the first half of D codes the column, the second the row.

    Raises:
        ValueError: D is no multiple of 4.
    """
    if embed_dim % 4:
        raise ValueError(
            f"embed_dim must be a multiple of 4 for a sine-cosine table, got {embed_dim}."
        )
    omega = 1.0 / 10000.0 ** (torch.arange(embed_dim // 4, dtype=torch.float64) / (embed_dim / 4))
    rows = torch.arange(grid_size[0], dtype=torch.float64)
    cols = torch.arange(grid_size[1], dtype=torch.float64)
    angles = [
        place.flatten().unsqueeze(1) * omega
        for place in reversed(torch.meshgrid(rows, cols, indexing="ij"))  # column first
    ]
    table = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)
    return torch.cat([table.new_zeros(num_prefix_tokens, embed_dim), table]).float().unsqueeze(0)


class VitRanker(Ranker, VisionTransformer):
    """The published ranker: class token -> Linear(D, N), fixed position table, LayerNorm eps 1e-5.

    Its state dict has the plain names of the published checkpoints (``blocks.0.attn.qkv.weight``,
    ``head.weight``). Its grid is fixed: other image sizes are bridged by resizing the image and the
    map.

    Args:
        img_size: the one image size it takes.
        patch_size: side of a patch in pixels.
        embed_dim: D.
        depth: number of blocks.
        num_heads: attention heads.
        in_chans: channels of an image.
        mean: normalisation that the images come in, in units of pixels in [0, 1].
        std: likewise.

    Source: LTRP (CVPR 2024, arXiv 2404.00680), section on the ranking model.
    """

    name = "vit_small"  # the registered sizes are this class with other numbers
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
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
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
        table = sincos_pos_embed(embed_dim, grid)
        with torch.no_grad():
            self.pos_embed.copy_(table)
        self.pos_embed.requires_grad_(False)
        self.patch_drop = TokenSlot(self.num_prefix_tokens)
        self.img_size: Optional[Tuple[int, int]] = size
        self.patch_size = patch
        self.mean: Optional[List[float]] = list(mean)
        self.std: Optional[List[float]] = list(std)
        self.depth, self.num_heads = depth, num_heads

    def config(self) -> Dict[str, Any]:
        """Arguments that rebuild this ranker."""
        names = ("embed_dim", "depth", "num_heads", "in_chans", "mean", "std")
        return {**self.sizes(), **{name: getattr(self, name) for name in names}}

    def set_input_size(
        self,
        img_size: Optional[Tuple[int, int]] = None,
        patch_size: Optional[Tuple[int, int]] = None,
    ) -> None:
        """Do nothing: its head has one logit per position; images and maps are resized."""

    def forward(self, x: Tensor, visible_indices: Optional[Tensor] = None) -> Tensor:
        """images (B, C, H, W) -> score map (B, h, w).

        Args:
            x: images of ``img_size``.
            visible_indices: (B, V) int64, ascending; when given only these patches are encoded, and
                only their scores mean anything (the published "asymmetric" training).
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
        out: Tensor = run_with_slots([self.patch_drop], visible_indices, self.forward_features, x)
        return out
