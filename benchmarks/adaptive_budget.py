"""Does it pay to let each image choose how many patches it keeps?

Claim. Where some images are busy and others nearly empty, a threshold on scores that compare
between images keeps more of the objects than a fixed budget of the same mean cost; sorting a batch
into buckets costs little. Ranks within an image, as `contrast` gives them, cannot tell busy images
from empty ones; a share of an image's own score mass hardly can. The page of results
lists what does not hold.

Arithmetic. Half of the scenes hold 1 or 2 objects and need a tenth of their patches, half hold 8 to
12 and need most of them. A fixed keep ratio of 0.3 gives each scene 59 of 196: too many here, too
few there. A batch of 32 in up to 8 buckets runs as up to 8 batches of 4: the part of a call's cost
that does not grow with the batch is paid up to 8 times. Each call reads the numbers of the buckets
from the device once.

Scenes: real digits of scikit-learn, enlarged to 24 - 56 px, tinted, on a gradient with low and
high frequency noise; which pixels are ink is known. Levels are calibrated on separate scenes
(`LTRPModel.calibrate`, 8 sizes), then measured on others. Budgets:
    fixed         top K of every image
    mass          as few patches as hold a share of the score mass
    threshold     those with a score of at least a level
`kept_ink` is the share of ink pixels in kept patches, `worst_ink` that of the worst tenth of the
images, `mean_share` the share of patches kept. Timed in turns in one process: a forward of
--batch-sizes scenes, ranker included; `time_ratio` is the time ÷ that of the fixed budget.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from common import VIT_S, Row, compare, create_full, inference, make_parser, pruned, timed_row
from runner import Benchmark, cells, figure, milliseconds, panels, plain
from studies.judging import ink_per_patch
from studies.scenes import make_scenes
from tables import Goal, nice
from torch import Tensor

from ltrp_timm.commands._flags import positive
from ltrp_timm.measure import throughput

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


def run(args: argparse.Namespace) -> Iterator[list[Row]]:
    """Measure every ranker, keep ratio and batch size on the first model."""
    full = create_full(args.models[0], args)
    known, _ = make_scenes(args.scenes, seed=0)
    scenes, ink = make_scenes(args.scenes, seed=1)
    mean, std = (
        torch.tensor(full.pretrained_cfg[name]).reshape(1, 3, 1, 1) for name in ("mean", "std")
    )
    known, scenes = (known - mean) / std, (scenes - mean) / std
    for ranker in args.rankers:
        for keep_ratio in args.keep_ratios:
            models = {budget: pruned(full, ranker, keep_ratio) for budget in BUDGETS}
            for budget in BUDGETS[1:]:
                models[budget].calibrate(known.split(32), keep_ratio, budget)
            kept = {budget: kept_ink(model, scenes, ink) for budget, model in models.items()}
            for batch in args.batch_sizes:
                calls = {name: inference(of, scenes[:batch]) for name, of in models.items()}
                timings = compare(calls, args)
                case = {"ranker": ranker, "keep_ratio": keep_ratio, "batch": batch}
                rows = []
                for budget in BUDGETS:
                    row = {**case, "method": budget, **ink_columns(kept, budget)}
                    ratio = throughput.ratio(timings[budget], timings["fixed"])
                    row = timed_row(row, timings[budget], time_ratio=ratio)
                    rows.append({**row, "scenes": args.scenes, "model": args.models[0]})
                yield rows


def ink_columns(kept: dict[str, tuple[Tensor, float]], budget: str) -> Row:
    """What a budget keeps of patches and of ink."""
    shares, patches = kept[budget]
    figures = {"mean_share": patches, "kept_ink": shares.mean(), "worst_ink": shares.quantile(0.1)}
    figures["ink_gain"] = (shares - kept["fixed"][0]).mean()
    return {name: round(float(value), 4) for name, value in figures.items()}


def plot(rows: list[Row], args: argparse.Namespace) -> Any:
    """Kept ink against patches kept: a panel for each ranker, a line for each budget."""
    rankers = list(dict.fromkeys(row["ranker"] for row in rows))
    picture, axes = panels(1, len(rankers), sharey=True)
    for ax, ranker in zip(axes[0], rankers):
        for budget in BUDGETS:
            of_both = [r for r in rows if r["ranker"] == ranker and r["method"] == budget]
            line = sorted({(row["mean_share"], row["kept_ink"]) for row in of_both})
            ax.plot(*zip(*line), "-o", ms=3, label=nice(budget))
        ax.set_title(ranker)
        ax.set_xlabel("mean share of patches kept")
    axes[0][0].set_ylabel("share of object pixels kept")
    axes[0][0].legend()
    return picture


def parser(description: str) -> argparse.ArgumentParser:
    """The options."""
    options = make_parser(
        description,
        models=[VIT_S],
        rankers=["gradient", "pixel_std", "contrast"],
        keep_ratios=[0.2, 0.3, 0.5],
        batch_sizes=[1, 32],
    )
    text = "number of scenes to calibrate on, and to measure on"
    options.add_argument("--scenes", type=positive, default=256, help=text)
    return options


main = Benchmark(
    name="adaptive_budget",
    doc=__doc__,
    title="Adaptive budgets against fixed ones of equal mean",
    run=run,
    progress="{method} keeps {kept_ink:.3f} of the ink in {mean_share:.3f}, time ×{time_ratio:.3f}",
    table=cells(
        {
            "model": plain("model"),
            "ranker": plain("ranker"),
            "keep": figure("keep_ratio", "g"),
            "batch": plain("batch"),
            "budget": plain("method"),
            "patches kept": figure("mean_share", ".3f"),
            "kept ink": figure("kept_ink", ".3f"),
            "of the worst tenth": figure("worst_ink", ".3f"),
            "ms": milliseconds,
            "time ÷ fixed (quartiles)": figure("time_ratio", ".2f"),
        }
    ),
    goals=goals,
    plot=plot,
    parser=parser,
).main


if __name__ == "__main__":
    main()
