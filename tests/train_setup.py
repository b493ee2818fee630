"""What the tests of training share: a few generated photos, a tiny teacher, a tiny run."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import lively
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from ltrp_timm.teacher import MAETeacher
from ltrp_timm.train import Summary, train_ranker

TEACHER_ARGS = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 1,
    "num_heads": 2,
    "decoder_embed_dim": 32,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}
QUIET = {"num_workers": 0, "tensorboard": False, "progress": False}
TINY = {
    **QUIET,
    "ranker_args": {"width": 16, "depth": 1},
    "mask_ratio": 0.5,
    "epochs": 2,
    "batch_size": 4,
    "lr": 1e-2,
}


def tiny_teacher() -> MAETeacher:
    torch.manual_seed(0)
    return lively(MAETeacher(**TEACHER_ARGS))


def make_photos(folder: Path, count: int = 20) -> Path:
    """Noise on a slope, with a bright box: no two alike."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    y, x = np.mgrid[0:40, 0:48]
    for number in range(count):
        pixels = np.stack([x * 4, y * 5, (x + y) * 2], -1) + draw.integers(0, 60, (40, 48, 3))
        top, left = draw.integers(0, 24, 2)
        pixels[top : top + 16, left : left + 20] = draw.integers(0, 255, 3)
        picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        picture.save(folder / f"{number:03d}.png")
    return folder


def run(data: Any, output: Path, **changes: Any) -> Summary:
    """A tiny run of train_ranker."""
    if "teacher" not in changes:
        changes["teacher"] = tiny_teacher()
    return train_ranker(data, output, **{**TINY, **changes})


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)
