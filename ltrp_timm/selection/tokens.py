"""Keep indices to tokens: check, gather, and put back on the grid."""

from typing import List, Tuple

import torch
from torch import Tensor

FILLS = ("zeros", "nearest")


def check_fill(fill: str) -> str:
    """Return ``fill``.

    Raises:
        ValueError: it names no way to fill dropped places.
    """
    if fill not in FILLS:
        raise ValueError(f"fill must be one of {', '.join(FILLS)}, got {fill!r}.")
    return fill


def check_keep_indices(
    keep_indices: Tensor, batch_size: int, num_patches: int, name: str = "keep_indices"
) -> None:
    """Check shape (B, K), 1 <= K <= N, and dtype int64 of indices; their values are not read.

    ``name`` is what the caller's argument is called.

    Raises:
        ValueError: the shape is off.
        TypeError: the dtype is off.
    """
    if not torch.jit.is_scripting():
        if not isinstance(keep_indices, Tensor):
            kind = type(keep_indices).__name__
            raise TypeError(f"{name} must be an int64 tensor, got {kind}: use torch.as_tensor.")
    if keep_indices.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {keep_indices.dtype}.")
    shape = keep_indices.shape
    if len(shape) != 2 or shape[0] != batch_size or shape[1] < 1 or shape[1] > num_patches:
        raise ValueError(
            f"{name} must be (B, K) with B = {batch_size} and 1 <= K <= N = {num_patches}, "
            f"got {list(shape)}."
        )


def validate_keep_indices(
    keep_indices: Tensor, num_patches: int, name: str = "keep_indices"
) -> None:
    """Check that indices (B, K) are in range and without duplicates; reads from the device.

    Raises:
        ValueError: an index lies outside 0 … N - 1 or stands twice in a row.
    """
    if keep_indices.numel() == 0:
        return
    low, high = int(keep_indices.min()), int(keep_indices.max())
    if low < 0 or high >= num_patches:
        raise ValueError(f"{name} must lie in 0 … {num_patches - 1}, got {low} … {high}.")
    ordered = keep_indices.sort(dim=1).values
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        raise ValueError(f"{name} holds the same patch twice in one row.")


def gather_patches(tokens: Tensor, keep_indices: Tensor) -> Tensor:
    """tokens (B, N, D), keep_indices (B, K) -> (B, K, D).

    Whole rows are copied: ``torch.gather`` along an expanded index reads an index for every value
    and takes many times longer on a CPU.

    Raises:
        ValueError: tokens and indices are not of one batch.
        IndexError: an index is out of range (on a GPU an assertion of the device).
    """
    if tokens.shape[0] != keep_indices.shape[0]:
        shapes = [tokens.shape[0], keep_indices.shape[0]]
        raise ValueError(f"tokens and keep_indices must be of one batch, got sizes {shapes}.")
    images = torch.arange(tokens.shape[0], device=tokens.device).unsqueeze(1)
    return tokens[images, keep_indices]


def token_indices(keep_indices: Tensor, num_prefix_tokens: int) -> Tensor:
    """keep_indices (B, K) -> places in the sequence (B, P + K), the P prefix tokens first."""
    if num_prefix_tokens == 0:
        return keep_indices
    prefix = torch.arange(num_prefix_tokens, device=keep_indices.device)
    prefix = prefix.expand(keep_indices.shape[0], -1)
    return torch.cat([prefix, keep_indices + num_prefix_tokens], dim=1)


def keep_tokens(tokens: Tensor, keep_indices: Tensor, num_prefix_tokens: int) -> Tensor:
    """Keep the prefix tokens and the chosen patch tokens.

    Args:
        tokens: (B, P + N, D).
        keep_indices: (B, K), prefix tokens not counted.
        num_prefix_tokens: P.

    Returns:
        (B, P + K, D).
    """
    if num_prefix_tokens == 0:
        return gather_patches(tokens, keep_indices)
    kept = gather_patches(tokens[:, num_prefix_tokens:], keep_indices)
    return torch.cat([tokens[:, :num_prefix_tokens], kept], dim=1)


def scatter_patches(
    tokens: Tensor, keep_indices: Tensor, grid_size: Tuple[int, int], fill: str = "zeros"
) -> Tensor:
    """Put kept tokens back at their places of the grid.

    Args:
        tokens: (B, K, D) tokens of the kept patches.
        keep_indices: (B, K), row-major positions on the grid.
        grid_size: (h, w) in patches, N = h * w.
        fill: what stands at dropped places: "zeros", or "nearest" for the token of the nearest kept
            patch (Euclid on the grid, ties to the lower index).

    Returns:
        (B, N, D).

    Raises:
        ValueError: ``fill`` is neither.
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
    nearest: List[Tensor] = []
    for kept in keep_indices:  # image by image: N x K distances of a whole batch are gigabytes
        distance = (rows[:, None] - kept // w) ** 2 + (cols[:, None] - kept % w) ** 2
        # distances are integers: the patch index as last digit makes the minimum unique
        nearest.append((distance * (h * w) + kept).argmin(dim=1))
    return torch.stack(nearest)
