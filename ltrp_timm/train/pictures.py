"""Normalised images as pictures again."""

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor


def show_images(
    images: Tensor, mean: Sequence[float] = (0.0,), std: Sequence[float] = (1.0,)
) -> list[Image.Image]:
    """images (B, 3, H, W), normalised by mean and std -> pictures."""
    shift, scale = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    pixels = (images.detach().float().cpu() * scale + shift) * 255.0
    whole = pixels.round().clamp(0.0, 255.0).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(one) for one in whole]
