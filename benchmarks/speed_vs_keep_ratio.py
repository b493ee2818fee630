"""How much faster is a pruned ViT than the full one, ranker included, and how close to the ceiling?

Claim. A pruned ViT-S, ViT-B or ViT-L is 1.5 to 2 times as fast at keep ratio 0.5, at batch 1 too.
Ranking costs so little that the model reaches more than 0.9 of the speed that it would have if the
right patches were known for free. A ViT-Ti is so cheap that the cost of ranking is visible.

Arithmetic. A block of width D on L tokens takes 12 L D² + 2 L² D multiply-adds, nearly linear in L
at L = 197 (the quadratic part is L / 6D of the other: 4 % for ViT-B, 17 % for ViT-Ti). Half of the
patches is 99 of 197 tokens, so the blocks can become a little more than 2 times as fast. What does
not shrink: at batch 1 the weights, which are read from memory whatever the tokens are. The ranker
comes on top: ViT-B takes 17.5 G multiply-adds an image and ViT-Ti 1.26 G, the conv ranker 0.037 G,
so 0.2 % and 3 %; the contrast ranker is some passes over the pixels. "achieved" is time of ideal ÷
time of pruned: 1 means that ranking, selecting and gathering cost nothing.

Timed, in turns in one process, on a batch that is in memory already:
    full      the plain timm model
    ideal     the same on the first K patches, embedding only these: no patch has to be ranked
    contrast, conv, …   ltrp_timm.drop_patches with that ranker: rank, select, gather, encode
    ranker    `model.patch_scores(images)` alone; its share is of the full model's time
Where one call of the full model takes more than a fourth of --seconds, only the keep ratios of the
goals (0.5 and 0.25) are measured, and few rounds: a large model's ratios scatter less.
Not timed: reading, decoding and moving images, building models, warm-up.
Weights are random: they do not change the time. All variants share one set of weights in memory.
The committed rows are older: their ideal model embeds all patches, and 11 of 102 beat it.
"""

import argparse
import functools
from collections.abc import Iterator
from typing import Any

import tables
from common import (
    ON_ONE_CORE,
    VIT_B,
    VIT_L,
    VIT_S,
    VIT_TI,
    Calls,
    Row,
    batches,
    compare,
    inference,
    make_parser,
    pruned,
    seconds_of,
    timed_row,
)
from resolution import ranker_share
from runner import CASE, SPEEDUP, Benchmark, Cell, cells, figure, lines, milliseconds, plain
from tables import Goal
from torch import Tensor

import ltrp_timm
from ltrp_timm.measure import throughput
from ltrp_timm.measure.payoff import ideal

BASELINES = ("full", "ideal")
GOAL_RATIOS = (0.5, 0.25)


def _achieved(short: str, model: str, keep_ratio: float, bound: float) -> Goal:
    where = {**ON_ONE_CORE, "model": model, "batch": 8, "keep_ratio": keep_ratio, "method": "conv"}
    return Goal(f"{short} keep {keep_ratio:g} batch 8, achieved", where, "achieved", ">=", bound)


def goals() -> list[Goal]:
    """What the claim says."""
    fast = {**ON_ONE_CORE, "model": VIT_B, "batch": 1, "keep_ratio": 0.5}
    fast["method"] = ("contrast", "conv")
    share = {**ON_ONE_CORE, "model": VIT_B, "batch": 8, "method": "contrast"}
    return [
        _achieved("ViT-L", VIT_L, 0.5, 0.98),
        _achieved("ViT-B", VIT_B, 0.5, 0.97),
        _achieved("ViT-S", VIT_S, 0.5, 0.94),
        _achieved("ViT-Ti", VIT_TI, 0.5, 0.88),
        _achieved("ViT-B", VIT_B, 0.25, 0.96),
        _achieved("ViT-S", VIT_S, 0.25, 0.92),
        Goal("ViT-B batch 8, ranker's share of full", share, "ranker_share", "<=", 0.005),
        Goal("ViT-B keep 0.5 batch 1, speed-up over full", fast, "speedup", ">=", 1.55),
    ]


def callables(full: Any, models: dict[str, Any], images: Tensor, keep_ratio: float) -> Calls:
    """What is timed for images (B, C, H, W) at one keep ratio, in the order of a round."""
    kept = ltrp_timm.num_keep(full.patch_embed.num_patches, keep_ratio)
    fns: Calls = {"full": inference(full, images), "ideal": inference(ideal(full, kept), images)}
    for method, model in models.items():
        model.keep_ratio = keep_ratio
        fns[method] = inference(model, images)
    for method, model in models.items():
        fns[f"rank:{method}"] = inference(model.patch_scores, images)
    return fns


def to_rows(timings: dict[str, throughput.Timing], case: Row) -> list[Row]:
    """One row for the full model, the ideal one and each ranker."""
    rows = []
    for method in (name for name in timings if not name.startswith("rank:")):
        speedup = throughput.ratio(timings["full"], timings[method])
        achieved = throughput.ratio(timings["ideal"], timings[method])
        row = {**case, "method": method}
        row = timed_row(row, timings[method], speedup=speedup, achieved=achieved)
        rows.append({**row, **ranker_share(timings, method)})
    return rows


def keep_ratios(args: argparse.Namespace, full_seconds: float) -> list[float]:
    """The options' keep ratios; of a slow model only those of the goals, if there are any."""
    slow = not args.repeats and full_seconds > args.seconds / 4
    some = [ratio for ratio in args.keep_ratios if ratio in GOAL_RATIOS]
    return some if slow and some else list(args.keep_ratios)


def run(args: argparse.Namespace) -> Iterator[list[Row]]:
    """Measure every model, batch size and keep ratio."""
    for full, images, case in batches(args):
        models = {ranker: pruned(full, ranker, 1.0) for ranker in args.rankers}
        full_seconds = 0.0 if args.repeats else seconds_of(inference(full, images), args)
        for ratio in keep_ratios(args, full_seconds):
            kept = ltrp_timm.num_keep(full.patch_embed.num_patches, ratio)
            timings = compare(callables(full, models, images, ratio), args)
            yield to_rows(timings, {**case, "keep_ratio": ratio, "patches_kept": kept})


def of_front_end(column: str, spec: str) -> Cell:
    """A figure that the baselines do not have."""
    return lambda row: "–" if row["method"] in BASELINES else tables.figure(row, column, spec)


TABLE = cells(
    {
        **CASE,
        "method": plain("method"),
        "ms": milliseconds,
        SPEEDUP: figure("speedup", ".2f"),
        "achieved ÷ ceiling (quartiles)": of_front_end("achieved", ".3f"),
        "ranker's share of full (quartiles)": of_front_end("ranker_share", ".2%"),
    }
)

main = Benchmark(
    name="speed_vs_keep_ratio",
    doc=__doc__,
    title="Pruned ViTs against the full ones, ranker included",
    run=run,
    progress="{method} ×{speedup:.2f}, {achieved:.3f} of ideal, ranker {ranker_share:.2%}",
    table=lambda rows: TABLE([row for row in rows if row["method"] != "full"]),
    goals=goals,
    plot=lambda rows, _: lines(rows, "speedup", SPEEDUP, reference=1.0),
    parser=functools.partial(
        make_parser,
        models=[VIT_TI, VIT_S, VIT_B, VIT_L],
        batch_sizes=[1, 8, 32],
        keep_ratios=[1.0, 0.75, 0.5, 0.25, 0.1],
    ),
).main


if __name__ == "__main__":
    main()
