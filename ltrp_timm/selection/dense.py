"""Dense features: tokens of kept patches go back to their places on the patch grid."""

from typing import List, Tuple

import torch
from torch import Tensor

from ltrp_timm.selection.rules import gather_patches


def check_fill(fill: str) -> str:
    """Return ``fill``, or raise ValueError if it is unknown."""
    if fill not in ("zeros", "nearest"):
        raise ValueError(f"fill must be one of zeros, nearest, got {fill!r}.")
    return fill


def scatter_patches(
    tokens: Tensor, keep_indices: Tensor, grid_size: Tuple[int, int], fill: str = "zeros"
) -> Tensor:
    """Put kept tokens back on the patch grid.

    Args:
        tokens: (B, K, D) tokens of the kept patches.
        keep_indices: (B, K), row-major positions on the grid.
        grid_size: (h, w) in patches, N = h * w.
        fill: what dropped places hold: "zeros", or "nearest" for the token of the nearest kept
            patch (Euclidean distance on the grid, ties to the lower index).

    Returns:
        (B, N, D).

    Raises:
        ValueError: `fill` is unknown.
    """
    if not torch.jit.is_scripting():
        check_fill(fill)
    if fill == "nearest":
        return gather_patches(tokens, nearest_kept(keep_indices, grid_size))
    dense = tokens.new_zeros(tokens.shape[0], grid_size[0] * grid_size[1], tokens.shape[2])
    images = torch.arange(tokens.shape[0], device=tokens.device).unsqueeze(1)
    return dense.index_put((images, keep_indices), tokens)


def nearest_kept(keep_indices: Tensor, grid_size: Tuple[int, int]) -> Tensor:
    """keep_indices (B, K) -> (B, N): which of the K kept patches is nearest to each place."""
    h, w = grid_size
    places = torch.arange(h * w, device=keep_indices.device)
    rows, cols = places // w, places % w
    if keep_indices.shape[0] == 0:
        return keep_indices.new_zeros(0, h * w)
    nearest: List[Tensor] = []
    for kept in keep_indices:  # one image at a time: N x K distances of a batch are gigabytes
        distance = (rows[:, None] - kept // w) ** 2 + (cols[:, None] - kept % w) ** 2
        # distances are integers: the patch index as the last digit makes the minimum unique
        nearest.append((distance * (h * w) + kept).argmin(dim=1))
    return torch.stack(nearest)
