"""What do coarse tokens cost beside dropping, and how close to the ceiling is the speed?

Claim. With `rest="coarse"` a pruned ViT-B reaches at least 0.96 of the speed of the same encoder
given as many tokens for nothing, a ViT-S 0.92, at batch 8 and keep ratios 0.5 and 0.375, with the
ranking of `border` and the size bias included.

Arithmetic. A cell of 2 x 2 patches is four tokens or one. At N = 196 and keep 0.5, 16 of 49 cells
are refined: 97 tokens. Beside dropping, the image is averaged to half size (150 k pixels, read
once), 49 patches of it are embedded (0.6 % of ViT-B's work at 97 tokens), and the position table is
resized (196 x D values). The size bias adds one value to each attention logit: a mask of one row,
which every attention kernel reads.

Timed, in turns in one process:
    full      the plain timm model
    ideal     the same on the first T patches, embedding only these
    drop      border, the rest dropped; as many patches as the budget allows
    coarse    border, coarse rest, size bias 0.5
    no bias   the same with size bias 0: no mask
    random    coarse rest with random cells: no ranking
Weights are random: they do not change the time.
"""

import functools
from collections.abc import Iterator
from typing import Any

import tables
from common import (
    ON_ONE_CORE,
    VIT_B,
    VIT_S,
    Calls,
    Row,
    batches,
    compare,
    inference,
    make_parser,
    timed_row,
)
from runner import CASE, SPEEDUP, Benchmark, cells, figure, lines, milliseconds, plain
from tables import Goal

from ltrp_timm import drop_patches
from ltrp_timm.measure import throughput
from ltrp_timm.measure.payoff import ideal, twin

BASELINES = ("full", "ideal")
VARIANTS: dict[str, dict[str, Any]] = {
    "drop": {"rest": "drop"},
    "coarse": {"rest": "coarse"},
    "no bias": {"rest": "coarse", "size_bias": 0.0},
    "random": {"rest": "coarse", "ranker": "random", "selection": "random"},
}


def goals() -> list[Goal]:
    """What the claim says."""
    where = {**ON_ONE_CORE, "batch": 8, "keep_ratio": (0.5, 0.375), "method": "coarse"}
    return [
        Goal(f"{short} batch 8, achieved", {**where, "model": model}, "achieved", ">=", bound)
        for short, model, bound in (("ViT-B", VIT_B, 0.96), ("ViT-S", VIT_S, 0.92))
    ]


def run(args: Any) -> Iterator[list[Row]]:
    """Measure every model, batch size and keep ratio."""
    for full, images, case in batches(args):
        for ratio in args.keep_ratios:
            models = {
                name: drop_patches(twin(full), keep_ratio=ratio, **options).eval()
                for name, options in VARIANTS.items()
            }
            tokens = models["coarse"].num_tokens()
            fns: Calls = {"full": inference(full, images)}
            fns["ideal"] = inference(ideal(full, tokens), images)
            fns.update({name: inference(model, images) for name, model in models.items()})
            timings = compare(fns, args)
            yield [
                timed_row(
                    {**case, "keep_ratio": ratio, "tokens": tokens, "method": method},
                    timings[method],
                    speedup=throughput.ratio(timings["full"], timings[method]),
                    achieved=throughput.ratio(timings["ideal"], timings[method]),
                )
                for method in timings
            ]


TABLE = cells(
    {
        **CASE,
        "tokens": plain("tokens"),
        "method": plain("method"),
        "ms": milliseconds,
        SPEEDUP: figure("speedup", ".2f"),
        "achieved ÷ ceiling (quartiles)": lambda row: (
            "–" if row["method"] in BASELINES else tables.figure(row, "achieved", ".3f")
        ),
    }
)

main = Benchmark(
    name="coarse_rest",
    doc=__doc__,
    title="Coarse tokens beside dropping",
    run=run,
    progress="{method} ×{speedup:.2f}, {achieved:.3f} of ideal",
    table=lambda rows: TABLE([row for row in rows if row["method"] != "full"]),
    goals=goals,
    plot=lambda rows, _: lines(rows, "speedup", SPEEDUP, reference=1.0),
    parser=functools.partial(
        make_parser, models=[VIT_S, VIT_B], batch_sizes=[8], keep_ratios=[0.5, 0.375]
    ),
).main


if __name__ == "__main__":
    main()
