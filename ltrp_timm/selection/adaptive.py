"""Adaptive budgets: each image keeps as many patches as its scores ask for, in a few sizes."""

from dataclasses import dataclass, fields, replace
from typing import Any, List, Mapping, Optional, Tuple

import torch
from torch import Tensor

from ltrp_timm.selection.rules import best_first, check_keep_ratio, num_keep

RULES = ("mass", "threshold")


@dataclass(frozen=True)
class AdaptiveBudget:
    """How many patches each image keeps.

    ``LTRPModel.calibrate`` makes one for a mean share of kept patches.

    Attributes:
        rule: "threshold" keeps the patches with a score of at least ``level``; it needs scores that
            are comparable between images. "mass" keeps the fewest patches that hold the share
            ``level`` of the image's score mass, measured from the image's lowest score.
        level: the threshold, or the share in [0, 1].
        buckets: number of sizes: counts are rounded up to multiples of N / buckets.
        mean_keep_ratio: share of patches that images keep on average, as calibrated.

    Raises:
        ValueError: An attribute is out of range.

    >>> AdaptiveBudget("threshold", 3.0, 4, 0.5).counts(torch.tensor([[1.0, 5.0, 3.0, 1.0]]))
    tensor([2])
    """

    rule: str
    level: float
    buckets: int
    mean_keep_ratio: float

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {self.rule!r}.")
        low, high = (0.0, 1.0) if self.rule == "mass" else (-3e38, 3e38)
        if not isinstance(self.level, (int, float)) or not low <= self.level <= high:
            raise ValueError(f"level must be a number from {low} to {high}, got {self.level!r}.")
        if not isinstance(self.buckets, int) or self.buckets < 1:
            raise ValueError(f"buckets must be a whole number from 1, got {self.buckets!r}.")
        mean = check_keep_ratio(self.mean_keep_ratio, "mean_keep_ratio")
        object.__setattr__(self, "mean_keep_ratio", mean)

    def counts(self, scores: Tensor) -> Tensor:
        """Scores (B, N) -> the number of patches (B,) int64 that each image keeps."""
        sizes = torch.tensor(bucket_sizes(scores.shape[1], self.buckets), device=scores.device)
        return sizes[torch.searchsorted(sizes, patches_needed(scores, self.rule, self.level))]

    def calibrated(self, scores: List[Tensor]) -> Tuple["AdaptiveBudget", float]:
        """Find the level at which images with scores (B, N) keep ``mean_keep_ratio`` on average.

        Returns:
            The budget with that level, and the mean share that these images keep: the largest that
            does not exceed ``mean_keep_ratio``, or the smallest possible.

        Raises:
            ValueError: `scores` is empty, or ``mean_keep_ratio`` is 1.
        """
        if self.mean_keep_ratio == 1.0 or not sum(len(part) for part in scores):
            raise ValueError(
                f"calibrate needs images and mean_keep_ratio < 1, got {len(scores)} batches and "
                f"{self.mean_keep_ratio}."
            )
        low, high, sign = 1e-6, 1.0, 1.0  # kept shares rise with the mass, fall with the threshold
        if self.rule == "threshold":
            finite = torch.cat([part.flatten() for part in scores])
            finite = finite[finite.isfinite()].double()
            if not finite.numel():
                raise ValueError("calibrate needs images whose scores are finite.")
            low, high, sign = -float(finite.max()) - 1.0, -float(finite.min()), -1.0
        for _ in range(50):
            middle = (low + high) / 2
            if replace(self, level=sign * middle)._mean_share(scores) > self.mean_keep_ratio:
                high = middle
            else:
                low = middle
        found = replace(self, level=sign * low)
        return found, found._mean_share(scores)

    def _mean_share(self, scores: List[Tensor]) -> float:
        return float(torch.cat([self.counts(s).double() / s.shape[1] for s in scores]).mean())


def as_budget(value: Any) -> Optional[AdaptiveBudget]:
    """A budget, None, or the mapping of a saved one, which is checked -> budget or None."""
    if value is None or isinstance(value, AdaptiveBudget):
        return value
    if not isinstance(value, Mapping):
        raise TypeError(f"budget must be an AdaptiveBudget or None, got {type(value).__name__}.")
    names = [field.name for field in fields(AdaptiveBudget)]
    if set(value) != set(names):
        raise ValueError(f"a saved budget must have {', '.join(names)}, got {', '.join(value)}.")
    return AdaptiveBudget(**value)


def bucket_sizes(num_patches: int, buckets: int) -> List[int]:
    """The numbers of patches that an adaptive budget may keep, ascending, N last.

    >>> bucket_sizes(196, 4)
    [49, 98, 147, 196]
    """
    return sorted({num_keep(num_patches, i / buckets) for i in range(1, buckets + 1)})


def patches_needed(scores: Tensor, rule: str, level: float) -> Tensor:
    """Scores (B, N) -> how many patches each image asks for (B,) int64, see ``AdaptiveBudget``.

    It is at least 1; a flat score map needs 1 by its mass. "mass" counts values that are not finite
    as the lowest.
    """
    if rule == "threshold":
        return (scores >= level).sum(dim=1).clamp(min=1)
    finite = scores.isfinite()
    lowest = torch.where(finite, scores, torch.inf).amin(dim=1, keepdim=True)
    mass = torch.where(finite, scores - lowest, 0.0)
    mass = mass.gather(1, best_first(mass)).double().cumsum(dim=1)  # float32 sums drift
    wanted = mass[:, -1:] * level
    return ((mass < wanted * (1.0 - 1e-9)).sum(dim=1) + 1).clamp(max=scores.shape[1])


def buckets_of(counts: Tensor) -> Tuple[List[Tuple[int, Tensor]], Tensor]:
    """Sort a batch by the counts (B,) of kept patches into buckets; reads from the device.

    Returns:
        For each bucket K and the rows (b,) of its images, K ascending; and the position (B,) of
        each image in the concatenation of the buckets.
    """
    rows = [(k, (counts == k).nonzero().flatten()) for k in sorted(set(counts.tolist()))]
    return rows, counts.sort(stable=True)[1].sort()[1]


def check_eager(x: Any) -> None:
    """Raise ValueError where the number of kept patches must not depend on values."""
    if isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing() or torch.compiler.is_exporting():
        raise ValueError(
            "an adaptive budget reads scores to know how many patches to encode: it runs in eager "
            "mode only. Set model.budget = None, or pass keep_indices."
        )


def common_count(counts: Tensor, num_patches: int) -> int:
    """K of images that keep these counts (B,), or N without images; ValueError if they differ."""
    sizes = sorted(set(counts.tolist()))
    if len(sizes) > 1:
        found = ", ".join(str(k) for k in sizes)
        raise ValueError(
            f"the images of this batch keep different numbers of patches ({found}): call the "
            "model itself, forward_intermediates(intermediates_only=True), or give one image."
        )
    return int(sizes[0]) if sizes else num_patches
