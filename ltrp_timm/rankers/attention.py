"""Rankers by the tokens of a ViT: its class token's attention, their contrast to the border."""

from typing import Any, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ltrp_timm.rankers.base import SizedRanker, is_integer

_PRE_NORM = ("Block", "EvaBlock")
_POST_NORM = ("ResPostBlock", "EvaBlockPostNorm")
_PARALLEL = ("ParallelScalingBlock",)  # one projection makes q, k, v and the MLP's input
_ATTENTIONS = ("Attention", "AttentionRope", "EvaAttention")


class AttentionRanker(SizedRanker):
    """The class token's attention to the patches in one block of a ViT, averaged over heads.

    The blocks in front of the chosen one run unchanged. Of that block only the norm and the
    projections of q and k remain; nothing behind it is stored. It takes one image size: other
    images, and the maps, are resized.

    Args:
        backbone: see ``ModelRanker``; a ``VisionTransformer`` or ``Eva`` with a class token.
        block: which block, from 0, or from -1 backwards.
        heads: the heads to average, one or several, from 0 (default: all).
        **kwargs: further arguments of ``ModelRanker``.

    Source: Caron et al., Emerging Properties in Self-Supervised Vision Transformers (ICCV 2021).

    >>> AttentionRanker("vit_tiny_patch16_224", img_size=64)(torch.zeros(1, 3, 64, 64)).shape
    torch.Size([1, 4, 4])
    """

    name = "attention"
    own_args = (*SizedRanker.own_args, "block", "heads")

    def __init__(
        self,
        backbone: Union[str, nn.Module] = "vit_small_patch16_224.dino",
        block: int = -1,
        heads: Union[int, Sequence[int], None] = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone, **kwargs)
        depth = len(self.backbone.blocks)
        if not is_integer(block) or not -depth <= block < depth:
            raise ValueError(f"block must lie in {-depth} … {depth - 1}, got {block!r}.")
        self.block = block % depth
        self.heads = _head_indices(heads, self.backbone.blocks[self.block])
        blocks = self.backbone.blocks[: self.block + 1]
        end = ClassTokenAttention(blocks[-1], self.backbone.num_prefix_tokens, self.heads or ())
        blocks[-1] = end.train(self.backbone.training)
        self.backbone.blocks = blocks  # forward_features then returns the class token's attention
        self.end_before_head()

    def check(self, net: Any) -> None:
        """Raise TypeError, with the reason, if the class token's attention is not known."""
        kind = type(net).__name__
        reason = ""
        if not isinstance(net, (VisionTransformer, Eva)):
            reason = "it is no VisionTransformer or Eva of timm"
            if getattr(net, "cls_token", None) is None:
                reason += ", and it has no class token"
        elif net.cls_token is None:
            pool = net.global_pool
            reason = f"it has no class token (it pools its patches, global_pool={pool!r})"
        else:
            block = net.blocks[-1]
            known = type(block).__name__ in (*_PRE_NORM, *_POST_NORM, *_PARALLEL)
            attn = getattr(block, "attn", None)
            if not known or (attn is not None and type(attn).__name__ not in _ATTENTIONS):
                what = type(block if attn is None else attn).__name__
                reason = f"the attention of its {what} is not a single softmax over all tokens"
        if reason:
            raise TypeError(f"cannot rank by the class token of {kind}: {reason}.")

    def forward(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) of ``img_size`` -> score map (B, h, w) float32, its sum below 1."""
        h, w = self.backbone.patch_embed.grid_size
        return self.backbone.forward_features(images).reshape(-1, h, w)


def _head_indices(heads: Union[int, Sequence[int], None], block: Any) -> Optional[List[int]]:
    if heads is None:
        return None
    count = getattr(block, "attn", block).num_heads
    listed = list(heads) if isinstance(heads, Sequence) else [heads]
    inside = [is_integer(head) and 0 <= head < count for head in listed]
    if not listed or not all(inside) or len(set(listed)) < len(listed):
        raise ValueError(f"heads must be different ones of 0 … {count - 1}, got {heads!r}.")
    return listed


class ClassTokenAttention(nn.Module):
    """Replaces a block: the class token's attention in it.

    It holds copies of the block's norm and of its projections of q and k only, and averages the
    given heads; all if there are none.
    """

    heads: List[int]

    def __init__(self, block: Any, num_prefix_tokens: int, heads: Sequence[int] = ()) -> None:
        super().__init__()
        kind = type(block).__name__
        attn = block if kind in _PARALLEL else block.attn
        norm = block.in_norm if kind in _PARALLEL else block.norm1
        self.norm = nn.Identity() if kind in _POST_NORM else norm
        self.q, self.k = _query_and_key(attn)
        self.q_norm, self.k_norm = attn.q_norm, attn.k_norm
        self.num_prefix_tokens = num_prefix_tokens
        self.num_heads: int = attn.num_heads
        self.num_kv_heads: int = getattr(attn, "num_kv_heads", attn.num_heads)
        self.scale: float = attn.scale
        self.rotate_half = bool(getattr(attn, "rotate_half", False))
        self.heads = list(heads)

    def forward(
        self,
        x: Tensor,
        rope: Optional[Tensor] = None,
        attn_mask: Optional[Tensor] = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Tokens (B, P + N, D) -> (B, N) float32: the class token's attention to the patches.

        The arguments are those of timm's blocks; ``rope`` is the rotary embedding of the patches.
        """
        x = self.norm(x)
        batch, length = x.shape[0], x.shape[1]
        q, k = self.q(x[:, :1]), self.k(x)
        width = q.shape[2] // self.num_heads
        q = q.reshape(batch, 1, self.num_heads, width).transpose(1, 2)
        k = k.reshape(batch, length, self.num_kv_heads, width).transpose(1, 2)
        q, k = self.q_norm(q), self.k_norm(k)
        p = self.num_prefix_tokens
        if rope is not None:  # prefix tokens have no position: the class token's q stays unchanged
            patches = apply_rot_embed_cat(k[:, :, p:], rope, half=self.rotate_half)
            k = torch.cat([k[:, :, :p], patches.to(k.dtype)], dim=2)
        if self.num_kv_heads != self.num_heads:
            k = k.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1)
        logits = (q * self.scale) @ k.transpose(2, 3)  # (B, H, 1, P + N)
        attention = logits.softmax(dim=3, dtype=torch.float32)[:, :, 0, p:]
        if len(self.heads) > 0:
            attention = torch.stack([attention[:, head] for head in self.heads], dim=1)
        return attention.mean(dim=1)


def _query_and_key(attn: Any) -> Tuple[nn.Linear, nn.Linear]:
    """Copies of an attention's projections to q and k, in any of timm's forms."""
    if getattr(attn, "q_proj", None) is not None:
        q, k = attn.q_proj, attn.k_proj
        return _linear(q.weight, q.bias), _linear(k.weight, k.bias)
    if hasattr(attn, "in_proj"):
        joint, sizes = attn.in_proj, attn.in_split
    else:
        joint, sizes = attn.qkv, [0, *[attn.qkv.weight.shape[0] // 3] * 3]
    _, q_weight, k_weight, _ = joint.weight.split(sizes)
    _, q_bias, k_bias, _ = (None,) * 4 if joint.bias is None else joint.bias.split(sizes)
    if getattr(attn, "q_bias", None) is not None:  # of Eva: k has no bias
        q_bias = attn.q_bias
    return _linear(q_weight, q_bias), _linear(k_weight, k_bias)


def _linear(weight: Tensor, bias: Optional[Tensor]) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer


class FeatureContrastRanker(SizedRanker):
    """1 - cosine of a patch's token to the mean token of the border, after some blocks of a ViT.

    Early blocks at a small image size are enough: what follows the chosen block is not stored.
    Other image sizes, and the maps, are resized.

    Args:
        backbone: see ``ModelRanker``; a ``VisionTransformer`` or ``Eva``.
        blocks: how many blocks to run, at least 1.
        img_size: its image size, (H, W) or one side; a multiple of the patch size.
        **kwargs: further arguments of ``ModelRanker``.

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
