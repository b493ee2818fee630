"""Ranking losses, which compare the order of scores with that of targets; multi-label losses.

Axes: B lists, V items of a list. The ranking losses take pred (B, V) and target (B, V), higher =
earlier, and give one value per list before ``reduction``. Half precision is computed in float32: a
sum of exponentials overflows in it.
"""

from collections.abc import Callable
from typing import Literal, Optional, Tuple, get_args  # as TorchScript reads them

import torch
import torch.nn.functional as F
from torch import Tensor

from ltrp_timm.metrics import check_lists, check_top, discounts, gains, reduce_lists, widen
from ltrp_timm.selection.rules import best_first

MultiLabelLoss = Literal["asymmetric", "bce"]
MULTI_LABEL_LOSSES: tuple[str, ...] = get_args(MultiLabelLoss)


def _prepare(pred: Tensor, target: Tensor) -> Tuple[Tensor, Tensor]:
    check_lists(pred, target)
    return widen(pred), widen(target).detach()


def list_mle(pred: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """ListMLE: negative Plackett-Luce log likelihood of the target's order, summed over a list.

    Equal scores give ln(V!), the chance level: 39.34 for V = 19.

    Args:
        pred: (B, V) scores.
        target: (B, V); only its order counts; of equal targets the lower index comes first.
        reduction: "mean" or "sum" over the lists, or "none" for (B,).

    Returns:
        A scalar, or (B,); at least 0.

    Raises:
        ValueError: The shapes differ, or ``reduction`` is unknown.

    Source: Xia et al. (2008), Listwise approach to learning to rank.

    >>> list_mle(torch.zeros(1, 3), torch.tensor([[3.0, 1.0, 2.0]]))  # ln 6
    tensor(1.7918)
    """
    scores, relevance = _prepare(pred, target)
    ordered = scores.gather(1, best_first(relevance))
    rest = ordered.flip(1).logcumsumexp(dim=1).flip(1)  # over this item and all later ones
    return reduce_lists((rest - ordered).sum(dim=1), reduction)


def list_net(
    pred: Tensor, target: Tensor, average_items: bool = True, reduction: str = "mean"
) -> Tensor:
    """ListNet: cross entropy between the softmax of the targets and that of the scores.

    Args:
        pred: (B, V) scores.
        target: (B, V).
        average_items: divide by V, as the published training does; False gives the plain cross
            entropy of a list.
        reduction: "mean" or "sum" over the lists, or "none" for (B,).

    Returns:
        A scalar, or (B,).

    Raises:
        ValueError: The shapes differ, or ``reduction`` is unknown.

    Source: Cao et al. (2007), Learning to rank: from pairwise approach to listwise approach.

    >>> list_net(torch.zeros(1, 2), torch.zeros(1, 2), average_items=False)  # ln 2
    tensor(0.6931)
    """
    scores, relevance = _prepare(pred, target)
    entropy = -(relevance.softmax(dim=1) * scores.log_softmax(dim=1))
    values = entropy.mean(dim=1) if average_items else entropy.sum(dim=1)
    return reduce_lists(values, reduction)


def _pairwise(
    scores: Tuple[Tensor, Tensor], targets: Tuple[Tensor, Tensor], threshold: float, sigma: float
) -> Tensor:
    """Half the mean binary cross entropy over pairs of items (B, I) and (B, J) -> (B,)."""
    logits, gaps = (a.unsqueeze(2) - b.unsqueeze(1) for a, b in (scores, targets))
    signs = torch.where(gaps.abs() > threshold, gaps.sign(), torch.zeros_like(gaps))
    labels = (0.5 * (1.0 + signs)).to(logits.dtype)
    loss = F.binary_cross_entropy_with_logits(sigma * logits, labels, reduction="none")
    return 0.5 * loss.mean(dim=(1, 2))


def rank_net(
    pred: Tensor,
    target: Tensor,
    threshold: float = 0.001,
    sigma: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """RankNet: binary cross entropy of all ordered pairs, an item with itself included, halved.

    The logit of a pair is sigma * (s_i - s_j); its label is ½ (1 + sign(t_i - t_j)), and ½ where
    the targets differ by at most the threshold.

    Args:
        pred: (B, V) scores s.
        target: (B, V) targets t.
        threshold: half the width of the dead zone, in units of the target, at least 0.
        sigma: steepness, above 0.
        reduction: "mean" or "sum" over the lists, or "none" for (B,).

    Returns:
        A scalar, or (B,); ½ ln 2 for equal scores.

    Raises:
        ValueError: The shapes differ, ``threshold`` or ``sigma`` is out of range, or ``reduction``
            is unknown.

    Source: Burges et al. (2005), Learning to rank using gradient descent.

    >>> rank_net(torch.zeros(1, 3), torch.tensor([[3.0, 1.0, 2.0]]))
    tensor(0.3466)
    """
    _check_pairs(threshold, sigma)
    scores, relevance = _prepare(pred, target)
    values = _pairwise((scores, scores), (relevance, relevance), threshold, sigma)
    return reduce_lists(values, reduction)


def _check_pairs(threshold: float, sigma: float) -> None:
    if not threshold >= 0.0:
        raise ValueError(f"threshold must be at least 0, got {threshold}.")
    if not sigma > 0.0:
        raise ValueError(f"sigma must be above 0, got {sigma}.")


def focused_rank(
    pred: Tensor,
    target: Tensor,
    k: int = 10,
    threshold: float = 0.001,
    sigma: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """Rank the true top k items in order and above the rest; the order of the rest is free.

    ListMLE on the k items with the highest targets, plus half the mean pairwise loss of
    ``rank_net`` over pairs of one of them and one of the rest.

    Args:
        pred: (B, V) scores.
        target: (B, V).
        k: number of top items, 1 <= k <= V; k = V is ListMLE alone.
        threshold: as for ``rank_net``.
        sigma: as for ``rank_net``.
        reduction: "mean" or "sum" over the lists, or "none" for (B,).

    Returns:
        A scalar, or (B,).

    Raises:
        ValueError: The shapes differ, ``k``, ``threshold`` or ``sigma`` is out of range, or
            ``reduction`` is unknown.

    >>> focused_rank(torch.zeros(1, 3), torch.tensor([[3.0, 1.0, 2.0]]), k=2)  # ln 2 + ½ ln 2
    tensor(1.0397)
    """
    _check_pairs(threshold, sigma)
    scores, relevance = _prepare(pred, target)
    check_top(k, scores.shape[1])
    order = best_first(relevance)
    s, t = scores.gather(1, order), relevance.gather(1, order)
    values = list_mle(s[:, :k], t[:, :k], reduction="none")
    if k < s.shape[1]:
        values = values + _pairwise((s[:, :k], s[:, k:]), (t[:, :k], t[:, k:]), threshold, sigma)
    return reduce_lists(values, reduction)


def pointwise_mse(pred: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """Mean squared difference of scores and targets: plain regression, not ranking.

    Args:
        pred: (B, V) scores.
        target: (B, V).
        reduction: "mean" or "sum" over the lists, or "none" for (B,).

    Returns:
        A scalar, or (B,).

    Raises:
        ValueError: The shapes differ, or ``reduction`` is unknown.

    >>> pointwise_mse(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]]))
    tensor(2.)
    """
    scores, relevance = _prepare(pred, target)
    return reduce_lists((scores - relevance).square().mean(dim=1), reduction)


def lambda_rank(
    pred: Tensor,
    target: Tensor,
    k: Optional[int] = None,
    sigma: float = 1.0,
    reduction: str = "mean",
) -> Tensor:
    """LambdaRank: each pair is weighted by the change of NDCG if its items were swapped.

    The sum over pairs t_i > t_j of |ΔNDCG_ij| · ln(1 + exp(-sigma (s_i - s_j))); gains and
    discounts are those of ``metrics.ndcg``. The weights have no gradient.

    Args:
        pred: (B, V) scores s.
        target: (B, V) targets t.
        k: number of places that count (default: all).
        sigma: steepness, above 0.
        reduction: "mean" or "sum" over the lists, or "none" for (B,).

    Returns:
        A scalar, or (B,); 0 for a list whose targets are all equal.

    Raises:
        ValueError: The shapes differ, ``k`` or ``sigma`` is out of range, or ``reduction`` is
            unknown.

    Source: Burges (2010), From RankNet to LambdaRank to LambdaMART.

    >>> lambda_rank(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]))  # (1 - 1 / log2 3) ln 2
    tensor(0.2558)
    """
    _check_pairs(0.0, sigma)
    scores, relevance = _prepare(pred, target)
    gain = gains(relevance)
    weight = discounts(scores.shape[1], k, gain)
    best = (gain.sort(dim=1, descending=True)[0] * weight).sum(dim=1)
    place = torch.empty_like(gain)  # the discount at the item's current place
    place.scatter_(1, best_first(scores.detach()), weight.expand_as(gain))
    gaps = gain.unsqueeze(2) - gain.unsqueeze(1)
    swaps = gaps.clamp(min=0.0) * (place.unsqueeze(2) - place.unsqueeze(1)).abs()
    swaps = swaps / best.clamp(min=torch.finfo(best.dtype).tiny).reshape(-1, 1, 1)
    logits = sigma * (scores.unsqueeze(2) - scores.unsqueeze(1))
    return reduce_lists((swaps.to(logits.dtype) * F.softplus(-logits)).sum(dim=(1, 2)), reduction)


def multi_label_loss(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Look up a loss of logits (B, C) against targets (B, C), which gives a scalar.

    Args:
        name: "asymmetric" (γ⁻ 4, γ⁺ 0, clip 0.05; summed over classes, mean over images; no
            gradient passes through its weights) or "bce" (binary cross entropy, mean over both).

    Raises:
        ValueError: ``name`` is not one of these.

    Source: Ridnik et al. (2021), Asymmetric loss for multi-label classification.

    >>> multi_label_loss("bce")(torch.zeros(2, 3), torch.ones(2, 3))  # ln 2
    tensor(0.6931)
    """
    if name == "bce":
        return _binary_cross_entropy
    if name == "asymmetric":
        return _asymmetric
    raise ValueError(f"loss must be one of {', '.join(MULTI_LABEL_LOSSES)}, got {name!r}.")


def _binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits.float(), targets.float())


def _asymmetric(logits: Tensor, targets: Tensor) -> Tensor:
    positive, targets = logits.float().sigmoid(), targets.float()
    negative = (1.0 - positive + 0.05).clamp(max=1.0)  # shifted: easy negatives cost nothing
    weight = (1.0 - negative.detach()) ** 4
    logs = [p.clamp(min=1e-8).log() for p in (positive, negative)]
    return -(targets * logs[0] + (1.0 - targets) * weight * logs[1]).sum() / len(logits)
