"""``ltrp-timm export``: a pruned model as a file for deployment, checked and timed."""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ltrp_timm._text import one_line, printable, say
from ltrp_timm.commands._console import CommandError, check_output, output_errors
from ltrp_timm.commands._flags import keep_ratio, not_negative, positive, threads
from ltrp_timm.commands._model import (
    build_model,
    check_names,
    describe_model,
    quiet_about_training,
)
from ltrp_timm.deploy.export import Exported, describe, export_model
from ltrp_timm.deploy.formats import FORMATS, input_size, load_exported, require, write_file
from ltrp_timm.measure.throughput import Timing, compare
from ltrp_timm.measure.throughput import ratio as speed_up
from ltrp_timm.models.ltrp import LTRPModel
from ltrp_timm.selection import SELECTIONS
from ltrp_timm.visualize import keeping


def add_export(commands: Any) -> None:
    """Add the command to the parser."""
    about = "Write a pruned model for deployment, check it against the model, and time it."
    parser = commands.add_parser("export", help=about, description=about, allow_abbrev=False)
    parser.set_defaults(run=_run)
    add = parser.add_argument
    add("model", metavar="MODEL", help="an ltrp_* name, any timm ViT, hf-hub:… or local-dir:…")
    add("--format", choices=list(FORMATS), default="onnx", help="(%(default)s)")
    add("-o", "--output", metavar="FILE", help="(the model's name and .onnx, .pt2 or .pt)")
    add("--overwrite", action="store_true", help="replace an existing --output")
    add("--keep-ratio", type=keep_ratio, metavar="R", help="share of patches, fixed in the file")
    add("--ranker", help="what scores the patches (the model's own, or contrast)")
    add("--ranker-weights", metavar="PATH", help="folder or .safetensors file of the ranker")
    add("--selection", choices=SELECTIONS, help="how scores become patches (the model's own)")
    add("--pretrained", action="store_true", help="download the backbone's weights if need be")
    add("--checkpoint", metavar="FILE", help="weights of the model or of its plain backbone")
    add("--img-size", type=positive, metavar="PIXELS", help="side of the images")
    add("--num-classes", type=not_negative, metavar="N", help="classes; 0 for features")
    add("--batch-size", type=positive, default=1, metavar="B", help="images at once (%(default)s)")
    add("--dynamic-batch", action="store_true", help="take any number of images")
    add("--opset", type=positive, metavar="N", help="version of ONNX's operators (torch's choice)")
    add("--no-check", action="store_true", help="do not run the file and compare")
    add("--repeats", type=not_negative, default=10, metavar="N", help="timed rounds (%(default)s)")
    add("--threads", type=positive, metavar="N", help="CPU threads (torch's own choice)")


def _run(arguments: argparse.Namespace) -> int:
    name, format = arguments.model, arguments.format
    output = arguments.output or _default_output(name, format)
    if arguments.opset is not None and format != "onnx":
        raise CommandError(f"--opset goes with --format onnx, got --format {format}.")
    check_names(name, arguments.ranker, option="MODEL")
    check_output(output, FORMATS[format], arguments.overwrite)
    try:
        require(format)
    except ImportError as error:
        raise CommandError(one_line(error)) from error
    with threads(arguments.threads), quiet_about_training():
        model, weights = build_model(
            name,
            option="MODEL",
            ranker=arguments.ranker,
            ranker_weights=arguments.ranker_weights,
            selection=arguments.selection,
            keep_ratio=arguments.keep_ratio,
            pretrained=arguments.pretrained or None,
            checkpoint=arguments.checkpoint,
            img_size=arguments.img_size,
            num_classes=arguments.num_classes,
        )
        describe_model(model, name, weights, [model.keep_ratio])
        exported = _export(model, output, arguments)
        _print_file(exported, arguments.opset)
        if arguments.repeats:
            _print_times(_measure(model, exported, arguments), model.keep_ratio, arguments)
    return 0


def _default_output(name: str, format: str) -> str:
    return name.replace(":", "/").rstrip("/").rpartition("/")[2] + FORMATS[format][0]


def _export(model: LTRPModel, output: str, arguments: argparse.Namespace) -> Exported:
    with output_errors(output):
        try:
            return export_model(
                model,
                output,
                arguments.format,
                batch_size=arguments.batch_size,
                dynamic_batch=arguments.dynamic_batch,
                opset=arguments.opset,
                check=not arguments.no_check,
                overwrite=arguments.overwrite,
            )
        except (ValueError, RuntimeError) as error:
            raise CommandError(f"nothing was written: {one_line(error)}") from error


def _print_file(exported: Exported, opset: int | None) -> None:
    found, size = exported.metadata, exported.path.stat().st_size / 1e6
    batch = "any" if found["batch_size"] is None else found["batch_size"]
    say(f"file        {printable(exported.path)}, {found['format']}, {size:.1f} MB, batch {batch}")
    parity = exported.parity
    if parity is None:
        say("parity      not checked (--no-check)")
        return
    near_ties = f", {parity.left_out} with near ties left out" if parity.left_out else ""
    say(
        f"parity      largest difference from the eager pruned model {parity.error:.1e} "
        f"({parity.num_images} images{near_ties}; outputs up to {parity.scale:.2g})"
    )
    if parity.from_full is None:
        say("            all patches are kept: it is the full model")
    else:
        say(f"            from the full model {parity.from_full:.1e} at least")


def _measure(
    model: LTRPModel, exported: Exported, arguments: argparse.Namespace
) -> dict[str, Timing]:
    """Time the file, the full model exported the same way, and the eager pruned model, in turns."""
    format, batch = exported.format, arguments.batch_size
    dynamic = exported.metadata["batch_size"] is None
    images = torch.randn(batch, *input_size(model))
    pruned, _ = load_exported(exported.path, format)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(False):
        path = Path(folder) / f"full{exported.path.suffix}"
        with keeping(model, 1.0):
            metadata = describe(model, format, exported.metadata["batch_size"])
            write_file(model, path, format, batch, dynamic, arguments.opset, metadata)
        full, _ = load_exported(path, format)
    with torch.inference_mode():
        return compare(
            {
                "full": partial(full, images),
                "pruned": partial(pruned, images),
                "eager": partial(model, images),
            },
            repeats=arguments.repeats,
        )


def _print_times(
    times: dict[str, Timing], keep_ratio: float, arguments: argparse.Namespace
) -> None:
    rounds, count = len(times["full"].seconds), torch.get_num_threads()
    batch, format = arguments.batch_size, arguments.format
    setting = f"CPU, {count} thread(s), float32, median of {rounds} round(s)"
    say(f"\ntime of a batch of {batch}: {setting}")
    say(f"  {format + ', full model':<28}{1e3 * times['full'].median:.1f} ms")
    for kind, label in (("pruned", f"{format}, keep {keep_ratio:g}"), ("eager", "eager, the same")):
        gain = speed_up(times["full"], times[kind])
        spread = f"{gain.median:.2f}x ({gain.low:.2f} to {gain.high:.2f})"
        say(f"  {label:<28}{1e3 * times[kind].median:.1f} ms, {spread}")
    say("  1.23x: as many times faster than the full model in the file's runtime, ranker included")
