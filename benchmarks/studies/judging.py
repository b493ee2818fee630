"""How scores are judged: by the lists of a teacher, and by where the ink of known objects is."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ltrp_timm
from ltrp_timm.layers.bridge import InputBridge
from ltrp_timm.metrics import spearman
from ltrp_timm.selection.rules import mean_rank, num_keep, select_top
from ltrp_timm.teacher import num_visible

INKED = 0.1  # a patch has ink where at least so much of it is


def teacher_lists(
    teacher: Any, images: Tensor, mask_ratio: float, aggregate: str, draws: int, seed: int
) -> list[tuple[Tensor, Tensor]]:
    """Scores of visible patches, and which, each (B, V): all N // V lists of each draw in turn.

    The lists of a draw are the parts of one random order: each patch is scored once.
    """
    generator = torch.Generator().manual_seed(seed)
    count = teacher.num_patches
    visible, lists = num_visible(count, mask_ratio), []
    shown = as_seen_by(teacher, images)
    for _ in range(draws):
        order = torch.rand(len(images), count, generator=generator).argsort(dim=1)
        for part in order.split(visible, dim=1):
            chosen = part.sort(dim=1).values.to(images.device)
            lists.append(ltrp_timm.semantic_density(teacher, shown, chosen, aggregate=aggregate))
    return lists


def as_seen_by(net: Any, images: Tensor) -> Tensor:
    """Pixels in [0, 1] -> normalised as a net wants them."""
    plain = ([0.0] * 3, [1.0] * 3)
    return InputBridge(plain, (net.mean or plain[0], net.std or plain[1]))(images)


def mean_map(lists: list[tuple[Tensor, Tensor]], count: int) -> Tensor:
    """The mean rank of each patch over the lists that it is in, (B, N)."""
    total = torch.zeros(len(lists[0][0]), count)
    times = torch.zeros_like(total)
    for scores, indices in lists:
        total.scatter_add_(1, indices, mean_rank(scores))
        times.scatter_add_(1, indices, torch.ones_like(scores))
    return total / times


def agreement(scores: Tensor, lists: list[tuple[Tensor, Tensor]]) -> Tensor:
    """scores (B, N) -> mean Spearman over the lists, (B,)."""
    found = [spearman(scores.gather(1, at), of, reduction="none") for of, at in lists]
    return torch.stack(found).mean(dim=0)


def object_auc(scores: Tensor, ink: Tensor) -> Tensor:
    """scores (B, N), ink (B, N) -> chance that a patch with ink outranks one without, (B,)."""
    ranks, inked = mean_rank(scores), (ink >= INKED).float()
    of_ink = (ranks * inked).sum(1) / inked.sum(1)
    return 0.5 + of_ink - (ranks * (1 - inked)).sum(1) / (1 - inked).sum(1)


def ink_per_patch(ink: Tensor, patch_size: int) -> Tensor:
    """ink (B, H, W) -> the share of each patch's pixels that are ink, (B, N)."""
    return F.avg_pool2d(ink.unsqueeze(1), patch_size).flatten(1)


def ink_kept(scores: Tensor, per_patch: Tensor, keep_ratio: float) -> Tensor:
    """scores (B, N), ink of each patch (B, N) -> share of the ink in the best patches, (B,)."""
    keep = select_top(scores, num_keep(scores.shape[1], keep_ratio))
    return per_patch.gather(1, keep).sum(1) / per_patch.sum(1)


def inked_among_kept(scores: Tensor, per_patch: Tensor, keep_ratio: float) -> Tensor:
    """scores (B, N), ink of each patch (B, N) -> share of the best patches that have ink, (B,)."""
    keep = select_top(scores, num_keep(scores.shape[1], keep_ratio))
    return (per_patch.gather(1, keep) >= INKED).float().mean(dim=1)


def ink_order(scores: Tensor, per_patch: Tensor) -> Tensor:
    """Spearman of the score with the ink of a patch, among those that have ink.

    Args:
        scores: (B, N).
        per_patch: ink, (B, N).

    Returns:
        One for each image where three patches have ink or more.
    """
    found = []
    for own, ink in zip(scores, per_patch):
        inked = ink >= INKED
        if int(inked.sum()) > 2:
            found.append(spearman(own[inked].unsqueeze(0), ink[inked].unsqueeze(0)))
    return torch.stack(found)
