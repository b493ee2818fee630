"""How much of an image does each selection cover?

Claim. At equal K, `stratified` leaves no 2x2 cell of the grid empty once K reaches the number of
cells, and `mixed` leaves fewer patches without a kept one that looks like them than `top` does;
both give up part of the score that `top` keeps.

Arithmetic. 14 x 14 patches are 49 cells of 2 x 2: at keep ratio 0.25 K = 49, one for each cell.
`mixed` at its default gives 70 % of K to the best scores and 30 % to cluster centres.

Measured on square crops of the real photos that scikit-image and scikit-learn bring along, at
224 px and patches of 16, ranked by `contrast`. Nothing is timed. Only the `random` selection is
random; its seed is 0. Means over all crops, with their quartiles:
    empty_cells   share of 2x2 cells without a kept patch
    distance      of a dropped patch to the nearest kept one, in patches
    farthest      the largest of these distances in an image
    unlike        difference of a patch from the most similar kept one: root of the mean square over
                  its pixels, in grey levels of 255; kept patches count with 0
    score         the kept patches' ranks in the score map, over those of the best K
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# started by its path, only its own folder is on the path
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from common import Row, base_parser, summary
from runner import Benchmark, cells, figure, panels, plain
from tables import Goal
from torch import Tensor

import ltrp_timm
from ltrp_timm.commands._flags import keep_ratio
from ltrp_timm.selection.coverage import patch_pixels, squared_distances
from ltrp_timm.selection.registry import check_selection_args, select
from ltrp_timm.selection.rules import gather_patches, mean_rank
from studies.scenes import load_crops

GRID = (14, 14)
MEASURES = ("empty_cells", "distance", "farthest", "unlike", "score")
TITLES = {
    "empty_cells": "cells left empty, share",
    "distance": "distance to a kept patch",
    "farthest": "largest distance",
    "unlike": "difference to a kept patch",
    "score": "score kept, share",
}
# selection, as the table names it -> name and options
SELECTIONS: dict[str, tuple[str, dict[str, float]]] = {
    "top": ("top", {}),
    "random": ("random", {}),
    "dithered": ("dithered", {}),
    "stratified": ("stratified", {}),
    "stratified, cells of 3x3": ("stratified", {"cell": 3}),
    "mixed": ("mixed", {}),
    "mixed, 4x4 pixels": ("mixed", {"pixels": 4}),
    "mixed, ratio 0.4": ("mixed", {"ratio": 0.4}),
}


def goals() -> list[Goal]:
    """What the claim says."""
    quarter = {"keep_ratio": 0.25}
    mixed = {**quarter, "method": ("mixed", "mixed, 4x4 pixels")}
    return [
        Goal("empty cells", {**quarter, "method": "stratified"}, "empty_cells", "<=", 0.0),
        Goal("unlike ÷ that of top", mixed, "unlike_of_top", "<=", 0.9),
    ]


def cover(keep: Tensor, scores: Tensor, pixels: Tensor) -> dict[str, Tensor]:
    """keep (B, K), scores (B, N), pixels (B, N, C) -> each measure, (B,)."""
    h, w = GRID
    place = torch.arange(h * w)
    position = torch.stack([place // w, place % w], dim=1).float()
    away = torch.cdist(position[keep], position.expand(len(keep), -1, -1)).amin(dim=1)
    dropped = torch.ones(len(keep), h * w).scatter(1, keep, 0.0)
    cell = (place // w // 2) * (-(-w // 2)) + place % w // 2
    full = torch.zeros(len(keep), int(cell.max()) + 1).scatter(1, cell[keep], 1.0)
    unlike = gather_patches(squared_distances(pixels), keep).amin(dim=1).sqrt()
    ranks = mean_rank(scores)
    best = ltrp_timm.select_top(scores, keep.shape[1])
    return {
        "empty_cells": 1.0 - full.mean(dim=1),
        "distance": (away * dropped).sum(dim=1) / dropped.sum(dim=1),
        "farthest": away.amax(dim=1),
        "unlike": 255 * unlike.mean(dim=1),
        "score": ranks.gather(1, keep).sum(dim=1) / ranks.gather(1, best).sum(dim=1),
    }


def run(args: argparse.Namespace) -> Iterator[list[Row]]:
    """All selections at every keep ratio."""
    images = load_crops()
    scores = ltrp_timm.create_ranker("contrast")(images).flatten(1)
    pixels = patch_pixels(images, GRID)
    for ratio in args.keep_ratios:
        k = ltrp_timm.num_keep(scores.shape[1], ratio)
        found: dict[str, dict[str, Tensor]] = {}
        rows = []
        for label, (name, changes) in SELECTIONS.items():
            options = check_selection_args(name, changes)
            tokens = patch_pixels(images, GRID, int(options.get("pixels", 0)))
            keep = select(scores, k, name, options, GRID, tokens)
            found[label] = cover(keep, scores, pixels)
            row: Row = {"keep_ratio": ratio, "patches_kept": k, "method": label}
            row["images"] = len(images)
            for measure in MEASURES:
                row |= summary(measure, found[label][measure])
            rows.append(
                row | summary("unlike_of_top", found[label]["unlike"] / found["top"]["unlike"])
            )
        yield rows


def plot(rows: list[Row], args: argparse.Namespace) -> Any:
    """A panel for each measure, a line for each selection."""
    picture, axes = panels(2, 3)  # the last is for the legend
    axes = axes.flatten()
    for ax, measure in zip(axes, MEASURES):
        for label in SELECTIONS:
            line = sorted(
                (row for row in rows if row["method"] == label), key=lambda row: row["keep_ratio"]
            )
            ax.plot([r["keep_ratio"] for r in line], [r[measure] for r in line], "-o", ms=3)
        ax.set_title(TITLES[measure])
        ax.set_xlabel("keep ratio")
        ax.set_ylim(bottom=0)
    axes[-1].axis("off")
    axes[-1].legend(axes[0].get_lines(), list(SELECTIONS), loc="center")
    return picture


def parser(description: str) -> argparse.ArgumentParser:
    """The options."""
    options, ratios = base_parser(description), [0.1, 0.25, 0.5, 0.75]
    text = "shares of patches to keep"
    options.add_argument("--keep-ratios", nargs="+", type=keep_ratio, default=ratios, help=text)
    return options


main = Benchmark(
    name="coverage",
    doc=__doc__,
    title="What each selection covers of real photos",
    run=run,
    progress="{method} leaves {empty_cells:.1%} of the cells empty",
    table=cells(
        {
            "keep": figure("keep_ratio", "g"),
            "selection": plain("method"),
            "empty 2x2 cells (quartiles)": figure("empty_cells", ".1%"),
            "distance (quartiles)": figure("distance", ".2f"),
            "farthest (quartiles)": figure("farthest", ".1f"),
            "unlike (quartiles)": figure("unlike", ".1f"),
            "score (quartiles)": figure("score", ".2f"),
        }
    ),
    goals=goals,
    plot=plot,
    parser=parser,
).main


if __name__ == "__main__":
    main()
