"""The small learned ranker: straight to the patch grid, its border, a few large-kernel blocks."""

from typing import Any, ClassVar, Dict, Sequence, Union

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import GroupNorm1, trunc_normal_
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from ltrp_timm.layers.bridge import to_img_size, to_pair
from ltrp_timm.rankers.base import Ranker


class ConvRanker(Ranker, nn.Module):
    """A patch embedding, distances to the border, timm's ConvNeXt blocks, and a 1x1 head.

    The blocks see neighbours; the distances tell them what is unlike the border of the image. It
    costs less than 1 % of a ViT-B, since no map is larger than the patch grid, and accepts any
    image size. GroupNorm over one group is a single operator and does not mix images of a batch.
    The weights that come with the package find objects no better than the weight-free ``border``,
    their teacher; ``weights/conv.md`` describes them.

    Args:
        patch_size: side of a patch in pixels, or (height, width).
        width: channels of the blocks.
        depth: number of blocks.
        kernel_size: side of the depthwise kernels, in patches.
        border_distances: number of learned distances to the border, see ``BorderDistances``; 0 for
            none, as older versions had it.
        in_chans: channels of an image.
        mean: normalisation of its images, for pixels in [0, 1].
        std: see ``mean``.
        img_size: its image size, (H, W) or one side; None accepts any size.

    Raises:
        ValueError: A size is invalid, `img_size` is smaller than a patch, the kernel is even, or
            `border_distances` is negative.
    """

    name = "conv"
    own_args = (
        *("patch_size", "img_size", "width", "depth", "kernel_size"),
        *("border_distances", "in_chans", "mean", "std"),
    )
    older_args: ClassVar[Dict[str, Any]] = {"border_distances": 0}
    learned = True
    has_published_weights = True
    brings_weights = True

    def __init__(
        self,
        patch_size: Union[int, Sequence[int]] = 16,
        width: int = 64,
        depth: int = 4,
        kernel_size: int = 5,
        in_chans: int = 3,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        img_size: Union[int, Sequence[int], None] = None,
        border_distances: int = 8,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}.")
        if border_distances < 0:
            raise ValueError(f"border_distances must be at least 0, got {border_distances}.")
        dd: Dict[str, Any] = {"device": device, "dtype": dtype}
        self.patch_size = to_pair(patch_size)
        self.img_size = to_img_size(img_size, self.patch_size)
        self.width, self.depth = width, depth
        self.kernel_size, self.in_chans = kernel_size, in_chans
        self.mean, self.std = list(mean), list(std)
        self.border_distances = border_distances
        self.stem = nn.Conv2d(in_chans, width, self.patch_size, stride=self.patch_size, **dd)
        count = border_distances
        self.border = BorderDistances(width, count, **dd) if count else nn.Identity()
        block = {"conv_mlp": True, "norm_layer": GroupNorm1, "ls_init_value": None, **dd}
        blocks = [ConvNeXtBlock(width, kernel_size=kernel_size, **block) for _ in range(depth)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = GroupNorm1(width, **dd)
        self.head = nn.Conv2d(width, 1, 1, **dd)
        self.apply(_init_weights)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) -> score map (B, h, w)."""
        x = self.blocks(self.border(self.stem(images)))
        return self.head(self.norm(x)).squeeze(1)


class BorderDistances(nn.Module):
    """Adds to each patch its distances to the border: to the most similar of its patches.

    Each of ``count`` distances is taken between projections of the features to four values, first
    divided by their spread over the image; a border patch is its own most similar one.
    """

    def __init__(self, width: int, count: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.count = count
        self.describe = nn.Conv2d(width, 4 * count, 1, bias=False, device=device, dtype=dtype)
        self.add = nn.Conv2d(count, width, 1, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """X (B, D, h, w) -> (B, D, h, w)."""
        alike = torch.group_norm(x, x.shape[1], eps=1e-6)  # each channel of each image
        return x + self.add(nearest_on_border(self.describe(alike), self.count))


def nearest_on_border(found: Tensor, count: int) -> Tensor:
    """Projections (B, 4 * count, h, w) -> (B, count, h, w): log of 1 + squared distances.

    Of each patch to the most similar patch on the border.
    """
    h, w = found.shape[2], found.shape[3]
    found = found.reshape(-1, 4, h, w)  # (B * count, 4, h, w)
    rows, sides = found[:, :, :: max(h - 1, 1)], found[:, :, 1:-1, :: max(w - 1, 1)]
    border = torch.cat([rows.flatten(2), sides.flatten(2)], dim=2)  # (B * count, 4, R)
    found = found.flatten(2)
    length, lengths = (each.square().sum(1, keepdim=True) for each in (found, border))
    pairs = torch.baddbmm(lengths, found.transpose(1, 2), border, alpha=-2.0)
    nearest = (pairs.amin(2) + length.squeeze(1)).clamp(min=0.0)
    # no root: rounding near 0 stays small
    return nearest.log1p().reshape(-1, count, h, w)


torch.fx.wrap("nearest_on_border")


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
