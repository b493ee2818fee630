"""Does the gain survive compiling and exporting, and what do they add?

Claim. A pruned ViT-B at keep ratio 0.5 and batch 1 is at least 1.55 times as fast as the plain
eager model, and 2.2 times once compiled by inductor with frozen weights; in ONNX Runtime the
ranking is part of the one graph, and the gain stays. The page of results lists
what does not hold.

Arithmetic. Half of the patches is 99 of 197 tokens: blocks take half the FLOPs, and at batch 1 on a
CPU a little more than half of the time, because the weights (344 MB in float32) are read whatever
the tokens are. Compiling with freezing packs the weights for the matrix kernels once and fuses what
lies between them. It speeds up the full model and the pruned one alike, so the two gains multiply.
The front-end adds 60 to 70 operators to those of the model (`where_does_time_go.py` counts them).
Eager mode pays for launching each of them; a compiled graph does not.

Timed, in turns in one process, ranking included:
    eager           the modules as they are
    compiled        torch.compile; on a CPU inductor with frozen weights, on a GPU max-autotune with
                    CUDA graphs
    aotinductor     the exported program compiled ahead of time by AOTInductor, weights frozen too.
                    On an x86 CPU the same inductor gives the frozen linear layers to oneDNN here
                    and to MKL in torch.compile (torch 2.15)
    onnxruntime     the exported graph of this batch size in ONNX Runtime, CPU, the same threads
each for `full` (the plain timm model), and for each ranker. Before anything is timed each output is
compared with the eager one: `max_error` is the largest difference of a logit ÷ the largest logit,
and more than 1e-3 (in float32) ends the run.
Compiling and exporting are not part of the times; `prepare_seconds` is what they took, once.
Weights are random.
"""

import argparse
import importlib
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import (
    ON_ONE_CORE,
    VIT_B,
    Calls,
    Row,
    cases,
    compare,
    inference,
    make_parser,
    pruned,
    timed_row,
)
from runner import CASE, Benchmark, bars, cells, figure, milliseconds, plain
from tables import Goal
from torch import Tensor

from ltrp_timm.measure import throughput

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}


def goals() -> list[Goal]:
    """What the claim says."""
    where = {**ON_ONE_CORE, "model": VIT_B, "batch": 1, "keep_ratio": 0.5}
    where["method"] = ("contrast", "conv")
    text = "ViT-B keep 0.5 batch 1, speed-up over eager full"
    bounds = {"eager": 1.55, "compiled": 2.2, "aotinductor": 2.2}
    return [
        Goal(f"{text}, {form}", {**where, "form": form}, "speedup_over_eager", ">=", bound)
        for form, bound in bounds.items()
    ]


def compiled(model: Any, images: Tensor, args: argparse.Namespace) -> Callable[[], Any]:
    """The model by torch.compile: a graph for this shape alone."""
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
    """Callables by "form method", and for each its error and the time it took to prepare.

    Raises:
        SystemExit: An output differs from the eager one.
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


def run(args: argparse.Namespace) -> Iterator[list[Row]]:
    """Measure every model, batch size and keep ratio, all forms and methods in turns."""
    for full, images, case in cases(args):
        torch.compiler.reset()
        models = {"full": full}
        models |= {ranker: pruned(full, ranker, case["keep_ratio"]) for ranker in args.rankers}
        calls, facts = prepare(models, images, args)
        timings = compare(calls, args)
        rows = []
        for name, timing in timings.items():
            form, method = name.split(" ", 1)
            row = timed_row(
                {**case, "form": form, "method": method},
                timing,
                speedup=throughput.ratio(timings[f"{form} full"], timing),
                speedup_over_eager=throughput.ratio(timings["eager full"], timing),
            )
            rows.append({**row, **facts[name]})
        yield rows


def parser(description: str) -> argparse.ArgumentParser:
    """The options."""
    options = make_parser(description, rankers=["contrast"], seconds=30.0)
    text = "what to compare"
    options.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS, help=text)
    return options


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the run where a form cannot be measured."""
    if "eager" not in args.forms:
        parser.error("--forms must have eager: it is what the others are held against")
    if "onnxruntime" in args.forms and not args.pool:
        if args.device != "cpu" or args.dtype != "float32":
            parser.error("onnxruntime is measured on a CPU in float32: leave it out of --forms")
        _import_onnxruntime()


main = Benchmark(
    name="compile_and_export",
    doc=__doc__,
    title="Eager, compiled and exported: pruned ViTs against the full ones",
    run=run,
    progress="{form} {method} ×{speedup_over_eager:.2f}",
    table=cells(
        {
            **CASE,
            "form": plain("form"),
            "method": plain("method"),
            "ms": milliseconds,
            "speed-up over full, same form (quartiles)": figure("speedup", ".2f"),
            "speed-up over eager full (quartiles)": figure("speedup_over_eager", ".2f"),
            "max error": figure("max_error", ".1e"),
        }
    ),
    goals=goals,
    plot=lambda rows, _: bars(
        rows,
        "speedup_over_eager",
        "speed-up over the eager full model (quartiles)",
        panel="{model}, batch {batch}, keep {keep_ratio:g}",
        bar="{form}",
        group="{method}",
    ),
    parser=parser,
    check=check,
).main


if __name__ == "__main__":
    main()
