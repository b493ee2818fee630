"""Sizes of images and patches."""

from typing import Any, Optional, Sequence, Tuple, Union


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
