"""One line for ViT, DINOv3, CLIP, SigLIP and EVA-02: each keeps its own tokens and positions."""

import timm
import torch

import ltrp_timm

BACKBONES = [
    ("vit_tiny_patch16_224", 224),
    ("deit_tiny_distilled_patch16_224", 224),
    ("vit_small_patch16_dinov3", 256),
    ("vit_base_patch16_clip_224", 224),
    ("vit_base_patch16_siglip_224", 224),
    ("eva02_tiny_patch14_224", 224),
]

for name, size in BACKBONES:
    backbone = timm.create_model(name, depth=2, num_classes=10).eval()  # shallow: this is a demo
    model = ltrp_timm.drop_patches(backbone, keep_ratio=0.5)
    with torch.inference_mode():
        tokens = model.forward_features(torch.randn(1, 3, size, size))
    patches = backbone.patch_embed.num_patches
    print(f"{name:32s} {patches:4d} patches, {model.num_prefix_tokens} prefix", end=" -> ")
    print(f"{tokens.shape[1]} tokens encoded")

for name in ("swin_tiny_patch4_window7_224", "resnet18"):
    try:
        ltrp_timm.drop_patches(timm.create_model(name))
    except TypeError as error:
        print(error)
