"""Write and load the file formats for deployment."""

import contextlib
import importlib
import io
import json
import logging
import os
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltrp_timm._text import optional_import
from ltrp_timm.models.ltrp import LTRPModel
from ltrp_timm.weights.files import PathLike

# format -> endings of its files, the usual one first
FORMATS = {"onnx": (".onnx",), "pt2": (".pt2",), "aoti": (".pt2",), "torchscript": (".pt", ".ts")}
OLDEST_OPSET = 18  # that torch's exporter writes
METADATA_KEY = "ltrp_timm"  # in ONNX's metadata_props and in AOTInductor's metadata
METADATA_FILE = "ltrp_timm.json"  # in torch's archives


def require(format: str) -> None:
    """Raise ImportError if a package of a format is not installed."""
    for name in ("onnx", "onnxscript", "onnxruntime") if format == "onnx" else ():
        optional_import(name, f"ONNX files need {name}", "'ltrp-timm[export]'")


def input_size(model: LTRPModel) -> tuple[int, int, int]:
    """Size (C, H, W) of the model's images."""
    h, w = model.data_config()["input_size"][-2:]
    channels: Any = model.in_chans
    return int(channels), int(h), int(w)


def write_file(
    model: LTRPModel, path: Path, metadata: dict[str, Any], batch_size: int, opset: int | None
) -> None:
    """Write a model without a check; ``metadata`` is as ``describe`` gives it."""
    parameter = next(model.backbone.parameters())
    format, dynamic = metadata["format"], metadata["batch_size"] is None
    # torch.export takes an example of one image for a fixed batch size
    batch = max(2, batch_size) if dynamic else batch_size
    images = torch.zeros(batch, *input_size(model), device=parameter.device, dtype=parameter.dtype)
    text, data = json.dumps(metadata), io.BytesIO()
    shapes = {"x": {0: torch.export.Dim("batch", min=1)}} if dynamic else None
    with torch.no_grad(), warnings.catch_warnings():
        # the exporters' warnings about themselves do not help a user
        warnings.simplefilter("ignore")
        if format == "onnx":
            _write_onnx(model, images, path, opset, shapes, text)
            return
        if format == "torchscript":
            with _refusals("torch.jit.script", model, "use format='onnx' or 'pt2'"):
                module = torch.jit.script(model)
            torch.jit.save(module, data, _extra_files={METADATA_FILE: text})
        else:
            with _refusals("torch.export", model):
                program = torch.export.export(model, (images,), dynamic_shapes=shapes)
            if format == "aoti":
                _compile(model, program, data, text)
            else:
                torch.export.save(program, data, extra_files={METADATA_FILE: text})
    path.write_bytes(data.getbuffer())  # torch itself aborts the process when a disk is full


def _compile(
    model: LTRPModel, program: torch.export.ExportedProgram, package: io.BytesIO, text: str
) -> None:
    on_cpu = next(model.backbone.parameters()).device.type == "cpu"
    options: dict[str, Any] = {"aot_inductor.metadata": {METADATA_KEY: text}}
    # weights are packed for the CPU's kernels; the number of threads is chosen at run time
    options |= {"freezing": True, "cpp.dynamic_threads": True} if on_cpu else {}
    compile_program = importlib.import_module("torch._inductor").aoti_compile_and_package
    # torch logs a missing CUDA toolkit
    with _refusals("AOTInductor", model), _without_log("torch.utils.cpp_extension"):
        compile_program(program, package_path=package, inductor_configs=options)


@contextlib.contextmanager
def _without_log(name: str) -> Iterator[None]:
    log = logging.getLogger(name)
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)


def _write_onnx(
    model: LTRPModel, images: Tensor, path: Path, opset: int | None, shapes: Any, text: str
) -> None:
    # a failed conversion is logged, and becomes an error here
    with _refusals("torch.onnx.export", model), _without_log("onnxscript"):
        program = torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=shapes,
            opset_version=opset,
            verbose=False,
        )
    if program is None:
        raise ValueError("torch.onnx.export gave no program.")
    got = program.model.opset_imports.get("")
    if opset is not None and got != opset:  # torch only logs this
        raise ValueError(f"this model cannot be written for ONNX opset {opset}: try {got}.")
    program.model.metadata_props[METADATA_KEY] = text
    program.save(str(path), external_data=False)


@contextlib.contextmanager
def _refusals(tool: str, model: LTRPModel, advice: str = "") -> Iterator[None]:
    """Turn an exporter's error of any type into a ValueError: its first sentence alone."""
    try:
        yield
    except Exception as error:
        source = error.__cause__ if tool == "torch.onnx.export" else None
        text = str(source or error).strip() or type(error).__name__
        text = re.sub(r"\x1b\[[0-9;]*m", "", text)  # colours
        reason = textwrap.shorten(re.split(r":?\s*\n?\s*File \"", text)[0], 300, placeholder=" …")
        parts = f"{type(model.backbone).__name__} with {type(model.ranker).__name__}"
        hint = advice and f" ({advice})"
        raise ValueError(f"{tool} cannot take {parts}: {reason}{hint}") from error


def load_exported(
    path: PathLike, format: str, device: str | torch.device = "cpu"
) -> tuple[Callable[[Tensor], Tensor], dict[str, Any]]:
    """Load a file in its own runtime: images (B, C, H, W) -> logits, and the metadata.

    ONNX files run in onnxruntime on the CPU; ``device`` is that of a TorchScript file, the other
    formats keep that of the export.
    """
    if format == "onnx":
        return _load_onnx(path)
    if format == "aoti":
        return _load_compiled(path)
    found: dict[str, Any] = {METADATA_FILE: ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if format == "pt2":
            with open(path, "rb") as file:
                module: Any = torch.export.load(file, extra_files=found).module()
        else:
            module = torch.jit.load(os.fspath(path), map_location=device, _extra_files=found)
    return module, json.loads(found[METADATA_FILE])


def _load_compiled(path: PathLike) -> tuple[Callable[[Tensor], Tensor], dict[str, Any]]:
    package = io.BytesIO(Path(path).read_bytes())
    module = importlib.import_module("torch._inductor").aoti_load_package(package)
    known = module.loader.get_metadata()
    metadata = json.loads(known[METADATA_KEY])
    batch, size = metadata["batch_size"], metadata["input_size"]

    def run(images: Tensor) -> Tensor:
        # compiled code does not check its input
        shape = [len(images) if batch is None else batch, *size]
        if list(images.shape) != shape or images.dtype != torch.float32:
            found = f"{images.dtype} of shape {list(images.shape)}"
            raise ValueError(f"the file takes torch.float32 of shape {shape}, got {found}.")
        device = known.get("AOTI_DEVICE_KEY", images.device.type)
        if images.device.type != device:
            raise ValueError(f"the file runs on {device}, got images on {images.device.type}.")
        return module(images.contiguous())

    return run, metadata


def _load_onnx(path: PathLike) -> tuple[Callable[[Tensor], Tensor], dict[str, Any]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # threads that spin between calls would slow down whatever runs next
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        os.fspath(path), options, providers=["CPUExecutionProvider"]
    )

    def run(images: Tensor) -> Tensor:
        (logits,) = session.run(["logits"], {"images": images.cpu().numpy()})
        return torch.from_numpy(logits).to(images.device)

    return run, json.loads(session.get_modelmeta().custom_metadata_map[METADATA_KEY])
