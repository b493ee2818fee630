"""Images for a ranker from those of a backbone, score maps on its patch grid, sizes of both."""

from typing import Any, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def resize_images(
    images: Tensor, scale: Tensor, shift: Tensor, size: Optional[List[int]]
) -> Tensor:
    """images (B, C, H, W) -> (B, C, H', W'): resized if ``size`` differs, * scale + shift."""
    if size is not None and (images.shape[-2] != size[0] or images.shape[-1] != size[1]):
        images = F.interpolate(images, size=size, mode="bilinear", antialias=True)
    return torch.addcmul(shift, images, scale)  # one pass, one temporary


def resize_score_map(scores: Tensor, h: int, w: int) -> Tensor:
    """Score map (B, h', w') -> scores (B, h * w) float32, resized if the grids differ."""
    if not torch.jit.is_scripting():
        if not isinstance(scores, Tensor) or scores.is_complex():
            kind = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(f"a ranker must return a score map (B, h, w) of numbers, got {kind}.")
    if scores.dim() != 3 or scores.shape[1] == 0 or scores.shape[2] == 0:
        shape: List[int] = list(scores.shape)
        raise ValueError(f"a ranker must return a score map (B, h, w), got shape {shape}.")
    if scores.dtype != torch.float32:
        scores = scores.float()
    if scores.shape[1] != h or scores.shape[2] != w:
        scores = F.interpolate(
            scores.unsqueeze(1), size=[h, w], mode="bilinear", antialias=True
        ).squeeze(1)
    return scores.flatten(1)


torch.fx.wrap("resize_images")


class InputBridge(nn.Module):
    """Images normalised for a backbone -> the same images normalised and sized for a ranker.

    Its buffers are computed from its settings; no checkpoint has them.

    Args:
        source: (mean, std) of the incoming images, for pixels in [0, 1].
        target: (mean, std) for the ranker.
        img_size: (H, W) for the ranker; None keeps the size.
        in_chans: C; for C other than 3, RGB values are averaged to one, as in timm.
    """

    scale: Tensor
    shift: Tensor

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
            [fit_channels(values, in_chans) for values in stats] for stats in (source, target)
        )
        # x * std + mean gives pixels, (pixels - new_mean) / new_std the ranker's input
        self._scale = [s / n for s, n in zip(std, new_std)]
        self._shift = [(m - c) / n for m, c, n in zip(mean, new_mean, new_std)]
        empty = torch.empty(1, in_chans, 1, 1, device=device, dtype=dtype)
        self.register_buffer("scale", empty, persistent=False)
        self.register_buffer("shift", empty.clone(), persistent=False)
        self.init_non_persistent_buffers()

    @torch.jit.ignore
    def init_non_persistent_buffers(self, device: Any = None) -> None:
        """Compute the buffers again, in their dtype; timm calls this after the meta device.

        ``device`` is where they go; None leaves them where they are.
        """
        for name, values in {"scale": self._scale, "shift": self._shift}.items():
            own = getattr(self, name)
            value = torch.tensor(values, device=device or own.device).view(1, -1, 1, 1)
            setattr(self, name, value.to(own.dtype))

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H', W')."""
        return resize_images(images, self.scale, self.shift, self.size)


def fit_channels(values: Sequence[float], in_chans: int) -> List[float]:
    """A mean or std for ``in_chans`` channels; RGB values are averaged to one, as in timm."""
    if len(values) == in_chans:
        return list(values)
    if len(values) not in (1, 3):
        raise ValueError(f"mean and std need 1, 3 or {in_chans} values, got {len(values)}.")
    return [sum(values) / len(values)] * in_chans


def make_bridge(ranker: Any, backbone: Any) -> nn.Module:
    """The module between a backbone's images and a ranker; an Identity where they agree.

    Images keep their normalisation if the ranker has no ``mean`` and ``std``, or if the backbone
    has no ``pretrained_cfg`` with them.
    """
    cfg = getattr(backbone, "pretrained_cfg", None) or {}
    source: List[Any] = [cfg.get("mean"), cfg.get("std")]
    target: List[Any] = [getattr(ranker, "mean", None), getattr(ranker, "std", None)]
    if None in source:
        source = target = [(0.0,), (1.0,)]
    target = [s if t is None else t for s, t in zip(source, target)]
    size = getattr(ranker, "img_size", None)
    same = all(tuple(a) == tuple(b) for a, b in zip(source, target))
    if same and size is None:
        return nn.Identity()
    parameter = next(backbone.parameters())
    return InputBridge(
        (source[0], source[1]),
        (target[0], target[1]),
        None if size is None else to_pair(size),
        getattr(backbone, "in_chans", 3),
        device=None if parameter.is_meta else parameter.device,  # weights come, buffers must be
        dtype=parameter.dtype,
    )


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
