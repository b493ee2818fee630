"""Sizes of images and patches, and the grid they make."""

from typing import Optional, Sequence, Tuple, Union

import torch
from torch import Tensor


def to_pair(value: Union[int, Sequence[int]]) -> Tuple[int, int]:
    """16 -> (16, 16); [16, 8] -> (16, 8).

    Raises:
        ValueError: not one or two positive integers.
    """
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or any(not isinstance(side, int) or side < 1 for side in pair):
        raise ValueError(f"expected a positive size or a pair (height, width), got {value!r}.")
    return pair[0], pair[1]


def to_img_size(
    img_size: Union[int, Sequence[int], None], patch_size: Tuple[int, int]
) -> Optional[Tuple[int, int]]:
    """The size a ranker looks at: 224 -> (224, 224); None means images as they come.

    Raises:
        ValueError: no size, or smaller than a patch.
    """
    if img_size is None:
        return None
    size = to_pair(img_size)
    if size[0] < patch_size[0] or size[1] < patch_size[1]:
        raise ValueError(f"img_size must hold a patch of {patch_size}, got {img_size!r}.")
    return size


def grid_of(images: Tensor, patch_size: Tuple[int, int]) -> Tuple[int, int]:
    """images (B, C, H, W) -> (h, w), the whole patches that fit.

    Raises:
        ValueError: the image is smaller than a patch.
    """
    h, w = images.shape[-2] // patch_size[0], images.shape[-1] // patch_size[1]
    if not torch.jit.is_scripting() and not torch.jit.is_tracing() and (h < 1 or w < 1):
        size = f"{images.shape[-2]}x{images.shape[-1]}"
        raise ValueError(f"images of {size} are smaller than a patch {patch_size}.")
    return h, w
