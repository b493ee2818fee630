"""Fixed position embeddings."""

from typing import Tuple

import torch
from torch import Tensor


def sincos_pos_embed(
    embed_dim: int, grid_size: Tuple[int, int], num_prefix_tokens: int = 1
) -> Tensor:
    """The fixed sine-cosine position table of MAE, (1, P + N, D) float32.

    The first half of D encodes the column, the second the row; the P rows in front are zeros.
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
