"""The rankers of the table, opened as ``ltrp-timm rank`` opens them, and what they keep."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ltrp_timm._text import first_names
from ltrp_timm.rankers import ranker_class
from ltrp_timm.scoring.scorer import Scorer, open_scorer
from ltrp_timm.selection import num_keep, select_top
from studies.fairness.coco_objects import Batch

RANDOM = "random"


@dataclass(frozen=True)
class Entry:
    """A ranker of the table: its name there, and what scores patches."""

    label: str
    scorer: Scorer


def open_rankers(args: argparse.Namespace, device: str) -> list[Entry]:
    """The rankers of the options, and random.

    Raises:
        ValueError: A name or an argument is unknown.
    """
    labels = list(dict.fromkeys(args.rankers))
    labels += [] if RANDOM in labels else [RANDOM]
    try:
        further = json.loads(args.ranker_args)
    except json.JSONDecodeError as error:
        raise ValueError(f"--ranker-args is not JSON ({error}), got {args.ranker_args}.") from error
    if not isinstance(further, dict):
        raise ValueError(f"--ranker-args must be a JSON object, got {args.ranker_args}.")
    strangers = [name for name in further if name not in labels]
    if strangers:
        raise ValueError(f"--ranker-args are for none of the --rankers: {first_names(strangers)}.")
    return [Entry(label, _open_ranker(label, further.get(label), args, device)) for label in labels]


def _open_ranker(label: str, further: Any, args: argparse.Namespace, device: str) -> Scorer:
    name, equals, weights = label.partition("=")
    if equals and not weights:
        raise ValueError(f"--rankers {label} names no weights behind the =.")
    published = args.pretrained and not weights and ranker_class(name).has_published_weights
    scorer = open_scorer(
        name,
        True if published else weights or None,
        further,
        model=args.model,
        img_size=args.img_size,
        patch_size=args.patch_size,
        crop_mode=args.crop_mode,
        device=device,
    )
    if name == RANDOM:  # one draw for all images would like some places of the picture
        scorer.ranker.generator = torch.Generator().manual_seed(args.seed)
    return scorer


def kept_shares(batch: Batch, entries: Sequence[Entry], ratios: Sequence[float]) -> Tensor:
    """Of each object the share of its area in kept patches (M, R), by ranker and keep ratio."""
    shares = []
    for entry in entries:
        scores, _ = entry.scorer(batch.pixels)
        for ratio in ratios:
            keep = select_top(scores, num_keep(scores.shape[1], ratio))
            kept = torch.zeros_like(scores).scatter(1, keep, 1.0)
            shares.append((batch.areas * kept[batch.row]).sum(1) / batch.areas.sum(1))
    return torch.stack(shares, dim=1)
