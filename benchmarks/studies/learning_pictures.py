"""Pictures of the learning run: score maps, curves of the training, bars of the figures."""

import argparse
from pathlib import Path
from typing import Any

from common import Row, load_pyplot
from PIL import Image
from torch import Tensor

from ltrp_timm.selection import num_keep, select_top
from ltrp_timm.train.logs import LOG_NAME, read_log
from ltrp_timm.visualize import kept_patches, row, score_map, show_images, stack_rows
from studies.small_run import PATCH, SIDE, HeldOut


def draw_maps(
    held: dict[tuple[str, int], HeldOut],
    scores: dict[tuple[str, int], dict[str, Tensor]],
    path: Path,
    aggregate: str,
    keep_ratio: float,
    count: int = 2,
) -> None:
    """Score maps of the last held-out images of each kind, and what is kept by them."""
    rows = []
    own, teacher = f"conv, {aggregate}", f"teacher, {aggregate}"
    for (kind, side), images in held.items():
        grid = (side // PATCH, side // PATCH)
        maps = {name: values[-count:] for name, values in scores[kind, side].items()}
        for number, photo in enumerate(show_images(images.images[-count:])):
            panels = [(photo, f"{kind}, {side} px")]
            for name in (teacher, own, "contrast"):
                of = maps.get(name)
                panels.append(
                    (photo, "(no teacher)")
                    if of is None
                    else (score_map(photo, of[number], grid), name)
                )
            for name in (own, "contrast"):
                own_map = maps[name][number : number + 1]
                keep = select_top(own_map, num_keep(own_map.shape[1], keep_ratio))
                panels.append((kept_patches(photo, keep, grid), f"{name} keeps 25 %"))
            rows.append(row(panels))
    picture: Image.Image = stack_rows(rows)
    picture.resize((picture.width // 2, picture.height // 2)).save(path)


def plot(rows: list[Row], folder: Path, args: argparse.Namespace) -> Any:
    """Curves of the training, and a bar for each score."""
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(1, 5, figsize=(20, 4))
    curves = ((["teacher"], "val_loss"), ([f"conv_{a}" for a in args.aggregates], "val_spearman"))
    for panel, (names, column) in zip(axes, curves):
        for seed in args.seeds:
            for name in names:
                log = read_log(folder / f"seed_{seed}" / name / LOG_NAME)
                line = [(r["epoch"], r[column]) for r in log]
                label = f"{name.replace('_', ', ')}, seed {seed}"
                panel.plot(*zip(*line), "-o", ms=3, label=label)
        panel.set_xlabel("epoch")
        panel.set_ylabel(f"held-out {column.removeprefix('val_')}")
        panel.legend(fontsize=8)
        panel.grid(alpha=0.3)
    bars = (("photos", SIDE, "map_spearman"), ("scenes", SIDE, "map_spearman"))
    bars += (("all", "", "object_auc"),)
    for ax, (kind, side, measure) in zip(axes[2:], bars):
        _bars(ax, [r for r in rows if (r["images"], r["px"]) == (kind, side)], measure, args)
        ax.set_title(f"{measure.replace('_', ' ')}, {kind} {side}".rstrip(), fontsize=9)
    return figure


def _bars(ax: Any, rows: list[Row], measure: str, args: argparse.Namespace) -> None:
    """Seeds and aggregates side by side, a group of bars for each score."""
    runs = [(seed, aggregate) for seed in args.seeds for aggregate in args.aggregates]
    width = 0.8 / len(runs)
    for number, (seed, aggregate) in enumerate(runs):
        ours = [r for r in rows if (r["seed"], r["aggregate"]) == (seed, aggregate)]
        ours = [row for row in ours if row["method"] != "ink"]
        places = [place + (number - (len(runs) - 1) / 2) * width for place in range(len(ours))]
        heights = [row[measure] for row in ours]
        ax.bar(places, heights, width=width, label=f"{aggregate}, seed {seed}")
        names = [row["method"].partition(",")[0] for row in ours]
    ax.set_xticks(range(len(names)), names, rotation=40, fontsize=8)
    ax.legend(fontsize=8)
    ax.grid(alpha=0.3, axis="y")
    if measure == "object_auc":
        ax.set_ylim(0.4, 1.0)
        ax.axhline(0.5, color="grey", lw=1)
