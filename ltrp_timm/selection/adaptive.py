"""How many patches each image asks for, snapped to a few sizes."""

from typing import List, Tuple

import torch
from torch import Tensor

from ltrp_timm.selection.rules import best_first, num_keep

RULES = ("mass", "threshold")


def bucket_sizes(num_patches: int, buckets: int) -> List[int]:
    """The numbers of patches that an adaptive budget may keep, ascending, N the last.

    >>> bucket_sizes(196, 4)
    [49, 98, 147, 196]
    """
    return sorted({num_keep(num_patches, i / buckets) for i in range(1, buckets + 1)})


def asked_for(scores: Tensor, rule: str, level: float) -> Tensor:
    """How many patches the scores of each image ask for.

    Args:
        scores: (B, N), higher = keep first; what is not finite counts as the lowest finite one.
        rule: "mass": as few as hold the share ``level`` of the image's score mass, scores counted
            from the image's lowest; neither scale nor shift of the scores matters. "threshold":
            those with a score of at least ``level``, for scores that compare between images.
        level: see ``rule``.

    Returns:
        (B,) int64, at least 1; a flat score map asks for 1 by its mass.

    Raises:
        ValueError: ``rule`` is neither.
    """
    if rule == "threshold":
        return (scores >= level).sum(dim=1).clamp(min=1)
    if rule != "mass":
        raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}.")
    finite = scores.isfinite()
    lowest = torch.where(finite, scores, torch.inf).amin(dim=1, keepdim=True)
    mass = torch.where(finite, scores - lowest, 0.0)
    mass = mass.gather(1, best_first(mass)).double().cumsum(dim=1)  # float32 sums drift
    wanted = mass[:, -1:] * level
    return ((mass < wanted * (1.0 - 1e-9)).sum(dim=1) + 1).clamp(max=scores.shape[1])


def snapped(counts: Tensor, sizes: List[int]) -> Tensor:
    """Counts (B,) -> the smallest of the ascending ``sizes`` that holds each."""
    steps = torch.tensor(sizes, device=counts.device)
    return steps[torch.searchsorted(steps, counts).clamp(max=len(sizes) - 1)]


def level_for(
    scores: List[Tensor], rule: str, mean_keep_ratio: float, buckets: int
) -> Tuple[float, float]:
    """The level at which images keep a given share of their patches on average.

    Args:
        scores: (B, N) each.
        rule: "mass" or "threshold".
        mean_keep_ratio: share of patches kept, averaged over the images, in (0, 1).
        buckets: as of ``bucket_sizes``.

    Returns:
        The level and the mean share kept with it: the largest that is not above
        ``mean_keep_ratio``, or the smallest there is.

    Raises:
        ValueError: ``rule`` is neither.
    """
    low, high = 1e-6, 1.0  # kept shares grow with the mass, and fall with the threshold
    if rule == "threshold":
        finite = torch.cat([part.flatten() for part in scores])
        finite = finite[finite.isfinite()].double()
        low, high = -float(finite.max()) - 1.0, -float(finite.min())
    sign = -1.0 if rule == "threshold" else 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if _mean_share(scores, rule, sign * middle, buckets) > mean_keep_ratio:
            high = middle
        else:
            low = middle
    return sign * low, _mean_share(scores, rule, sign * low, buckets)


def _mean_share(scores: List[Tensor], rule: str, level: float, buckets: int) -> float:
    shares: List[Tensor] = []
    for part in scores:
        counts = snapped(asked_for(part, rule, level), bucket_sizes(part.shape[1], buckets))
        shares.append(counts.double() / part.shape[1])
    return float(torch.cat(shares).mean())
