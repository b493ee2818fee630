"""Pictures of the learning run: score maps, curves of the training, bars of the figures."""

from pathlib import Path
from typing import Any

from common import WIDTH, Row, load_pyplot
from PIL import Image
from torch import Tensor

from ltrp_timm.selection import num_keep, select_top
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
    """Score maps of the last held-out images of each kind that the teacher scores."""
    rows = []
    own, teacher = f"conv, {aggregate}", f"teacher, {aggregate}"
    for (kind, side), images in held.items():
        if teacher not in scores[kind, side]:
            continue
        grid = (side // PATCH, side // PATCH)
        maps = {name: values[-count:] for name, values in scores[kind, side].items()}
        for number, photo in enumerate(show_images(images.images[-count:])):
            panels = [(photo, f"{kind}, {side} px")]
            for name in (teacher, own, "contrast"):
                panels.append((score_map(photo, maps[name][number], grid), name))
            for name in (own, "contrast"):
                own_map = maps[name][number : number + 1]
                keep = select_top(own_map, num_keep(own_map.shape[1], keep_ratio))
                panels.append((kept_patches(photo, keep, grid), f"{name} keeps 25 %"))
            rows.append(row(panels))
    picture: Image.Image = stack_rows(rows)
    picture.resize((picture.width // 2, picture.height // 2)).save(path)


def plot(rows: list[Row]) -> Any:
    """A bar for each score: order of the teacher on photos and scenes, and objects found."""
    figure, axes = load_pyplot().subplots(1, 3, figsize=(WIDTH, 3.2))
    bars = (("photos", SIDE, "map_spearman"), ("scenes", SIDE, "map_spearman"))
    bars += (("all", "", "object_auc"),)
    for ax, (kind, side, measure) in zip(axes, bars):
        _bars(ax, [r for r in rows if (r["images"], r["px"]) == (kind, side)], measure)
        name = {"map_spearman": "correlation", "object_auc": "object AUC"}[measure]
        ax.set_title(f"{name}, {kind} {'images' if kind == 'all' else ''}".rstrip())
    return figure


def _bars(ax: Any, rows: list[Row], measure: str) -> None:
    """Seeds and aggregates side by side, a group of bars for each score."""
    runs = list(dict.fromkeys((row["seed"], row["aggregate"]) for row in rows))
    width = 0.8 / len(runs)
    for number, (seed, aggregate) in enumerate(runs):
        ours = [r for r in rows if (r["seed"], r["aggregate"]) == (seed, aggregate)]
        ours = [row for row in ours if row["method"] != "ink"]
        places = [place + (number - (len(runs) - 1) / 2) * width for place in range(len(ours))]
        heights = [row[measure] for row in ours]
        ax.barh(places, heights, width, label=f"{aggregate}, seed {seed}")
        names = [row["method"].partition(",")[0] for row in ours]
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    if len(runs) > 1:
        ax.legend()
    ax.grid(alpha=0.3, axis="x")
    if measure == "object_auc":
        ax.set_xlim(0, 1)
        ax.axvline(0.5, color="k", lw=1, ls=":")
