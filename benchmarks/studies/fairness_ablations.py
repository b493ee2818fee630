"""What makes a ranker without labels better: mask, removal, aggregate, loss, size, more of it?

Claim. The mean change over the masked patches says little about what lies in a patch; the
strongest local change (`max`), or the squared one (`mse`), says more, and longer training says it
better. A ranker of this kind does not learn how much a patch shows, which `contrast` measures: one
that learns from both by halves keeps more of unlabelled objects than either.

Arithmetic. At 64 patches a mask ratio of 0.75 leaves 16 visible, 0.5 leaves 32 and 0.9 leaves 6, of
which a list has at most 10. A ranker of 64 channels and 4 blocks has 0.15 M weights and sees 10 000
scenes once, in 306 steps of 32 (200 of them are held out): every variant has the same images in the
same order.

Each variant differs in what its name says from `base`: removal `full`, aggregate `mean`, metric
`l1`, mask ratio 0.75, ListMLE, conv 64 × 4. Teachers and judges are those of
`benchmarks/studies/fairness.py --runs FOLDER`, with the same FOLDER; it measures on other scenes
than that benchmark. Nothing here saw a label, so all ten digits count alike:
    found     share of the kept patches that have ink on a tenth of their pixels or more
    order     Spearman of the score with the ink of a patch, among those that have ink
    recall    share of ink in kept patches, mean over classes
    mAP       of the judge, mean over classes
    − contrast  mAP above that of the `contrast` ranker: same judge, same scenes
Rows of seed `all` are means over the seeds; low and high there are the extremes of the seeds, and
else 95 % intervals over resampled scenes. `mixed` is not a training: 0.7 of the patches are the
base's best, clusters choose the rest.
"""

import argparse
import statistics
import sys
from functools import cache
from pathlib import Path
from typing import Any

# started by its path, only its own folder is on the path
sys.path.insert(0, str(Path(__file__).parents[1]))

import tables
import torch
from common import WIDTH, Row, load_pyplot, set_up

import ltrp_timm
from ltrp_timm.selection import num_keep
from ltrp_timm.selection.coverage import patch_pixels, select_mixed
from studies.fairness.measures import Judging, Kept, N, interval, scores_of
from studies.fairness.networks import make_judge
from studies.fairness.scenes import PATCH, SIDE, TEST, TRAIN, make_scenes
from studies.fairness.stages import Run, load_network, make_parser
from studies.judging import ink_order, inked_among_kept

NAME = "fairness_ablations"
TITLE = "What makes a ranker that saw no labels better"
KEEP_RATIO = 0.25
SETTINGS = ("scale", "scenes", "mask_ratio", "list_size", "ranker_epochs", "ranker_lr")
VIT = {"ranker": "vit_tiny", "ranker_args": {"embed_dim": 96, "depth": 4, "num_heads": 3}}
# axis, what is changed
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "base": ("base", {}),
    "mask ratio 0.5": ("mask ratio", {"mask_ratio": 0.5}),
    "mask ratio 0.9": ("mask ratio", {"mask_ratio": 0.9}),
    "removal encoder": ("removal", {"removal": "encoder"}),
    "removal decoder": ("removal", {"removal": "decoder"}),
    "aggregate max": ("aggregate", {"aggregate": "max"}),
    "metric mse": ("metric", {"metric": "mse"}),
    "list_net": ("loss", {"loss": "list_net"}),
    "rank_net": ("loss", {"loss": "rank_net"}),
    "lambda_rank": ("loss", {"loss": "lambda_rank"}),
    "pointwise_mse": ("loss", {"loss": "pointwise_mse"}),
    "conv 32 × 2": ("ranker", {"ranker_args": {"width": 32, "depth": 2}}),
    "conv 128 × 6": ("ranker", {"ranker_args": {"width": 128, "depth": 6}}),
    "vit": ("ranker", VIT),
    "vit, visible only": ("ranker", {**VIT, "visible_only": True}),
    "list of 16": ("list", {"list_size": 16}),
    # of a list of ten its top ten are all: then it is ListMLE
    "focused_rank, list of 16": ("list", {"loss": "focused_rank", "list_size": 16}),
    "3 cycles": ("more", {"epochs": [1, 1, 1]}),
    "max, metric mse": ("max and", {"aggregate": "max", "metric": "mse"}),
    "max, mask ratio 0.5": ("max and", {"aggregate": "max", "mask_ratio": 0.5}),
    "max, list of 16": ("max and", {"aggregate": "max", "list_size": 16}),
    "max, 3 cycles": ("max and", {"aggregate": "max", "epochs": [1, 1, 1]}),
    "max, half contrast": ("max and", {"aggregate": "max", "distill_from": "contrast"}),
    "max, half contrast, 3 cycles": (
        "max and",
        {"aggregate": "max", "distill_from": "contrast", "epochs": [1, 1, 1]},
    ),
    "contrast alone": ("distilled", {"teacher": None, "distill_from": "contrast"}),
}
FREE = ("contrast", "pixel_std", "random")


def goals() -> list[tables.Goal]:
    """What the claim says, of the best ranker: no worse than the best score without weights."""
    where = {"seed": "all", "method": "max, half contrast, 3 cycles"}
    return [tables.Goal("mAP − contrast's", where, "above_contrast", ">=", 0.0)]


def variants(folder: Path, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Every variant's ranker, trained where it is not in the folder of its seed yet."""
    settings = {name: getattr(args, name) for name in SETTINGS}
    run = Run(folder / f"seed_{seed}", seed, args, settings)
    scenes = cache(lambda: make_scenes(args.scenes, 0, TRAIN))
    found = {}
    for name, (_, options) in VARIANTS.items():
        own = {**options}
        if own.get("teacher", True) is None:
            own |= {"img_size": SIDE, "ranker_args": {"patch_size": PATCH}}
        found[name] = run.ranker(f"ablation {name}", scenes, **own).eval()
    return found


def measured(kept: Kept) -> Row:
    """Means over the classes with intervals."""
    assert kept.precision is not None
    recall, precision = kept.recall.mean(dim=1), kept.precision.mean(dim=1)
    return {**interval("recall", recall), **interval("map", precision)}


def judge_seed(folder: Path, seed: int, args: argparse.Namespace) -> list[Row]:
    """Rows of one seed."""
    judge = load_network(make_judge(), folder / f"seed_{seed}", "judge")
    judging = Judging(make_scenes(args.test_scenes, 20_000 + seed, TEST), judge)
    rankers = variants(folder, seed, args)
    free = {name: ltrp_timm.create_ranker(name, patch_size=PATCH).eval() for name in FREE}
    free["random"].generator = torch.Generator().manual_seed(0)
    scores = {name: scores_of(net, judging.scenes) for name, net in (rankers | free).items()}
    ink = judging.ink.sum(dim=1) / PATCH**2
    tokens = patch_pixels(judging.scenes.pixels(), (SIDE // PATCH, SIDE // PATCH))
    keep = select_mixed(scores["base"], num_keep(N, KEEP_RATIO), tokens)
    scores["mixed"] = torch.zeros(len(keep), N).scatter_(1, keep, 1.0)
    axes = {name: axis for name, (axis, _) in VARIANTS.items()} | {"mixed": "selection"}
    rows = []
    for name, values in scores.items():
        row: Row = {"seed": seed, "axis": axes.get(name, "no weights"), "method": name}
        row |= measured(judging(values, KEEP_RATIO))
        row["found"] = round(float(inked_among_kept(values, ink, KEEP_RATIO).mean()), 5)
        row["ink_order"] = round(float(ink_order(values, ink).mean()), 5)
        rows.append(row)
    of_contrast = next(row["map"] for row in rows if row["method"] == "contrast")
    return [{**row, "above_contrast": round(row["map"] - of_contrast, 5)} for row in rows]


def over_seeds(rows: list[Row]) -> list[Row]:
    """Means over the seeds, with their extremes."""
    found = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        line: Row = {**own[0], "seed": "all"}
        for name in ("recall", "map", "above_contrast", "found", "ink_order"):
            values = [row[name] for row in own]
            line[name] = round(statistics.mean(values), 5)
            if f"{name}_low" in line:
                line |= {f"{name}_low": min(values), f"{name}_high": max(values)}
        found.append(line)
    return found


def table(rows: list[Row]) -> list[Row]:
    """The figures over all seeds as text."""
    return [
        {
            "axis": row["axis"],
            "variant": row["method"],
            "kept patches with ink": f"{row['found']:.2f}",
            "order by ink": f"{row['ink_order']:.2f}",
            "recall": tables.figure(row, "recall", ".2f"),
            "mAP": tables.figure(row, "map", ".2f"),
            "mAP − contrast's": f"{row['above_contrast']:+.3f}",
        }
        for row in rows
        if row["seed"] == "all"
    ]


def plot(rows: list[Row]) -> Any:
    """A bar for each variant, with the extremes of the seeds; a line where `contrast` is."""
    own = [row for row in rows if row["seed"] == "all"]
    figure, axes = load_pyplot().subplots(1, 2, figsize=(WIDTH, 6.5), sharey=True)
    names = [row["method"] for row in own]
    for ax, name in zip(axes, ("recall", "map")):
        below = [row[name] - row[f"{name}_low"] for row in own]
        above = [row[f"{name}_high"] - row[name] for row in own]
        ax.barh(names, [row[name] for row in own], xerr=(below, above), capsize=2)
        ax.axvline(next(r[name] for r in own if r["method"] == "contrast"), color="k", ls=":")
        ax.grid(alpha=0.3, axis="x")
    axes[0].invert_yaxis()
    axes[0].set_xlabel(f"share of ink kept at keep ratio {KEEP_RATIO:g}")
    axes[1].set_xlabel("mAP of the judge")
    return figure


def main() -> None:
    """Train, judge, write CSV, PNG and Markdown, check the goals."""
    parser = make_parser((__doc__ or "").splitlines()[0])
    text = "folder of benchmarks/studies/fairness.py's training"
    parser.add_argument("--runs", type=Path, required=True, help=text)
    parser.set_defaults(name=NAME, scenes=10_000, ranker_epochs=[1], seeds=[1, 2])
    args = parser.parse_args()
    where = set_up(args)
    for seed in args.seeds:  # the last that fairness.py writes for a seed
        if not (args.runs / f"seed_{seed}" / "rows.json").exists():
            raise SystemExit(f"{args.runs} has no seed {seed}: run fairness.py first, to its end")
    rows = [row for seed in args.seeds for row in judge_seed(args.runs, seed, args)]
    fixed = {name: getattr(args, name) for name in (*SETTINGS, "test_scenes")}
    rows = [{**row, **fixed, **where} for row in [*rows, *over_seeds(rows)]]
    tables.conclude(NAME, TITLE, rows, table(rows), goals(), plot(rows), args)


if __name__ == "__main__":
    main()
