"""Pictures of the comparison: what is kept of a few scenes, and bars of the figures."""

from pathlib import Path
from typing import Any

import torch
from common import WIDTH, Row, load_pyplot
from tables import nice

from ltrp_timm.selection import num_keep, select_top
from ltrp_timm.visualize import kept_patches, row, show_images, stack_rows
from studies.fairness.compared import CAM, label_free, with_labels
from studies.fairness.measures import scores_of
from studies.fairness.scenes import PATCH, SIDE, TEST, make_scenes
from studies.fairness.stages import Trained

_SHOWN = ("random", "contrast", "full max", CAM)
_GRID = (SIDE // PATCH, SIDE // PATCH)
_SCALE = 2


def draw_scenes(trained: Trained, path: Path, count: int = 6, keep_ratio: float = 0.25) -> None:
    """New scenes, and what each selector keeps of them; labels were those of the first half."""
    scenes = make_scenes(count, 2, TEST)
    half = next(iter(trained.cnns))
    rankers = {**label_free(trained), **with_labels(trained, half)}
    scores = {name: scores_of(rankers[name], scenes) for name in _SHOWN if name in rankers}
    scores["ink"] = scenes.ink().sum(dim=1)
    rows = []
    for number, photo in enumerate(show_images(scenes.pixels())):
        large = photo.resize((photo.width * _SCALE, photo.height * _SCALE), resample=0)
        digits = scenes.labels[number].nonzero().squeeze(1).tolist()
        panels = [(large, " ".join(map(str, digits)))]
        for name, values in scores.items():
            keep = select_top(values[number : number + 1], num_keep(values.shape[1], keep_ratio))
            panels.append((kept_patches(large, keep, _GRID), nice(name)))
        rows.append(row(panels))
    stack_rows(rows).save(path)


def plot(rows: list[Row], keep_ratio: float = 0.25) -> Any:
    """Bars of seen and unseen classes for each selector and half of the digits.

    Lines are the extremes of the seeds.
    """
    halves = list(dict.fromkeys(row["seen"] for row in rows if row["seen"] != "both"))
    size = (WIDTH, 3.8 * len(halves))
    figure, axes = load_pyplot().subplots(
        len(halves), 2, figsize=size, squeeze=False, sharex=True, sharey=True
    )
    for line, half in zip(axes, halves):
        case = ("all", half, "clutter", keep_ratio)
        own = [r for r in rows if (r["seed"], r["seen"], r["images"], r["keep_ratio"]) == case]
        places = torch.arange(len(own)).tolist()
        for ax, name in zip(line, ("recall", "map")):
            for part, shift in (("seen", -0.2), ("unseen", 0.2)):
                column = f"{name}_{part}"
                heights = [r[column] for r in own]
                below = [max(r[column] - r[f"{column}_low"], 0) for r in own]
                above = [max(r[f"{column}_high"] - r[column], 0) for r in own]
                at = [place + shift for place in places]
                label = "labelled digits" if part == "seen" else "other digits"
                ax.barh(at, heights, 0.4, xerr=(below, above), capsize=1, label=label)
            ax.set_yticks(places, [nice(r["method"]) for r in own])
            ax.set_ylim(len(own) - 0.4, -0.6)
            ax.set_xlim(0, 1)
            ax.set_title(f"labels of {half}")
            ax.grid(alpha=0.3, axis="x")
    axes[0][0].legend(loc="upper right", fontsize=7)
    axes[-1][0].set_xlabel(f"share of pixels kept at keep ratio {keep_ratio:g}")
    axes[-1][1].set_xlabel("average precision of the judge")
    return figure
