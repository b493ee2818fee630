"""Rows of the comparison: every selector judged, differences, means over seeds."""

import argparse
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Row
from torch import Tensor

from ltrp_timm.measure import throughput
from ltrp_timm.metrics import average_precision
from ltrp_timm.weights.files import write_text
from studies.fairness.compared import CAM, OF_CNN, label_free, with_labels
from studies.fairness.measures import Judging, Kept, interval, scores_of, teacher_auc
from studies.fairness.networks import logits_of
from studies.fairness.scenes import CLASSES, TEST, Scenes, make_scenes
from studies.fairness.stages import HALVES, LTRP, Trained

TEST_SEED = 10_000  # scenes of trials had smaller ones
KEEP_RATIOS = (0.5, 0.25, 0.125)
PARTS = ("seen", "unseen", "gap")
# how far above which selector, in what
ABOVE = {
    "recall_above_random": ("random", "recall"),
    "map_unseen_above_cam": (CAM, "precision"),
    "map_unseen_above_contrast": ("contrast", "precision"),
}


def judge_all(trained: Trained, seed: int, args: argparse.Namespace) -> list[Row]:
    """Rows of one seed: every selector, for each half of the digits with labels.

    Each seed has separate test scenes. Smooth scenes are a control without mAP, as the judge has
    not learned them.
    """
    clutter = make_scenes(args.test_scenes, TEST_SEED + seed, TEST)
    smooth = make_scenes(args.test_scenes, TEST_SEED + seed, TEST, smooth=True)
    judges = {"clutter": Judging(clutter, trained.judge), "smooth": Judging(smooth, None)}
    free = label_free(trained)
    of_labels = {half: with_labels(trained, half) for half in trained.cnns}
    costs = milliseconds({**free, **next(iter(of_labels.values()))}, clutter)
    aucs = {
        name: over_resamples(
            teacher_auc(trained.teacher, clutter, args.mask_ratio, *name.split()),
            judges["clutter"],
        )
        for name in LTRP
    }
    rows: list[Row] = []
    ratios = (1.0, *KEEP_RATIOS)
    kept = {key: keep_all(free, judge, ratios) for key, judge in judges.items()}
    for half, cnn in trained.cnns.items():
        own = dict.fromkeys(OF_CNN, own_map(cnn, clutter, HALVES[half]))
        if half in trained.vits:
            own["attention"] = own_map(trained.vits[half], clutter, HALVES[half])
        for images, judge in judges.items():
            found = kept[images] | keep_all(of_labels[half], judge, KEEP_RATIOS)
            for (method, ratio), what in found.items():
                row: Row = {"seen": half, "images": images, "keep_ratio": ratio}
                row |= {"method": method, **measured(what, HALVES[half])}
                others = {name: found[name, ratio] for name, r in found if r == ratio < 1}
                row |= differences(what, others, HALVES[half])
                measured_here = images == "clutter"  # the control has neither
                row |= of_teacher(method, aucs if measured_here else {})
                row["own_map"] = own.get(method.partition(",")[0], "") if measured_here else ""
                rows.append({**row, "rank_ms": costs.get(method, "")})
    return rows


def over_resamples(values: Tensor, judge: Judging) -> Tensor:
    """A value for each scene, or NaN -> means over all scenes and over resampled ones, (1 + R,)."""
    return torch.stack([values[some].nanmean() for some in judge.resamples])


def of_teacher(method: str, aucs: dict[str, Tensor]) -> Row:
    """The AUC of the scores that a ranker learns, and how far the first lies above decoder's."""
    names = ("teacher_auc", "auc_above_decoder")
    row: Row = dict.fromkeys((name + end for name in names for end in ("", "_low", "_high")), "")
    if method in aucs:
        row |= interval(names[0], aucs[method])
        if method == LTRP[0]:
            row |= interval(names[1], aucs[method] - aucs["decoder mean"])
    return row


def judged(trained: Trained, seed: int, args: argparse.Namespace, folder: Path) -> list[Row]:
    """Rows of one seed; those of a run that goes on are in its folder."""
    path = folder / f"seed_{seed}" / "rows.json"
    if not path.exists():
        rows = judge_all(trained, seed, args)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(rows))
    found: list[Row] = json.loads(path.read_text(encoding="utf-8"))
    return found


def keep_all(
    rankers: dict[str, Any], judge: Judging, ratios: tuple[float, ...]
) -> dict[tuple[str, float], Kept]:
    """What is kept by each ranker at each ratio; beside those without labels, by the truth."""
    scores = {name: scores_of(ranker, judge.scenes) for name, ranker in rankers.items()}
    if 1.0 in ratios:
        scores["ink"] = judge.ink.sum(dim=1)
    found = {(name, r): judge(of, r) for r in ratios if r < 1 for name, of in scores.items()}
    if 1.0 in ratios:
        found["all patches", 1.0] = judge(scores["ink"], 1.0)
    return found


def milliseconds(rankers: dict[str, Any], scenes: Scenes) -> dict[str, float]:
    """What ranking costs an image, in a batch of 64: the median of rounds in turns."""
    batch = next(scenes.batches(64))
    calls = {name: partial(scores_of, ranker, batch) for name, ranker in rankers.items()}
    timings = throughput.compare(calls, repeats=5, warmup=1)
    return {name: round(1e3 * of.median / len(batch.images), 4) for name, of in timings.items()}


def own_map(cnn: Any, scenes: Scenes, digits: list[int]) -> float:
    """mAP of a classifier on whole scenes, on the classes that it learned."""
    precision = average_precision(logits_of(cnn, scenes), scenes.labels[:, digits])
    return round(float(precision.mean()), 4)


def measured(kept: Kept, seen: list[int]) -> Row:
    """Recall and mAP of seen and unseen classes, with intervals; mAP is empty without a judge."""
    unseen = [number for number in range(CLASSES) if number not in seen]
    row: Row = {}
    for name, of in (("recall", kept.recall), ("map", kept.precision)):
        if of is None:
            columns = [f"{name}_{part}{end}" for part in PARTS for end in ("", "_low", "_high")]
            row |= dict.fromkeys(columns, "")
            continue
        first, second = of[:, seen].mean(dim=1), of[:, unseen].mean(dim=1)
        for part, values in zip(PARTS, (first, second, first - second)):
            row |= interval(f"{name}_{part}", values)
    return row


def differences(what: Kept, others: dict[str, Kept], seen: list[int]) -> Row:
    """How far a selector lies above others, scene by scene the same, with intervals.

    Args:
        what: what it keeps.
        others: what others keep, by the names of ``ABOVE``; columns of missing ones are empty.
        seen: the classes with labels.
    """
    unseen = [number for number in range(CLASSES) if number not in seen]
    row: Row = {}
    for column, (other, measure) in ABOVE.items():
        row |= dict.fromkeys((column, f"{column}_low", f"{column}_high"), "")
        if other not in others:
            continue
        mine, theirs = (getattr(kept, measure) for kept in (what, others[other]))
        if mine is None:
            continue
        classes = unseen if "unseen" in column else list(range(CLASSES))
        row |= interval(column, (mine - theirs)[:, classes].mean(dim=1))
    return row


def over_seeds(rows: list[Row]) -> list[Row]:
    """Means over the seeds, for each half and for both; low and high are the extremes of seeds."""
    found = []
    halves = list(dict.fromkeys(row["seen"] for row in rows))
    for seen in [*halves, "both"] if len(halves) > 1 else halves:
        own = [row for row in rows if seen in (row["seen"], "both")]
        for key in dict.fromkeys((r["images"], r["keep_ratio"], r["method"]) for r in own):
            some = [r for r in own if (r["images"], r["keep_ratio"], r["method"]) == key]
            found.append(merged(some, {"seed": "all", "seen": seen}))
    return found


def merged(rows: list[Row], case: Row) -> Row:
    """One row of several: the mean of seeds, each the mean of its halves."""
    line: Row = {**rows[0], **case}
    seeds = list(dict.fromkeys(row["seed"] for row in rows))
    for name, value in rows[0].items():
        if not isinstance(value, float) or name.endswith(("_low", "_high")) or name == "keep_ratio":
            continue
        each = [statistics.mean(row[name] for row in rows if row["seed"] == seed) for seed in seeds]
        line[name] = round(statistics.mean(each), 5)
        if f"{name}_low" in line:
            line |= {f"{name}_low": round(min(each), 5), f"{name}_high": round(max(each), 5)}
    line["recall_gap_size"] = abs(line["recall_gap"])
    return line
