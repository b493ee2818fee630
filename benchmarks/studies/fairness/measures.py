"""What a selection keeps of each class, and what a judge recognises in it."""

from typing import Any, NamedTuple

import torch
from common import Row
from torch import Tensor

import ltrp_timm
from ltrp_timm.metrics import average_precision
from ltrp_timm.selection import num_keep, select_top
from ltrp_timm.teacher import random_visible_indices
from studies.fairness.networks import logits_of
from studies.fairness.scenes import PATCH, SIDE, Scenes
from studies.judging import INKED, as_seen_by, object_auc

N = (SIDE // PATCH) ** 2
_RESAMPLES = 200
_BATCH = 250


class Kept(NamedTuple):
    """What a selection keeps, over all scenes (the first row) and over R resampled sets of them.

    Attributes:
        recall: share of the ink of each class that is kept, (1 + R, 10).
        precision: average precision of the judge for each class, (1 + R, 10); None without one.
    """

    recall: Tensor
    precision: Tensor | None


def interval(name: str, values: Tensor) -> Row:
    """(1 + R,), the first of all scenes -> it, and the middle 95 % of the others, as columns."""
    low, high = torch.quantile(values[1:].double(), torch.tensor([0.025, 0.975]).double()).tolist()
    found = {name: float(values[0]), f"{name}_low": low, f"{name}_high": high}
    return {column: round(figure, 5) for column, figure in found.items()}


class Judging:
    """Scenes, and a judge of what is kept of them.

    Args:
        scenes: to measure on.
        judge: a network of ``make_judge``, or None to measure ink alone.
    """

    def __init__(self, scenes: Scenes, judge: Any) -> None:
        self.scenes, self.judge, self.ink = scenes, judge, scenes.ink()
        count = len(scenes.images)
        draw = torch.Generator().manual_seed(0)  # the same scenes for every selector
        again = torch.randint(count, (_RESAMPLES, count), generator=draw)
        self.resamples = torch.cat([torch.arange(count).unsqueeze(0), again])

    def __call__(self, scores: Tensor, keep_ratio: float) -> Kept:
        """scores (B, N) -> what the best share of the patches holds."""
        kept = torch.zeros(scores.shape, dtype=torch.bool)
        kept.scatter_(1, select_top(scores, num_keep(N, keep_ratio)), True)
        in_kept = (self.ink * kept.unsqueeze(1)).sum(dim=2)  # (B, 10)
        every = self.ink.sum(dim=2)
        recall = [in_kept[some].sum(dim=0) / every[some].sum(dim=0) for some in self.resamples]
        if self.judge is None:
            return Kept(torch.stack(recall), None)
        logits, labels = logits_of(self.judge, self.scenes, kept), self.scenes.labels
        # copies of a scene must not count as ties
        noise = 1e-5 * torch.rand(logits.shape, generator=torch.Generator().manual_seed(0))
        precision = [
            average_precision(logits[some] + noise, labels[some]) for some in self.resamples
        ]
        return Kept(torch.stack(recall), torch.stack(precision))


def scores_of(ranker: Any, scenes: Scenes) -> Tensor:
    """The ranker's scores of all scenes, (B, N)."""
    with torch.no_grad():  # Grad-CAM needs gradients inside
        found = [
            ranker(as_seen_by(ranker, batch.pixels())).flatten(1)
            for batch in scenes.batches(_BATCH)
        ]
    return torch.cat(found)


def teacher_auc(
    teacher: Any, scenes: Scenes, mask_ratio: float, removal: str, aggregate: str
) -> Tensor:
    """Chance that a visible patch with ink scores above one without, under one mask a scene.

    Returns:
        (B,); NaN where all visible patches have ink, or none.
    """
    draw, found = torch.Generator().manual_seed(0), []
    for batch in scenes.batches(_BATCH):
        images = as_seen_by(teacher, batch.pixels())
        visible = random_visible_indices(len(images), N, mask_ratio, generator=draw)
        scores, at = ltrp_timm.semantic_density(
            teacher, images, visible, removal=removal, aggregate=aggregate
        )
        share = batch.ink().sum(dim=1).gather(1, at) / PATCH**2
        inked = share >= INKED
        both = inked.any(dim=1) & ~inked.all(dim=1)
        found.append(torch.where(both, object_auc(scores, share), torch.nan))
    return torch.cat(found)
