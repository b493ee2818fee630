"""How much faster does a pruned ViT train?

Claim. With half of its patches a ViT-S trains at least 1.6 times as fast, ranking included: the
backward pass saves what the forward pass saves.

Arithmetic. A training step is a forward and a backward pass of twice its cost, both nearly
proportional to the number of tokens, and an update of the weights that does not depend on it. With
K of N patches kept the ceiling is about (P + N) / (P + K): 197 / 99 = 1.99 for a ViT-S at keep 0.5,
197 / 50 = 3.9 at 0.25, a little more where attention counts. The ranker is not trained and runs
once: its share of a step is a third of its share of a forward pass.

Timed, in turns in one process: whole training steps — forward, cross entropy, backward, AdamW — of
the plain model and of the same model behind each ranker. The images are in memory: a data loader
adds the same time to all, and hides the gain where it is the bottleneck. `ideal` is given the first
K patches for nothing; in the committed rows, which are older, it embeds all patches. Weights are
random and drop path is off: neither changes the time.
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from common import (
    ON_ONE_CORE,
    VIT_S,
    Calls,
    Row,
    batches,
    compare,
    create_full,
    make_parser,
    pruned,
    timed_row,
)
from runner import CASE, SPEEDUP, Benchmark, bars, cells, figure, plain
from tables import Goal
from torch import Tensor

from ltrp_timm import num_keep
from ltrp_timm.measure import throughput
from ltrp_timm.measure.payoff import ideal
from ltrp_timm.train.engine import make_optimizer
from ltrp_timm.train.settings import Settings


def goals() -> list[Goal]:
    """What the claim says."""
    where = {**ON_ONE_CORE, "model": VIT_S, "keep_ratio": 0.5, "method": ("contrast", "conv")}
    return [Goal("ViT-S keep 0.5, speed-up of a training step", where, "speedup", ">=", 1.6)]


def training_step(model: Any, images: Tensor) -> Callable[[], None]:
    """One whole step, on the same images each time."""
    model.train()
    backbone = getattr(model, "backbone", model)
    backbone.requires_grad_(True)
    optimizer = make_optimizer(model, 1e-5, Settings(layer_decay=0.75))
    targets = torch.arange(len(images), device=images.device) % backbone.num_classes

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), targets).backward()
        optimizer.step()

    return step


def run(args: argparse.Namespace) -> Iterator[list[Row]]:
    """Measure every model and batch size, all rankers and keep ratios in turns."""
    for full, images, case in batches(args):
        patches = full.patch_embed.num_patches

        def new(name: str = case["model"]) -> Any:  # weights are trained: models share none
            return create_full(name, args)

        models = {("full", 1.0): new()}
        for ratio in args.keep_ratios:
            models["ideal", ratio] = ideal(new(), num_keep(patches, ratio))
            models |= {(ranker, ratio): pruned(new(), ranker, ratio) for ranker in args.rankers}
        calls: Calls = {
            f"{method} {ratio}": training_step(model, images)
            for (method, ratio), model in models.items()
        }
        timings = compare(calls, args)
        rows = []
        for (method, ratio), timing in zip(models, timings.values()):
            row = {**case, "keep_ratio": ratio, "method": method}
            speedup = throughput.ratio(timings["full 1.0"], timing)
            rows.append(timed_row(row, timing, speedup=speedup))
        yield rows


main = Benchmark(
    name="training_speed",
    doc=__doc__,
    title="Training steps of pruned ViTs: speed-up over those of the full model",
    run=run,
    progress="{method} at {keep_ratio:g} ×{speedup:.2f}",
    table=cells(
        {
            **CASE,
            "method": plain("method"),
            "images/s": figure("images_per_second", ".2f"),
            SPEEDUP: figure("speedup", ".2f"),
        }
    ),
    goals=goals,
    plot=lambda rows, _: bars(
        rows,
        "speedup",
        SPEEDUP,
        panel="{model}, batch {batch}",
        bar="{method}, keep {keep_ratio:g}",
    ),
    parser=functools.partial(
        make_parser, models=[VIT_S], batch_sizes=[8], keep_ratios=[0.5, 0.25], seconds=120.0
    ),
).main


if __name__ == "__main__":
    main()
