"""Fine-tune a ViT that drops patches: real digits in clutter, one model for two budgets."""

import tempfile
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits
from timm.layers import build_sincos2d_pos_embed

import ltrp_timm  # noqa: F401  # registers the models
from ltrp_timm.train import finetune


def draw_digits(folder: Path, per_class: int, first: int) -> None:
    """A folder for each digit; a white one on coloured noise. Take your own photos instead."""
    draw, digits = np.random.default_rng(first), load_digits()
    for name in range(3):
        (folder / str(name)).mkdir(parents=True)
        chosen = digits.images[digits.target == name][first : first + per_class]
        for number, digit in enumerate(chosen):
            scene = draw.integers(0, 90, (64, 64, 3)) + draw.integers(0, 60, 3)
            top, left = draw.integers(8, 25, 2)
            shape = np.kron(digit / 16, np.ones((4, 4)))[..., None]
            spot = scene[top : top + 32, left : left + 32]
            spot[:] = spot + shape * (255 - spot)
            picture = Image.fromarray(scene.astype(np.uint8))
            picture.save(folder / str(name) / f"{number}.png")


# for real: "ltrp_vit_base", pretrained=True and the published defaults; here it takes seconds
small = {"img_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
torch.manual_seed(0)
vit = timm.create_model("vit_tiny_patch16_224", class_token=False, global_pool="avg", **small)
vit.pos_embed.data.copy_(build_sincos2d_pos_embed([8, 8], 64))
settings = {"epochs": 12, "lr": 2e-3, "batch_size": 16, "num_workers": 0, "tensorboard": False}
settings.update(layer_decay=None, aa="none", reprob=0.0, hflip=0.0, scale=(0.9, 1.0))

with tempfile.TemporaryDirectory() as name:
    photos, output = Path(name) / "photos", Path(name) / "run"
    draw_digits(photos / "train", 96, first=0)
    draw_digits(photos / "val", 24, first=96)
    ratios = [0.5, 0.25]  # one of them is drawn for each update
    done = finetune(vit, photos, output, keep_ratio=ratios, **settings)
    model = timm.create_model(f"local-dir:{output}", pretrained=True).eval()

print(f"keeps {model.keep_ratio} of the patches; classes {model.pretrained_cfg['label_names']}")
for ratio in ratios:
    print(f"keep {ratio}: top-1 {done.metrics[f'val_top1@{ratio:g}']:.2f} (chance 0.33)")
assert done.metrics["val_top1"] > 0.6
