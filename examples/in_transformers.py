"""A pruned model inside transformers: pip install transformers."""

import tempfile

import timm
import torch
from transformers import AutoModelForImageClassification

import ltrp_timm

# pretrained=True brings the backbone's weights from the Hub
model = timm.create_model("ltrp_vit_tiny", num_classes=10, keep_ratio=0.5)
images = torch.randn(2, 3, 224, 224)

with tempfile.TemporaryDirectory() as folder:
    ltrp_timm.save_pretrained(model, folder)
    wrapped = AutoModelForImageClassification.from_pretrained(folder).eval()

for keep_ratio in (1.0, 0.5, 0.25):
    wrapped.timm_model.keep_ratio = keep_ratio
    tokens = wrapped.timm_model.keep_indices(images).shape[1]
    print(f"keep {keep_ratio}: {tokens} patches, logits {tuple(wrapped(images).logits.shape)}")
