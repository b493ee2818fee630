"""Ranking metrics, which compare the order of scores with that of targets; average precision.

Axes: B lists, V items of a list. The ranking metrics take pred (B, V) and target (B, V), higher =
earlier, and give one value per list; of equal values the lower index comes first, as everywhere in
this library. A list whose values are all equal has a correlation of 0.

``average_precision`` measures classifiers: N images, C classes.
"""

from typing import Optional

import torch
from torch import Tensor

from ltrp_timm.selection.rules import best_first, mean_rank, select_top

REDUCTIONS = ("mean", "sum", "none")


def check_lists(pred: Tensor, target: Tensor) -> None:
    """Raise ValueError unless both are (B, V) with at least one item."""
    if pred.dim() != 2 or pred.shape != target.shape or pred.numel() == 0:
        raise ValueError(
            f"pred and target must both be (B, V), got {list(pred.shape)} and {list(target.shape)}."
        )


def widen(values: Tensor) -> Tensor:
    """Half precision and integers as float32; float32 and float64 as they are."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def reduce_lists(values: Tensor, reduction: str) -> Tensor:
    """values (B,) -> their mean or sum, or as they are for "none"; ValueError for another one."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}.")
    if reduction == "none":
        return values
    return values.mean() if reduction == "mean" else values.sum()


def check_top(k: Optional[int], num_items: int) -> int:
    """Return ``k``, or V for None; ValueError if it is not in 1 … V."""
    if k is None:
        return num_items
    if k < 1 or k > num_items:
        raise ValueError(f"k must be in 1 … {num_items}, the length of the lists, got {k}.")
    return k


def spearman(pred: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """Spearman's rank correlation; equal values share their mean rank.

    Args:
        pred: (B, V).
        target: (B, V).
        reduction: "mean" or "sum" over the lists, or "none" for (B,).

    Returns:
        In [-1, 1]; float32 (float64 where pred is).

    Raises:
        ValueError: The shapes differ, or ``reduction`` is unknown.

    >>> spearman(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 4.0, 9.0]]))
    tensor(1.)
    """
    check_lists(pred, target)
    dtype = widen(pred).dtype
    ranks = [mean_rank(widen(values).contiguous()).to(dtype) for values in (pred, target)]
    x, y = (rank - rank.mean(dim=1, keepdim=True) for rank in ranks)
    return reduce_lists(_ratio((x * y).sum(dim=1), x.norm(dim=1) * y.norm(dim=1)), reduction)


def kendall(pred: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """Kendall's tau-b: concordant minus discordant pairs, corrected for ties.

    Args:
        pred: (B, V).
        target: (B, V).
        reduction: "mean" or "sum" over the lists, or "none" for (B,).

    Returns:
        In [-1, 1].

    Raises:
        ValueError: The shapes differ, or ``reduction`` is unknown.

    >>> kendall(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([[1.0, 2.0, 3.0]]))
    tensor(0.3333)
    """
    check_lists(pred, target)
    dtype = widen(pred).dtype
    wide = (widen(values) for values in (pred, target))
    x, y = ((values.unsqueeze(2) - values.unsqueeze(1)).sign().to(dtype) for values in wide)
    untied = x.abs().sum(dim=(1, 2)) * y.abs().sum(dim=(1, 2))
    return reduce_lists(_ratio((x * y).sum(dim=(1, 2)), untied.sqrt()), reduction)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, and 0 where the whole is 0."""
    return torch.where(whole == 0, 0.0, part / whole.clamp(min=torch.finfo(whole.dtype).tiny))


def gains(target: Tensor) -> Tensor:
    """target (B, V) -> gain of each item in NDCG: its target minus the lowest of its list.

    Gains are thus never negative, and a shift of all targets changes nothing.
    """
    wide = widen(target)
    return wide - wide.amin(dim=1, keepdim=True)


def discounts(num_items: int, k: Optional[int], like: Tensor) -> Tensor:
    """Weight of each place, (V,): 1 / log2(2 + place), and 0 from place k on."""
    places = torch.arange(num_items, device=like.device, dtype=like.dtype)
    return torch.where(places < check_top(k, num_items), 1.0 / torch.log2(places + 2.0), 0.0)


def ndcg(pred: Tensor, target: Tensor, k: Optional[int] = None, reduction: str = "mean") -> Tensor:
    """Normalised discounted cumulative gain of the first k places.

    The gain of an item is linear: its target minus the lowest target of the list.

    Args:
        pred: (B, V).
        target: (B, V).
        k: number of places that count (default: all).
        reduction: "mean" or "sum" over the lists, or "none" for (B,).

    Returns:
        In [0, 1]; 1 for the best order, and for a list whose targets are all equal; NaN for one
        with a target that is not finite.

    Raises:
        ValueError: The shapes differ, ``k`` is out of range, or ``reduction`` is unknown.

    >>> ndcg(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[2.0, 1.0, 0.0]]), k=2)
    tensor(1.)
    """
    check_lists(pred, target)
    gain = gains(target)
    weight = discounts(pred.shape[1], k, gain)
    found = (gain.gather(1, best_first(widen(pred))) * weight).sum(dim=1)
    best = (gain.sort(dim=1, descending=True)[0] * weight).sum(dim=1)
    return reduce_lists(torch.where(best == 0, 1.0, _ratio(found, best)), reduction)


def top_k_overlap(pred: Tensor, target: Tensor, k: int, reduction: str = "mean") -> Tensor:
    """Share of the k best items by target that are among the k best by pred.

    Args:
        pred: (B, V).
        target: (B, V).
        k: number of best items, 1 <= k <= V; chance is k / V.
        reduction: "mean" or "sum" over the lists, or "none" for (B,).

    Returns:
        In [0, 1].

    Raises:
        ValueError: The shapes differ, ``k`` is out of range, or ``reduction`` is unknown.

    >>> top_k_overlap(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[3.0, 1.0, 2.0]]), k=2)
    tensor(0.5000)
    """
    check_lists(pred, target)
    check_top(k, pred.shape[1])
    chosen, best = (select_top(widen(values), k) for values in (pred, target))
    hits = (chosen.unsqueeze(2) == best.unsqueeze(1)).sum(dim=(1, 2))
    return reduce_lists(hits / k, reduction)


def average_precision(scores: Tensor, targets: Tensor) -> Tensor:
    """Average precision of each class over a whole set.

    The sum of precision over steps of recall, without interpolation. Images of equal score form one
    step, so their order in the set does not count. timm's multi-label evaluator treats ties the
    same way, but counts a class without images as 0 and reports the mean only; torchmetrics applies
    a sigmoid in float32, which makes large logits equal.

    Args:
        scores: (N, C), higher = earlier; only their order counts.
        targets: (N, C), 1 or True where the image has the class, else 0.

    Returns:
        (C,) float64 in (0, 1]; NaN for a class without images. ``nanmean()`` is the mAP.

    Raises:
        ValueError: The shapes differ, there is no image, a score is NaN, or a target is not 0 or 1.

    Source: scikit-learn's ``average_precision_score``, class by class.

    >>> average_precision(torch.tensor([[0.9], [0.5], [0.1]]), torch.tensor([[1], [0], [1]]))
    tensor([0.8333], dtype=torch.float64)
    """
    if scores.dim() != 2 or scores.shape != targets.shape or scores.shape[0] == 0:
        raise ValueError(
            f"scores and targets must both be (N, C), got {list(scores.shape)} and "
            f"{list(targets.shape)}."
        )
    if bool(scores.isnan().any()):
        raise ValueError("scores must be numbers, got NaN.")
    if bool(((targets != 0) & (targets != 1)).any()):
        raise ValueError("targets must be 0 or 1.")
    order = scores.argsort(dim=0, descending=True)
    ordered = scores.gather(0, order)
    hits = (targets != 0).gather(0, order).cumsum(dim=0)  # (N, C) int64
    last = torch.ones_like(hits, dtype=torch.bool)
    last[:-1] = ordered[1:] != ordered[:-1]  # of equal scores
    found = torch.where(last, hits, 0).cummax(dim=0)[0]  # at the end of a step, until the next
    before = torch.cat([torch.zeros_like(found[:1]), found[:-1]])
    places = torch.arange(1, len(scores) + 1, device=scores.device).unsqueeze(1)
    precision = hits.double() / places
    steps = torch.where(last, (hits - before) * precision, 0.0)
    return steps.sum(dim=0) / hits[-1].double()  # 0 / 0 is NaN
