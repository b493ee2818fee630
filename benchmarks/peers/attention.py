"""What the peers need of a block's attention and timm's does not give: keys and chosen softmax."""

from typing import Any, Optional

import torch.nn.functional as F
from torch import Tensor


def check_plain(model: Any) -> None:
    """Raise TypeError where these algorithms would silently leave something out."""
    attn = model.blocks[0].attn
    extras = ("q_norm", "k_norm", "norm")
    known = all(type(getattr(attn, name)).__name__ == "Identity" for name in extras)
    if not known or attn.gate is not None or model.num_prefix_tokens != 1:
        kind = type(model).__name__
        raise TypeError(f"peers are for plain ViTs with one class token, got a {kind} with more.")


def split_heads(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (B, L, D) -> queries, keys, values (B, heads, L, D / heads)."""
    batch, length, _ = x.shape
    qkv = attn.qkv(x).view(batch, length, 3, attn.num_heads, attn.head_dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def mix(
    attn: Any, q: Tensor, k: Tensor, v: Tensor, bias: Optional[Tensor] = None, fused: bool = True
) -> Tensor:
    """softmax(q kᵀ / √d + bias) v, heads joined and projected: (B, L, D).

    Args:
        attn: the block's attention.
        q: (B, heads, L, d).
        k: the same shape as q.
        v: the same shape as q.
        bias: (B, 1, 1, L) onto the scores of each key.
        fused: by ``scaled_dot_product_attention``; else by matrix products and a softmax.
    """
    if fused:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    else:
        scores = (q * attn.scale) @ k.transpose(-2, -1)
        out = (scores if bias is None else scores + bias).softmax(dim=-1) @ v
    projected: Tensor = attn.proj(out.transpose(1, 2).flatten(2))
    return projected
