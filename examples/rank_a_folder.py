"""Rank a folder once, keep the indices on disk, and encode with them later."""

import json
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from skimage import data

import ltrp_timm
from ltrp_timm.commands import main

photos, out = Path("photos"), Path("ranking")
photos.mkdir(exist_ok=True)
for name in ("astronaut", "chelsea", "coffee"):
    Image.fromarray(getattr(data, name)()).save(photos / f"{name}.png")

name = "vit_tiny_patch16_224"
command = ["rank", str(photos), "-o", str(out), "--model", name, "--keep-ratio", "0.5"]
assert main([*command, "--overwrite", "--num-workers", "0"]) == 0

images = json.loads((out / "index.json").read_text())["images"]
keep_indices = np.load(out / "keep_indices.npy")
model = ltrp_timm.drop_patches(timm.create_model(name).eval())  # pretrained=True in real life
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
with torch.inference_mode():
    for image, keep in zip(images, keep_indices):
        x = transform(Image.open(photos / image).convert("RGB")).unsqueeze(0)
        kept = torch.from_numpy(keep).unsqueeze(0)
        assert torch.equal(model.keep_indices(x), kept)  # what the model would have chosen
        logits = model(x, keep_indices=kept)  # no ranker at work
        print(f"{image}: kept {len(keep)} patches, logits {tuple(logits.shape)}")
