"""Write a pruned model for deployment, as ONNX, ``torch.export``, AOTInductor or TorchScript.

The keep ratio of a file is fixed. Its batch size is too, without ``dynamic_batch``; TorchScript
files accept any. A file whose outputs differ from the model's is not written.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ltrp_timm.deploy.formats import (
    FORMATS,
    OLDEST_OPSET,
    input_size,
    load_exported,
    require,
    write_file,
)
from ltrp_timm.deploy.parity import Parity, check_parity
from ltrp_timm.models.ltrp import LTRPModel
from ltrp_timm.slots.coarse import UNSCRIPTABLE
from ltrp_timm.weights.files import PathLike, write_atomically

TOLERANCE = 1e-4
ONNX_LIMIT = 2**31 - 2**20  # bytes of weights in an ONNX file; the graph takes the rest of 2 GiB


@dataclass(frozen=True)
class Exported:
    """An exported file.

    Args:
        path: The file.
        format: "onnx", "pt2", "aoti" or "torchscript".
        metadata: The metadata in the file, see ``describe``.
        parity: Results of the check; None without ``check``.
    """

    path: Path
    format: str
    metadata: dict[str, Any]
    parity: Parity | None


def export_model(
    model: LTRPModel,
    path: PathLike,
    format: str = "onnx",
    *,
    batch_size: int = 1,
    dynamic_batch: bool = False,
    opset: int | None = None,
    check: bool = True,
    tolerance: float = TOLERANCE,
    overwrite: bool = False,
) -> Exported:
    """Write a pruned model, its ranker included, to one file.

    Before the file gets its name it is loaded and run: its outputs must be those of the eager
    pruned model and not those of the full model. A failed export leaves no file. An ONNX file has
    the input ``images`` (B, C, H, W), normalised for the backbone, and the output ``logits``.

    Args:
        model: In eval mode, on the device to export for.
        path: Ends in .onnx, in .pt2 for pt2 and aoti, or in .pt or .ts for TorchScript.
        format: "onnx", "pt2" (``torch.export``), "aoti" (a pt2 file compiled by AOTInductor for
            this kind of machine; needs a C++ compiler) or "torchscript" (``torch.jit.script``).
        batch_size: B of the file; with ``dynamic_batch`` only of the example.
        dynamic_batch: Accept any batch size; TorchScript files always do.
        opset: Version of the ONNX operators; None is torch's choice.
        check: Load the file and compare.
        tolerance: Largest allowed difference of an output from the eager one.
        overwrite: Replace an existing file.

    Returns:
        The file and the results of the check.

    Raises:
        TypeError: ``model`` is not an LTRPModel.
        ValueError: An argument is out of range, the model is in training mode, or the format does
            not support it.
        RuntimeError: The outputs of the file are not those of the model.
        ImportError: An extra is not installed.
        OSError: The file exists already, or cannot be written.

    >>> import tempfile, timm, ltrp_timm
    >>> vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1).eval()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export_model(ltrp_timm.drop_patches(vit), f"{folder}/vit.pt2", "pt2").format
    'pt2'
    """
    path = Path(path)
    _check_arguments(model, path, format, batch_size, opset)
    require(format)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists already; pass overwrite=True to replace it.")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder.")
    target = Path(os.path.realpath(path))  # a link stays a link
    if not target.parent.is_dir():
        raise FileNotFoundError(f"the folder {target.parent} does not exist.")
    dynamic = dynamic_batch or format == "torchscript"
    metadata = describe(model, format, None if dynamic else batch_size)
    with torch.no_grad():  # the model's own errors are clearer than an exporter's
        model(torch.zeros(1, *input_size(model), device=_device(model)))
    parity: list[Parity] = []

    def write(temporary: Path) -> None:
        write_file(model, temporary, format, batch_size, dynamic, opset, metadata)
        if check:
            run, found = load_exported(temporary, format, _device(model))
            if found != metadata:
                raise RuntimeError(f"the file has the metadata {found}, expected {metadata}.")
            parity.append(check_parity(model, run, input_size(model), batch_size, dynamic))
            parity[0].raise_if_wrong(tolerance)

    write_atomically(target, write)
    return Exported(path, format, metadata, parity[0] if parity else None)


def _check_arguments(model: Any, path: Path, format: str, batch_size: Any, opset: Any) -> None:
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}.")
    if not isinstance(model, LTRPModel):
        raise TypeError(
            f"export_model takes an LTRPModel, got {type(model).__name__}: use drop_patches first."
        )
    if any(part.training for part in model.modules()):
        raise ValueError("the model is in training mode: call model.eval() first.")
    dtypes = {str(parameter.dtype) for parameter in model.parameters()}
    if dtypes != {"torch.float32"}:  # rounding to 16 bits would hide the errors to check for
        raise ValueError(f"export takes a float32 model, got {', '.join(sorted(dtypes))}.")
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"batch_size must be a whole number from 1, got {batch_size!r}.")
    if path.suffix.lower() not in FORMATS[format]:
        endings = " or ".join(FORMATS[format])
        raise ValueError(f"the path of a {format} file must end in {endings}, got {path}.")
    if opset is not None and format != "onnx":
        raise ValueError(f"opset requires format='onnx', got format={format!r}.")
    if opset is not None and opset < OLDEST_OPSET:
        raise ValueError(f"opset must be {OLDEST_OPSET} or later, got {opset}.")
    if format == "torchscript" and model.rest == "coarse":
        raise ValueError(UNSCRIPTABLE)
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    if format == "onnx" and size > ONNX_LIMIT:
        raise ValueError(
            f"an ONNX file must be smaller than 2 GiB, the weights have {size / 2**30:.1f} GiB: "
            "use format='pt2'."
        )


def describe(model: LTRPModel, format: str, batch_size: int | None) -> dict[str, Any]:
    """The metadata of a file: how to prepare images, and what the model does.

    Args:
        model: The model to export.
        format: "onnx", "pt2", "aoti" or "torchscript".
        batch_size: B of the file; None for any.

    Returns:
        JSON values: ltrp_timm, torch and timm (versions), format, architecture, input_size
        [C, H, W], batch_size, mean and std (of pixels in [0, 1]), interpolation, crop_pct,
        num_classes, keep_ratio, num_keep (patch tokens), num_patches (N), ranker, selection; and
        rest, if that is not dropped.
    """
    import timm

    from ltrp_timm import __version__

    config = model.data_config()
    cfg = getattr(model.backbone, "pretrained_cfg", None) or {}
    classes: Any = model.num_classes
    return {
        "ltrp_timm": __version__,
        "torch": str(torch.__version__),
        "timm": timm.__version__,
        "format": format,
        "architecture": cfg.get("architecture") or type(model.backbone).__name__,
        "input_size": list(input_size(model)),
        "batch_size": batch_size,
        "mean": list(config["mean"]),
        "std": list(config["std"]),
        "interpolation": config["interpolation"],
        "crop_pct": config["crop_pct"],
        "num_classes": int(classes),
        "keep_ratio": model.keep_ratio,
        "num_keep": model.num_tokens(),
        "num_patches": model.num_patches,
        "ranker": getattr(model.ranker, "name", "") or type(model.ranker).__name__,
        "selection": model.selection,
        **({} if model.rest == "drop" else {"rest": model.rest}),
    }


def _device(model: LTRPModel) -> torch.device:
    return next(model.backbone.parameters()).device
