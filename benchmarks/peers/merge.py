"""Token merging by bipartite soft matching, in each block between attention and MLP.

Source: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, arXiv 2210.09461, section 3.
Tokens are split in turns into two sets A and B; each of A has one edge, to its most similar token
of B by the cosine of their keys (mean over heads); the r most similar edges are merged, as an
average weighted by how many patches each token stands for. Proportional attention adds the
logarithm of that number to a key's scores. The class token is never merged away.
"""

from typing import Any

import torch
from torch import Tensor, nn

from peers.attention import check_plain, mix, split_heads

ATTENTION = ("proportional", "proportional_fused", "plain_fused")


def merge_schedule(length: int, r: int, depth: int) -> list[tuple[int, int]]:
    """Tokens before attention and before MLP of each block, class token included.

    At most half of the patches can go in one block: each of A has one partner, the class token
    none.
    """
    tokens = []
    for _ in range(depth):
        after = length - min(r, (length - 1) // 2)
        tokens.append((length, after))
        length = after
    return tokens


def match_flops(model: Any, r: int) -> int:
    """FLOPs of finding the partners: A times Bᵀ, keys of one head's width."""
    length = 1 + model.patch_embed.num_patches
    width = model.blocks[0].attn.head_dim
    pairs = merge_schedule(length, r, len(model.blocks))
    return sum(2 * ((a + 1) // 2) * (a // 2) * width for a, b in pairs if b < a)


def merge_tokens(x: Tensor, size: Tensor, metric: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Merge the r most similar pairs.

    Args:
        x: tokens (B, L, D), the class token first.
        size: (B, L, 1), patches that each stands for.
        metric: (B, L, d), what similarity is taken of.
        r: number of merges, at most (L - 1) // 2.

    Returns:
        Tokens (B, L - r, D), the class token first, and their sizes.
    """
    metric = metric / metric.norm(dim=-1, keepdim=True)
    similar = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)
    similar[:, 0] = -torch.inf  # the class token stays
    best, partner = similar.max(dim=-1)
    order = best.argsort(dim=-1, descending=True)
    gone, stay = order[:, :r], order[:, r:].sort(dim=-1).values
    batch, _, width = x.shape
    images = torch.arange(batch, device=x.device).unsqueeze(1)
    weighted = torch.cat([x * size, size], dim=-1)  # sums of tokens and of sizes in one pass
    a, b = weighted[:, ::2], weighted[:, 1::2].contiguous()
    rows = images * b.shape[1] + partner.gather(1, gone)
    b.view(-1, width + 1).index_add_(0, rows.flatten(), a[images, gone].flatten(0, 1))
    merged = torch.cat([a[images, stay], b], dim=1)
    size = merged[..., -1:]
    return merged[..., :-1] / size, size


class MergingBlocks(nn.Module):
    """Stands at a ViT's ``blocks``: runs them, r tokens fewer after each attention.

    Args:
        blocks: timm's blocks.
        r: merges per block.
        attention: "proportional" as published, "proportional_fused" the same through
            ``scaled_dot_product_attention``, "plain_fused" without sizes.
    """

    def __init__(self, blocks: Any, r: int, attention: str) -> None:
        super().__init__()
        if attention not in ATTENTION:
            raise ValueError(f"attention must be one of {', '.join(ATTENTION)}, got {attention!r}.")
        self.blocks, self.r, self.attention = blocks, r, attention
        self.fused = attention.endswith("fused")

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, L, D) -> the tokens left (B, L', D)."""
        size, merged = torch.ones_like(x[..., :1]), False
        for block in self.blocks:
            q, k, v = split_heads(block.attn, block.norm1(x))
            bias = None
            if merged and self.attention != "plain_fused":  # log 1 = 0 before the first merge
                bias = size.log().transpose(1, 2).unsqueeze(1)
            x = x + block.ls1(mix(block.attn, q, k, v, bias, self.fused))
            r = min(self.r, (x.shape[1] - 1) // 2)
            if r > 0:
                x, size = merge_tokens(x, size, k.mean(dim=1), r)
                merged = True
            x = x + block.ls2(block.mlp(block.norm2(x)))
        return x


def merge_similar(model: Any, r: int, attention: str = "proportional") -> Any:
    """Have a timm ViT merge r tokens in each block; in place, returns the model.

    Raises:
        TypeError: the model is no plain ViT with one class token.
        ValueError: an attention of another name.
    """
    check_plain(model)
    model.blocks = MergingBlocks(model.blocks, r, attention)
    return model
