"""Write a pruned model for deployment, as ONNX, ``torch.export``, AOTInductor or TorchScript.

A file holds one K: its keep ratio is fixed. It takes the batch size it was written for, or any with
``dynamic_batch``; TorchScript files take any. No file is written that does not do what it should.
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
from ltrp_timm.selection import num_keep
from ltrp_timm.weights.files import PathLike, write_atomically

TOLERANCE = 1e-4
ONNX_LIMIT = 2**31 - 2**20  # bytes of one ONNX file; the graph itself takes some


@dataclass(frozen=True)
class Exported:
    """A file that was written.

    Args:
        path: where it is.
        format: "onnx", "pt2", "aoti" or "torchscript".
        metadata: what is written in it, see ``describe``.
        parity: the figures of the check; None where it was not asked for.
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
    """Write a pruned model to one file; it ranks and drops as the model does at its keep ratio.

    The file is loaded back and run before it gets its name: it must give the eager pruned outputs,
    and not those of the full model. A file that fails leaves nothing behind. The input of an ONNX
    file is ``images`` (B, C, H, W), normalised for the backbone, its output ``logits``.

    Args:
        model: in eval mode; exported on its device.
        path: ends in .onnx, in .pt2 for pt2 and aoti, or in .pt or .ts for TorchScript.
        format: "onnx", "pt2" (``torch.export``), "aoti" (the same compiled by AOTInductor, for this
            kind of machine; needs a C++ compiler) or "torchscript" (``torch.jit.script``).
        batch_size: B of the file; of a dynamic one only the size of the example.
        dynamic_batch: take any batch size. TorchScript files do so always.
        opset: version of the ONNX operators; None is torch's choice.
        check: load the file back and compare.
        tolerance: largest allowed difference of an output from the eager one.
        overwrite: replace an existing file.

    Returns:
        What was written, with the figures of the check.

    Raises:
        TypeError: no LTRPModel.
        ValueError: an argument is out of its range, the model is in training mode, or the format
            cannot hold it; the message says why.
        RuntimeError: the file does not do what the model does; the message has the figures.
        ImportError: an extra is missing; the message says what to install.
        OSError: the file exists already, or cannot be written.

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
    with torch.no_grad():  # what the model itself refuses is best said by it
        model(torch.zeros(1, *input_size(model), device=_device(model)))
    parity: list[Parity] = []

    def write(temporary: Path) -> None:
        write_file(model, temporary, format, batch_size, dynamic, opset, metadata)
        if check:
            run, found = load_exported(temporary, format, _device(model))
            if found != metadata:
                raise RuntimeError(f"the metadata of the file is {found}, not {metadata}.")
            parity.append(check_parity(model, run, input_size(model), batch_size, dynamic))
            parity[0].raise_if_wrong(tolerance)

    write_atomically(target, write)
    return Exported(path, format, metadata, parity[0] if parity else None)


def _check_arguments(model: Any, path: Path, format: str, batch_size: Any, opset: Any) -> None:
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}.")
    if not isinstance(model, LTRPModel):
        raise TypeError(
            f"export_model takes an LTRPModel, got {type(model).__name__}: drop_patches makes one."
        )
    if any(part.training for part in model.modules()):
        raise ValueError("the model is in training mode: call model.eval() first.")
    dtypes = {str(parameter.dtype) for parameter in model.parameters()}
    if dtypes != {"torch.float32"}:  # rounding of 16 bits would hide what the check looks for
        raise ValueError(f"export takes a float32 model, got {', '.join(sorted(dtypes))}.")
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"batch_size must be a whole number from 1, got {batch_size!r}.")
    if path.suffix.lower() not in FORMATS[format]:
        endings = " or ".join(FORMATS[format])
        raise ValueError(f"the path of a {format} file must end in {endings}, got {path}.")
    if opset is not None and format != "onnx":
        raise ValueError(f"opset goes with format='onnx', got format={format!r}.")
    if opset is not None and opset < OLDEST_OPSET:
        raise ValueError(f"opset must be {OLDEST_OPSET} or later, got {opset}.")
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    if format == "onnx" and size > ONNX_LIMIT:
        raise ValueError(
            f"one ONNX file holds less than 2 GiB, the weights are {size / 2**30:.1f} GiB: "
            "use format='pt2'."
        )


def describe(model: LTRPModel, format: str, batch_size: int | None) -> dict[str, Any]:
    """The metadata of a file: all that one needs to feed it, and what it does.

    Args:
        model: the model that is exported.
        format: "onnx", "pt2", "aoti" or "torchscript".
        batch_size: None for any.

    Returns:
        What JSON can hold: ltrp_timm, torch and timm (versions), format, architecture, input_size
        [C, H, W], batch_size, mean and std (of pixels in [0, 1]), interpolation, crop_pct,
        num_classes, keep_ratio, num_keep (K), num_patches (N), ranker, selection.
    """
    import timm

    from ltrp_timm import __version__

    config, (channels, h, w) = model.data_config(), input_size(model)
    rows, cols = model.patch_grid
    cfg = getattr(model.backbone, "pretrained_cfg", None) or {}
    classes: Any = model.num_classes
    return {
        "ltrp_timm": __version__,
        "torch": str(torch.__version__),
        "timm": timm.__version__,
        "format": format,
        "architecture": cfg.get("architecture") or type(model.backbone).__name__,
        "input_size": [channels, h, w],
        "batch_size": batch_size,
        "mean": list(config["mean"]),
        "std": list(config["std"]),
        "interpolation": config["interpolation"],
        "crop_pct": config["crop_pct"],
        "num_classes": int(classes),
        "keep_ratio": model.keep_ratio,
        "num_keep": num_keep(rows * cols, model.keep_ratio),
        "num_patches": rows * cols,
        "ranker": getattr(model.ranker, "name", "") or type(model.ranker).__name__,
        "selection": model.selection,
    }


def _device(model: LTRPModel) -> torch.device:
    device: torch.device = next(model.backbone.parameters()).device
    return device
