"""How much faster is a pruned ViT than the full one, ranker included, and how close to the ceiling?

Claim. A pruned ViT-S, ViT-B or ViT-L is 1.5 to 2 times as fast at keep ratio 0.5, at batch 1 too,
and its ranking costs so little that it reaches more than 0.9 of what would be possible if the right
patches were known for free. A ViT-Ti is so cheap that ranking shows.

Arithmetic. A block of width D on L tokens takes 12 L D² + 2 L² D multiply-adds, nearly linear in L
at L = 197 (the quadratic part is L / 6D of the other: 4 % for ViT-B, 17 % for ViT-Ti). Half of the
patches is 99 of 197 tokens, so the blocks can become a little more than 2 times as fast. What does
not shrink: at batch 1 the weights, which are read from memory whatever the tokens are. The ranker
comes on top: ViT-B takes 17.5 G multiply-adds an image and ViT-Ti 1.26 G, the conv ranker 0.037 G,
so 0.2 % and 3 %; the contrast ranker is some passes over the pixels. "achieved" is time of ideal ÷
time of pruned: 1 means that ranking, selecting and gathering cost nothing.

Timed, in turns in one process, each call for itself on a batch that is in memory already:
    full      the plain timm model
    ideal     the same on the first K patches, embedding only these: nothing has to find out which
              ones to keep
    contrast, conv, …   ltrp_timm.drop_patches with that ranker: rank, select, gather, encode
    ranker    `model.patch_scores(images)` alone; its share is of the full model's time
Where one call of the full model takes more than a fourth of --seconds, only the keep ratios of the
goals (0.5 and 0.25) are measured, and few rounds: a large model's ratios scatter less.
Not timed: reading, decoding and moving images, building models, warm-up.
Weights are random: they do not change the time. All variants share one set of weights in memory.
The committed rows are older: their ideal model embeds all patches, and 11 of 102 beat it.
"""

import argparse
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
    compare,
    create_full,
    inference,
    load_pyplot,
    make_images,
    make_parser,
    pruned,
    rows_of,
    seconds_of,
    spread,
    timing_columns,
)
from tables import Goal
from torch import Tensor

import ltrp_timm
from ltrp_timm.measure import throughput
from ltrp_timm.measure.payoff import ideal

NAME = "speed_vs_keep_ratio"
TITLE = "Pruned ViTs against the full ones, ranker included"
BASELINES = ("full", "ideal")
GOAL_RATIOS = (0.5, 0.25)


def _achieved(short: str, model: str, keep_ratio: float, bound: float) -> Goal:
    where = {**ON_ONE_CORE, "model": model, "batch": 8, "keep_ratio": keep_ratio, "method": "conv"}
    return Goal(f"{short} keep {keep_ratio:g} batch 8, achieved", where, "achieved", ">=", bound)


def goals() -> list[Goal]:
    """The project's goals that this file's rows can answer."""
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
        Goal("ViT-B keep 0.5 batch 1, times as fast as full", fast, "speedup", ">=", 1.55),
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


def to_rows(timings: dict[str, throughput.Timing], case: Row, where: Row) -> list[Row]:
    """One row for the full model, the ideal one and each ranker."""
    full, best = timings["full"], timings["ideal"]
    rows = []
    for method in (name for name in timings if not name.startswith("rank:")):
        timing = timings[method]
        row = {**case, "method": method, **timing_columns(timing, case["batch"])}
        row |= spread("speedup", throughput.ratio(full, timing))
        row |= spread("achieved", throughput.ratio(best, timing))
        rank = timings.get(f"rank:{method}")
        share = spread("ranker_share", throughput.ratio(rank or full, full))
        row |= share if rank else dict.fromkeys(share, 0.0)  # the baselines rank nothing
        rows.append({**row, **where})
    return rows


def keep_ratios(args: argparse.Namespace, full_seconds: float) -> list[float]:
    """Those asked for; of a slow model those of the goals, where any is among them."""
    slow = not args.repeats and full_seconds > args.seconds / 4
    some = [ratio for ratio in args.keep_ratios if ratio in GOAL_RATIOS]
    return some if slow and some else list(args.keep_ratios)


def run(args: argparse.Namespace, where: Row) -> list[Row]:
    """Measure every model, batch size and keep ratio."""
    rows: list[Row] = []
    for name in args.models:
        full = create_full(name, args)
        models = {ranker: pruned(full, ranker, 1.0) for ranker in args.rankers}
        patches = full.patch_embed.num_patches
        for batch in args.batch_sizes:
            images = make_images(full, batch, args)
            full_seconds = 0.0 if args.repeats else seconds_of(inference(full, images), args)
            for keep_ratio in keep_ratios(args, full_seconds):
                case = {"model": name, "batch": batch, "keep_ratio": keep_ratio}
                case["patches_kept"] = ltrp_timm.num_keep(patches, keep_ratio)
                fns = callables(full, models, images, keep_ratio)
                new = to_rows(compare(fns, args), case, where)
                rows += new
                print(_progress(new), flush=True)
    return rows


def _progress(rows: list[Row]) -> str:
    head = "{model} batch {batch} keep {keep_ratio:g}, {rounds} rounds:".format(**rows[0])
    parts = [f"{row['method']} {row['seconds_median'] * 1e3:.1f} ms" for row in rows]
    parts += [
        "{method} ×{speedup:.2f}, {achieved:.3f} of ideal, ranker {ranker_share:.2%}".format(**row)
        for row in rows
        if row["method"] not in BASELINES
    ]
    return f"{head} {'; '.join(parts)}"


def table(rows: list[Row]) -> list[Row]:
    """The figures as text."""
    return [
        {
            "model": row["model"],
            "batch": row["batch"],
            "keep": f"{row['keep_ratio']:g}",
            "method": row["method"],
            "ms": f"{row['seconds_median'] * 1e3:.1f}",
            "times as fast (quartiles)": tables.figure(row, "speedup", ".2f"),
            "achieved ÷ ceiling": _front_end_figure(row, "achieved", ".3f"),
            "ranker's share of full": _front_end_figure(row, "ranker_share", ".2%"),
        }
        for row in rows
        if row["method"] != "full"
    ]


def _front_end_figure(row: Row, column: str, spec: str) -> str:
    return "–" if row["method"] in BASELINES else tables.figure(row, column, spec)


def plot(rows: list[Row], args: argparse.Namespace) -> Any:
    """Speed-up against keep ratio: a column of panels per model, a row per batch size."""
    shape = (len(args.batch_sizes), len(args.models))
    figure, axes = load_pyplot().subplots(
        *shape, figsize=(1 + 3.6 * shape[1], 1 + 3.1 * shape[0]), squeeze=False, sharex=True
    )
    for i, batch in enumerate(args.batch_sizes):
        for j, model in enumerate(args.models):
            panel = [row for row in rows if row["model"] == model and row["batch"] == batch]
            _plot_panel(axes[i][j], panel, args)
            axes[i][j].set_title(f"{model}, batch {batch}", fontsize=9)
        axes[i][0].set_ylabel("times as fast as full")
    for ax in axes[-1]:
        ax.set_xlabel("keep ratio")
    axes[0][0].legend(fontsize=8)
    return figure


def _plot_panel(ax: Any, rows: list[Row], args: argparse.Namespace) -> None:
    ax.axhline(1.0, color="k", linestyle=":", label="full")
    for method in ("ideal", *args.rankers):
        line = sorted(
            (row for row in rows if row["method"] == method), key=lambda row: row["keep_ratio"]
        )
        x, y = ([row[column] for row in line] for column in ("keep_ratio", "speedup"))
        below = [row["speedup"] - row["speedup_low"] for row in line]
        above = [row["speedup_high"] - row["speedup"] for row in line]
        style = "k--o" if method == "ideal" else "-o"
        ax.errorbar(x, y, (below, above), fmt=style, ms=3, capsize=2, label=method)
    ax.set_xticks(sorted(args.keep_ratios))
    ax.set_ylim(bottom=0)
    ax.grid(alpha=0.3)


def main() -> None:
    """Measure, write CSV, PNG and Markdown, check the goals."""
    args = make_parser(
        (__doc__ or "").splitlines()[0],
        models=[VIT_TI, VIT_S, VIT_B, VIT_L],
        batch_sizes=[1, 8, 32],
        keep_ratios=[1.0, 0.75, 0.5, 0.25, 0.1],
    ).parse_args()
    rows = rows_of(NAME, run, args)
    tables.conclude(NAME, TITLE, rows, table(rows), goals(), plot(rows, args), args)


if __name__ == "__main__":
    main()
