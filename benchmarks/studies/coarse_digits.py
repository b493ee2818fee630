"""After one epoch of fine-tuning, is a coarse rest better than dropping or a smaller image?

Claim. A small ViT that was trained on all patches and fine-tuned for one epoch on 24 of 64 patch
tokens classifies digits in clutter better with a coarse rest than with a smaller image of as many
patches.

Arithmetic. Scenes of 64 px are 64 patches of 8, or 16 cells. At keep ratio 0.375 there are 24
tokens: dropping keeps the 24 best patches; a coarse rest refines 2 cells and gives 14 coarsely, 22
tokens; the smaller image has 40 px, 25 patches. A digit covers 16 to 25 patches.

Data and model are those of finetune_digits.py: `full` goes on with all patches; `drop`, `dithered`
and `coarse` rank with `border`; `smaller image` resizes the scenes. All go on for one epoch, from
the same weights with equal options. Top-1 on 1000 held-out scenes with other handwriting, for three
seeds.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

# started by its path, only its own folder is on the path
sys.path.insert(0, str(Path(__file__).parents[1]))

import statistics

import tables
from common import WIDTH, Row, load_pyplot
from tables import Goal

from ltrp_timm.commands._flags import not_negative
from ltrp_timm.train.folder import LOG_NAME, read_log
from studies.finetune_digits import (
    SIDE,
    Scenes,
    common_options,
    digits_parser,
    run_in_folder,
    tune,
    write_start,
)

NAME = "coarse_digits"
TITLE = "One epoch of fine-tuning on 24 of 64 patch tokens, digits in clutter"
KEEP = 0.375
METHODS: dict[str, dict[str, Any]] = {
    "full": {"keep_ratio": 1.0},
    "drop": {"keep_ratio": KEEP, "ranker": "border"},
    "dithered": {"keep_ratio": KEEP, "ranker": "border", "selection": "dithered"},
    "coarse": {"keep_ratio": KEEP, "ranker": "border", "rest": "coarse"},
    "smaller image": {"keep_ratio": 1.0, "img_size": 40},
}


def goals() -> list[Goal]:
    """What the claim says."""
    where = {"method": "coarse", "seed": "mean"}
    return [Goal("top-1 − that of the smaller image", where, "over_smaller", ">=", 0.0)]


def run(args: argparse.Namespace, where: Row, folder: Path) -> list[Row]:
    """For each seed train once on all patches, then go on with each method; means at the end."""
    train, held = Scenes(args.scenes, 0, False), Scenes(args.held_out, 1, True)
    rows: list[Row] = []
    for seed in args.seeds:
        args.seed, place = seed, folder / str(seed)
        place.mkdir(exist_ok=True)
        write_start(args, place / "start.safetensors")
        common = {**common_options(args, held), "layer_decay": None}
        start: Row = {"checkpoint": place / "start.safetensors", "lr": args.lr}
        tune(train, place / "first", epochs=args.first_epochs, **start, **common)
        weights = place / "first" / "model.safetensors"
        for method, options in METHODS.items():
            own = {**common, "checkpoint": weights, "lr": args.lr / 3, "epochs": 1, **options}
            tune(train, place / method.replace(" ", "_"), **own)
            log = read_log(place / method.replace(" ", "_") / LOG_NAME)
            rows.append({"method": method, "seed": seed, "top1": log[-1]["val_top1"]})
        print(*(f"{row['method']} {row['top1']:.3f}" for row in rows[-len(METHODS) :]), flush=True)
    for method in METHODS:
        found = [row["top1"] for row in rows if row["method"] == method]
        rows.append({"method": method, "seed": "mean", "top1": statistics.mean(found)})
    fixed = {"keep_ratio": KEEP, "img_size": SIDE, "scenes": args.scenes, "held_out": args.held_out}
    fixed |= {"first_epochs": args.first_epochs, "lr": args.lr, **where}
    return [{**row, **compared(row, rows), **fixed} for row in rows]


def compared(row: Row, rows: list[Row]) -> Row:
    """A row compared with the other methods of its seed."""
    top1 = {one["method"]: one["top1"] for one in rows if one["seed"] == row["seed"]}
    rivals = {"full": "full", "drop": "drop", "smaller": "smaller image"}
    return {f"over_{key}": round(row["top1"] - top1[name], 5) for key, name in rivals.items()}


def table(rows: list[Row]) -> list[Row]:
    """The figures as text."""
    return [
        {
            "seed": row["seed"],
            "method": row["method"],
            "top-1": f"{row['top1']:.1%}",
            "− drop": f"{100 * row['over_drop']:+.1f}",
            "− smaller image": f"{100 * row['over_smaller']:+.1f}",
        }
        for row in rows
    ]


def plot(rows: list[Row]) -> Any:
    """Top-1 of each method and seed."""
    figure, ax = load_pyplot().subplots(figsize=(WIDTH, 3.6))
    seeds = [row["seed"] for row in rows if row["method"] == "full" and row["seed"] != "mean"]
    for seed in seeds:
        own = [row for row in rows if row["seed"] == seed]
        ax.plot([r["method"] for r in own], [r["top1"] for r in own], "o:", label=f"seed {seed}")
    means = [row for row in rows if row["seed"] == "mean"]
    ax.plot([r["method"] for r in means], [r["top1"] for r in means], "k_", ms=24, label="mean")
    ax.set_ylabel("held-out top-1")
    ax.legend()
    ax.grid(alpha=0.3)
    return figure


def main() -> None:
    """Train, write CSV, PNG and Markdown, check the goals."""
    parser = digits_parser(__doc__ or "")
    text = "of the training"
    parser.add_argument("--seeds", type=not_negative, nargs="+", default=[0, 1, 2], help=text)
    args = parser.parse_args()
    rows = run_in_folder(run, args)
    tables.conclude(NAME, TITLE, rows, table(rows), goals(), plot(rows), args)


if __name__ == "__main__":
    main()
