"""Write a pruned model for deployment, as ONNX, ``torch.export``, AOTInductor or TorchScript.

The keep ratio of a file is fixed. Its batch size is too, without ``dynamic_batch``; TorchScript
files accept any. A file whose outputs differ from the model's is not written.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ltrp_timm.deploy.formats import (
    FORMATS,
    OLDEST_OPSET,
    input_size,
    load_exported,
    require,
    write_file,
)
from ltrp_timm.models.ltrp import LTRPModel
from ltrp_timm.slots.coarse import UNSCRIPTABLE
from ltrp_timm.weights.files import PathLike, write_atomically

TOLERANCE = 1e-4
ONNX_LIMIT = 2**31 - 2**20  # bytes of weights in an ONNX file; the graph takes the rest of 2 GiB
_NOISE = 5e-6  # relative change of a pixel, above the rounding of any float32 runtime
_MARGIN = 10.0  # least ratio of the distances from the full and from the pruned outputs
_IMAGES = 4  # least number of images
_DRAWS = 8  # images drawn for each one needed, before giving up


@dataclass(frozen=True)
class Parity:
    """Differences between the outputs of a file and of a model.

    Args:
        error: Largest absolute difference from the eager pruned outputs.
        from_full: Largest absolute difference from the full model, in the batch where it is
            smallest; None if all patches are kept.
        scale: Largest absolute output.
        batch_sizes: Sizes of the batches.
        left_out: Number of excluded images, in which the last kept patch is a near tie.
    """

    error: float
    from_full: float | None
    scale: float
    batch_sizes: tuple[int, ...]
    left_out: int

    def raise_if_wrong(self, tolerance: float) -> None:
        """RuntimeError if the error is above the tolerance, or the file may be the full model."""
        figures = f"largest difference from the eager pruned outputs {self.error:.1e}"
        if not self.error <= tolerance:  # NaN fails too
            batches = ", ".join(map(str, self.batch_sizes))
            raise RuntimeError(
                f"the file does not give the model's outputs: {figures}, allowed {tolerance:.1e} "
                f"(outputs up to {self.scale:.1e}, batches of {batches})."
            )
        if self.from_full is None:
            return
        if not self.from_full > _MARGIN * self.error:
            raise RuntimeError(
                f"the file cannot be distinguished from the full model: {figures}, from the full "
                f"model's {self.from_full:.1e}. Weights may be missing (LayerScale near 0 hides "
                "patches)."
            )


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
        write_file(model, temporary, metadata, batch_size, opset)
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


@torch.no_grad()
def check_parity(
    model: LTRPModel,
    run: Callable[[Tensor], Tensor],
    input_size: tuple[int, int, int],
    batch_size: int,
    dynamic: bool,
) -> Parity:
    """Run a loaded file and its model on the same images; in several batch sizes if dynamic.

    When two scores at the cut are nearly equal, another runtime may keep the other patch. Such
    images are excluded. RuntimeError if shapes differ, or too few images have a clear order.
    """
    sizes = [1, 2, batch_size + 2] if dynamic else [batch_size] * max(2, -(-_IMAGES // batch_size))
    parameter = next(model.backbone.parameters())
    images, left_out = _clear_images(model, input_size, sum(sizes), parameter)
    figures = []
    for batch in images.split(sizes):
        wanted, full, out = model(batch), model.backbone(batch), run(batch)
        if out.shape != wanted.shape:
            raise RuntimeError(
                f"the file gives outputs {list(out.shape)}, the model {list(wanted.shape)}."
            )
        each = torch.stack([out - wanted, out - full, wanted]).abs().flatten(1)
        figures.append(each.amax(dim=1))  # a NaN stays one
    errors, from_full, scales = torch.stack(figures, dim=1)
    h, w = model.grid_size(images)
    all_kept = model.keep_indices(images[:1]).shape[1] == h * w
    least = None if all_kept else from_full.min().item()
    return Parity(errors.max().item(), least, scales.max().item(), tuple(sizes), left_out)


def _clear_images(
    model: LTRPModel, input_size: tuple[int, int, int], count: int, like: Tensor
) -> tuple[Tensor, int]:
    """Images (count, C, H, W) whose kept patches survive rounding; the number of excluded ones."""
    kept: list[Tensor] = []
    left_out = 0
    generator = torch.Generator().manual_seed(0)
    for image in _draw(input_size, count * _DRAWS, generator):
        image = image.to(like.device, like.dtype)
        if _has_near_tie(model, image, generator):
            left_out += 1
        else:
            kept.append(image)
        if len(kept) == count:
            return torch.cat(kept), left_out
    raise RuntimeError(
        f"only {len(kept)} of {count * _DRAWS} images have a clear order of patches: the scores "
        "are too close to each other to compare runtimes."
    )


def _draw(
    input_size: tuple[int, int, int], count: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Normalised images (1, C, H, W): noise, and soft shapes with some texture."""
    channels, h, w = input_size
    for number in range(count):
        noise = torch.randn(1, channels, h, w, generator=generator)
        if number % 2 == 0:
            yield noise
            continue
        shapes = torch.randn(1, channels, 7, 7, generator=generator)
        texture = torch.rand(1, 1, 5, 5, generator=generator)
        shapes = F.interpolate(shapes, size=(h, w), mode="bicubic")
        yield shapes + 0.2 * F.interpolate(texture, size=(h, w)) * noise


def _has_near_tie(model: LTRPModel, image: Tensor, generator: torch.Generator) -> bool:
    """Whether rounding could change which patches of an image (1, C, H, W) are kept."""
    keep = model.keep_indices(image)
    noise = torch.randn(image.shape, generator=generator).to(image.device, image.dtype)
    changed = [image * (1 + _NOISE), image * (1 - _NOISE), image + _NOISE * noise]
    return any(not torch.equal(model.keep_indices(other), keep) for other in changed)
