"""Does another checkout compute the same, bit for bit?

What a change of structure, or another version of timm, must leave alone: scores, kept patches and
logits of every family of backbones, of every ranker and selection; losses and their gradients;
weights after a few updates of each training; a saved folder, loaded. Everything runs on one thread
of the CPU with random weights and keyed random numbers, about a minute in all.

    PYTHONPATH=before python scripts/same_behaviour.py record before.pt --saved saved
    PYTHONPATH=after python scripts/same_behaviour.py record after.pt --saved saved
    python scripts/same_behaviour.py compare before.pt after.pt

The first run saves a model into the folder ``saved``; the second one loads it from there. Exit code
1: something differs.
"""

import argparse
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor

import ltrp_timm
from ltrp_timm import losses
from ltrp_timm.train import finetune, train_ranker, train_teacher

FAMILIES = {
    "vit_tiny_patch16_224": {"img_size": 64},
    "vit_small_patch14_reg4_dinov2": {"img_size": 56},
    "vit_base_patch32_clip_224": {"img_size": 96},
    "deit_tiny_distilled_patch16_224": {"img_size": 64},
    "beit_base_patch16_224": {"img_size": 64},
    "cait_xxs24_224": {"img_size": 64},
    "vit_relpos_small_patch16_224": {"img_size": 64},
    "naflexvit_base_patch16_gap": {},
    "eva02_tiny_patch14_224": {"img_size": 56},
    "vit_small_patch16_dinov3": {"img_size": 64},
}
RANKERS = ("contrast", "conv", "pixel_std", "gradient", "centre", "random", "dpc_knn", "vit_tiny")
SELECTIONS = ("top", "random", "mixed", "stratified", "dithered")
LOSSES = ("list_mle", "list_net", "rank_net", "focused_rank", "pointwise_mse", "lambda_rank")
QUIET = {"num_workers": 0, "tensorboard": False, "progress": False}
NARROW = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def lively(model: Any) -> Any:
    """The model in eval with weights that depend on nothing but their names' order."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.05 + (1.0 if parameter.dim() == 1 else 0.0))
    return model.eval()


def images_like(model: Any, count: int = 2) -> Tensor:
    """Smooth noise of the model's size (B, 3, H, W)."""
    size = timm.data.resolve_model_data_config(model)["input_size"][-2:]
    embed = getattr(model, "patch_embed", None)
    size = getattr(embed, "img_size", None) or size
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(count, 3, 8, 8, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=tuple(size), mode="bilinear")


def of_models(out: dict[str, Tensor]) -> None:
    """Scores, kept patches and logits."""

    def note(name: str, model: Any, x: Tensor) -> None:
        with torch.no_grad():
            out[f"{name} scores"] = model.patch_scores(x)
            out[f"{name} kept"] = model.keep_indices(x)
            out[f"{name} logits"] = model(x)

    for family, sizes in FAMILIES.items():
        backbone = lively(timm.create_model(family, depth=2, num_classes=10, **sizes))
        x = images_like(backbone)
        out[f"{family} plain"] = backbone(x).detach()
        note(family, ltrp_timm.drop_patches(backbone, "contrast", 0.5), x)
    for ranker in RANKERS:
        backbone = lively(timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=10))
        x = images_like(backbone)
        torch.manual_seed(2)
        model = ltrp_timm.drop_patches(backbone, ranker, 0.4)
        for selection in SELECTIONS:
            model.selection = selection
            note(f"{ranker} {selection}", model, x)
        model.selection = "top"
        dense = model.forward_intermediates(x, indices=1, intermediates_only=True, fill="nearest")
        out[f"{ranker} dense"] = dense[0].detach()


def of_losses(out: dict[str, Tensor]) -> None:
    """Values and gradients."""
    generator = torch.Generator().manual_seed(3)
    target = torch.rand(4, 12, generator=generator)
    start = torch.randn(4, 12, generator=generator)
    for name in LOSSES:
        pred = start.clone().requires_grad_()
        value = getattr(losses, name)(pred, target, **({"k": 4} if name == "focused_rank" else {}))
        (gradient,) = torch.autograd.grad(value, pred)
        out[f"{name} value"], out[f"{name} gradient"] = value.detach(), gradient


def of_training(out: dict[str, Tensor], home: Path) -> None:
    """Weights after a few updates of teacher, ranker and fine-tuning."""
    draw = np.random.default_rng(0)
    for number in range(12):
        folder = home / "photos" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 255, (6, 6, 3)).astype(np.uint8)
        Image.fromarray(pixels).resize((48, 40)).save(folder / f"{number}.png")
    data, common = home / "photos", {**QUIET, "epochs": 2, "batch_size": 4, "lr": 1e-2}
    sizes = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    sizes |= {f"decoder_{name}": sizes[name] for name in ("embed_dim", "depth", "num_heads")}
    train_teacher(data, home / "teacher", 32, sizes, **common)
    options = {"ranker_args": {"width": 16, "depth": 1}, "mask_ratio": 0.5, **common}
    train_ranker(data, home / "ranker", teacher=str(home / "teacher"), **options)
    front = {"img_size": 32, "model_kwargs": NARROW, "keep_ratio": 0.5}
    finetune("vit_tiny_patch16_224", data, home / "tuned", **front, **common)
    for part in ("teacher", "ranker", "tuned"):
        weights = timm.models.load_state_dict(str(home / part / "model.safetensors"))
        out.update({f"{part} {name}": tensor for name, tensor in weights.items()})


def of_saved(out: dict[str, Tensor], folder: Path) -> None:
    """Logits of a saved model, which the first run writes."""
    if not folder.exists():
        backbone = lively(timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=10))
        model = ltrp_timm.drop_patches(backbone, "contrast", 0.3, "stratified")
        ltrp_timm.save_pretrained(model, folder)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = images_like(model.backbone)
    out["saved kept"], out["saved logits"] = model.keep_indices(x), model(x).detach()


def compare(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    """A line for each tensor that differs or stands on one side alone."""
    lines = [f"{name}: only in one of the two" for name in sorted(before.keys() ^ after.keys())]
    for name in sorted(before.keys() & after.keys()):
        a, b = before[name], after[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            lines.append(f"{name}: {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}")
        elif not torch.equal(a.nan_to_num(), b.nan_to_num()):
            lines.append(f"{name}: differs by up to {float((a.double() - b.double()).abs().max())}")
    return lines


def main() -> int:
    """Record or compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    record = commands.add_parser("record", help="write what this checkout computes")
    record.add_argument("output", type=Path, help="the file to write")
    record.add_argument("--saved", type=Path, required=True, help="folder of the saved model")
    both = commands.add_parser("compare", help="compare two files")
    both.add_argument("files", type=Path, nargs=2)
    arguments = parser.parse_args()
    if arguments.command == "compare":
        before, after = (torch.load(file, weights_only=True) for file in arguments.files)
        lines = compare(before, after)
        print("\n".join([*lines, f"{len(before)} and {len(after)} tensors, {len(lines)} differ"]))
        return 1 if lines else 0
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    out: dict[str, Tensor] = {}
    of_models(out)
    of_losses(out)
    with tempfile.TemporaryDirectory() as home:
        of_training(out, Path(home))
    of_saved(out, arguments.saved)
    torch.save({name: tensor.contiguous() for name, tensor in out.items()}, arguments.output)
    print(f"{len(out)} tensors from {Path(ltrp_timm.__file__).parent}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
