"""Dense features of a pruned ViT: kept tokens return to their places of the grid."""

import timm
import torch

import ltrp_timm

images = torch.randn(2, 3, 224, 224)
model = ltrp_timm.drop_patches(timm.create_model("vit_tiny_patch16_224").eval(), keep_ratio=0.5)

with torch.inference_mode():
    final, features = model.forward_intermediates(images, indices=[5, 11], norm=True)
    print("tokens", tuple(final.shape), "maps", [tuple(feature.shape) for feature in features])
    empty = (features[-1] == 0).all(dim=1).float().mean()
    print(f"places left empty: {empty:.0%}")

    model.fill = "nearest"  # or the features of the nearest kept patch
    _, (filled,) = model.forward_intermediates(images, indices=[11], norm=True)
    print(f"with fill='nearest': {(filled == 0).all(dim=1).float().mean():.0%}")

# as timm makes backbones for detection and segmentation
net = timm.create_model("ltrp_vit_tiny", features_only=True, out_indices=(3, 7, 11), keep_ratio=0.5)
with torch.inference_mode():
    maps = net.eval()(images)
print("features_only", [tuple(feature.shape) for feature in maps], net.feature_info.reduction())
