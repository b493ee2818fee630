"""How many patches, and which: the best by score, or at random.

Axes, in this room: B images, N patches, P prefix tokens, L = P + N, D width, K kept patches.
Everything is a function of its arguments, runs without host synchronisation (but for
``validate_keep_indices``) and can be scripted, traced, compiled and exported.
"""

import math
from typing import List, Optional

import torch
from torch import Tensor


def num_keep(num_patches: int, keep_ratio: float) -> int:
    """The number of patches K that a keep ratio means: ``max(1, int(N * keep_ratio + 0.5))``.

    Raises:
        ValueError: keep_ratio is not in (0, 1].

    >>> num_keep(196, 0.5)
    98
    """
    if not torch.jit.is_scripting():  # there it was checked when it was set
        check_keep_ratio(keep_ratio)
    return max(1, int(num_patches * keep_ratio + 0.5))


def check_keep_ratio(keep_ratio: float) -> float:
    """Return ``keep_ratio`` as a float.

    Raises:
        ValueError: it is not a number in (0, 1].
    """
    number = isinstance(keep_ratio, (int, float)) and not isinstance(keep_ratio, bool)
    if not number or not 0.0 < keep_ratio <= 1.0:  # a NaN fails both comparisons
        raise ValueError(f"keep_ratio must be in (0, 1], got {keep_ratio}.")
    return float(keep_ratio)


def check_k(scores: Tensor, k: int) -> None:
    """Check scores (B, N) and 1 <= k <= N, raise ValueError otherwise."""
    if scores.dim() != 2 or k < 1 or k > scores.shape[1]:
        shape: List[int] = list(scores.shape)
        raise ValueError(f"expected scores (B, N) and 1 <= k <= N, got scores {shape} and k = {k}.")


def select_top(scores: Tensor, k: int) -> Tensor:
    """Keep the K best scores of each image.

    Ties go to the lower index, NaN counts as minus infinity.

    Args:
        scores: (B, N) floating point, higher = keep first.
        k: number of patches to keep, 1 <= k <= N.

    Returns:
        (B, K) int64 indices, ascending.

    Raises:
        ValueError: scores are not (B, N), or k is out of range.

    >>> select_top(torch.tensor([[1.0, 3.0, 3.0, 2.0]]), 2)
    tensor([[1, 2]])
    """
    check_k(scores, k)
    return best_first(scores, k).sort(dim=1)[0]


def best_first(scores: Tensor, k: Optional[int] = None) -> Tensor:
    """The k best of scores (B, N) -> (B, k) int64 indices, best first; all N without k.

    Ties go to the lower index, NaN counts as minus infinity.
    """
    scores = torch.nan_to_num(scores, nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    k = scores.shape[1] if k is None else k
    if not torch.jit.is_scripting():
        if torch.onnx.is_in_onnx_export():
            # ONNX knows no stable sort; its TopK has the same rule for ties
            return scores.topk(k, dim=1).indices
    return torch.sort(scores, dim=1, descending=True, stable=True)[1][:, :k]


def mean_rank(values: Tensor) -> Tensor:
    """values (B, N) -> ranks in (0, 1): 0.5/N the lowest, ties share their mean rank."""
    count = values.shape[1]
    if not torch.jit.is_scripting():
        if torch.onnx.is_in_onnx_export():  # no searchsorted there; counting pairs is the same
            pairs = values.unsqueeze(2) - values.unsqueeze(1)
            return (pairs.sign().sum(dim=2) + count) / (2 * count)
    ordered = values.sort(dim=1)[0]
    below = torch.searchsorted(ordered, values, right=False)
    up_to = torch.searchsorted(ordered, values, right=True)
    return (below + up_to) / (2 * count)


def select_random(
    scores: Tensor, k: int, generator: Optional[torch.Generator] = None, seed: int = 0
) -> Tensor:
    """Keep K patches at random.

    Without a generator it is the same set for every image and at every call.

    Args:
        scores: (B, N), read for its shape and device only.
        k: number of patches to keep, 1 <= k <= N.
        generator: draws a fresh set for each image when given (eager only).
        seed: chooses the set when no generator is given.

    Returns:
        (B, K) int64 indices, ascending.

    Raises:
        ValueError: scores are not (B, N), or k is out of range.
    """
    if not torch.jit.is_scripting():
        if generator is not None:
            draw = torch.rand(scores.shape, generator=generator, device=generator.device)
            return select_top(draw.to(scores.device), k)
    return select_top(seeded_scores(scores.shape[0], scores.shape[1], seed, scores.device), k)


def seeded_scores(batch_size: int, num_patches: int, seed: int, device: torch.device) -> Tensor:
    """Scores (B, N) float32 in [0, 1) that look random: a function of (seed, N) alone.

    They are the same for every image. The values come from a few rounds of modular squaring of the
    patch index, so that scripted, compiled and exported models draw what eager ones draw, and a
    call draws what the call before drew.
    """
    prime = 2147483647  # 2^31 - 1: products of two residues stay inside int64
    x = torch.arange(1, num_patches + 1, device=device, dtype=torch.int64)
    start = (seed * 40503 + num_patches * 7919 + 12345) % prime
    x = (x * 1103515245 + start) % prime
    for _ in range(4):
        x = ((x * x) % prime + x * 69069 + 362437) % prime
    return (x.to(torch.float32) / prime).unsqueeze(0).expand(batch_size, -1)
