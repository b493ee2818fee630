"""What all rankers share, and the bridge between a backbone's images and a ranker's."""

from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltrp_timm.checkpoints import PathLike, save_weights

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Ranker:
    """A mixin for modules images (B, C, H, W) -> score map (B, h, w), higher = keep first.

    A ranker needs none of this: any ``nn.Module`` with that mapping will do. What it declares is used: ``mean`` and
    ``std`` of the pixels it wants (None: as the backbone gets them), ``img_size`` when it takes one size only.
    """

    name: str = ""
    learned: bool = False
    follows_patch_size: bool = True

    mean: Optional[List[float]] = None
    std: Optional[List[float]] = None
    img_size: Optional[Tuple[int, int]] = None
    trained: bool = False

    def config(self) -> Dict[str, Any]:
        """Arguments of ``create_ranker`` that rebuild this ranker, as JSON can hold them."""
        raise NotImplementedError

    def save(self: Any, directory: PathLike, overwrite: bool = False) -> None:
        """Write ``config.json`` and ``model.safetensors``; ``create_ranker(name, pretrained=directory)`` reads them.

        Raises:
            FileExistsError: the folder holds a saved model already and ``overwrite`` is False.
        """
        config = {"ranker": self.name, "args": self.config()}
        save_weights(directory, config, self.state_dict(), overwrite=overwrite)

    def set_input_size(
        self,
        img_size: Optional[Tuple[int, int]] = None,
        patch_size: Optional[Tuple[int, int]] = None,
    ) -> None:
        """Follow a backbone to another image or patch size; a ranker with a fixed grid stays as it is."""


def to_pair(value: Union[int, Sequence[int]]) -> Tuple[int, int]:
    """16 -> (16, 16); [16, 8] -> (16, 8).

    Raises:
        ValueError: not one or two positive integers.
    """
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or any(not isinstance(side, int) or side < 1 for side in pair):
        raise ValueError(f"expected a positive size or a pair (height, width), got {value!r}.")
    return pair[0], pair[1]


def grid_of(images: Tensor, patch_size: Tuple[int, int]) -> Tuple[int, int]:
    """images (B, C, H, W) -> (h, w), the whole patches that fit.

    Raises:
        ValueError: the image is smaller than a patch.
    """
    h, w = images.shape[-2] // patch_size[0], images.shape[-1] // patch_size[1]
    if not torch.jit.is_scripting() and not torch.jit.is_tracing() and (h < 1 or w < 1):
        raise ValueError(
            f"images of {images.shape[-2]}x{images.shape[-1]} are smaller than a patch {patch_size}."
        )
    return h, w


def resize_images(
    images: Tensor, scale: Tensor, shift: Tensor, size: Optional[List[int]]
) -> Tensor:
    """images (B, C, H, W) * scale + shift, resized to (H', W') where ``size`` asks for another one."""
    images = images * scale + shift
    if size is not None and (images.shape[-2] != size[0] or images.shape[-1] != size[1]):
        images = F.interpolate(images, size=size, mode="bilinear", antialias=True)
    return images


def resize_score_map(scores: Tensor, h: int, w: int) -> Tensor:
    """Score map (B, h', w') -> scores (B, h * w) float32, resized when the grids differ.

    Raises:
        ValueError: the map has not three axes.
    """
    if scores.dim() != 3:
        shape: List[int] = list(scores.shape)
        raise ValueError(f"a ranker must return a score map (B, h, w), got shape {shape}.")
    scores = scores.float()
    if scores.shape[1] != h or scores.shape[2] != w:
        scores = F.interpolate(
            scores.unsqueeze(1), size=[h, w], mode="bilinear", antialias=True
        ).squeeze(1)
    return scores.flatten(1)


torch.fx.wrap("resize_images")


class InputBridge(nn.Module):
    """Images normalised for a backbone -> the same images normalised, and sized, for a ranker.

    Args:
        source: (mean, std) of the images that arrive, in units of pixels in [0, 1].
        target: (mean, std) that the ranker wants.
        img_size: (H, W) that the ranker wants; None leaves the size.
        in_chans: C; a mean of another length is averaged to one value, as timm does.
    """

    def __init__(
        self,
        source: Tuple[Sequence[float], Sequence[float]],
        target: Tuple[Sequence[float], Sequence[float]],
        img_size: Optional[Tuple[int, int]] = None,
        in_chans: int = 3,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.size: Optional[List[int]] = None if img_size is None else list(img_size)
        (mean, std), (new_mean, new_std) = (
            [_channels(values, in_chans) for values in stats] for stats in (source, target)
        )
        # x * std + mean are pixels; (pixels - new_mean) / new_std is what the ranker wants
        self._scale = [s / n for s, n in zip(std, new_std)]
        self._shift = [(m - c) / n for m, c, n in zip(mean, new_mean, new_std)]
        empty = torch.empty(1, in_chans, 1, 1, device=device, dtype=dtype)
        self.register_buffer("scale", empty, persistent=False)
        self.register_buffer("shift", empty.clone(), persistent=False)
        self.init_non_persistent_buffers()

    @torch.jit.ignore
    def init_non_persistent_buffers(self) -> None:
        """Fill the buffers anew, as timm asks of a model that leaves the meta device."""
        for buffer, values in ((self.scale, self._scale), (self.shift, self._shift)):
            if not buffer.is_meta:
                buffer.copy_(torch.tensor(values).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H', W')."""
        return resize_images(images, self.scale, self.shift, self.size)


def _channels(values: Sequence[float], in_chans: int) -> List[float]:
    if len(values) == in_chans:
        return list(values)
    return [sum(values) / len(values)] * in_chans
