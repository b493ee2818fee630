"""FLOPs of a ViT as a function of how many tokens each block sees.

Counted are matrix products, two FLOPs per multiply-add, as ``torch.utils.flop_counter`` counts them
(softmax, norms and activations are not). One block of width D on L tokens before its attention and
M before its MLP of hidden width H takes

    2 L D 3D  (q, k, v)  +  2 · 2 L² D  (scores, values)  +  2 L D D  (projection)  +  2 · 2 M D H
"""

from collections.abc import Sequence
from typing import Any

Tokens = Sequence[tuple[int, int]]


def block_flops(width: int, hidden: int, attention: int, mlp: int) -> int:
    """One block: ``attention`` tokens reach its attention, ``mlp`` its MLP."""
    return 8 * attention * width**2 + 4 * attention**2 * width + 4 * mlp * width * hidden


def vit_flops(model: Any, tokens: Tokens) -> int:
    """A timm ViT on one image: all patches embedded, (attention, MLP) tokens for each block, head.

    Raises:
        ValueError: `tokens` does not have one pair for each block.
    """
    if len(tokens) != len(model.blocks):
        raise ValueError(f"{len(model.blocks)} blocks need one pair each, got {len(tokens)}.")
    width, hidden = model.embed_dim, model.blocks[0].mlp.fc1.out_features
    pixels = model.patch_embed.proj.weight[0].numel()
    embed = 2 * model.patch_embed.num_patches * pixels * width
    head = 2 * width * model.num_classes
    return embed + head + sum(block_flops(width, hidden, *pair) for pair in tokens)


def plain_tokens(model: Any, kept: int) -> list[tuple[int, int]]:
    """The tokens of each block when ``kept`` patches enter the first one and none leaves."""
    length = model.num_prefix_tokens + kept
    return [(length, length)] * len(model.blocks)
