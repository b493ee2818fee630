"""The class token's attention in one block of a timm ViT, from q and k alone."""

from typing import Any, List, Optional, Sequence, Tuple

import torch
from timm.layers import apply_rot_embed_cat
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

_PRE_NORM = ("Block", "EvaBlock")
_POST_NORM = ("ResPostBlock", "EvaBlockPostNorm")
_PARALLEL = ("ParallelScalingBlock",)  # one projection makes q, k, v and the MLP's input
_ATTENTIONS = ("Attention", "AttentionRope", "EvaAttention")


class ClassTokenAttention(nn.Module):
    """Stands at the place of a block: what the class token attends to there.

    It holds copies of the block's norm and of its projections of q and k, nothing else.

    Args:
        block: a block of a timm ViT or Eva.
        num_prefix_tokens: P, the class token first.
        heads: the heads to average, from 0; empty for all.
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
        """Tokens (B, P + N, D) -> (B, N) float32: the class token's row, of the patches.

        Args:
            x: tokens as the block gets them.
            rope: rotary embedding of the patches, as timm hands it to a block.
            attn_mask: part of a block's interface; nobody masks here.
            is_causal: likewise.
        """
        x = self.norm(x)
        batch, length = x.shape[0], x.shape[1]
        q = self.q(x[:, :1]).reshape(batch, 1, self.num_heads, -1).transpose(1, 2)
        k = self.k(x).reshape(batch, length, self.num_kv_heads, -1).transpose(1, 2)
        q, k = self.q_norm(q), self.k_norm(k)
        p = self.num_prefix_tokens
        if rope is not None:  # prefix tokens have no place: the class token's q stays as it is
            patches = apply_rot_embed_cat(k[:, :, p:], rope, half=self.rotate_half)
            k = torch.cat([k[:, :, :p], patches.to(k.dtype)], dim=2)
        if self.num_kv_heads != self.num_heads:
            k = k.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1)
        logits = (q * self.scale) @ k.transpose(2, 3)  # (B, H, 1, P + N)
        attention = logits.softmax(dim=3, dtype=torch.float32)[:, :, 0, p:]
        if len(self.heads) > 0:
            attention = torch.stack([attention[:, head] for head in self.heads], dim=1)
        return attention.mean(dim=1)


def check_class_token(backbone: Any) -> None:
    """Check that the class token's attention of a model is known.

    Raises:
        TypeError: it is not; the message says why.
    """
    kind = type(backbone).__name__
    reason = ""
    if not isinstance(backbone, (VisionTransformer, Eva)):
        reason = "it is no VisionTransformer or Eva of timm"
        if getattr(backbone, "cls_token", None) is None:
            reason += ", and it has no class token"
    elif backbone.cls_token is None:
        pool = backbone.global_pool
        reason = f"it has no class token (it pools its patches, global_pool={pool!r})"
    else:
        block = backbone.blocks[-1]
        known = type(block).__name__ in (*_PRE_NORM, *_POST_NORM, *_PARALLEL)
        attn = getattr(block, "attn", None)
        if not known or (attn is not None and type(attn).__name__ not in _ATTENTIONS):
            what = type(block if attn is None else attn).__name__
            reason = f"the attention of its {what} is not a single softmax over all tokens"
    if reason:
        raise TypeError(f"cannot rank by the class token of {kind}: {reason}.")


def _query_and_key(attn: Any) -> Tuple[nn.Linear, nn.Linear]:
    """The projections to q and k of an attention, whatever form timm gave them; copies."""
    if getattr(attn, "q_proj", None) is not None:
        q, k = attn.q_proj, attn.k_proj
        return _linear(q.weight, q.bias), _linear(k.weight, k.bias)
    if hasattr(attn, "in_proj"):
        joint, sizes = attn.in_proj, attn.in_split
    else:
        joint, sizes = attn.qkv, [0, *[attn.qkv.weight.shape[0] // 3] * 3]
    _, q_weight, k_weight, _ = joint.weight.split(sizes)
    _, q_bias, k_bias, _ = (None,) * 4 if joint.bias is None else joint.bias.split(sizes)
    if getattr(attn, "q_bias", None) is not None:  # Eva: k has none
        q_bias = attn.q_bias
    return _linear(q_weight, q_bias), _linear(k_weight, k_bias)


def _linear(weight: Tensor, bias: Optional[Tensor]) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer
