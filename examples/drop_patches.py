"""Put an LTRP front-end on a timm ViT, change the budget, take it off again."""

import timm
import torch

import ltrp_timm

images = torch.randn(2, 3, 224, 224)

# a registered model; pretrained=True would pull the backbone's weights
model = timm.create_model("ltrp_vit_tiny", keep_ratio=0.5).eval()
print("registered:", tuple(model(images).shape), "from", model.keep_indices(images).shape)

# the same for a ViT that you have already
vit = timm.create_model("vit_tiny_patch16_224").eval()
model = ltrp_timm.drop_patches(vit, keep_ratio=0.5)

with torch.inference_mode():
    for keep_ratio in (1.0, 0.7, 0.5, 0.25):
        model.keep_ratio = keep_ratio
        keep = model.keep_indices(images)  # (B, K), ascending
        logits = model(images)  # ranks, drops, encodes
        print(f"keep_ratio {keep_ratio}: K = {keep.shape[1]}, logits {tuple(logits.shape)}")

    # any choice of your own plugs in here
    checkerboard = torch.arange(0, 196, 2).expand(2, -1)
    print("own indices:", tuple(model(images, keep_indices=checkerboard).shape))

# the ranker is frozen, the backbone trains as ever
model.train()
model(images).square().mean().backward()
print("gradients:", sum(p.grad is not None for p in model.parameters()))

same = model.restore()
print("the same object back:", same is vit)
