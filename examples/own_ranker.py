"""Any module images (B, C, H, W) -> score map (B, h, w) is a ranker."""

import timm
import torch
from torch import Tensor, nn

import ltrp_timm


class Redness(nn.Module):
    """Prefers red patches."""

    mean = (0.0, 0.0, 0.0)  # it wants pixels in [0, 1]; without, what the backbone gets
    std = (1.0, 1.0, 1.0)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, H / 16, W / 16)."""
        red = images[:, :1] - images[:, 1:].mean(1, keepdim=True)
        return nn.functional.avg_pool2d(red, 16).squeeze(1)


vit = timm.create_model("vit_tiny_patch16_224").eval()
model = ltrp_timm.drop_patches(vit, ranker=Redness(), keep_ratio=0.1)

pixels = torch.full((1, 3, 224, 224), 0.4)
pixels[:, 0, 64:128, 96:160] = 1.0  # a red square: rows 4-7, columns 6-9
mean, std = (torch.tensor(vit.pretrained_cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
keep = model.keep_indices((pixels - mean) / std)[0]
square = {row * 14 + column for row in range(4, 8) for column in range(6, 10)}
print(f"kept {len(keep)} patches, {len(square & set(keep.tolist()))} of the 16 red ones among them")
assert square <= set(keep.tolist())
