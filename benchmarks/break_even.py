"""Up to which keep ratio does a ranker pay for itself?

Claim. `contrast` and `conv` pay for themselves on every ViT when half of the patches are dropped,
and long before. The paper's `vit_small` ranker costs as much as a ViT-S: in front of a ViT-B little
gain is left, and in front of a ViT-S or ViT-Ti it does not pay at any keep ratio.

Arithmetic. A ViT on a share k of its tokens takes nearly k times as long, so a ranker that takes
the share s of the full model's time pays while k + s < 1: the break-even keep ratio is about 1 - s.
`vit_small` in front of a ViT-S has s = 1; in front of a ViT-B s is about 0.3; `conv` in front of a
ViT-Ti at batch 1 about 0.07.

Timed, in turns in one process: the plain model, and ltrp_timm.drop_patches with each ranker at each
keep ratio, ranking included. `break_even` is the largest keep ratio at which the pruned model takes
as long as the full one, interpolated linearly between measured ratios. It is at most the largest
measured ratio, as nothing is ranked at 1; it is 0 where no measured ratio pays.
Weights are random: they do not change the time.
"""

import argparse
import functools
import statistics
from collections.abc import Iterator
from typing import Any

import tables
from common import (
    ON_ONE_CORE,
    VIT_B,
    VIT_S,
    VIT_TI,
    Calls,
    Row,
    batches,
    compare,
    inference,
    make_parser,
    pruned,
    spread,
    timed_row,
)
from runner import SPEEDUP, Benchmark, lines
from tables import Goal

from ltrp_timm.measure import throughput
from ltrp_timm.measure.payoff import break_even

BOUND = ("speedup", ">=", 1.0)


def goals() -> list[Goal]:
    """What the claim says of the two cheap rankers."""
    where = {**ON_ONE_CORE, "keep_ratio": 0.5, "method": ("contrast", "conv")}
    text = "keep 0.5, speed-up over full"
    cases = [(model, batch) for model in (VIT_TI, VIT_S, VIT_B) for batch in (1, 8)]
    return [
        Goal(f"{model} batch {batch} {text}", {**where, "model": model, "batch": batch}, *BOUND)
        for model, batch in cases
    ]


def run(args: argparse.Namespace) -> Iterator[list[Row]]:
    """Measure every model and batch size, all rankers and keep ratios in turns."""
    keep_ratios = sorted(args.keep_ratios)
    for full, images, case in batches(args):
        calls: Calls = {"full": inference(full, images)}
        for ranker in args.rankers:
            for ratio in keep_ratios:
                calls[f"{ranker} {ratio}"] = inference(pruned(full, ranker, ratio), images)
        timings = compare(calls, args)
        rows = []
        for ranker in args.rankers:
            found = [timings[f"{ranker} {ratio}"] for ratio in keep_ratios]
            costs = [throughput.ratio(timing, timings["full"]).median for timing in found]
            even = round(break_even(keep_ratios, costs), 4)
            for ratio, timing in zip(keep_ratios, found):
                row = {**case, "method": ranker, "keep_ratio": ratio, "break_even": even}
                row = timed_row(row, timing)
                row["full_seconds"] = round(statistics.median(timings["full"].seconds), 7)
                rows.append(row | spread("speedup", throughput.ratio(timings["full"], timing)))
        yield rows


def table(rows: list[Row]) -> list[Row]:
    """A line for each model, batch size and ranker."""
    lines: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = (row["model"], row["batch"], row["method"])
        even = f"{row['break_even']:.2f}" if row["break_even"] else "never"
        names = {"model": key[0], "batch": key[1], "ranker": key[2], "pays up to keep": even}
        line = lines.setdefault(key, names)
        line[f"speed-up at {row['keep_ratio']:g} (quartiles)"] = tables.figure(
            row, "speedup", ".2f"
        )
    return list(lines.values())


main = Benchmark(
    name="break_even",
    doc=__doc__,
    title="Up to which keep ratio a ranker pays for itself",
    run=run,
    progress="{method} at {keep_ratio:g} ×{speedup:.2f}, pays up to {break_even:.2f}",
    table=table,
    goals=goals,
    plot=lambda rows, _: lines(rows, "speedup", SPEEDUP, reference=1.0),
    parser=functools.partial(
        make_parser,
        models=[VIT_TI, VIT_S, VIT_B],
        keep_ratios=[0.95, 0.75, 0.5, 0.25],
        rankers=["contrast", "conv", "vit_tiny", "vit_small"],
    ),
).main


if __name__ == "__main__":
    main()
