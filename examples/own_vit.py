"""PatchSelector, the bare layer, inside a ViT that is not timm's."""

import torch
from torch import Tensor, nn

import ltrp_timm


class MyViT(nn.Module):
    """A plain ViT on torch's own encoder, 64x64 images, patches of 8."""

    def __init__(self, width: int = 64, keep_ratio: float = 0.5) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 8, stride=8)
        self.positions = nn.Parameter(torch.randn(1, 1 + 64, width) * 0.02)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.ranker = ltrp_timm.create_ranker("contrast", patch_size=8)
        self.select = ltrp_timm.PatchSelector(keep_ratio, num_prefix_tokens=1)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 1] (B, 3, 64, 64) -> logits (B, 10)."""
        tokens = self.embed(pixels).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(tokens), -1, -1), tokens], dim=1)
        tokens = tokens + self.positions  # places first, then drop: each token knows where it was
        tokens, keep = self.select(tokens, self.ranker(pixels).flatten(1))
        print(f"{keep.shape[1]} of 64 patches, tokens {list(tokens.shape)}")
        return self.head(self.encoder(tokens)[:, 0])


model = MyViT().eval()
pixels = torch.rand(4, 3, 64, 64)
for keep_ratio in (1.0, 0.5, 0.25):
    model.select.keep_ratio = keep_ratio
    assert model(pixels).shape == (4, 10)
