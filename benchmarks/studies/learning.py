"""Does a ranker trained without labels learn its teacher, and does it find objects?

Claim. A `conv` ranker that saw nothing but images and a small masked autoencoder (MAE) trained on
the same images puts the patches of new images in its teacher's order, clearly more so than any
score that needs no weights. It finds objects without labels, better than chance on any kind of
image. A further goal is to find them better than scores without weights do; until it is met,
`contrast` stays the default ranker. The page of results lists what does not hold.

Arithmetic. Images of 128 px are 64 patches of 16; at mask ratio 0.5 the teacher sees V = 32, and a
list has 10 of them. It costs 11 encodings and paintings of the small teacher. Chance is a Spearman
of 0, an object AUC of 0.5, and a loss of ln(10!) = 15.1.

Images: generated scenes (digits among textured blobs, the ink is known) and squares of the photos
of scikit-image and scikit-learn. What is measured is new: scenes of other digits, squares of other
photos, and digits on these photos, a kind that no training saw. At 224 px, 196 patches, the same
kinds are judged by their ink alone: there is no teacher of that size. Settings were chosen in runs
measured on other digits and photos (an MAE that paints normalised patches, `--norm-pix`, gave
rankers near chance for digits on photos). Goals and seeds were fixed before the figures here were
seen. The weights of the last epoch count.
    spearman     of a score with the teacher's, over lists of visible patches, mean of an image
    map_spearman of a score with the teacher's mean rank over all lists of an image, 64 patches:
                 what a patch is worth depends on what else is seen, its mean rank less so
    object_auc   chance that a patch with ink (10 % of its pixels or more) outranks one without
    ink_kept     share of the ink in the best 25 % of the patches
Squares of four photos are no sample of all photos: their spread says little. `teacher` is the mean
rank of the teacher's scores over half of the lists of an image, compared with the other half: it
shows how far lists of one image agree. `ink` is the truth. Rows of `all` images are means over the
kinds and sizes; `above_random` is the smallest margin of a score's object AUC over that of random
scores on any of them.
"""

import argparse
import hashlib
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

# started by its path, only its own folder is on the path
sys.path.insert(0, str(Path(__file__).parents[1]))

import tables
import torch
from common import Row, add_ranker_options, device_parser, set_up, summary
from tables import Goal
from torch import Tensor

import ltrp_timm
from ltrp_timm.commands._flags import positive
from ltrp_timm.metrics import spearman
from ltrp_timm.weights.files import WEIGHTS_NAME
from studies.judging import agreement, as_seen_by, ink_kept, mean_map, object_auc, teacher_lists
from studies.learning_pictures import draw_maps, plot
from studies.small_run import KINDS, PATCH, SIDE, HeldOut, make_data, train

NAME = "learning"
TITLE = "A ranker trained without labels, its teacher, and scores without weights"
KEEP_RATIO = 0.25
WEIGHT_FREE = ("contrast", "pixel_std", "gradient", "colour", "centre", "random")
MEASURES = ("spearman", "map_spearman", "object_auc", "ink_kept")
OF_INK = MEASURES[2:]
AGGREGATES = ("mean", "max")


def goals() -> list[Goal]:
    """What the claim says."""
    conv = {"method": tuple(f"conv, {name}" for name in AGGREGATES)}
    found = [
        Goal(
            f"map spearman − best without weights, {kind}",
            {**conv, "images": kind, "px": SIDE},
            "map_spearman_gain",
            ">=",
            0.1,
        )
        for kind in KINDS
    ]
    every = {**conv, "images": "all"}
    return [
        *found,
        Goal("object AUC − random scores', least of all sets", every, "above_random", ">=", 0.05),
        Goal("object AUC − best without weights, all sets", every, "object_auc_gain", ">=", 0.0),
        Goal("ink kept − best without weights, all sets", every, "ink_kept_gain", ">=", 0.0),
    ]


def all_scores(images: Tensor, home: Path, aggregates: list[str]) -> dict[str, Tensor]:
    """Scores (B, N) of the trained rankers and of those without weights."""
    rankers = {
        f"conv, {name}": ltrp_timm.create_ranker("conv", pretrained=home / f"conv_{name}")
        for name in aggregates
    }
    rankers |= {
        name: ltrp_timm.create_ranker(name, patch_size=PATCH)
        for name in WEIGHT_FREE
        if name != "random"
    }
    with torch.inference_mode():
        maps = {
            name: ranker.eval()(as_seen_by(ranker, images)).flatten(1)
            for name, ranker in rankers.items()
        }
    draw = torch.Generator().manual_seed(0)  # another order for each image
    maps["random"] = torch.rand(maps["contrast"].shape, generator=draw)
    return maps


class Judged(NamedTuple):
    """What a set of held-out images says.

    Attributes:
        figures: by aggregate of the teacher and name of the score, each measure's (B,).
        maps: the scores (B, N) by name.
    """

    figures: dict[tuple[str, str], dict[str, Tensor]]
    maps: dict[str, Tensor]


def judge(held: HeldOut, home: Path, args: argparse.Namespace) -> Judged:
    """Every score against the teacher of each aggregate, at its size, and against the ink."""
    teacher = ltrp_timm.create_teacher(home / "teacher")
    plain, figures = all_scores(held.images, home, args.aggregates), {}
    maps = dict(plain)
    for aggregate in args.aggregates:
        own = f"conv, {aggregate}"
        candidates = {own: plain[own], **{name: plain[name] for name in WEIGHT_FREE}}
        if held.ink is not None:
            candidates["ink"] = held.ink
        found = {name: _by_ink(scores, held.ink) for name, scores in candidates.items()}
        if held.images.shape[-1] == SIDE:
            ratio = args.mask_ratio
            lists = teacher_lists(teacher, held.images, ratio, aggregate, args.draws, seed=2)
            half, count = len(lists) // 2, teacher.num_patches
            first, rest = mean_map(lists[:half], count), mean_map(lists[half:], count)
            whole = mean_map(lists, count)
            for name, scores in candidates.items():
                found[name] |= _by_teacher(scores, lists, whole)
            of_teacher = {**_by_teacher(first, lists[half:], rest), **_by_ink(whole, held.ink)}
            found = {"teacher": of_teacher, **found}
            maps[f"teacher, {aggregate}"] = whole
        figures |= {(aggregate, name): values for name, values in found.items()}
    return Judged(figures, maps)


def _by_ink(scores: Tensor, ink: Tensor | None) -> dict[str, Tensor]:
    if ink is None:
        return {}
    kept = ink_kept(scores, ink, KEEP_RATIO)
    return {"object_auc": object_auc(scores, ink), "ink_kept": kept}


def _by_teacher(
    scores: Tensor, lists: list[tuple[Tensor, Tensor]], mean_ranks: Tensor
) -> dict[str, Tensor]:
    of_map = spearman(scores, mean_ranks, reduction="none")
    return {"spearman": agreement(scores, lists), "map_spearman": of_map}


def to_rows(judged: Judged, fixed: Row) -> list[Row]:
    """A row for each score: means with quartiles, and how far above the best without weights."""
    rows: list[Row] = []
    for (aggregate, name), found in judged.figures.items():
        line: Row = {"aggregate": aggregate, "method": name, "above_random": ""}
        for measure in MEASURES:
            if measure not in found:
                columns = (measure, f"{measure}_low", f"{measure}_high", f"{measure}_gain")
                line |= dict.fromkeys(columns, "")
                continue
            free = [judged.figures[aggregate, other][measure].mean() for other in WEIGHT_FREE]
            line |= summary(measure, found[measure])
            line[f"{measure}_gain"] = round(float(found[measure].mean() - max(free)), 5)
        if "object_auc" in found:
            random = judged.figures[aggregate, "random"]["object_auc"]
            line["above_random"] = round(float((found["object_auc"] - random).mean()), 5)
        rows.append({**line, **fixed})
    return rows


def over_all(rows: list[Row]) -> list[Row]:
    """Rows of one seed -> for each score the means over kinds and sizes of images with ink."""
    known = [r for r in rows if r["object_auc"] != "" and r["method"] != "teacher"]
    found: dict[tuple[str, str], Row] = {}
    for key in dict.fromkeys((r["aggregate"], r["method"]) for r in known):
        own = [r for r in known if (r["aggregate"], r["method"]) == key]
        line = {name: "" if name.startswith(MEASURES) else value for name, value in own[0].items()}
        for measure in OF_INK:
            line[measure] = round(sum(r[measure] for r in own) / len(own), 5)
        above = min(r["above_random"] for r in own)
        found[key] = {**line, "images": "all", "px": "", "above_random": above}
    for (aggregate, _), line in found.items():
        for measure in OF_INK:
            best = max(found[aggregate, name][measure] for name in WEIGHT_FREE)
            line[f"{measure}_gain"] = round(line[measure] - best, 5)
    return list(found.values())


def run(args: argparse.Namespace, where: Row, folder: Path) -> tuple[list[Row], Any]:
    """Make the images; for each seed train and judge; rows and the picture."""
    start = time.perf_counter()
    held = make_data(args, folder)
    print(f"images: {time.perf_counter() - start:.0f} s", flush=True)
    settings = ("held_out", "teacher_epochs", "ranker_epochs", "teacher_lr", "ranker_lr")
    settings += ("list_size", "norm_pix")
    fixed: Row = {name: getattr(args, name) for name in (*settings, "mask_ratio", "draws")}
    fixed |= {"train_scenes": args.scenes, "train_crops": args.crops, **where}
    rows: list[Row] = []
    args.output.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        seconds, home = train(args, folder, seed), folder / f"seed_{seed}"
        judged = {key: judge(images, home, args) for key, images in held.items()}
        if seed == args.seeds[0]:
            maps = {key: found.maps for key, found in judged.items()}
            path = args.output / f"{NAME}_maps.png"
            draw_maps(held, maps, path, args.aggregates[0], KEEP_RATIO)
        own = [
            line
            for (kind, side), found in judged.items()
            for line in to_rows(found, {"images": kind, "px": side, "seed": seed, **fixed})
        ]
        for line in [*own, *over_all(own)]:
            taken = ("teacher", line["method"]) if line["method"].startswith("conv") else ()
            line["train_seconds"] = round(sum(seconds[stage] for stage in taken), 1)
            line["weights_sha256"] = digest(home, line["method"])
            rows.append(line)
    return rows, plot(rows)


def digest(home: Path, method: str) -> str:
    """SHA-256 of the weights file of a trained ranker; empty for a score without weights."""
    path = weights_of(home, method.partition(", ")[2])
    found = method.startswith("conv")
    return hashlib.sha256(path.read_bytes()).hexdigest() if found else ""


def weights_of(home: Path, aggregate: str) -> Path:
    """The weights file of the ranker of an aggregate."""
    return home / f"conv_{aggregate}" / WEIGHTS_NAME


def table(rows: list[Row]) -> list[Row]:
    """The figures as text."""
    return [
        {
            "seed": row["seed"],
            "images": f"{row['images']} {row['px']}".strip(),
            "teacher's aggregate": row["aggregate"],
            "score": row["method"],
            "spearman with the teacher's lists": _figure(row, "spearman"),
            "with its mean rank": _figure(row, "map_spearman"),
            "object AUC": _figure(row, "object_auc"),
            "ink kept at 25 %": _figure(row, "ink_kept"),
        }
        for row in rows
    ]


def _figure(row: Row, column: str) -> str:
    if row[column] == "":
        return "–"
    if row[f"{column}_low"] == "":
        return f"{row[column]:.2f}"
    return tables.figure(row, column, ".2f")


def main() -> None:
    """Train, judge, write CSV, PNG and Markdown, check the goals."""
    parser = device_parser((__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--scenes", type=positive, default=2000, help="to train on")
    add("--crops", type=positive, default=2000, help="squares of photos to train on")
    add("--held-out", type=positive, default=48, help="images of each kind to measure on")
    add("--teacher-epochs", type=positive, default=15, help="of the MAE")
    add("--ranker-epochs", type=positive, default=3, help="of each ranker")
    add("--teacher-lr", type=float, default=1e-3, help="learning rate")
    add_ranker_options(parser)
    text = "the MAE paints each patch normalised by its own mean and standard deviation"
    add("--norm-pix", action=argparse.BooleanOptionalAction, default=False, help=text)
    text = "of the scores over the masked patches; a ranker for each"
    add("--aggregates", nargs="+", choices=AGGREGATES, default=["mean"], help=text)
    add("--draws", type=positive, default=4, help="orders of the patches that are cut into lists")
    text = "folder for images, runs and weights; a second run continues there"
    add("--runs", type=Path, help=text)
    args = parser.parse_args()
    where = set_up(args)
    with tempfile.TemporaryDirectory() as name:
        folder = args.runs or Path(name)
        rows, picture = run(args, where, folder)
    tables.conclude(NAME, TITLE, rows, table(rows), goals(), picture, args)


if __name__ == "__main__":
    main()
