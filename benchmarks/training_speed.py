"""How much faster does a pruned ViT train?

Claim. With half of its patches a ViT-S trains at least 1.6 times as fast, ranking included: the
backward pass saves what the forward pass saves.

Arithmetic. A training step is a forward and a backward pass of twice its cost, both nearly
proportional to the number of tokens, and an update of the weights that does not depend on it. With
K of N patches kept the ceiling is about (P + N) / (P + K): 197 / 99 = 1.99 for a ViT-S at keep 0.5,
197 / 50 = 3.9 at 0.25, a little more where attention counts. The ranker is not trained and runs
once: its share of a step is a third of its share of a forward pass.

Timed, in turns in one process: whole training steps — forward, cross entropy, backward, AdamW — of
the plain model and of the same model behind each ranker, the images ready in memory: what the data
loader adds is the same for all, and hides the gain where it is the bottleneck. `ideal` is given the
first K patches for nothing; in the committed rows, which are older, it embeds all patches. Weights
are random, drop path is off: neither changes the time.
"""

import argparse
from collections.abc import Callable
from typing import Any

import tables
import torch
import torch.nn.functional as F
from common import (
    ON_ONE_CORE,
    VIT_S,
    Calls,
    Row,
    compare,
    create_full,
    load_pyplot,
    make_images,
    make_parser,
    pruned,
    rows_of,
    spread,
    timing_columns,
)
from tables import Goal
from torch import Tensor

from ltrp_timm import num_keep
from ltrp_timm.measure import throughput
from ltrp_timm.measure.payoff import ideal
from ltrp_timm.train.engine import make_optimizer
from ltrp_timm.train.settings import Settings

NAME = "training_speed"
TITLE = "Training steps of pruned ViTs: times as fast as those of the full model"


def goals() -> list[Goal]:
    """What the claim says."""
    where = {**ON_ONE_CORE, "model": VIT_S, "keep_ratio": 0.5, "method": ("contrast", "conv")}
    return [Goal("ViT-S keep 0.5 training step, times as fast", where, "speedup", ">=", 1.6)]


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


def run_case(name: str, batch: int, args: argparse.Namespace, where: Row) -> list[Row]:
    """All rankers and keep ratios at one batch size; each model has weights of its own."""
    full = create_full(name, args)
    images = make_images(full, batch, args)
    patches = full.patch_embed.num_patches
    fns: Calls = {"full": training_step(create_full(name, args), images)}
    cases: list[tuple[str, float]] = []
    for ratio in args.keep_ratios:
        cases.append(("ideal", ratio))
        lean = ideal(create_full(name, args), num_keep(patches, ratio))
        fns[f"ideal {ratio}"] = training_step(lean, images)
        for ranker in args.rankers:
            cases.append((ranker, ratio))
            model = pruned(create_full(name, args), ranker, ratio)
            fns[f"{ranker} {ratio}"] = training_step(model, images)
    timings = compare(fns, args)
    rows = []
    for method, ratio in [("full", 1.0), *cases]:
        timing = timings["full" if method == "full" else f"{method} {ratio}"]
        row = {"model": name, "batch": batch, "keep_ratio": ratio, "method": method}
        row |= timing_columns(timing, batch)
        row |= spread("speedup", throughput.ratio(timings["full"], timing))
        rows.append({**row, **where})
    return rows


def run(args: argparse.Namespace, where: Row) -> list[Row]:
    """Measure every model and batch size."""
    rows: list[Row] = []
    for name in args.models:
        for batch in args.batch_sizes:
            new = run_case(name, batch, args, where)
            rows += new
            found = {f"{r['method']} {r['keep_ratio']}": f"{r['speedup']:.2f}" for r in new}
            print(f"{name} batch {batch}, {new[0]['rounds']} rounds: {found}", flush=True)
    return rows


def table(rows: list[Row]) -> list[Row]:
    """A line for each row."""
    return [
        {
            "model": f"`{row['model']}`",
            "batch": row["batch"],
            "keep": row["keep_ratio"],
            "method": row["method"],
            "images/s": f"{row['images_per_second']:.2f}",
            "times as fast as full": tables.figure(row, "speedup", ".2f"),
        }
        for row in rows
    ]


def plot(rows: list[Row]) -> Any:
    """A bar for each method, a panel for each model and batch size."""
    panels = list(dict.fromkeys((row["model"], row["batch"]) for row in rows))
    figure, axes = load_pyplot().subplots(
        1, len(panels), figsize=(1 + 5 * len(panels), 4), squeeze=False
    )
    for ax, panel in zip(axes[0], panels):
        own = [row for row in rows if (row["model"], row["batch"]) == panel]
        names = [f"{row['method']} {row['keep_ratio']:g}" for row in own]
        ax.bar(names, [row["speedup"] for row in own])
        ax.axhline(1.0, color="k", linestyle=":")
        ax.tick_params(axis="x", rotation=40, labelsize=8)
        ax.set_ylabel("times as fast as full")
        ax.set_title(f"{panel[0]}, batch {panel[1]}", fontsize=9)
        ax.grid(alpha=0.3, axis="y")
    return figure


def main() -> None:
    """Measure, write CSV, PNG and Markdown, check the goals."""
    args = make_parser(
        (__doc__ or "").splitlines()[0],
        models=[VIT_S],
        batch_sizes=[8],
        keep_ratios=[0.5, 0.25],
        seconds=120.0,
    ).parse_args()
    rows = rows_of(NAME, run, args)
    tables.conclude(NAME, TITLE, rows, table(rows), goals(), plot(rows), args)


if __name__ == "__main__":
    main()
