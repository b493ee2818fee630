"""From a folder of images without labels to a ranker: first a teacher (MAE), then the ranker."""

import tempfile
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image

import ltrp_timm
from ltrp_timm.train import train_ranker, train_teacher


def draw_scenes(folder: Path, count: int) -> None:
    """A soft background and a textured box somewhere; take your own photos instead."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    y, x = np.mgrid[0:64, 0:64] / 64
    for number in range(count):
        scene = 255 * np.stack([x * draw.random(), y * draw.random(), (x + y) / 2], axis=-1)
        top, left = draw.integers(0, 40, 2)
        scene[top : top + 24, left : left + 24] = draw.integers(0, 255, (24, 24, 3))
        Image.fromarray(scene.astype(np.uint8)).save(folder / f"{number}.png")


# minutes for real: hundreds of epochs, thousands of images; here it takes seconds
common = {"batch_size": 16, "num_workers": 0, "holdout": 0.1, "tensorboard": False}
mae = {"embed_dim": 64, "depth": 2, "num_heads": 2, "patch_size": 8}
mae.update(decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)

with tempfile.TemporaryDirectory() as name:
    photos, teacher, ranker = (Path(name) / part for part in ("photos", "teacher", "ranker"))
    draw_scenes(photos, 80)
    train_teacher(photos, teacher, img_size=64, teacher_args=mae, epochs=4, lr=1e-3, **common)
    # 64 patches: hide three quarters, so that 16 can be compared
    arguments = {"ranker_args": {"width": 16, "depth": 1}, "mask_ratio": 0.75}
    done = train_ranker(photos, ranker, teacher=teacher, epochs=12, lr=1e-2, **arguments, **common)

    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=8).eval()
    model = ltrp_timm.drop_patches(vit, ranker="conv", ranker_weights=ranker, keep_ratio=0.25)

keep = model.keep_indices(torch.randn(1, 3, 64, 64))
loss, chance = done.metrics["loss"], done.metrics["chance"]
print(
    f"loss {loss:.2f} (chance {chance:.2f}), held-out spearman {done.metrics['val_spearman']:.2f}"
)
print(f"{keep.shape[1]} of 64 patches kept")
assert loss < chance
