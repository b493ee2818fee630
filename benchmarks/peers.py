"""Is ranking before the encoder faster than merging or fusing tokens inside it, for equal work?

Claim. At equal FLOPs a ViT-B that drops half of its patches before the first block is at least 1.1
times as fast at batch 1 as one that merges tokens in each block, and 1.05 times where merging uses
fused attention; dropping costs one ranking, merging a matching in each of twelve blocks. The page
of results lists what does not hold.

Arithmetic. `benchmarks/flops.py` counts the matrix products of a ViT from the tokens that each
block sees. Dropping half of 196 patches is 99 tokens in all 12 blocks, about half of 35.1 GFLOPs.
Merging needs r = 16 a block for that (197, 181, … 21, 11 tokens), and its matching some 0.1 % more;
what costs it time is not FLOPs but a dozen small operators a block (norm, matching, max, sort,
scatter, gather), a softmax by hand where sizes enter it, and blocks whose tokens shrink to a
handful, where weights are read for nothing. At equal *final* tokens merging keeps more in the early
blocks, so it does more work and is slower still. Accuracy is another question, which times do not
answer.

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
All peers are written from the published algorithms. Tests show that they are the plain model where
they have nothing to do. Weights are random.
"""

import argparse
import functools
from collections.abc import Iterator
from typing import Any

from common import (
    ON_ONE_CORE,
    VIT_B,
    Calls,
    Row,
    cases,
    compare,
    inference,
    make_parser,
    pruned,
    timed_row,
)
from peers.matched import dropping, match
from runner import CASE, SPEEDUP, Benchmark, bars, cells, figure, milliseconds, plain
from tables import Goal
from torch import Tensor

import ltrp_timm
from ltrp_timm.measure import throughput
from ltrp_timm.measure.payoff import twin

MATCHES = ("flops", "tokens")


def goals() -> list[Goal]:
    """What the claim says."""
    where = {**ON_ONE_CORE, "model": VIT_B, "batch": 1, "keep_ratio": 0.5, "matched": "flops"}
    text = "ViT-B keep 0.5 batch 1, equal FLOPs, time ÷ that of dropping"
    fused = ("merging_proportional_fused", "merging_plain_fused")
    return [
        Goal(text, {**where, "method": "merging"}, "gain", ">=", 1.10),
        Goal(text, {**where, "method": fused}, "gain", ">=", 1.05),
    ]


def run(args: argparse.Namespace) -> Iterator[list[Row]]:
    """Measure every model, batch size, keep ratio and kind of match."""
    for full, images, case in cases(args):
        for matched in MATCHES:
            yield run_case(full, images, {**case, "matched": matched}, args)


def run_case(full: Any, images: Tensor, case: Row, args: argparse.Namespace) -> list[Row]:
    """All methods at one batch size, keep ratio and kind of match."""
    patches = full.patch_embed.num_patches
    found = match(full, ltrp_timm.num_keep(patches, case["keep_ratio"]), case["matched"])
    models = {"full": full}
    models |= {ranker: pruned(full, ranker, case["keep_ratio"]) for ranker in args.rankers}
    models |= {name: peer.build(twin(full)) for name, peer in found.items()}
    calls: Calls = {name: inference(model, images) for name, model in models.items()}
    timings = compare(calls, args)
    found["full"] = dropping(full, patches)
    rows = []
    for name, timing in timings.items():
        peer = found.get(name, found["random"])  # a pruned encoder does what random dropping does
        row = {**case, "method": name, "setting": peer.setting, "tokens_last": peer.last}
        row["gflops"] = round(peer.flops / 1e9, 4)
        speedup = throughput.ratio(timings["full"], timing)
        gain = throughput.ratio(timing, timings[args.rankers[0]])
        rows.append(timed_row(row, timing, speedup=speedup, gain=gain))
    return rows


main = Benchmark(
    name="peers",
    doc=__doc__,
    title="Pruned ViTs against merging and fusing, for equal work",
    run=run,
    progress="{method} ({setting}) ×{speedup:.2f}",
    table=cells(
        {
            **CASE,
            "equal": plain("matched"),
            "method": plain("method"),
            "setting": plain("setting"),
            "last tokens": plain("tokens_last"),
            "GFLOPs": figure("gflops", ".2f"),
            "ms": milliseconds,
            SPEEDUP: figure("speedup", ".2f"),
            "time ÷ that of dropping (quartiles)": figure("gain", ".3f"),
        }
    ),
    goals=goals,
    plot=lambda rows, _: bars(
        rows, "speedup", SPEEDUP, panel="{model}, batch {batch}, equal {matched}"
    ),
    parser=functools.partial(make_parser, seconds=40.0),
).main


if __name__ == "__main__":
    main()
