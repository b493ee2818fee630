"""How many patches, which ones, their tokens, and these back on the patch grid."""

import math
from numbers import Real
from typing import List, Optional, Tuple

import torch
from torch import Tensor


def num_keep(num_patches: int, keep_ratio: float) -> int:
    """The number of kept patches: ``K = max(1, int(N * keep_ratio + 0.5))``.

    Raises:
        ValueError: `keep_ratio` is not in (0, 1].

    >>> num_keep(196, 0.5)
    98
    """
    if not torch.jit.is_scripting():  # a scripted module checked it when it was set
        check_keep_ratio(keep_ratio)
    return max(1, int(num_patches * keep_ratio + 0.5))


def check_keep_ratio(keep_ratio: float, name: str = "keep_ratio") -> float:
    """Return a keep ratio as a float, or raise ValueError if it is not a number in (0, 1]."""
    number = isinstance(keep_ratio, Real) and not isinstance(keep_ratio, bool)
    if not number or not 0.0 < keep_ratio <= 1.0:  # a NaN fails both comparisons
        raise ValueError(f"{name} must be in (0, 1], got {keep_ratio!r}.")
    return float(keep_ratio)


def check_k(scores: Tensor, k: int) -> None:
    """Raise ValueError unless scores are (B, N) and 1 <= k <= N."""
    if scores.dim() != 2 or k < 1 or k > scores.shape[1]:
        shape: List[int] = list(scores.shape)
        raise ValueError(f"expected scores (B, N) and 1 <= k <= N, got scores {shape} and k = {k}.")


def select_top(scores: Tensor, k: int) -> Tensor:
    """Keep the K best scores of each image.

    Ties go to the lower index; NaN counts as minus infinity.

    Args:
        scores: (B, N) floating point, higher = keep first.
        k: number of patches to keep, 1 <= k <= N.

    Returns:
        (B, K) int64 indices, ascending.

    Raises:
        ValueError: `scores` is not (B, N), or `k` is out of range.

    >>> select_top(torch.tensor([[1.0, 3.0, 3.0, 2.0]]), 2)
    tensor([[1, 2]])
    """
    check_k(scores, k)
    return best_first(scores, k).sort(dim=1)[0]


def best_first(scores: Tensor, k: Optional[int] = None) -> Tensor:
    """The k best of scores (B, N) -> (B, k) int64 indices, best first; all N by default.

    Ties go to the lower index; NaN counts as minus infinity.
    """
    scores = torch.nan_to_num(scores, nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    if not torch.jit.is_scripting():
        if torch.onnx.is_in_onnx_export():
            # ONNX has no stable sort; its TopK breaks ties the same way
            return scores.topk(scores.shape[1] if k is None else k, dim=1).indices
    order = torch.sort(scores, dim=1, descending=True, stable=True)[1]
    return order if k is None else order[:, :k]


def mean_rank(values: Tensor) -> Tensor:
    """values (B, N) -> ranks in (0, 1): 0.5/N for the lowest; ties share their mean rank."""
    return places_in_order(values) / (2 * values.shape[1])


def places_in_order(values: Tensor) -> Tensor:
    """values (B, N) -> (B, N) whole numbers, twice the mean rank: 1, 3, 5, … without ties."""
    if not torch.jit.is_scripting():
        if torch.onnx.is_in_onnx_export():  # ONNX has no searchsorted; counting pairs is equal
            pairs = values.unsqueeze(2) - values.unsqueeze(1)
            return pairs.sign().sum(dim=2) + values.shape[1]
    ordered = values.sort(dim=1)[0]
    below = torch.searchsorted(ordered, values, right=False)
    return below + torch.searchsorted(ordered, values, right=True)


def select_random(
    scores: Tensor, k: int, generator: Optional[torch.Generator] = None, seed: int = 0
) -> Tensor:
    """Keep K random patches.

    Without a generator, every image and every call gets the same set.

    Args:
        scores: (B, N); only its shape and device are used.
        k: number of patches to keep, 1 <= k <= N.
        generator: draws a fresh set for each image (eager only).
        seed: chooses the set when there is no generator.

    Returns:
        (B, K) int64 indices, ascending.

    Raises:
        ValueError: `scores` is not (B, N), or `k` is out of range.
    """
    if not torch.jit.is_scripting():
        if generator is not None:
            draw = torch.rand(scores.shape, generator=generator, device=generator.device)
            return select_top(draw.to(scores.device), k)
    return select_top(seeded_scores(scores.shape[0], scores.shape[1], seed, scores.device), k)


def seeded_scores(batch_size: int, num_patches: int, seed: int, device: torch.device) -> Tensor:
    """Random-looking scores (B, N) float32 in [0, 1): a function of (seed, N) alone.

    All images get the same scores. A few rounds of modular squaring of the patch index make them,
    so that eager, scripted, compiled and exported models draw the same values at every call.
    """
    prime = 2147483647  # 2^31 - 1: products of two residues fit into int64
    x = torch.arange(1, num_patches + 1, device=device, dtype=torch.int64)
    start = (seed * 40503 + num_patches * 7919 + 12345) % prime
    x = (x * 1103515245 + start) % prime
    for _ in range(4):
        x = ((x * x) % prime + x * 69069 + 362437) % prime
    return (x.to(torch.float32) / prime).unsqueeze(0).expand(batch_size, -1)


def check_keep_indices(
    keep_indices: Tensor,
    batch_size: int,
    num_patches: int,
    name: str = "keep_indices",
    fewest: int = 1,
) -> None:
    """Raise TypeError unless indices are int64, ValueError unless (B, K), ``fewest`` <= K <= N.

    Values are not read; ``name`` is the argument's name in the error.
    """
    if not torch.jit.is_scripting():
        if not isinstance(keep_indices, Tensor):
            kind = type(keep_indices).__name__
            raise TypeError(f"{name} must be an int64 tensor, got {kind}: use torch.as_tensor.")
    if keep_indices.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {keep_indices.dtype}.")
    shape = keep_indices.shape
    if len(shape) != 2 or shape[0] != batch_size or shape[1] < fewest or shape[1] > num_patches:
        raise ValueError(
            f"{name} must be (B, K) with B = {batch_size} and {fewest} <= K <= N = {num_patches}, "
            f"got {list(shape)}."
        )


def validate_keep_indices(
    keep_indices: Tensor, num_patches: int, name: str = "keep_indices"
) -> None:
    """Raise ValueError if indices (B, K) are out of range or twice in a row; reads the device."""
    if keep_indices.numel() == 0:
        return
    low, high = int(keep_indices.min()), int(keep_indices.max())
    if low < 0 or high >= num_patches:
        raise ValueError(f"{name} must lie in 0 … {num_patches - 1}, got {low} … {high}.")
    ordered = keep_indices.sort(dim=1).values
    if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
        raise ValueError(f"{name} holds the same patch twice in one row.")


def may_read(values: Tensor) -> bool:
    """Whether reading values costs nothing and does not end in a graph as a constant."""
    if not torch.jit.is_scripting():
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
    return values.device.type == "cpu"


def gather_patches(tokens: Tensor, keep_indices: Tensor) -> Tensor:
    """tokens (B, N, D), keep_indices (B, K) -> (B, K, D).

    Indexing copies whole rows. ``torch.gather`` along an expanded index reads one index for each
    value and is many times slower on a CPU.

    Raises:
        ValueError: The batch sizes differ.
        IndexError: An index is out of range (on a GPU: a device assertion).
    """
    if tokens.shape[0] != keep_indices.shape[0]:
        shapes = [tokens.shape[0], keep_indices.shape[0]]
        raise ValueError(f"tokens and keep_indices must be of one batch, got sizes {shapes}.")
    images = torch.arange(tokens.shape[0], device=tokens.device).unsqueeze(1)
    return tokens[images, keep_indices]


def token_indices(keep_indices: Tensor, num_prefix_tokens: int) -> Tensor:
    """keep_indices (B, K) -> positions in the sequence (B, P + K), the P prefix tokens first."""
    if num_prefix_tokens == 0:
        return keep_indices
    prefix = torch.arange(num_prefix_tokens, device=keep_indices.device)
    prefix = prefix.expand(keep_indices.shape[0], -1)
    return torch.cat([prefix, keep_indices + num_prefix_tokens], dim=1)


def keep_tokens(
    tokens: Tensor, keep_indices: Tensor, num_prefix_tokens: int, more: Optional[Tensor] = None
) -> Tensor:
    """Tokens (B, P + N, D), keep_indices (B, K) without prefix tokens -> (B, P + K, D).

    ``more`` (B, M, D) is appended.
    """
    kept = gather_patches(tokens[:, num_prefix_tokens:], keep_indices)
    parts = [] if num_prefix_tokens == 0 else [tokens[:, :num_prefix_tokens]]
    parts.append(kept)
    if more is not None:
        parts.append(more)
    return kept if len(parts) == 1 else torch.cat(parts, dim=1)


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
