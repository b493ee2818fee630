"""Sizes of images and patches, and the position table of a patch grid."""

from typing import Any, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor


def to_pair(value: Union[int, Sequence[int]]) -> Tuple[int, int]:
    """16 -> (16, 16); [16, 8] -> (16, 8). ValueError unless these are positive integers."""
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or any(not isinstance(side, int) or side < 1 for side in pair):
        raise ValueError(f"expected a positive size or a pair (height, width), got {value!r}.")
    return pair[0], pair[1]


def to_img_size(
    img_size: Union[int, Sequence[int], None], patch_size: Tuple[int, int]
) -> Optional[Tuple[int, int]]:
    """A ranker's image size: 224 -> (224, 224); None accepts any size.

    A size that is smaller than a patch is a ValueError.
    """
    if img_size is None:
        return None
    size = to_pair(img_size)
    if size[0] < patch_size[0] or size[1] < patch_size[1]:
        raise ValueError(f"img_size must hold a patch of {patch_size}, got {img_size!r}.")
    return size


def set_image_size(net: Any, size: Tuple[int, int]) -> None:
    """Give a timm model another image size, as timm does; ValueError if it has only one."""
    if not hasattr(net, "set_input_size"):
        raise ValueError(
            f"a {type(net).__name__} takes images of one size: timm gives it no set_input_size for "
            f"{size[0]}x{size[1]} pixels. Use a model that has one, or leave the other size out."
        )
    net.set_input_size(img_size=size)


def sincos_pos_embed(embed_dim: int, grid_size: Tuple[int, int]) -> Tensor:
    """The fixed sine-cosine position table of MAE, (1, 1 + N, D) float32.

    The first half of D encodes the column, the second the row; the class token's are zeros.
    """
    if embed_dim % 4:
        raise ValueError(
            f"embed_dim must be a multiple of 4 for a sine-cosine table, got {embed_dim}."
        )
    omega = 1.0 / 10000.0 ** (torch.arange(embed_dim // 4, dtype=torch.float64) / (embed_dim / 4))
    rows = torch.arange(grid_size[0], dtype=torch.float64)
    cols = torch.arange(grid_size[1], dtype=torch.float64)
    angles = [
        place.flatten().unsqueeze(1) * omega
        for place in reversed(torch.meshgrid(rows, cols, indexing="ij"))  # column first
    ]
    table = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)
    return torch.cat([table.new_zeros(1, embed_dim), table]).float().unsqueeze(0)
