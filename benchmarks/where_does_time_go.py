"""Where does the time of a pruned forward go, and what does the front-end launch?

Claim. Ranking, selecting and gathering together are below 1 % of a ViT-B's time on a CPU; a pruned
forward dispatches at most 1.30 times (with `conv` 1.40 times) the operators of the plain one, never
makes the host wait for the device, and gives the same bits at every call. The README lists what
does not hold under *Where it falls short*.

Arithmetic. The contrast ranker reads 224 · 224 · 3 = 150 528 values a few times, the conv ranker
takes 0.037 G multiply-adds, a ViT-B 17.5 G. Selecting is two sorts of 196 numbers; gathering copies
99 · 768 · 4 bytes = 0.3 MB. At batch 1 what counts is the number of operators: some microseconds
each on a CPU, and on a GPU the whole cost of a small batch. `mixed` clusters the pixels of all
patches (196 distances of 768 values each: 30 M multiply-adds) and is allowed 2 ms for 8 images.

Timed, in turns in one process, each part separately on inputs that are in memory already:
    whole      the plain model (`full`) and the pruned ones, by ranker
    ranker     `model.patch_scores(images)`, by ranker
    select     scores (B, N) -> keep indices (B, K), by rule; `mixed` reads the pixels of patches
    embed      patch embedding and position embedding, of all patches and of the kept ones
    gather     tokens (B, P + N, D) -> (B, P + K, D)
    blocks     all blocks, on all tokens (`full`) and on the kept ones (`kept`)
    head       final norm, pooling, classifier, on the kept tokens
`share` is of the plain model's time. `operators` counts those that the dispatcher sees in one call,
`host_syncs` those of them that read a value from the device. `same_bits` is 1 where two calls gave
equal tensors.
Weights are random: they do not change the time.
"""

import argparse
import functools
from collections.abc import Iterator
from typing import Any

import torch
from common import (
    ON_ONE_CORE,
    VIT_B,
    VIT_S,
    VIT_TI,
    Calls,
    Row,
    cases,
    compare,
    host_syncs,
    inference,
    make_parser,
    operators,
    pruned,
    timed_row,
)
from runner import CASE, Benchmark, bars, cells, figure, milliseconds, plain
from tables import Goal
from torch import Tensor

import ltrp_timm
from ltrp_timm.measure import throughput
from ltrp_timm.selection.coverage import patch_pixels
from ltrp_timm.selection.rules import keep_tokens


def goals() -> list[Goal]:
    """What the claim says."""
    base = {**ON_ONE_CORE, "model": VIT_B, "keep_ratio": 0.5}
    front_end = {**base, "part": "whole", "method": ("contrast", "conv")}
    contrast, conv = ({**front_end, "method": name} for name in ("contrast", "conv"))
    text = "ViT-B keep 0.5"
    share = {**base, "batch": 8, "part": "ranker", "method": "contrast"}
    both = ("mixed", "mixed (4 x 4 pixels)")
    mixed = {**base, "batch": 8, "part": "select", "method": both}
    return [
        Goal(f"{text}, operators ÷ plain", contrast, "operators_ratio", "<=", 1.30),
        Goal(f"{text}, operators ÷ plain", conv, "operators_ratio", "<=", 1.40),
        Goal(f"{text}, host syncs", front_end, "host_syncs", "<=", 0),
        Goal(f"{text}, two calls give the same bits", front_end, "same_bits", ">=", 1),
        Goal(f"{text} batch 8, ranker's share of full", share, "share", "<=", 0.005),
        Goal(f"{text} batch 8, seconds", mixed, "seconds_median", "<=", 0.002),
    ]


def selections(scores: Tensor, images: Tensor, grid: tuple[int, int], kept: int) -> Calls:
    """Every selection rule by name, on scores (B, N)."""
    return {
        "top": inference(ltrp_timm.select_top, scores, kept),
        "random": inference(ltrp_timm.select_random, scores, kept),
        "stratified": inference(ltrp_timm.select_stratified, scores, kept, grid),
        "mixed": inference(
            lambda: ltrp_timm.select_mixed(scores, kept, patch_pixels(images, grid))
        ),
        "mixed (4 x 4 pixels)": inference(
            lambda: ltrp_timm.select_mixed(scores, kept, patch_pixels(images, grid, 4))
        ),
    }


def _embed_kept(backbone: Any, images: Tensor, keep: Tensor) -> Tensor:
    backbone.patch_embed.keep_indices = keep
    return backbone._pos_embed(backbone.patch_embed(images))


def parts(full: Any, images: Tensor, keep_ratio: float, rankers: list[str]) -> Calls:
    """What is timed, by "part method": all parts of a pruned forward."""
    grid = tuple(full.patch_embed.grid_size)
    models = {ranker: pruned(full, ranker, keep_ratio) for ranker in rankers}
    kept = ltrp_timm.num_keep(full.patch_embed.num_patches, keep_ratio)
    with torch.inference_mode():
        tokens = full._pos_embed(full.patch_embed(images))
        scores = models[rankers[0]].patch_scores(images)
        keep = ltrp_timm.select_top(scores, kept)
        some = keep_tokens(tokens, keep, full.num_prefix_tokens)
    calls: Calls = {"whole full": inference(full, images)}
    calls |= {f"whole {name}": inference(model, images) for name, model in models.items()}
    calls |= {
        f"ranker {name}": inference(model.patch_scores, images) for name, model in models.items()
    }
    rules = selections(scores, images, (grid[0], grid[1]), kept)
    calls |= {f"select {name}": call for name, call in rules.items()}
    calls["embed all"] = inference(lambda: full._pos_embed(full.patch_embed(images)))
    calls["embed kept"] = inference(_embed_kept, models[rankers[0]].backbone, images, keep)
    calls["gather kept"] = inference(keep_tokens, tokens, keep, full.num_prefix_tokens)
    calls["blocks full"] = inference(full.blocks, tokens)
    calls["blocks kept"] = inference(full.blocks, some)
    calls["head kept"] = inference(lambda: full.forward_head(full.norm(some)))
    return calls


def run(args: argparse.Namespace) -> Iterator[list[Row]]:
    """Measure every model, batch size and keep ratio, all parts in turns."""
    for full, images, case in cases(args):
        calls = parts(full, images, case["keep_ratio"], args.rankers)
        timings = compare(calls, args)
        plain_model = len(operators(calls["whole full"]))
        rows = []
        for name, call in calls.items():
            part, method = name.split(" ", 1)
            share = throughput.ratio(timings[name], timings["whole full"])
            row = timed_row({**case, "part": part, "method": method}, timings[name], share=share)
            names = operators(call)
            row |= {"operators": len(names), "operators_ratio": round(len(names) / plain_model, 4)}
            row["host_syncs"] = len(host_syncs(names))
            rows.append({**row, "same_bits": int(torch.equal(call(), call()))})
        yield rows


def plot(rows: list[Row], args: argparse.Namespace) -> Any:
    """Shares of the plain model's time: a panel for each model, a colour for each batch size."""
    return bars(
        [row for row in rows if row["keep_ratio"] == args.keep_ratios[0]],
        "share",
        "share of the plain model's time (quartiles)",
        panel="{model}, keep {keep_ratio:g}",
        bar="{part} {method}",
        group="batch {batch}",
        log=True,
    )


main = Benchmark(
    name="where_does_time_go",
    doc=__doc__,
    title="Where the time of a pruned forward goes",
    run=run,
    progress="{part} {method} {share:.2%}",
    table=cells(
        {
            **CASE,
            "part": plain("part"),
            "method": plain("method"),
            "ms": milliseconds,
            "share of full (quartiles)": figure("share", ".2%"),
            "operators": plain("operators"),
            "÷ plain": figure("operators_ratio", ".2f"),
            "host syncs": plain("host_syncs"),
        }
    ),
    goals=goals,
    plot=plot,
    parser=functools.partial(make_parser, models=[VIT_TI, VIT_S, VIT_B]),
).main


if __name__ == "__main__":
    main()
