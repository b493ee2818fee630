"""What does the vision side of a vision-language model cost with half of its patches?

Claim. At 1024 px and keep ratio 0.5, ranking included, the vision tower and the projector of a
PerceptionLM take at most 0.6 of the time of the plain ones, and the language model reads half as
many tokens. With `rest="coarse"` it reads as many as before, for about the same time.

Arithmetic. A block of width D on L tokens takes 12 L D² + 2 L² D multiply-adds. At 1024 px and
patches of 16, L is 4096; of the small tower (D = 384) the quadratic part is 1.8 times the other.
Half of the tokens is half of the one and a quarter of the other: 0.34 of the work. The projector
pools 2 x 2 patches and is small.

Timed, in turns in one process: `model.get_image_features(pixels)` of transformers, that is tower
and projector, without the language model:
    full              the plain tower
    border, …         ltrp_timm.drop_visual_tokens(model, that ranker): whole cells of 2 x 2 patches
    border, coarse    the same with rest="coarse": weak cells are one token each
Weights are random and the language model is tiny: neither changes the time. Answers are not judged.
The committed rows were measured while the machine did other work: their ranges are wide.
"""

import argparse
import copy
from collections.abc import Iterator
from typing import Any

import timm
import torch
from common import ON_ONE_CORE, Row, compare, inference, make_parser, spread, timed_row
from runner import SPEEDUP, Benchmark, cells, figure, milliseconds, panels, plain, whiskers
from tables import Goal

import ltrp_timm
from ltrp_timm.commands._flags import positive
from ltrp_timm.measure import throughput

TOWER = "vit_pe_core_small_patch16_384"


def goals() -> list[Goal]:
    """What must hold at 1024 px."""
    where = {**ON_ONE_CORE, "model": TOWER, "img_size": 1024, "keep_ratio": 0.5, "batch": 1}
    where["method"] = lambda method: method != "full"
    return [Goal("1024 px keep 0.5 batch 1, time ÷ full", where, "time_ratio", "<=", 0.6)]


def make_model(name: str, size: int, args: argparse.Namespace) -> Any:
    """A random PerceptionLM around a timm tower."""
    try:
        import transformers as hf
    except ImportError as error:
        raise SystemExit("this benchmark needs transformers: pip install transformers") from error
    tower: Row = {"img_size": size, "global_pool": ""}
    tower |= {"depth": args.depth} if args.depth else {}
    tower["embed_dim"] = timm.create_model(name, depth=1).embed_dim
    small = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 8}
    config = hf.PerceptionLMConfig(
        vision_config=hf.TimmWrapperConfig(architecture=name, model_args=tower, do_pooling=False),
        text_config=hf.LlamaConfig(**small, intermediate_size=64, pad_token_id=0),
        projector_pooling_ratio=2,
    )
    model = hf.PerceptionLMModel(config).eval().requires_grad_(False)
    return model.to(device=args.device, dtype=getattr(torch, args.dtype))


def run(args: argparse.Namespace) -> Iterator[list[Row]]:
    """Measure every tower, image size, batch size and keep ratio."""
    for name in args.models:
        for size in args.img_sizes:
            full = make_model(name, size, args)
            for batch in args.batch_sizes:
                for keep_ratio in args.keep_ratios:
                    case = {"model": name, "img_size": size, "keep_ratio": keep_ratio}
                    yield run_case(full, {**case, "batch": batch}, args)


def run_case(full: Any, case: Row, args: argparse.Namespace) -> list[Row]:
    """All methods at one image size, batch size and keep ratio."""
    models = {"full": full}
    for ranker in args.rankers:
        for method, rest in ((ranker, "drop"), (f"{ranker}, coarse", "coarse")):
            models[method] = copy.deepcopy(full)
            ltrp_timm.drop_visual_tokens(models[method], ranker, case["keep_ratio"], rest=rest)
    shape = (case["batch"], 1, 3, case["img_size"], case["img_size"])
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    pixels = pixels.to(device=args.device, dtype=getattr(torch, args.dtype))
    calls = {name: inference(model.get_image_features, pixels) for name, model in models.items()}
    timings = compare(calls, args)
    return [
        {
            **timed_row(
                {
                    **case,
                    "method": method,
                    "visual_tokens": ltrp_timm.num_visual_tokens(model, case["img_size"]),
                },
                timings[method],
                speedup=throughput.ratio(timings["full"], timings[method]),
            ),
            **spread("time_ratio", throughput.ratio(timings[method], timings["full"])),
        }
        for method, model in models.items()
    ]


def plot(rows: list[Row], args: argparse.Namespace) -> Any:
    """Time ÷ that of the plain model, a bar for each method; a panel for each tower and size."""
    first = {"batch": args.batch_sizes[0], "keep_ratio": args.keep_ratios[0]}
    shown = [row for row in rows if all(row[key] == value for key, value in first.items())]
    places = list(dict.fromkeys((row["model"], row["img_size"]) for row in shown))
    picture, axes = panels(1, len(places))
    for ax, (model, size) in zip(axes[0], places):
        some = [row for row in shown if (row["model"], row["img_size"]) == (model, size)]
        names = [f"{row['method']}\n{row['visual_tokens']} tokens" for row in some]
        ax.bar(names, [row["time_ratio"] for row in some], color="#4878a8")
        ranges = whiskers(some, "time_ratio")
        ax.errorbar(names, [row["time_ratio"] for row in some], ranges, fmt="none", ecolor="k")
        ax.axhline(0.6, color="k", ls=":", lw=1)
        ax.set_title(f"{model}, {size} px, keep {first['keep_ratio']:g}", fontsize=9)
        ax.tick_params(axis="x", labelsize=7)
        ax.set_ylabel("time of tower and projector ÷ plain")
    return picture


def parser(description: str) -> argparse.ArgumentParser:
    """The options."""
    options = make_parser(description, models=[TOWER], batch_sizes=[1], rankers=["border", "conv"])
    text = "sides in pixels, multiples of two patches"
    options.add_argument("--img-sizes", nargs="+", type=positive, default=[1024], help=text)
    return options


main = Benchmark(
    name="visual_tokens",
    doc=__doc__,
    title="The vision side of a vision-language model",
    run=run,
    progress="{method} ×{speedup:.2f}, {visual_tokens} tokens",
    table=cells(
        {
            "model": plain("model"),
            "px": plain("img_size"),
            "batch": plain("batch"),
            "keep": figure("keep_ratio", "g"),
            "method": plain("method"),
            "visual tokens": plain("visual_tokens"),
            "ms": milliseconds,
            SPEEDUP: figure("speedup", ".2f"),
            "time ÷ full (quartiles)": figure("time_ratio", ".3f"),
        }
    ),
    goals=goals,
    plot=plot,
    parser=parser,
).main


if __name__ == "__main__":
    main()
