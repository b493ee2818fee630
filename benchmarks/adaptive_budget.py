"""Does it pay to let each image choose how many patches it keeps?

Claim. On images of which some are busy and some nearly empty, a threshold on scores that compare
between images keeps more of the objects than a fixed budget that costs as much on average; sorting
a batch into buckets costs little. Ranks within an image, as `contrast` gives them, cannot tell busy
images from empty ones, and a share of an image's own score mass hardly can. How far that holds
stands in the README, under *Where it falls short*.

Arithmetic. Half of the scenes hold 1 or 2 objects and need a tenth of their patches, half hold 8 to
12 and need most of them. A fixed keep ratio of 0.3 gives all of them 59 of 196: too much here, too
little there. A batch of 32 in up to 8 buckets runs as up to 8 batches of 4: the cost of a call that
does not grow with its batch is paid up to 8 times. The numbers of the buckets are read from the
device once a call.

Scenes: real digits of scikit-learn, enlarged to 24 - 56 px, tinted, on a gradient with low and
high frequency noise; which pixels are ink is known. Levels are calibrated on scenes of their own
(`LTRPModel.calibrate`, 8 sizes), then measured on others. Budgets:
    fixed         top K of every image
    mass          as few patches as hold a share of the score mass
    threshold     those with a score of at least a level
`kept_ink` is the share of ink pixels in kept patches, `worst_ink` that of the worst tenth of the
images, `mean_share` the share of patches kept. Timed in turns in one process: a forward of
--batch-sizes scenes, ranker included; `time_ratio` is the time ÷ that of the fixed budget.
"""

import argparse
from typing import Any

import tables
import torch
from common import (
    VIT_S,
    Calls,
    Row,
    compare,
    create_full,
    inference,
    load_pyplot,
    make_parser,
    pruned,
    rows_of,
    spread,
    timing_columns,
)
from studies.judging import ink_per_patch
from studies.scenes import make_scenes
from tables import Goal
from torch import Tensor

from ltrp_timm.commands._flags import positive
from ltrp_timm.measure import throughput

NAME = "adaptive_budget"
TITLE = "Adaptive budgets against fixed ones of equal mean"
PATCH = 16
BUDGETS = ("fixed", "mass", "threshold")


def goals() -> list[Goal]:
    """What the claim says."""
    where = {"depth": "all", "ranker": "pixel_std", "keep_ratio": 0.2, "method": "threshold"}
    return [
        Goal("kept ink − that of the fixed budget", where, "ink_gain", ">=", 0.02),
        Goal("time ÷ that of the fixed budget", {**where, "batch": 32}, "time_ratio", "<=", 1.10),
    ]


def kept_ink(model: Any, images: Tensor, ink: Tensor) -> tuple[Tensor, float]:
    """Share of each image's ink in kept patches (B,), and the mean share of patches kept."""
    per_patch = ink_per_patch(ink, PATCH)
    shares, patches = [], []
    for image, amount in zip(images.split(1), per_patch):
        keep = model.keep_indices(image)[0]
        shares.append(amount[keep].sum() / amount.sum())
        patches.append(len(keep) / len(amount))
    return torch.stack(shares), sum(patches) / len(patches)


def set_budget(model: Any, budget: str, keep_ratio: float, images: Tensor) -> None:
    """Give a model that keeps ``keep_ratio`` its budget, calibrated on ``images``."""
    if budget != "fixed":
        model.calibrate(images.split(32), keep_ratio, budget)


def run_case(
    full: Any, ranker: str, keep_ratio: float, args: argparse.Namespace, where: Row
) -> list[Row]:
    """All budgets of one ranker at one mean keep ratio."""
    known, _ = make_scenes(args.scenes, seed=0)
    scenes, ink = make_scenes(args.scenes, seed=1)
    mean, std = (
        torch.tensor(full.pretrained_cfg[name]).reshape(1, 3, 1, 1) for name in ("mean", "std")
    )
    known, scenes = (known - mean) / std, (scenes - mean) / std
    models = {}
    for budget in BUDGETS:
        models[budget] = pruned(full, ranker, keep_ratio)
        set_budget(models[budget], budget, keep_ratio, known)
    kept = {budget: kept_ink(model, scenes, ink) for budget, model in models.items()}
    rows = []
    for batch in args.batch_sizes:
        images = scenes[:batch]
        calls: Calls = {name: inference(model, images) for name, model in models.items()}
        timings = compare(calls, args)
        for budget, (shares, patches) in kept.items():
            row: Row = {"ranker": ranker, "keep_ratio": keep_ratio, "batch": batch}
            row |= {"method": budget, "mean_share": round(patches, 4)}
            row |= {"kept_ink": round(float(shares.mean()), 4)}
            row |= {"worst_ink": round(float(shares.quantile(0.1)), 4)}
            row |= {"ink_gain": round(float((shares - kept["fixed"][0]).mean()), 4)}
            row |= timing_columns(timings[budget], batch)
            row |= spread("time_ratio", throughput.ratio(timings[budget], timings["fixed"]))
            rows.append({**row, "scenes": args.scenes, **where})
    return rows


def run(args: argparse.Namespace, where: Row) -> list[Row]:
    """Measure every ranker and keep ratio on the first model."""
    full = create_full(args.models[0], args)
    rows: list[Row] = []
    for ranker in args.rankers:
        for keep_ratio in args.keep_ratios:
            new = run_case(full, ranker, keep_ratio, args, {"model": args.models[0], **where})
            rows += new
            print(f"{ranker} keep {keep_ratio:g}:", flush=True)
            for row in new:
                print("  batch {batch} {method}: ink {kept_ink:.3f}".format(**row), end="")
                print(" at {mean_share:.3f}, time ×{time_ratio:.3f}".format(**row), flush=True)
    return rows


def table(rows: list[Row]) -> list[Row]:
    """The figures as text."""
    return [
        {
            "model": row["model"],
            "ranker": row["ranker"],
            "keep": f"{row['keep_ratio']:g}",
            "batch": row["batch"],
            "budget": row["method"],
            "patches kept": f"{row['mean_share']:.3f}",
            "kept ink": f"{row['kept_ink']:.3f}",
            "of the worst tenth": f"{row['worst_ink']:.3f}",
            "ms": f"{1e3 * row['seconds_median']:.0f}",
            "time ÷ fixed": tables.figure(row, "time_ratio", ".2f"),
        }
        for row in rows
    ]


def plot(rows: list[Row]) -> Any:
    """Kept ink against patches kept: a panel per ranker, a line per budget."""
    pyplot = load_pyplot()
    rankers = list(dict.fromkeys(row["ranker"] for row in rows))
    size = (1 + 4 * len(rankers), 4)
    figure, axes = pyplot.subplots(1, len(rankers), figsize=size, squeeze=False, sharey=True)
    for ax, ranker in zip(axes[0], rankers):
        for budget in BUDGETS:
            of_both = [r for r in rows if r["ranker"] == ranker and r["method"] == budget]
            line = sorted({(row["mean_share"], row["kept_ink"]) for row in of_both})
            ax.plot(*zip(*line), "-o", ms=3, label=budget)
        ax.set_title(ranker, fontsize=9)
        ax.set_xlabel("mean share of patches kept")
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel("share of ink kept")
    axes[0][0].legend(fontsize=8)
    return figure


def main() -> None:
    """Measure, write CSV, PNG and Markdown, check the goals."""
    parser = make_parser(
        (__doc__ or "").splitlines()[0],
        models=[VIT_S],
        rankers=["gradient", "pixel_std", "contrast"],
        keep_ratios=[0.2, 0.3, 0.5],
        batch_sizes=[1, 32],
    )
    parser.add_argument("--scenes", type=positive, default=256, help="to calibrate, and to measure")
    args = parser.parse_args()
    rows = rows_of(NAME, run, args)
    tables.conclude(NAME, TITLE, rows, table(rows), goals(), plot(rows), args)


if __name__ == "__main__":
    main()
