"""Does a ranker trained without labels learn its teacher, and does it find objects?

Claim. A `conv` ranker that saw nothing but images and a small masked autoencoder (MAE) trained on
the same images puts the patches of new images in its teacher's order, clearly more so than any
score that needs no weights. The goals hold it to that for each aggregate, on scenes and on photos.
That it finds objects better than these scores does not follow: it is asked, and where the teacher
itself does not find them the ranker cannot be expected to.

Arithmetic. Images of 128 px are 64 patches of 16; at mask ratio 0.75 the teacher sees V = 16, the
least that works, and a list has 16 scores. It costs 17 encodings and paintings of the small
teacher: that is where the time goes. Chance is a Spearman of 0 and a loss of ln(16!) = 30.7.

Images: generated scenes (digits among textured blobs, the ink is known) and squares of the photos
of scikit-image and scikit-learn. Scenes that are measured are drawn anew, photos that are measured
are others than those trained on. The teacher is trained once, a ranker for each aggregate of the
pseudo-scores ("full" removal). The weights of the last epoch
count, not those that suit the held-out images best. Epochs and learning rates were set, and the
goals moved from single lists to mean ranks, after one shorter run that was held against the same
images: take the figures as those of one seed, tuned in view, until fresh seeds confirm them.
    spearman     of a score with the teacher's, over lists of 16 patches, mean of an image
    map_spearman of a score with the teacher's mean rank over all lists of an image, 64 patches:
                 what a patch is worth depends on what else is seen, its mean rank less so
    object_auc   chance that a patch with ink (10 % of its pixels or more) outranks one without
    ink_kept     share of the ink in the best 25 % of the patches
Photos are judged by the first two alone: squares of three photos, so their spread says little.
`teacher` is the mean rank of the teacher's own scores over half of the lists of an image; it is
held against the other half, and says how far lists of one image agree. `ink` is the truth.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import tables
import torch
from common import Row, load_pyplot, make_parser, set_up, summary
from judging import (
    agreement,
    as_seen_by,
    ink_kept,
    mean_map,
    object_auc,
    teacher_lists,
)
from PIL import Image
from small_run import AGGREGATES, GRID, PATCH, HeldOut, make_data, train
from tables import Goal
from torch import Tensor

import ltrp_timm
from ltrp_timm.metrics import spearman
from ltrp_timm.rankers import resize_score_map
from ltrp_timm.selection import num_keep, select_top
from ltrp_timm.train.logs import LOG_NAME, read_log
from ltrp_timm.train.pictures import show_images
from ltrp_timm.visualize import kept_patches, row, score_map, stack_rows

NAME = "learning"
TITLE = "A ranker trained without labels, its teacher, and scores without weights"
KEEP_RATIO = 0.25
WEIGHT_FREE = ("contrast", "pixel_std", "gradient", "colour", "centre", "random")
MEASURES = ("spearman", "map_spearman", "object_auc", "ink_kept")


def goals() -> list[Goal]:
    """What the claim says, and what is asked beside it."""
    conv = {"method": tuple(f"conv, {name}" for name in AGGREGATES)}
    scenes, photos = {**conv, "images": "scenes"}, {**conv, "images": "photos"}
    return [
        Goal("map spearman − best without weights, scenes", scenes, "map_spearman_gain", ">=", 0.1),
        Goal("map spearman − best without weights, photos", photos, "map_spearman_gain", ">=", 0.1),
        Goal("object AUC − best without weights", scenes, "object_auc_gain", ">=", 0.0),
        Goal("ink kept − best without weights", scenes, "ink_kept_gain", ">=", 0.0),
    ]


def all_scores(images: Tensor, folder: Path) -> dict[str, Tensor]:
    """Scores (B, N) of the trained rankers and of those without weights."""
    rankers = {
        f"conv, {name}": ltrp_timm.create_ranker("conv", pretrained=folder / f"conv_{name}")
        for name in AGGREGATES
    }
    rankers |= {
        name: ltrp_timm.create_ranker(name, patch_size=PATCH)
        for name in WEIGHT_FREE
        if name != "random"
    }
    with torch.inference_mode():
        maps = {
            name: resize_score_map(ranker.eval()(as_seen_by(ranker, images)), *GRID)
            for name, ranker in rankers.items()
        }
    draw = torch.Generator().manual_seed(0)  # an order of its own for each image
    maps["random"] = torch.rand(len(images), GRID[0] * GRID[1], generator=draw)
    return maps


class Judged(NamedTuple):
    """What a set of held-out images says.

    Attributes:
        figures: by aggregate of the teacher and name of the score, each measure's (B,).
        maps: the scores (B, N) by name.
    """

    figures: dict[tuple[str, str], dict[str, Tensor]]
    maps: dict[str, Tensor]


def judge(held: HeldOut, folder: Path, args: argparse.Namespace) -> Judged:
    """Every score against the teacher of each aggregate, and against the ink."""
    teacher = ltrp_timm.create_teacher(folder / "teacher")
    plain, figures = all_scores(held.images, folder), {}
    maps = dict(plain)
    for aggregate in AGGREGATES:
        lists = teacher_lists(teacher, held.images, args.mask_ratio, aggregate, args.draws, seed=2)
        half, count = len(lists) // 2, teacher.num_patches
        of_teacher, rest = mean_map(lists[:half], count), mean_map(lists[half:], count)
        whole = mean_map(lists, count)
        maps[f"teacher, {aggregate}"] = of_teacher
        own = f"conv, {aggregate}"
        others = {name: plain[name] for name in WEIGHT_FREE}
        candidates = {"teacher": of_teacher, own: plain[own], **others}
        if held.ink is not None:
            candidates["ink"] = held.ink
        for name, scores in candidates.items():
            used, of_all = (lists[half:], rest) if name == "teacher" else (lists, whole)
            found = {"spearman": agreement(scores, used)}
            found["map_spearman"] = spearman(scores, of_all, reduction="none")
            if held.ink is not None:
                found["object_auc"] = object_auc(scores, held.ink)
                found["ink_kept"] = ink_kept(scores, held.ink, KEEP_RATIO)
            figures[aggregate, name] = found
    return Judged(figures, maps)


def to_rows(judged: Judged, fixed: Row) -> list[Row]:
    """A row for each score: means with quartiles, and how far above the best without weights."""
    rows: list[Row] = []
    for (aggregate, name), found in judged.figures.items():
        line: Row = {"aggregate": aggregate, "method": name}
        for measure in MEASURES:
            if measure not in found:
                columns = (measure, f"{measure}_low", f"{measure}_high", f"{measure}_gain")
                line |= dict.fromkeys(columns, "")
                continue
            free = [judged.figures[aggregate, other][measure].mean() for other in WEIGHT_FREE]
            line |= summary(measure, found[measure])
            line[f"{measure}_gain"] = round(float(found[measure].mean() - max(free)), 5)
        rows.append({**line, **fixed})
    return rows


def draw_maps(
    held: dict[str, HeldOut], judged: dict[str, Judged], path: Path, count: int = 3
) -> None:
    """Score maps of the first held-out images of each kind, and what the learned ones keep."""
    rows, shown = [], ("teacher, mean", "conv, mean", "teacher, max", "conv, max", "contrast")
    for kind, images in held.items():
        for number, photo in enumerate(show_images(images.images[:count])):
            maps = judged[kind].maps
            panels = [(photo, kind)]
            panels += [(score_map(photo, maps[name][number], GRID), name) for name in shown]
            keep = select_top(maps["conv, max"][number : number + 1], num_keep(64, KEEP_RATIO))
            panels.append((kept_patches(photo, keep, GRID), "conv, max keeps 25 %"))
            rows.append(row(panels))
    picture: Image.Image = stack_rows(rows)
    picture.resize((picture.width // 2, picture.height // 2)).save(path)


def run(args: argparse.Namespace, where: Row, folder: Path) -> tuple[list[Row], Any]:
    """Make the images, train, judge; rows and the picture."""
    start = time.perf_counter()
    held = make_data(args, folder)
    seconds = {"images": time.perf_counter() - start, **train(args, folder)}
    start = time.perf_counter()
    judged = {kind: judge(images, folder, args) for kind, images in held.items()}
    seconds["judging"] = time.perf_counter() - start
    for stage, value in seconds.items():
        print(f"{stage}: {value:.0f} s", flush=True)
    fixed: Row = {
        f"seconds_{stage.replace(', ', '_')}": round(s, 1) for stage, s in seconds.items()
    }
    fixed |= {"train_scenes": args.scenes, "train_crops": args.crops, "held_out": args.held_out}
    fixed |= {"teacher_epochs": args.teacher_epochs, "ranker_epochs": args.ranker_epochs}
    fixed |= {"mask_ratio": args.mask_ratio, "draws": args.draws, "seed": args.seed, **where}
    args.output.mkdir(parents=True, exist_ok=True)
    draw_maps(held, judged, args.output / f"{NAME}_maps.png")
    rows = [r for kind in held for r in to_rows(judged[kind], {"images": kind, **fixed})]
    return rows, plot(rows, folder)


def table(rows: list[Row]) -> list[Row]:
    """The figures as text."""
    return [
        {
            "images": row["images"],
            "teacher's aggregate": row["aggregate"],
            "score": row["method"],
            "spearman with the teacher's lists": tables.figure(row, "spearman", ".2f"),
            "with its mean rank": tables.figure(row, "map_spearman", ".2f"),
            "object AUC": _figure(row, "object_auc"),
            "ink kept at 25 %": _figure(row, "ink_kept"),
        }
        for row in rows
    ]


def _figure(row: Row, column: str) -> str:
    return "–" if row[column] == "" else tables.figure(row, column, ".2f")


def plot(rows: list[Row], folder: Path) -> Any:
    """Curves of the training, and a bar for each score."""
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(1, 5, figsize=(20, 4))
    for panel, (names, column) in zip(
        axes, ((["teacher"], "val_loss"), ([f"conv_{a}" for a in AGGREGATES], "val_spearman"))
    ):
        for name in names:
            log = read_log(folder / name / LOG_NAME)
            line = [(r["epoch"], r[column]) for r in log]
            panel.plot(*zip(*line), "-o", ms=3, label=name.replace("_", ", "))
        panel.set_xlabel("epoch")
        panel.set_ylabel(f"held-out {column.removeprefix('val_')}")
        panel.legend(fontsize=8)
        panel.grid(alpha=0.3)
    for ax, (kind, measure) in zip(
        axes[2:], (("scenes", "map_spearman"), ("photos", "map_spearman"), ("scenes", "ink_kept"))
    ):
        _bars(ax, [row for row in rows if row["images"] == kind], measure)
        ax.set_title(f"{measure.replace('_', ' ')}, {kind}", fontsize=9)
    return figure


def _bars(ax: Any, rows: list[Row], measure: str) -> None:
    """Both aggregates side by side, a pair of bars for each score."""
    for shift, aggregate in zip((-0.2, 0.2), AGGREGATES):
        ours = [row for row in rows if row["aggregate"] == aggregate and row["method"] != "ink"]
        places = [number + shift for number in range(len(ours))]
        ax.bar(places, [row[measure] for row in ours], width=0.4, label=aggregate)
        names = [row["method"].partition(",")[0] for row in ours]
    ax.set_xticks(range(len(names)), names, rotation=40, fontsize=8)
    ax.legend(fontsize=8)
    ax.grid(alpha=0.3, axis="y")


def main() -> None:
    """Train, judge, write CSV, PNG and Markdown, check the goals."""
    parser = make_parser((__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--scenes", type=int, default=800, help="to train on")
    add("--crops", type=int, default=400, help="squares of photos to train on")
    add("--held-out", type=int, default=48, help="scenes, and as many squares, to measure on")
    add("--teacher-epochs", type=int, default=60, help="of the MAE")
    add("--ranker-epochs", type=int, default=12, help="of each ranker")
    add("--teacher-lr", type=float, default=1e-3, help="learning rate")
    add("--ranker-lr", type=float, default=4e-3, help="learning rate")
    add("--mask-ratio", type=float, default=0.75, help="of the scores that the rankers learn")
    add("--draws", type=int, default=4, help="orders of the patches that are cut into lists")
    add("--seed", type=int, default=0, help="of the training")
    text = "keep images, runs and weights here; started again, it goes on and times the rest"
    add("--runs", type=Path, help=text)
    args = parser.parse_args()
    where = set_up(args)
    with tempfile.TemporaryDirectory() as name:
        rows, picture = run(args, where, args.runs or Path(name))
    tables.conclude(NAME, TITLE, rows, table(rows), goals(), picture, args)


if __name__ == "__main__":
    main()
