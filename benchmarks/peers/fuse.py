"""Keep the patches that the class token attends to, fuse the others into one token.

Source: Liang et al., "Not All Patches are What You Need: Expediting Vision Transformers via Token
Reorganizations", ICLR 2022, arXiv 2202.07800, section 3: at the 4th, 7th and 10th of 12 blocks,
between attention and MLP, the class token's attention (mean over heads) keeps a share of the
tokens; the rest becomes one token, their sum weighted by that attention.
"""

from typing import Any

import torch
from torch import Tensor, nn

from peers.attention import check_plain, mix, split_heads


def fusing_blocks(depth: int) -> tuple[int, ...]:
    """The blocks that reorganise tokens, counted from 0: 3, 6 and 9 of 12."""
    return tuple(i for i in range(depth) if i in (depth // 4, depth // 2, 3 * depth // 4) and i > 0)


def num_attentive(others: int, keep_ratio: float) -> int:
    """How many of the tokens behind the class token stay: rounded up."""
    return max(1, -int(-others * keep_ratio // 1))


def fuse_tokens(length: int, keep_ratio: float, depth: int) -> list[tuple[int, int]]:
    """Tokens before attention and before MLP of each block, class and fused tokens included."""
    tokens = []
    for i in range(depth):
        after = length
        if i in fusing_blocks(depth):
            kept = num_attentive(length - 1, keep_ratio)
            after = 1 + kept + (1 if kept < length - 1 else 0)
        tokens.append((length, after))
        length = after
    return tokens


class FusingBlocks(nn.Module):
    """Stands at a ViT's ``blocks``: runs them, and reorganises tokens in three of them.

    Args:
        blocks: timm's blocks.
        keep_ratio: share of the tokens that each of the three keeps, in (0, 1].
    """

    def __init__(self, blocks: Any, keep_ratio: float) -> None:
        super().__init__()
        self.blocks, self.keep_ratio = blocks, keep_ratio
        self.where = fusing_blocks(len(blocks))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, L, D) -> the tokens left (B, L', D)."""
        for i, block in enumerate(self.blocks):
            q, k, v = split_heads(block.attn, block.norm1(x))
            x = x + block.ls1(mix(block.attn, q, k, v))
            kept = num_attentive(x.shape[1] - 1, self.keep_ratio)
            if i in self.where and kept < x.shape[1] - 1:
                scores = (q[:, :, :1] * block.attn.scale) @ k.transpose(-2, -1)
                x = reorganise(x, scores.softmax(dim=-1).mean(dim=1)[:, 0, 1:], kept)
            x = x + block.ls2(block.mlp(block.norm2(x)))
        return x


def reorganise(x: Tensor, attention: Tensor, kept: int) -> Tensor:
    """Tokens (B, 1 + n, D), the class token's attention (B, n) -> (B, 1 + kept + 1, D)."""
    order = attention.argsort(dim=1, descending=True)
    images = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    patches = x[:, 1:]
    rest = order[:, kept:]
    fused = attention.gather(1, rest).unsqueeze(1) @ patches[images, rest]
    return torch.cat([x[:, :1], patches[images, order[:, :kept]], fused], dim=1)


def fuse_inattentive(model: Any, keep_ratio: float) -> Any:
    """Have a timm ViT keep and fuse tokens; in place, returns the model.

    Raises:
        TypeError: the model is no plain ViT with one class token.
        ValueError: keep_ratio is not in (0, 1].
    """
    check_plain(model)
    if not 0.0 < keep_ratio <= 1.0:
        raise ValueError(f"keep_ratio must be in (0, 1], got {keep_ratio}.")
    model.blocks = FusingBlocks(model.blocks, keep_ratio)
    return model
