"""``ltrp-timm benchmark``: does dropping patches pay for this model, on this machine?"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import nn

from ltrp_timm._text import csv_text, printable, say
from ltrp_timm.commands._console import (
    ModelOptions,
    behind_links,
    check_names,
    check_output,
    how_chosen,
    output_errors,
    quiet_about_training,
    size_text,
)
from ltrp_timm.commands._flags import NotNegative, PathName, Positive, add_command
from ltrp_timm.deploy.formats import input_size
from ltrp_timm.measure.payoff import (
    FULL,
    SMALLER,
    CompileMode,
    Payoff,
    by_ranker,
    measure_payoff,
    pays_up_to,
    recommend,
)
from ltrp_timm.measure.throughput import environment
from ltrp_timm.models.front_end import make_ranker
from ltrp_timm.models.open_model import is_source
from ltrp_timm.rankers import DEFAULT_RANKER
from ltrp_timm.runtime.world import usable_device
from ltrp_timm.train.recipe import RestOptions
from ltrp_timm.weights.files import write_text

RANKERS = (DEFAULT_RANKER, "conv", "vit_small")


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions(RestOptions):
    """Options of ``ltrp-timm benchmark``.

    Args:
        model: One or more ``ltrp_*`` names, timm ViTs, hf-hub:OWNER/NAME or local-dir:DIR.
        keep_ratio: Shares of patches to keep, in (0, 1).
        ranker: Names of rankers (default: the model's own, else border, conv and vit_small).
        selection: How scores choose patches (default: the model's own, else top).
        batch_size: Images per call.
        img_size: Sides of the images in pixels (default: the model's own).
        device: Device, such as cpu, cuda or cuda:1.
        dtype: Type of the weights and images.
        compile_mode: Compile each variant with torch.compile in this mode; freezing packs the
            weights for a CPU (default: eager).
        repeats: Number of timed rounds.
        warmup: Rounds before them.
        threads: CPU threads (default: torch's choice).
        memory: Measure peak memory.
        smaller_image: Also measure the plain model at the image size with about as many patches as
            are kept, at each keep ratio.
        output: CSV file with all figures.
        overwrite: Replace an existing ``output``.
    """

    model: Sequence[str]
    keep_ratio: Sequence[float] = (0.75, 0.5, 0.25)
    ranker: Sequence[str] | None = None
    selection: str | None = None
    batch_size: Sequence[int] = (1, 8)
    img_size: Sequence[int] | None = None
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    compile_mode: CompileMode | None = None
    repeats: Positive = 10
    warmup: NotNegative = 2
    threads: Positive | None = None
    memory: bool = True
    smaller_image: bool = False
    output: PathName | None = None
    overwrite: bool = False


def add_benchmark(commands: Any) -> None:
    """Add ``ltrp-timm benchmark``."""
    about = "Measure whether dropping patches pays: full, ideal and pruned, interleaved."
    add_command(commands, "benchmark", about, _run, BenchmarkOptions, positional=("model",))


def _run(**given: Any) -> int:
    options = BenchmarkOptions(**given)
    device = usable_device(options.device)
    if 1 in options.keep_ratio:
        raise ValueError("--keep-ratio must be below 1; the full model is always measured.")
    if options.compile_mode == "freezing" and device.type != "cpu":
        raise ValueError(f"--compile-mode freezing requires --device cpu, got {device}.")
    for name in options.model:
        check_names(name, *(options.ranker or ()))
    if options.output is not None:
        check_output(options.output, (".csv",), options.overwrite)
    rows: list[dict[str, Any]] = []
    with quiet_about_training():
        _say_where(device, options)
        for name in dict.fromkeys(options.model):
            for side in dict.fromkeys(options.img_size or (None,)):
                rows += _measure_model(name, side, device, options)
    if options.output is not None:
        with output_errors(options.output):
            write_text(behind_links(options.output), csv_text(rows))
        say(f"\nfigures     {printable(options.output)}, {len(rows)} rows")
    return 0


def _say_where(device: torch.device, options: BenchmarkOptions) -> None:
    found, mode = environment(device), options.compile_mode
    form = f"compiled ({mode})" if mode else "eager"
    say(f"{found['machine']}, {device}, {found['threads']} thread(s), {options.dtype}, {form}")
    say(f"torch {found['torch']}, timm {found['timm']}, ltrp_timm {found['ltrp_timm']}")
    say(f"time of one batch: median and quartiles of {options.repeats} interleaved round(s)")


def _measure_model(
    name: str, side: int | None, device: torch.device, options: BenchmarkOptions
) -> list[dict[str, Any]]:
    """All batch sizes of one model at one image size."""
    front = {field.name: getattr(options, field.name) for field in fields(RestOptions)}
    front["selection"] = options.selection
    model, _ = ModelOptions(model=name, img_size=side, **front).open()
    size, own = input_size(model), model.ranker
    names = (*front, "selection_args")
    front = {key: value for key, value in model.settings().items() if key in names}
    full = model.restore().eval().requires_grad_(False)
    rankers = _rankers(own, full, name, options.ranker)
    form: dict[str, Any] = {"device": device, "dtype": getattr(torch, options.dtype)}
    full = full.to(**form)
    rankers = {key: ranker.to(**form) for key, ranker in rankers.items()}
    names = ("compile_mode", "repeats", "warmup", "memory", "smaller_image")
    given = {name: getattr(options, name) for name in names} | front
    rows, chosen = [], how_chosen(given)
    for batch in dict.fromkeys(options.batch_size):
        say(f"\n{printable(name)}, {size[1]}x{size[2]} pixels, batch {batch}, selection {chosen}")
        images = torch.randn(batch, *size, generator=torch.Generator().manual_seed(0))
        lines = measure_payoff(full, images.to(**form), rankers, options.keep_ratio, **given)
        _print_lines(lines, batch)
        say(f"-> {printable(name)} at batch {batch}: {recommend(lines)}.")
        case = {"batch": batch, "device": str(device)}
        case |= {"dtype": options.dtype, "compile": options.compile_mode or "eager"}
        case |= {"rest": model.rest}
        rows += [
            {"model": name, **_row(line, batch, case), **environment(device)} for line in lines
        ]
    return rows


def _rankers(
    own: nn.Module, full: nn.Module, name: str, names: Sequence[str] | None
) -> dict[str, nn.Module]:
    """The rankers by these names; without names the model's own, or some to choose from."""
    if names is None and (name.startswith("ltrp") or is_source(name)):
        return {getattr(own, "name", type(own).__name__): own}
    return {ranker: make_ranker(ranker, full) for ranker in names or RANKERS}


def _print_lines(lines: Sequence[Payoff], batch: int) -> None:
    say(f"{'':<18}{'ms':>20}{'images/s':>10}{'speed-up':>21}{'of ideal':>10}{'MiB':>9}")
    keep = 1.0
    for line in lines:
        if line.method != FULL and line.keep_ratio != keep:
            keep = line.keep_ratio
            say(f"keep {keep:g}, {line.num_kept} of {lines[0].num_kept} patch tokens")
        if line.method == SMALLER:
            height, width = line.img_size
            say(f"full model on {height}x{width} pixels, {line.num_kept} patches")
        say(_text(line, batch))
    for name, found in by_ranker(lines).items():
        share = statistics.median(line.ranking or 0.0 for line in found)
        up_to, most = pays_up_to(found), found[-1].keep_ratio
        text = "at no keep ratio measured" if not up_to else f"up to keep {up_to:.2g}"
        text += " at least" if up_to == most else ""
        say(f"{name}: pays {text}; ranking adds {share:.1%} of the full model's time")


def _text(line: Payoff, batch: int) -> str:
    timing, name = line.timing, f"{'' if line.method == FULL else '  '}{line.method}"
    low, median, high = (f"{1e3 * t:.4g}" for t in (timing.low, timing.median, timing.high))
    time = f"{median} ({low} – {high})"
    gain = f"{line.speedup.median:.2f} ({line.speedup.low:.2f} – {line.speedup.high:.2f})"
    gain = "" if line.method == FULL else gain
    ideal = "" if line.achieved is None else f"{line.achieved.median:.3f}"
    memory = "" if timing.peak_memory is None else f"{timing.peak_memory / 2**20:.1f}"
    rate = f"{timing.items_per_second(batch):.4g}"
    return f"{name:<18}{time:>20}{rate:>10}{gain:>21}{ideal:>10}{memory:>9}".rstrip()


def _row(line: Payoff, batch: int, case: Mapping[str, Any]) -> dict[str, Any]:
    """One line of the CSV file; cells are empty where there is no figure."""
    timing, best = line.timing, line.achieved
    return {
        "img_size": size_text(line.img_size),
        **case,
        "method": line.method,
        "keep_ratio": line.keep_ratio,
        "num_kept": line.num_kept,
        "rounds": len(timing.seconds),
        "seconds_median": round(timing.median, 7),
        "seconds_low": round(timing.low, 7),
        "seconds_high": round(timing.high, 7),
        "images_per_second": round(timing.items_per_second(batch), 3),
        "speedup": round(line.speedup.median, 5),
        "speedup_low": round(line.speedup.low, 5),
        "speedup_high": round(line.speedup.high, 5),
        "achieved": "" if best is None else round(best.median, 5),
        "ranking_share": "" if line.ranking is None else round(line.ranking, 5),
        "peak_bytes": "" if timing.peak_memory is None else timing.peak_memory,
    }
