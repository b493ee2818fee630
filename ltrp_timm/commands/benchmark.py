"""``ltrp-timm benchmark``: does dropping patches pay for this model, here?"""

import argparse
import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ltrp_timm._text import one_line, printable, say
from ltrp_timm.commands._console import CommandError, behind_links, check_output, output_errors
from ltrp_timm.commands._flags import keep_ratio, not_negative, positive, threads
from ltrp_timm.commands._model import build_model, check_names, quiet_about_training
from ltrp_timm.deploy.formats import input_size
from ltrp_timm.measure.payoff import (
    COMPILE_MODES,
    FULL,
    Line,
    by_ranker,
    measure_payoff,
    pays_up_to,
    recommend,
)
from ltrp_timm.measure.throughput import Ratio, environment
from ltrp_timm.models.front_end import make_ranker
from ltrp_timm.selection import SELECTIONS
from ltrp_timm.weights.files import write_atomically

DTYPES = ("float32", "bfloat16", "float16")
RANKERS = ("contrast", "conv", "vit_small")


def add_benchmark(commands: Any) -> None:
    """Add the command to the parser."""
    about = "Measure whether dropping patches pays: full, ideal and pruned, in turns."
    parser = commands.add_parser("benchmark", help=about, description=about, allow_abbrev=False)
    parser.set_defaults(run=_run)
    add = parser.add_argument
    models = "ltrp_* names, any timm ViTs, hf-hub:… or local-dir:…"
    add("models", metavar="MODEL", nargs="+", help=models)
    shares = "shares of patches, below 1 (0.75 0.5 0.25)"
    add("--keep-ratio", nargs="+", type=keep_ratio, metavar="R", help=shares)
    own = f"what scores the patches (the model's own, else {', '.join(RANKERS)})"
    add("--ranker", nargs="+", metavar="RANKER", help=own)
    add("--selection", choices=SELECTIONS, default="top", help="(%(default)s)")
    add("--batch-size", nargs="+", type=positive, default=[1, 8], metavar="B", help="(1 8)")
    add("--img-size", nargs="+", type=positive, metavar="PIXELS", help="sides (the model's own)")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, … (%(default)s)")
    add("--dtype", choices=DTYPES, default="float32", help="of weights and images (%(default)s)")
    modes = "torch.compile, each variant for itself; freezing is for CPUs (default)"
    add("--compile", nargs="?", const="default", choices=COMPILE_MODES, help=modes)
    add("--repeats", type=positive, default=10, metavar="N", help="timed rounds (%(default)s)")
    add("--warmup", type=not_negative, default=2, metavar="N", help="rounds before (%(default)s)")
    add("--threads", type=positive, metavar="N", help="CPU threads (torch's own choice)")
    add("--no-memory", action="store_true", help="do not measure peak memory")
    add("-o", "--output", metavar="CSV", help="write all figures")
    add("--overwrite", action="store_true", help="replace an existing --output")


def _run(arguments: argparse.Namespace) -> int:
    device = _device(arguments.device)
    shares = sorted(set(arguments.keep_ratio or (0.75, 0.5, 0.25)), reverse=True)
    if shares[0] == 1:
        raise CommandError("--keep-ratio must be below 1: the full model is measured anyway.")
    if arguments.compile == "freezing" and device.type != "cpu":
        raise CommandError(f"--compile freezing packs weights for a CPU, got --device {device}.")
    for name in arguments.models:
        for ranker in arguments.ranker or [None]:
            check_names(name, ranker, option="MODEL")
    if arguments.output is not None:
        check_output(arguments.output, (".csv",), arguments.overwrite)
    rows: list[dict[str, Any]] = []
    with threads(arguments.threads), quiet_about_training():
        _say_where(device, arguments)
        for name in dict.fromkeys(arguments.models):
            for side in dict.fromkeys(arguments.img_size or [None]):
                rows += _measure_model(name, side, shares, device, arguments)
    if arguments.output is not None:
        with output_errors(arguments.output):
            _write(rows, arguments.output)
        say(f"\nfigures     {printable(arguments.output)}, {len(rows)} rows")
    return 0


def _device(text: str) -> torch.device:
    """The device, after something was put on it.

    Raises:
        CommandError: there is none of that name here.
    """
    try:
        device = torch.device(text)
        torch.zeros(1, device=device)
        if device.type == "meta":
            raise ValueError("nothing runs on it")
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = one_line(error)
        raise CommandError(f"--device {printable(text)} cannot be used: {reason}") from error
    return device


def _say_where(device: torch.device, arguments: argparse.Namespace) -> None:
    found = environment(device)
    form = f"compiled ({arguments.compile})" if arguments.compile else "eager"
    say(f"{found['machine']}, {device}, {found['threads']} thread(s), {arguments.dtype}, {form}")
    say(f"torch {found['torch']}, timm {found['timm']}, ltrp_timm {found['ltrp_timm']}")
    count = arguments.repeats
    say(f"time of one batch, all variants in turns: median of {count} round(s) (quartiles)")


def _measure_model(
    name: str,
    side: int | None,
    shares: Sequence[float],
    device: torch.device,
    arguments: argparse.Namespace,
) -> list[dict[str, Any]]:
    """All batch sizes of one model at one image size."""
    model, _ = build_model(name, option="MODEL", img_size=side)
    size, own = input_size(model), model.ranker
    full = model.restore().eval().requires_grad_(False)
    rankers = _rankers(own, full, name, arguments.ranker)
    dtype = getattr(torch, arguments.dtype)
    full = full.to(device=device, dtype=dtype)
    rankers = {key: ranker.to(device=device, dtype=dtype) for key, ranker in rankers.items()}
    rows = []
    for batch in dict.fromkeys(arguments.batch_size):
        say(f"\n{printable(name)}, {size[1]}x{size[2]} pixels, batch {batch}")
        images = torch.randn(batch, *size, generator=torch.Generator().manual_seed(0))
        lines = _lines(full, images.to(device=device, dtype=dtype), rankers, shares, arguments)
        _print_lines(lines, batch)
        say(f"-> {printable(name)} at batch {batch}: {recommend(lines)}.")
        case = {"model": name, "img_size": size[1], "batch": batch, "device": str(device)}
        case |= {"dtype": arguments.dtype, "compile": arguments.compile or "eager"}
        rows += [{**case, **_row(line, batch), **environment(device)} for line in lines]
    return rows


def _rankers(
    own: nn.Module, full: nn.Module, name: str, names: Sequence[str] | None
) -> dict[str, nn.Module]:
    """Those that were asked for; else the model's own, or some to choose from."""
    if names is None and name.startswith(("ltrp", "hf-hub:", "hf_hub:", "local-dir:")):
        return {getattr(own, "name", type(own).__name__): own}
    found = {}
    for ranker in dict.fromkeys(names or RANKERS):
        try:
            found[ranker] = make_ranker(ranker, full)
        except (ValueError, TypeError) as error:
            raise CommandError(f"--ranker {ranker}: {one_line(error)}") from error
    return found


def _lines(
    full: nn.Module,
    images: Tensor,
    rankers: Mapping[str, nn.Module],
    shares: Sequence[float],
    arguments: argparse.Namespace,
) -> list[Line]:
    try:
        return measure_payoff(
            full,
            images,
            rankers,
            shares,
            selection=arguments.selection,
            compile_mode=arguments.compile,
            repeats=arguments.repeats,
            warmup=arguments.warmup,
            memory=not arguments.no_memory,
        )
    except torch.OutOfMemoryError as error:
        size = "x".join(str(length) for length in images.shape)
        raise CommandError(f"images of {size} do not fit: {one_line(error)}") from error
    except (RuntimeError, ValueError) as error:
        raise CommandError(f"cannot be measured: {one_line(error)}") from error


def _print_lines(lines: Sequence[Line], batch: int) -> None:
    say(f"{'':<18}{'ms':>20}{'images/s':>10}{'x full':>21}{'of ideal':>10}{'MiB':>9}")
    keep = 1.0
    for line in lines:
        if line.method != FULL and line.keep_ratio != keep:
            keep = line.keep_ratio
            say(f"keep {keep:g}, {line.num_kept} of {lines[0].num_kept} patches")
        say(_text(line, batch))
    for name, found in by_ranker(lines).items():
        share = statistics.median(line.ranking or 0.0 for line in found)
        up_to, most = pays_up_to(found), found[-1].keep_ratio
        text = "at no keep ratio measured" if not up_to else f"up to keep {up_to:.2g}"
        text += " at least" if up_to == most else ""
        say(f"{name}: pays {text}; ranking adds {share:.1%} of the full model's time")


def _text(line: Line, batch: int) -> str:
    timing, name = line.timing, f"{'' if line.method == FULL else '  '}{line.method}"
    low, median, high = (f"{1e3 * t:.4g}" for t in (timing.low, timing.median, timing.high))
    time = f"{median} ({low} – {high})"
    gain = "" if line.method == FULL else _ratio(line.speedup)
    ideal = "" if line.achieved is None else f"{line.achieved.median:.3f}"
    memory = "" if timing.peak_memory is None else f"{timing.peak_memory / 2**20:.1f}"
    rate = f"{timing.items_per_second(batch):.4g}"
    return f"{name:<18}{time:>20}{rate:>10}{gain:>21}{ideal:>10}{memory:>9}".rstrip()


def _ratio(value: Ratio) -> str:
    return f"{value.median:.2f} ({value.low:.2f} – {value.high:.2f})"


def _row(line: Line, batch: int) -> dict[str, Any]:
    """One line of the CSV file; cells are empty where there is no figure."""
    timing, best = line.timing, line.achieved
    return {
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


def _write(rows: Sequence[Mapping[str, Any]], output: str) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    data = text.getvalue().encode()
    write_atomically(behind_links(output), lambda path: path.write_bytes(data))
