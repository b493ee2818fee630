"""Shared parts of the benchmarks: command-line options, models, images, timing."""

import argparse
import importlib
import re
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ltrp_timm
from ltrp_timm.commands._flags import keep_ratio, not_negative, positive
from ltrp_timm.measure import throughput
from ltrp_timm.measure.payoff import twin

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]
Calls = dict[str, Callable[[], Any]]

VIT_TI, VIT_S, VIT_B, VIT_L = (
    f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large")
)
WIDTH = 8.4  # of pictures in inches: text keeps its size on a page
# the colours of Okabe and Ito, which colour-blind readers tell apart
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#000000")
STYLE: dict[str, Any] = {
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 9,
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}
# where the project's goals hold; a row must say all of it
ON_ONE_CORE = {"device": "cpu", "dtype": "float32", "threads": "1"}


def base_parser(description: str) -> argparse.ArgumentParser:
    """The options every benchmark has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--threads", type=not_negative, default=1, help="threads of torch; 0: its default")
    add("--output", type=Path, default=RESULTS, help="folder of the CSV, PNG and Markdown files")
    parser.set_defaults(depth=0, device="cpu", dtype="float32")
    return parser


def device_parser(description: str) -> argparse.ArgumentParser:
    """The options of a benchmark that runs on any device."""
    parser = base_parser(description)
    add = parser.add_argument
    add("--depth", type=not_negative, default=0, help="blocks of each model; 0: all")
    add("--device", default="cpu", help="cpu, cuda, …")
    text = "of models and images"
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help=text)
    return parser


def add_ranker_options(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """The options of a benchmark that trains rankers, with its ``defaults``."""
    add = parser.add_argument
    add("--ranker-lr", type=float, default=4e-3, help="learning rate")
    add("--mask-ratio", type=float, default=0.5, help="share of masked patches")
    add("--list-size", type=positive, default=10, help="scores per image to learn from")
    add("--seeds", type=not_negative, nargs="+", default=[0], help="one training run per seed")
    parser.set_defaults(**defaults)


def timing_parser(description: str) -> argparse.ArgumentParser:
    """The options of a benchmark that times batches."""
    parser = device_parser(description)
    add = parser.add_argument
    add("--batch-sizes", nargs="+", type=positive, default=[1, 8], help="images per call")
    add("--repeats", type=not_negative, default=0, help="timed rounds; 0: as --seconds allow")
    add("--seconds", type=float, default=20.0, help="time limit of one comparison")
    text = "pool what earlier runs wrote into these folders (their --output); measure nothing"
    add("--pool", nargs="+", type=Path, metavar="FOLDER", help=text)
    return parser


def make_parser(description: str, **defaults: Any) -> argparse.ArgumentParser:
    """The options of a benchmark of models, with its ``defaults``."""
    parser = timing_parser(description)
    add = parser.add_argument
    add("--models", nargs="+", default=[VIT_B], help="timm models")
    ratios = {"nargs": "+", "type": keep_ratio, "default": [0.5]}
    add("--keep-ratios", **ratios, help="shares of patches to encode")
    add("--rankers", nargs="+", default=["contrast", "conv"], help="names of ltrp_timm rankers")
    parser.set_defaults(**defaults)
    return parser


def set_up(args: argparse.Namespace) -> Row:
    """Apply ``--threads``; returns the columns of machine, settings and versions."""
    # an untrained ranker warns; here only its time counts, which its weights do not change
    warnings.filterwarnings("ignore", message=".*no trained weights.*")
    if args.threads > 0:
        torch.set_num_threads(args.threads)
    depth = {"depth": args.depth} if args.depth else {"depth": "all"}
    env = throughput.environment(args.device)
    return {"runs": 1, "device": args.device, "dtype": args.dtype, **depth, **env}


def create_full(name: str, args: argparse.Namespace, **kwargs: Any) -> Any:
    """The plain timm model, random weights, in eval."""
    depth = {"depth": args.depth} if args.depth else {}
    model = timm.create_model(name, pretrained=False, **depth, **kwargs)
    model = model.eval().requires_grad_(False)
    return model.to(device=args.device, dtype=getattr(torch, args.dtype))


def pruned(full: Any, ranker: str, keep_ratio: float, **ranker_args: Any) -> Any:
    """A twin of the plain model behind a front-end."""
    return ltrp_timm.drop_patches(
        twin(full), ranker=ranker, keep_ratio=keep_ratio, ranker_args=ranker_args or None
    )


def make_images(model: Any, batch: int, args: argparse.Namespace) -> Tensor:
    """Noise (B, C, H, W) of the model's image size: pixels do not change the time."""
    generator = torch.Generator().manual_seed(0)
    height, width = model.patch_embed.img_size
    images = torch.randn(
        batch, model.patch_embed.proj.in_channels, height, width, generator=generator
    )
    return images.to(device=args.device, dtype=getattr(torch, args.dtype))


def batches(args: argparse.Namespace) -> Iterator[tuple[Any, Tensor, Row]]:
    """The plain model, images for it and the columns of each model and batch size."""
    for name in args.models:
        full = create_full(name, args)
        for batch in args.batch_sizes:
            yield full, make_images(full, batch, args), {"model": name, "batch": batch}


def cases(args: argparse.Namespace) -> Iterator[tuple[Any, Tensor, Row]]:
    """The same for each keep ratio."""
    for full, images, case in batches(args):
        for ratio in args.keep_ratios:
            yield full, images, {**case, "keep_ratio": ratio}


def inference(fn: Callable[..., Any], *inputs: Any) -> Callable[[], Any]:
    """``fn(*inputs)`` as a callable without arguments, in inference mode."""

    def call() -> Any:
        with torch.inference_mode():
            return fn(*inputs)

    return call


def compare(
    fns: Mapping[str, Callable[[], Any]], args: argparse.Namespace
) -> dict[str, throughput.Timing]:
    """``throughput.compare`` with ``--repeats`` rounds, or as many as fit into ``--seconds``.

    A first round, which gives that number, is the warm-up.
    """
    if args.repeats > 0:
        return throughput.compare(fns, repeats=args.repeats, warmup=1, device=args.device)
    probe = throughput.compare(fns, repeats=1, warmup=0, device=args.device)
    seconds = sum(timing.median for timing in probe.values())
    # another warm-up where it costs little: a first call also pays for buffers that stay
    warmup = 1 if seconds < args.seconds / 10 else 0
    rounds = num_rounds(seconds, args.seconds)
    return throughput.compare(fns, repeats=rounds, warmup=warmup, device=args.device)


def num_rounds(round_seconds: float, seconds: float) -> int:
    """As many rounds as fit, at most 41; at least 5, or 3 where 5 take over three times as long."""
    least = 5 if 5 * round_seconds <= 3 * seconds else 3
    return max(least, min(41, round(seconds / round_seconds)))


def seconds_of(fn: Callable[[], Any], args: argparse.Namespace) -> float:
    """Seconds of one call after a warm-up: enough to plan by."""
    return throughput.compare({"": fn}, repeats=1, warmup=1, device=args.device)[""].median


def timing_columns(timing: throughput.Timing, batch: int) -> Row:
    """rounds, seconds_median with its quartiles, images_per_second."""
    row: Row = {"rounds": len(timing.seconds)}
    row |= {
        f"seconds_{part}": round(getattr(timing, part), 7) for part in ("median", "low", "high")
    }
    return {**row, "images_per_second": round(timing.items_per_second(batch), 3)}


def spread(name: str, value: throughput.Ratio) -> Row:
    """A ratio as three columns: NAME for its median, NAME_low and NAME_high for its quartiles."""
    figures = {name: value.median, f"{name}_low": value.low, f"{name}_high": value.high}
    return {column: round(figure, 5) for column, figure in figures.items()}


def timed_row(case: Row, timing: throughput.Timing, **ratios: throughput.Ratio) -> Row:
    """The columns of a case, of its timing, and of ratios with their quartiles."""
    row = {**case, **timing_columns(timing, case["batch"])}
    for name, value in ratios.items():
        row |= spread(name, value)
    return row


def summary(name: str, values: Tensor) -> Row:
    """Mean and quartiles over the images, as columns."""
    low, _, high = statistics.quantiles(values.tolist(), n=4, method="inclusive")
    figures = {name: float(values.mean()), f"{name}_low": low, f"{name}_high": high}
    return {column: round(figure, 5) for column, figure in figures.items()}


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # a boolean index is a nonzero inside one operator
        indices = args[1] if str(func) in ("aten.index.Tensor", "aten.index_put_.default") else ()
        masked = any(index is not None and index.dtype == torch.bool for index in indices)
        self.names.append("aten.masked_select (index)" if masked else str(func))
        return func(*args, **(kwargs or {}))


def operators(fn: Callable[[], Any]) -> list[str]:
    """The operators that one call dispatches, in order; views count, as they cost a launch too."""
    with _Operators() as mode:
        fn()
    return mode.names


# with inference mode the dispatcher sees composite operators as they are
_WAITS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero")
_WAITS += ("masked_select", "unique_dim", "_unique", "_unique2", "unique_consecutive")


def host_syncs(names: Iterable[str]) -> list[str]:
    """The operators of ``names`` that make the host wait: they read a value from the device."""
    return [name for name in names if re.split("[. ]", name)[1] in _WAITS]


def load_pyplot() -> Any:
    """matplotlib's pyplot, drawing into files.

    Raises:
        SystemExit: matplotlib is not installed.
    """
    try:
        importlib.import_module("matplotlib").use("Agg")
    except ImportError as error:
        raise SystemExit("plots need matplotlib: pip install 'ltrp-timm[demo]'") from error
    pyplot = importlib.import_module("matplotlib.pyplot")
    cycle = importlib.import_module("cycler").cycler(color=COLOURS)
    pyplot.rcParams.update({**STYLE, "axes.prop_cycle": cycle})
    return pyplot
