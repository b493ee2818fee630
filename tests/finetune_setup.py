"""What the tests of fine-tuning share: pictures of three kinds, a tiny model, a tiny run."""

from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from train_setup import QUIET

from ltrp_timm.train import Summary, finetune

NAMES = ("blue", "green", "red")
NARROW = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
PLAIN = {"aa": "none", "reprob": 0.0, "drop_path": 0.0, "smoothing": 0.0}
TINY = {
    **QUIET,
    "img_size": 32,
    "model_kwargs": NARROW,
    "keep_ratio": 0.5,
    "epochs": 2,
    "batch_size": 6,
    "lr": 3e-3,
}


def make_classes(folder: Path, count: int = 10, names: tuple[str, ...] = NAMES) -> Path:
    """A folder for each class; a square in its colour somewhere on noise."""
    draw = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        channel = {"red": 0, "green": 1, "blue": 2}.get(name, 0)
        for number in range(count):
            pixels = draw.integers(0, 90, (36, 40, 3))
            top, left = draw.integers(0, 18, 2)
            pixels[top : top + 18, left : left + 18, channel] += 160
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{number:02d}.png")
    return folder


def tune(data: Any, output: Path, model: Any = "vit_tiny_patch16_224", **changes: Any) -> Summary:
    """A tiny run of finetune."""
    return finetune(model, data, output, **{**TINY, **changes})


def load(folder: Path, **changes: Any) -> Any:
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **changes).eval()


def small_vit(**changes: Any) -> Any:
    torch.manual_seed(3)
    sizes = {"img_size": 32, "num_classes": 3, **NARROW, **changes}
    return timm.create_model("vit_tiny_patch16_224", **sizes)
