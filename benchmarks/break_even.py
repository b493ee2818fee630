"""Up to which keep ratio does a ranker pay for itself?

Claim. `contrast` and `conv` pay for themselves on every ViT when half of the patches goes, and long
before; the paper's `vit_small` ranker, as dear as a ViT-S, needs a ViT-B behind it and keeps it
from gaining much, and in front of a ViT-S or ViT-Ti there is no keep ratio worth having.

Arithmetic. A ViT on a share k of its tokens takes nearly k times as long, so a ranker that takes
the share s of the full model's time pays while k + s < 1: the break-even keep ratio is about 1 - s.
`vit_small` in front of a ViT-S has s = 1; in front of a ViT-B s is about 0.3; `conv` in front of a
ViT-Ti at batch 1 about 0.07.

Timed, in turns in one process: the plain model, and ltrp_timm.drop_patches with each ranker at each
keep ratio, ranking included. `break_even` is the largest keep ratio at which the pruned model takes
as long as the full one, linear between the measured ratios; at 1 nothing is ranked, so only
ratios below the largest measured one are looked at; 0 says that no measured ratio pays.
Weights are random: they do not change the time.
"""

import argparse
import statistics
from typing import Any

import tables
from common import (
    ON_ONE_CORE,
    VIT_B,
    VIT_S,
    VIT_TI,
    Calls,
    Row,
    compare,
    create_full,
    inference,
    load_pyplot,
    make_images,
    make_parser,
    pruned,
    rows_of,
    spread,
    timing_columns,
)
from tables import Goal

from ltrp_timm.measure import throughput
from ltrp_timm.measure.payoff import break_even

NAME = "break_even"
TITLE = "Up to which keep ratio a ranker pays for itself"
BOUND = ("speedup", ">=", 1.0)


def goals() -> list[Goal]:
    """What the claim says of the two cheap rankers."""
    where = {**ON_ONE_CORE, "keep_ratio": 0.5, "method": ("contrast", "conv")}
    text = "keep 0.5, times as fast as full"
    cases = [(model, batch) for model in (VIT_TI, VIT_S, VIT_B) for batch in (1, 8)]
    return [
        Goal(f"{model} batch {batch} {text}", {**where, "model": model, "batch": batch}, *BOUND)
        for model, batch in cases
    ]


def run_case(full: Any, case: Row, args: argparse.Namespace, where: Row) -> list[Row]:
    """All rankers and keep ratios at one batch size."""
    images = make_images(full, case["batch"], args)
    keep_ratios = sorted(args.keep_ratios)
    fns: Calls = {"full": inference(full, images)}
    for ranker in args.rankers:
        for ratio in keep_ratios:
            fns[f"{ranker} {ratio}"] = inference(pruned(full, ranker, ratio), images)
    timings = compare(fns, args)
    rows = []
    for ranker in args.rankers:
        found = [timings[f"{ranker} {ratio}"] for ratio in keep_ratios]
        costs = [throughput.ratio(timing, timings["full"]).median for timing in found]
        even = round(break_even(keep_ratios, costs), 4)
        for ratio, timing in zip(keep_ratios, found):
            row = {**case, "method": ranker, "keep_ratio": ratio, "break_even": even}
            row |= timing_columns(timing, case["batch"])
            row["full_seconds"] = round(statistics.median(timings["full"].seconds), 7)
            row |= spread("speedup", throughput.ratio(timings["full"], timing))
            rows.append({**row, **where})
    return rows


def run(args: argparse.Namespace, where: Row) -> list[Row]:
    """Measure every model and batch size."""
    rows: list[Row] = []
    for name in args.models:
        full = create_full(name, args)
        for batch in args.batch_sizes:
            new = run_case(full, {"model": name, "batch": batch}, args, where)
            rows += new
            found = {row["method"]: f"{row['break_even']:.2f}" for row in new}
            print(f"{name} batch {batch}, {new[0]['rounds']} rounds: {found}", flush=True)
    return rows


def table(rows: list[Row]) -> list[Row]:
    """A line for each model, batch size and ranker."""
    lines: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = (row["model"], row["batch"], row["method"])
        even = f"{row['break_even']:.2f}" if row["break_even"] else "never"
        names = {"model": key[0], "batch": key[1], "ranker": key[2], "pays up to keep": even}
        line = lines.setdefault(key, names)
        line[f"× at {row['keep_ratio']:g}"] = tables.figure(row, "speedup", ".2f")
    return list(lines.values())


def plot(rows: list[Row], args: argparse.Namespace) -> Any:
    """Speed-up against keep ratio and the line of break-even: a panel per model and batch size."""
    shape = (len(args.batch_sizes), len(args.models))
    figure, axes = load_pyplot().subplots(
        *shape, figsize=(1 + 3.6 * shape[1], 1 + 3 * shape[0]), squeeze=False, sharex=True
    )
    for i, batch in enumerate(args.batch_sizes):
        for j, model in enumerate(args.models):
            ax = axes[i][j]
            ax.axhline(1.0, color="k", linestyle=":", label="full")
            for ranker in args.rankers:
                line = [
                    row
                    for row in rows
                    if (row["model"], row["batch"], row["method"]) == (model, batch, ranker)
                ]
                x, y = ([row[column] for row in line] for column in ("keep_ratio", "speedup"))
                ax.plot(x, y, "-o", ms=3, label=ranker)
            ax.set_title(f"{model}, batch {batch}", fontsize=9)
            ax.set_ylim(bottom=0)
            ax.grid(alpha=0.3)
        axes[i][0].set_ylabel("times as fast as full")
    for ax in axes[-1]:
        ax.set_xlabel("keep ratio")
    axes[0][0].legend(fontsize=8)
    return figure


def main() -> None:
    """Measure, write CSV, PNG and Markdown, check the goals."""
    args = make_parser(
        (__doc__ or "").splitlines()[0],
        models=[VIT_TI, VIT_S, VIT_B],
        keep_ratios=[0.95, 0.75, 0.5, 0.25],
        rankers=["contrast", "conv", "vit_tiny", "vit_small"],
    ).parse_args()
    rows = rows_of(NAME, run, args)
    tables.conclude(NAME, TITLE, rows, table(rows), goals(), plot(rows, args), args)


if __name__ == "__main__":
    main()
