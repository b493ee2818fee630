"""The ranker that finds patches whose features are unlike those of the border of the image."""

from typing import Any, Sequence, Tuple, Union

import torch.nn.functional as F
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ltrp_timm.rankers.on_model import SizedRanker, is_integer


class FeatureContrastRanker(SizedRanker):
    """1 - cosine of a patch's token to the mean token of the border, after some blocks of a ViT.

    Early blocks at a small image size are enough: what follows the chosen block is not stored.
    Other image sizes, and the maps, are resized.

    Args:
        backbone: see ``ModelRanker``; a ``VisionTransformer`` or ``Eva``.
        blocks: how many blocks to run, at least 1.
        img_size: its image size, (H, W) or one side; a multiple of the patch size.
        **kwargs: further arguments of ``ModelRanker``.

    Raises:
        TypeError: The backbone is of another class.
        ValueError: An argument is out of range.

    >>> ranker = FeatureContrastRanker("vit_tiny_patch16_224", blocks=2, img_size=64)
    >>> ranker(torch.zeros(1, 3, 64, 64)).shape
    torch.Size([1, 4, 4])
    """

    name = "feature_contrast"
    own_args = (*SizedRanker.own_args, "blocks")

    def __init__(
        self,
        backbone: Union[str, nn.Module] = "vit_small_patch14_dinov2.lvd142m",
        blocks: int = 4,
        img_size: Union[int, Sequence[int], None] = 112,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, img_size=img_size, **kwargs)
        depth = len(self.backbone.blocks)
        if not is_integer(blocks) or not 1 <= blocks <= depth:
            raise ValueError(f"blocks must lie in 1 … {depth}, got {blocks!r}.")
        self.blocks = blocks
        self.backbone.blocks = self.backbone.blocks[:blocks]
        self.end_before_head()
        self.grid: Tuple[int, int] = tuple(self.backbone.patch_embed.grid_size)

    def check(self, net: Any) -> None:
        """Raise TypeError if the model is of another class."""
        if not isinstance(net, (VisionTransformer, Eva)):
            kind = type(net).__name__
            raise TypeError(
                f"feature_contrast takes a VisionTransformer or Eva of timm, got {kind}."
            )

    def forward(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) of ``img_size`` -> score map (B, h, w) float32, in [0, 2]."""
        h, w = self.grid
        tokens = self.backbone.forward_features(images)[:, -h * w :].float()
        tokens = F.layer_norm(tokens, [tokens.shape[-1]])
        grid = tokens.reshape(-1, h, w, tokens.shape[-1])
        inside = grid[:, 1:-1, 1:-1].sum([1, 2])
        border = tokens.sum(1) - inside  # the cosine does not depend on its length
        return 1.0 - F.cosine_similarity(tokens, border.unsqueeze(1), dim=2).reshape(-1, h, w)
