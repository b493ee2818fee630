"""Does the gain survive compiling and exporting, and what do they add?

Claim. A pruned ViT-B at keep ratio 0.5 and batch 1 is at least 1.55 times as fast as the plain
eager model, and 2.2 times once compiled by inductor with frozen weights; in ONNX Runtime the
ranking is part of the one graph, and the gain stays. How far that holds stands in the README, under
*Where it falls short*.

Arithmetic. Half of the patches is 99 of 197 tokens: blocks take half the FLOPs, and at batch 1 on a
CPU a little more than half of the time, because the weights (344 MB in float32) are read whatever
the tokens are. Compiling with freezing packs the weights for the matrix kernels once and fuses what
lies between them: it shortens the full model and the pruned one alike, so the two gains multiply.
The front-end adds 60 to 70 operators to those of the model (`where_does_time_go.py` counts them):
launching them is what eager mode pays for and a compiled graph does not.

Timed, in turns in one process, ranking included:
    eager           the modules as they are
    compiled        torch.compile; on a CPU inductor with frozen weights, on a GPU max-autotune with
                    CUDA graphs
    aotinductor     the exported program compiled ahead of time by AOTInductor, weights frozen too.
                    On an x86 CPU the same inductor gives the frozen linear layers to oneDNN here
                    and to MKL in torch.compile (torch 2.15)
    onnxruntime     the exported graph of this batch size in ONNX Runtime, CPU, the same threads
each for `full` (the plain timm model), and for each ranker. Before anything is timed each is held
against the eager output: `max_error` is the largest difference of a logit ÷ the largest logit, and
more than 1e-3 (in float32) ends the run.
Not timed: compiling and exporting; `prepare_seconds` says what they took, once.
Weights are random.
"""

import argparse
import importlib
import io
import tempfile
import time
from collections.abc import Callable
from typing import Any

import tables
import torch
from common import (
    ON_ONE_CORE,
    VIT_B,
    Calls,
    Row,
    cases,
    compare,
    inference,
    load_pyplot,
    make_parser,
    pruned,
    rows_of,
    spread,
    timing_columns,
)
from tables import Goal
from torch import Tensor

from ltrp_timm.measure import throughput

NAME = "compile_and_export"
TITLE = "Eager, compiled and exported: pruned ViTs against the full ones"
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}


def goals() -> list[Goal]:
    """The project's goals that this file's rows can answer."""
    where = {**ON_ONE_CORE, "model": VIT_B, "batch": 1, "keep_ratio": 0.5}
    where["method"] = ("contrast", "conv")
    text = "ViT-B keep 0.5 batch 1, times as fast as eager full"
    bounds = {"eager": 1.55, "compiled": 2.2, "aotinductor": 2.2}
    return [
        Goal(f"{text}, {form}", {**where, "form": form}, "speedup_over_eager", ">=", bound)
        for form, bound in bounds.items()
    ]


def compiled(model: Any, images: Tensor, args: argparse.Namespace) -> Callable[[], Any]:
    """The model by torch.compile, each for itself: a graph for this shape alone."""
    on_cpu = torch.device(args.device).type == "cpu"
    inductor: Any = importlib.import_module("torch._inductor.config")
    inductor.freezing = on_cpu
    mode = "default" if on_cpu else "max-autotune"
    call = inference(torch.compile(model, dynamic=False, mode=mode), images)
    call()
    return call


def compiled_ahead(model: Any, images: Tensor, args: argparse.Namespace) -> Callable[[], Any]:
    """The exported program by AOTInductor, as a deployed package runs it."""
    inductor: Any = importlib.import_module("torch._inductor")
    on_cpu = torch.device(args.device).type == "cpu"
    configs = {"freezing": on_cpu, "max_autotune": not on_cpu}
    # it freezes nothing where gradients are on
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        program = torch.export.export(model, (images,))
        package = inductor.aoti_compile_and_package(
            program, package_path=f"{folder}/model.pt2", inductor_configs=configs
        )
        return inference(inductor.aoti_load_package(package), images)


def exported(model: Any, images: Tensor, args: argparse.Namespace) -> Callable[[], Any]:
    """The model as an ONNX graph of this batch size in ONNX Runtime."""
    onnxruntime = _import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    file = io.BytesIO()
    torch.onnx.export(model, (images,), dynamo=True, verbose=False).save(file)
    session = onnxruntime.InferenceSession(
        file.getvalue(), options, providers=["CPUExecutionProvider"]
    )
    feed = {session.get_inputs()[0].name: images.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def _import_onnxruntime() -> Any:
    try:
        importlib.import_module("onnxscript")
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise SystemExit(
            "exporting needs onnx, onnxscript and onnxruntime: pip install 'ltrp-timm[test]', "
            "or leave onnxruntime out of --forms"
        ) from error


FORMS: dict[str, Callable[[Any, Tensor, argparse.Namespace], Callable[[], Any]]] = {
    "eager": lambda model, images, args: inference(model, images),
    "compiled": compiled,
    "aotinductor": compiled_ahead,
    "onnxruntime": exported,
}


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference of two outputs ÷ the largest of the expected ones."""
    difference = (found.float().cpu() - expected.float().cpu()).abs().max()
    return float(difference / expected.float().abs().max())


def prepare(
    models: dict[str, Any], images: Tensor, args: argparse.Namespace
) -> tuple[Calls, dict[str, Row]]:
    """Callables by "form method", and what preparing each took and how exact it is.

    Raises:
        SystemExit: an output is not the eager one.
    """
    calls: Calls = {}
    facts = {}
    for method, model in models.items():
        expected = inference(model, images)()
        for form in args.forms:
            name, start = f"{form} {method}", time.perf_counter()
            calls[name] = FORMS[form](model, images, args)
            seconds = time.perf_counter() - start
            error = relative_error(calls[name](), expected)
            if not error <= TOLERANCE[args.dtype]:
                raise SystemExit(f"{name} is off by {error:.2g} of the eager output: not timed.")
            facts[name] = {"max_error": float(f"{error:.3g}"), "prepare_seconds": round(seconds, 2)}
    return calls, facts


def run_case(
    full: Any, images: Tensor, case: Row, args: argparse.Namespace, where: Row
) -> list[Row]:
    """All forms and methods at one batch size and keep ratio."""
    models = {"full": full}
    models |= {ranker: pruned(full, ranker, case["keep_ratio"]) for ranker in args.rankers}
    calls, facts = prepare(models, images, args)
    timings = compare(calls, args)
    rows = []
    for name, timing in timings.items():
        form, method = name.split(" ", 1)
        row = {**case, "form": form, "method": method, **timing_columns(timing, case["batch"])}
        row |= spread("speedup", throughput.ratio(timings[f"{form} full"], timing))
        row |= spread("speedup_over_eager", throughput.ratio(timings["eager full"], timing))
        rows.append({**row, **facts[name], **where})
    return rows


def run(args: argparse.Namespace, where: Row) -> list[Row]:
    """Measure every model, batch size and keep ratio."""
    rows: list[Row] = []
    for full, images, case in cases(args):
        torch.compiler.reset()
        new = run_case(full, images, case, args, where)
        rows += new
        print(_progress(new), flush=True)
    return rows


def _progress(rows: list[Row]) -> str:
    head = "{model} batch {batch} keep {keep_ratio:g}, {rounds} rounds: ".format(**rows[0])
    return head + "; ".join(
        "{form} {method} ×{speedup_over_eager:.2f}".format(**row) for row in rows
    )


def table(rows: list[Row]) -> list[Row]:
    """The figures as text."""
    return [
        {
            "model": row["model"],
            "batch": row["batch"],
            "keep": f"{row['keep_ratio']:g}",
            "form": row["form"],
            "method": row["method"],
            "ms": f"{row['seconds_median'] * 1e3:.1f}",
            "times as fast as full, same form": tables.figure(row, "speedup", ".2f"),
            "times as fast as eager full": tables.figure(row, "speedup_over_eager", ".2f"),
            "max error": f"{row['max_error']:.1e}",
        }
        for row in rows
    ]


def plot(rows: list[Row], args: argparse.Namespace) -> Any:
    """Bars: times as fast as eager full, a panel per model, batch size and keep ratio."""
    keys = ("model", "batch", "keep_ratio")
    cases = list(dict.fromkeys(tuple(row[key] for key in keys) for row in rows))
    figure, axes = load_pyplot().subplots(
        1, len(cases), figsize=(1 + 4.5 * len(cases), 4), squeeze=False
    )
    methods = ["full", *args.rankers]
    width = 0.8 / len(methods)
    for ax, case in zip(axes[0], cases):
        for i, method in enumerate(methods):
            bars = {
                row["form"]: row
                for row in rows
                if tuple(row[key] for key in keys) == case and row["method"] == method
            }
            places = [j + i * width for j in range(len(args.forms))]
            heights = [bars[form]["speedup_over_eager"] for form in args.forms]
            drawn = ax.bar(places, heights, width, label=method)
            ax.bar_label(drawn, fmt="%.2f", fontsize=7)
        ax.set_xticks([j + 0.4 - width / 2 for j in range(len(args.forms))], args.forms)
        ax.set_title("{} batch {} keep {:g}".format(*case), fontsize=9)
        ax.set_ylabel("times as fast as eager full")
        ax.margins(y=0.2)  # room for the legend
    axes[0][0].legend(fontsize=8)
    return figure


def main() -> None:
    """Measure, write CSV, PNG and Markdown, check the goals."""
    parser = make_parser((__doc__ or "").splitlines()[0], rankers=["contrast"], seconds=30.0)
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS, help="to compare")
    args = parser.parse_args()
    if "eager" not in args.forms:
        parser.error("--forms must have eager: it is what the others are held against")
    if "onnxruntime" in args.forms and not args.pool:
        if args.device != "cpu" or args.dtype != "float32":
            parser.error("onnxruntime is measured on a CPU in float32: leave it out of --forms")
        _import_onnxruntime()
    rows = rows_of(NAME, run, args)
    tables.conclude(NAME, TITLE, rows, table(rows), goals(), plot(rows, args), args)


if __name__ == "__main__":
    main()
