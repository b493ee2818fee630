"""``ltrp-timm export``: a pruned model as a file for deployment, checked and timed."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from ltrp_timm._text import printable, say
from ltrp_timm.commands._console import (
    ModelOptions,
    check_names,
    check_output,
    describe_model,
    output_errors,
    quiet_about_training,
    time_and_gain,
)
from ltrp_timm.commands._flags import NotNegative, PathName, Positive, add_command
from ltrp_timm.deploy.export import Exported, describe, export_model
from ltrp_timm.deploy.formats import FORMATS, input_size, load_exported, require, write_file
from ltrp_timm.measure.throughput import Timing, compare
from ltrp_timm.models.ltrp import LTRPModel
from ltrp_timm.visualize import keeping


@dataclass(frozen=True, kw_only=True)
class ExportOptions(ModelOptions):
    """Options of ``ltrp-timm export``.

    Args:
        format: Format of the file.
        output: File to write (default: the model's name with .onnx, .pt2 or .pt).
        overwrite: Replace an existing ``output``.
        keep_ratio: Share of patches to keep, fixed in the file (default: the model's own).
        batch_size: Images per call.
        dynamic_batch: Accept any number of images per call.
        opset: Version of the ONNX operators (default: torch's choice).
        check: Run the file and compare its outputs with those of the model.
        repeats: Number of timed rounds, 0 for none.
        threads: CPU threads (default: torch's choice).
    """

    format: Annotated[str, tuple(FORMATS)] = "onnx"
    output: PathName | None = None
    overwrite: bool = False
    keep_ratio: float | None = None
    batch_size: int = 1
    dynamic_batch: bool = False
    opset: Positive | None = None
    check: bool = True
    repeats: NotNegative = 10
    threads: Positive | None = None


def add_export(commands: Any) -> None:
    """Add ``ltrp-timm export``."""
    about = "Write a pruned model for deployment, check it against the model, and time it."
    add_command(commands, "export", about, _run, ExportOptions, positional=("model",))


def _run(**given: Any) -> int:
    options = ExportOptions(**given)
    name, format = options.model, options.format
    suffixes = FORMATS[format]
    stem = name.replace(":", "/").rstrip("/").rpartition("/")[2]
    output = options.output or stem + suffixes[0]
    if options.opset is not None and format != "onnx":
        raise ValueError(f"--opset requires --format onnx, got --format {format}.")
    check_names(name, options.ranker)
    check_output(output, suffixes, options.overwrite)
    require(format)
    with quiet_about_training():
        model, weights = options.open(keep_ratio=options.keep_ratio)
        describe_model(model, name, weights, [model.keep_ratio])
        exported = _export(model, output, options)
        _print_file(exported)
        if options.repeats:
            _print_times(_measure(model, exported, options), model.keep_ratio, options)
    return 0


def _export(model: LTRPModel, output: str, options: ExportOptions) -> Exported:
    names = ("batch_size", "dynamic_batch", "opset", "check", "overwrite")
    try:
        given = {name: getattr(options, name) for name in names}
        return export_model(model, output, options.format, **given)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"nothing was written: {error}") from error
    except OSError:
        with output_errors(output):
            raise


def _print_file(exported: Exported) -> None:
    found, size = exported.metadata, exported.path.stat().st_size / 1e6
    batch = "any" if found["batch_size"] is None else found["batch_size"]
    say(f"file        {printable(exported.path)}, {found['format']}, {size:.1f} MB, batch {batch}")
    parity = exported.parity
    if parity is None:
        say("parity      not checked (--no-check)")
        return
    near_ties = f", {parity.left_out} with near ties excluded" if parity.left_out else ""
    say(
        f"parity      largest difference from the eager pruned model {parity.error:.1e} "
        f"({sum(parity.batch_sizes)} images{near_ties}; outputs up to {parity.scale:.2g})"
    )
    if parity.from_full is None:
        say("            all patches are kept: it is the full model")
    else:
        say(f"            smallest difference from the full model {parity.from_full:.1e}")


def _measure(model: LTRPModel, exported: Exported, options: ExportOptions) -> dict[str, Timing]:
    """Time the file, the full model in the same format and the eager pruned model, interleaved."""
    format, batch = exported.format, options.batch_size
    fixed = exported.metadata["batch_size"]
    pruned, _ = load_exported(exported.path, format)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(False):
        path = Path(folder) / f"full{exported.path.suffix}"
        with keeping(model, 1.0):
            write_file(model, path, describe(model, format, fixed), batch, options.opset)
        full, _ = load_exported(path, format)
    calls: dict[str, Callable[[Tensor], Any]] = {"full": full, "pruned": pruned, "eager": model}
    images = torch.randn(batch, *input_size(model))
    with torch.inference_mode():
        fns = {name: partial(call, images) for name, call in calls.items()}
        return compare(fns, repeats=options.repeats)


def _print_times(times: dict[str, Timing], keep_ratio: float, options: ExportOptions) -> None:
    full, count = times["full"], torch.get_num_threads()
    setting = f"CPU, {count} thread(s), float32, median of {options.repeats} round(s)"
    say(f"\ntime of a batch of {options.batch_size}: {setting}")
    say(f"  {options.format + ', full model':<28}{1e3 * full.median:.1f} ms")
    for kind, text in (
        ("pruned", f"{options.format}, keep {keep_ratio:g}"),
        ("eager", "eager, the same"),
    ):
        say(f"  {text:<28}{time_and_gain(times[kind], full)}")
    say("  x: speed-up over the full model in the same format, ranking included (quartiles)")
