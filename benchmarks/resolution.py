"""Does the gain grow with the resolution when patches are ranked at 224 px, encoded at full size?

Claim. At 1024 px a pruned ViT gains more than at 224. A ranker that looks at 224 px costs next to
nothing there: the pruned model is as fast as the ideal one.

Arithmetic. A block of width D on L tokens takes 12 L D² + 2 L² D multiply-adds. The quadratic part
is L / 6D of the other: 4 % of a ViT-B at 224 px (197 tokens), 89 % at 1024 px (4097 tokens). Half
of the tokens is half of the first and a quarter of the second, so by FLOPs the gain at keep 0.5
grows from 2.0 to 2.6 (ViT-S: from 2.1 to 2.9). A ranker on the full image grows with the pixels,
21-fold from 224 to 1024, while a ViT-B grows 38-fold; one that looks at 224 px grows by its reading
of the image alone: one resize.

Timed, in turns in one process, batch by batch:
    full            the plain timm model, made for that image size
    ideal           the same given the K patches for nothing
    contrast, …     ltrp_timm.drop_patches with that ranker, which looks at the full image
    contrast@224    the same with ranker_args={"img_size": 224}: the image is resized for the
                    ranker, the score map to the grid (where the image is larger)
    ranker          `model.patch_scores(images)` alone, resizing included; its share is of full
Image sizes are rounded down to whole patches: 518 is 512 for patches of 16 pixels.
The committed rows are older: their ideal model embeds all patches.
Weights are random: they do not change the time. Accuracy at low resolution is not measured.
"""

import argparse
from collections.abc import Iterator
from typing import Any

from common import (
    ON_ONE_CORE,
    VIT_B,
    VIT_S,
    Calls,
    Row,
    compare,
    create_full,
    inference,
    make_images,
    make_parser,
    pruned,
    spread,
    timed_row,
)
from runner import SPEEDUP, Benchmark, cells, figure, milliseconds, panels, plain
from tables import Goal, nice

import ltrp_timm
from ltrp_timm.commands._flags import positive
from ltrp_timm.measure import throughput
from ltrp_timm.measure.payoff import ideal


def goals() -> list[Goal]:
    """What must hold at 1024 px for rankers that look at less."""
    where = {**ON_ONE_CORE, "model": (VIT_S, VIT_B), "img_size": 1024, "batch": 1}
    where["method"] = lambda method: "@" in method
    text = "1024 px batch 1"
    return [
        Goal(f"{text}, ranker's share of full", where, "ranker_share", "<=", 0.005),
        Goal(f"{text}, achieved", where, "achieved", ">=", 0.98),
    ]


def rankers_at(size: int, args: argparse.Namespace) -> dict[str, tuple[str, Row]]:
    """Method -> (ranker, its arguments) for images of one size."""
    methods: dict[str, tuple[str, Row]] = {ranker: (ranker, {}) for ranker in args.rankers}
    if size > args.rank_size:
        for ranker in args.rankers:
            methods[f"{ranker}@{args.rank_size}"] = (ranker, {"img_size": args.rank_size})
    return methods


def run(args: argparse.Namespace) -> Iterator[list[Row]]:
    """Measure every model, image size, batch size and keep ratio."""
    for name in args.models:
        patch = create_full(name, argparse.Namespace(**{**vars(args), "depth": 1})).patch_embed
        for size in (side // patch.patch_size[0] * patch.patch_size[0] for side in args.img_sizes):
            full = create_full(name, args, img_size=size)
            case = {"model": name, "img_size": size, "patches": full.patch_embed.num_patches}
            for batch in args.batch_sizes:
                for keep_ratio in args.keep_ratios:
                    yield run_case(full, {**case, "keep_ratio": keep_ratio, "batch": batch}, args)


def run_case(full: Any, case: Row, args: argparse.Namespace) -> list[Row]:
    """All methods at one image size, batch size and keep ratio."""
    images = make_images(full, case["batch"], args)
    kept = ltrp_timm.num_keep(full.patch_embed.num_patches, case["keep_ratio"])
    calls: Calls = {"full": inference(full, images), "ideal": inference(ideal(full, kept), images)}
    ranks: Calls = {}
    for method, (ranker, options) in rankers_at(case["img_size"], args).items():
        model = pruned(full, ranker, case["keep_ratio"], **options)
        calls[method] = inference(model, images)
        ranks[f"rank:{method}"] = inference(model.patch_scores, images)
    timings = compare({**calls, **ranks}, args)
    return [
        {
            **timed_row(
                {**case, "patches_kept": kept, "method": method},
                timings[method],
                speedup=throughput.ratio(timings["full"], timings[method]),
                achieved=throughput.ratio(timings["ideal"], timings[method]),
            ),
            **ranker_share(timings, method),
        }
        for method in calls
    ]


def ranker_share(timings: dict[str, throughput.Timing], method: str) -> Row:
    """Time of ``rank:METHOD`` ÷ that of the full model; 0 for methods that do not rank."""
    rank = timings.get(f"rank:{method}")
    share = spread("ranker_share", throughput.ratio(rank or timings["full"], timings["full"]))
    return share if rank else dict.fromkeys(share, 0.0)


def plot(rows: list[Row], args: argparse.Namespace) -> Any:
    """Above the speed-up, below the ranker's share, against the image size; a column per model."""
    first = {"batch": args.batch_sizes[0], "keep_ratio": args.keep_ratios[0]}
    shown = [row for row in rows if all(row[key] == value for key, value in first.items())]
    methods = list(dict.fromkeys(row["method"] for row in shown if row["method"] != "full"))
    picture, axes = panels(2, len(args.models), sharex=True, sharey="row")
    for j, model in enumerate(args.models):
        for method in methods:
            line = [row for row in shown if row["model"] == model and row["method"] == method]
            x = [row["img_size"] for row in line]
            style = "k--o" if method == "ideal" else "-o"
            axes[0][j].plot(x, [row["speedup"] for row in line], style, ms=3, label=nice(method))
            if method != "ideal":
                share = [100 * row["ranker_share"] for row in line]
                axes[1][j].plot(x, share, style, ms=3)
        title = "{}, batch {batch}, keep {keep_ratio:g}".format(model, **first)
        axes[0][j].set_title(nice(title))
        axes[0][j].set_ylim(bottom=0)
        axes[1][j].set_yscale("log")
        axes[1][j].yaxis.set_major_formatter("{x:g}")
        axes[1][j].set_xlabel("image side, pixels")
    axes[0][0].set_ylabel("speed-up over the full model")
    axes[1][0].set_ylabel("ranker's share of the time, %")
    axes[0][0].legend()
    return picture


def parser(description: str) -> argparse.ArgumentParser:
    """The options."""
    options = make_parser(description, models=[VIT_S, VIT_B], batch_sizes=[1])
    add, sizes = options.add_argument, [224, 384, 518, 1024]
    add("--img-sizes", nargs="+", type=positive, default=sizes, help="sides in pixels")
    text = "side in pixels that a low-resolution ranker looks at"
    add("--rank-size", type=positive, default=224, help=text)
    return options


main = Benchmark(
    name="resolution",
    doc=__doc__,
    title="Rank at low resolution, encode at high",
    run=run,
    progress="{method} ×{speedup:.2f} (ranker {ranker_share:.2%})",
    table=cells(
        {
            "model": plain("model"),
            "px": plain("img_size"),
            "batch": plain("batch"),
            "keep": figure("keep_ratio", "g"),
            "method": plain("method"),
            "ms": milliseconds,
            SPEEDUP: figure("speedup", ".2f"),
            "achieved ÷ ceiling (quartiles)": figure("achieved", ".3f"),
            "ranker's share of full (quartiles)": figure("ranker_share", ".3%"),
        }
    ),
    goals=goals,
    plot=plot,
    parser=parser,
).main


if __name__ == "__main__":
    main()
