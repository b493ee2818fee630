"""Is ranking before the encoder faster than merging or fusing tokens inside it, for equal work?

Claim. At equal FLOPs a ViT-B that drops half of its patches before the first block is at least 1.1
times as fast at batch 1 as one that merges tokens in each block, and 1.05 times where merging uses
fused attention; dropping costs one ranking, merging a matching in each of twelve blocks. How far
that holds stands in the README, under *Where it falls short*.

Arithmetic. `benchmarks/flops.py` counts the matrix products of a ViT from the tokens that each
block sees. Dropping half of 196 patches is 99 tokens in all 12 blocks, about half of 35.1 GFLOPs.
Merging needs r = 16 a block for that (197, 181, … 21, 11 tokens), and its matching some 0.1 % more;
what costs it time is not FLOPs but a dozen small operators a block (norm, matching, max, sort,
scatter, gather), a softmax by hand where sizes enter it, and blocks whose tokens shrink to a
handful, where weights are read for nothing. At equal *final* tokens merging keeps more in the early
blocks, so it does more work and is slower still; its accuracy is another question, which times do
not answer.

Timed, in turns in one process, ranking included:
    full                         the plain timm model
    contrast, conv, …            ltrp_timm.drop_patches with that ranker
    random                       random patches dropped at the same place
    merging                      token merging with proportional attention, as published
    merging_proportional_fused   the same with scaled_dot_product_attention and a bias
    merging_plain_fused          without proportional attention, with scaled_dot_product_attention
    fusing                       keep what the class token attends to, fuse the rest, in 3 blocks
Matched to the pruned model: "flops" (nearest FLOPs of encoder and matching; a conv ranker's own are
below 0.3 % of a ViT-B and not matched), "tokens" (nearest number of tokens after the last block).
`gain` is time of the method ÷ time of the pruned model with the first ranker.
All peers are written from the published algorithms and tested to be the plain model where they have
nothing to do. Weights are random.
"""

import argparse
from typing import Any

import tables
from common import (
    ON_ONE_CORE,
    VIT_B,
    Calls,
    Row,
    cases,
    compare,
    inference,
    load_pyplot,
    make_parser,
    pruned,
    rows_of,
    spread,
    timing_columns,
)
from peers.matched import dropping, match
from tables import Goal
from torch import Tensor

import ltrp_timm
from ltrp_timm.measure import throughput
from ltrp_timm.measure.payoff import twin

NAME = "peers"
TITLE = "Pruned ViTs against merging and fusing, for equal work"
MATCHES = ("flops", "tokens")


def goals() -> list[Goal]:
    """The project's goals that this file's rows can answer."""
    where = {**ON_ONE_CORE, "model": VIT_B, "batch": 1, "keep_ratio": 0.5, "matched": "flops"}
    text = "ViT-B keep 0.5 batch 1, equal FLOPs, times as fast as"
    fused = ("merging_proportional_fused", "merging_plain_fused")
    return [
        Goal(text, {**where, "method": "merging"}, "gain", ">=", 1.10),
        Goal(text, {**where, "method": fused}, "gain", ">=", 1.05),
    ]


def run_case(
    full: Any, images: Tensor, case: Row, args: argparse.Namespace, where: Row
) -> list[Row]:
    """All methods at one batch size, keep ratio and kind of match."""
    patches = full.patch_embed.num_patches
    kept = ltrp_timm.num_keep(patches, case["keep_ratio"])
    found = match(full, kept, case["matched"])
    models = {"full": full}
    models |= {ranker: pruned(full, ranker, case["keep_ratio"]) for ranker in args.rankers}
    models |= {name: peer.build(twin(full)) for name, peer in found.items()}
    fns: Calls = {name: inference(model, images) for name, model in models.items()}
    timings = compare(fns, args)
    found["full"] = dropping(full, patches)
    rows = []
    for name, timing in timings.items():
        peer = found.get(name, found["random"])  # a pruned encoder does what random dropping does
        row = {**case, "method": name, "setting": peer.setting, "tokens_last": peer.last}
        row |= {"gflops": round(peer.flops / 1e9, 4), **timing_columns(timing, case["batch"])}
        row |= spread("speedup", throughput.ratio(timings["full"], timing))
        row |= spread("gain", throughput.ratio(timing, timings[args.rankers[0]]))
        rows.append({**row, **where})
    return rows


def run(args: argparse.Namespace, where: Row) -> list[Row]:
    """Measure every model, batch size, keep ratio and kind of match."""
    rows: list[Row] = []
    for full, images, case in cases(args):
        for matched in MATCHES:
            new = run_case(full, images, {**case, "matched": matched}, args, where)
            rows += new
            print(_progress(new), flush=True)
    return rows


def _progress(rows: list[Row]) -> str:
    head = "{model} batch {batch} keep {keep_ratio:g}, equal {matched}, {rounds} rounds: "
    parts = ["{method} ({setting}) ×{speedup:.2f}".format(**row) for row in rows]
    return head.format(**rows[0]) + "; ".join(parts)


def table(rows: list[Row]) -> list[Row]:
    """The figures as text."""
    return [
        {
            "model": row["model"],
            "batch": row["batch"],
            "keep": f"{row['keep_ratio']:g}",
            "equal": row["matched"],
            "method": row["method"],
            "setting": row["setting"],
            "last tokens": row["tokens_last"],
            "GFLOPs": f"{row['gflops']:.2f}",
            "ms": f"{row['seconds_median'] * 1e3:.1f}",
            "times as fast as full": tables.figure(row, "speedup", ".2f"),
            "its time ÷ ours": tables.figure(row, "gain", ".3f"),
        }
        for row in rows
    ]


def plot(rows: list[Row], args: argparse.Namespace) -> Any:
    """Bars of speed-up, a panel for each case."""
    keys = ("model", "batch", "keep_ratio", "matched")
    cases = list(dict.fromkeys(tuple(row[key] for key in keys) for row in rows))
    columns = len(MATCHES)
    lines = -(-len(cases) // columns)
    figure, axes = load_pyplot().subplots(
        lines, columns, figsize=(6 * columns, 1 + 2.6 * lines), squeeze=False
    )
    for ax, case in zip(axes.flat, cases):
        bars = [row for row in rows if tuple(row[key] for key in keys) == case]
        names = [row["method"] for row in bars]
        ours = [name in args.rankers for name in names]
        middle = [row["speedup"] for row in bars]
        below = [row["speedup"] - row["speedup_low"] for row in bars]
        above = [row["speedup_high"] - row["speedup"] for row in bars]
        colours = ["tab:blue" if own else "tab:grey" for own in ours]
        ax.barh(names, middle, xerr=(below, above), color=colours, capsize=2)
        ax.invert_yaxis()
        ax.set_title("{} batch {} keep {:g}, equal {}".format(*case), fontsize=9)
        ax.tick_params(labelsize=8)
        ax.set_xlabel("times as fast as full", fontsize=8)
    return figure


def main() -> None:
    """Measure, write CSV, PNG and Markdown, check the goals."""
    args = make_parser((__doc__ or "").splitlines()[0], seconds=40.0).parse_args()
    rows = rows_of(NAME, run, args)
    tables.conclude(NAME, TITLE, rows, table(rows), goals(), plot(rows, args), args)


if __name__ == "__main__":
    main()
