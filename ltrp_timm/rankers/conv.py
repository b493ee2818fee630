"""The small learned ranker: straight to the patch grid, then a few large-kernel blocks."""

from typing import Any, Dict, Sequence, Union

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import GroupNorm1, trunc_normal_
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from ltrp_timm.layers.sizes import to_img_size, to_pair
from ltrp_timm.rankers.base import Ranker


class ConvRanker(Ranker, nn.Module):
    """A patch embedding, timm's ConvNeXt blocks on the patch grid, and a 1x1 head.

    It costs less than 1 % of a ViT-B, since no map is larger than the patch grid, and accepts any
    image size. GroupNorm over one group is a single operator and does not mix images of a batch.
    ``create_ranker("conv", pretrained=True)`` loads experimental weights, trained at small scale,
    which find objects worse than the weight-free ``border`` and ``contrast``; their card,
    ``weights/conv.md``, describes data, training command and results.

    Args:
        patch_size: side of a patch in pixels, or (height, width).
        width: channels of the blocks.
        depth: number of blocks.
        kernel_size: side of the depthwise kernels, in patches.
        in_chans: channels of an image.
        mean: normalisation of its images, for pixels in [0, 1].
        std: see ``mean``.
        img_size: its image size, (H, W) or one side; None accepts any size.

    Raises:
        ValueError: A size is invalid, `img_size` is smaller than a patch, or the kernel is even.
    """

    name = "conv"
    own_args = (
        *("patch_size", "img_size", "width", "depth", "kernel_size"),
        *("in_chans", "mean", "std"),
    )
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
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}.")
        dd: Dict[str, Any] = {"device": device, "dtype": dtype}
        self.patch_size = to_pair(patch_size)
        self.img_size = to_img_size(img_size, self.patch_size)
        self.width, self.depth = width, depth
        self.kernel_size, self.in_chans = kernel_size, in_chans
        self.mean, self.std = list(mean), list(std)
        self.stem = nn.Conv2d(in_chans, width, self.patch_size, stride=self.patch_size, **dd)
        block = {"conv_mlp": True, "norm_layer": GroupNorm1, "ls_init_value": None, **dd}
        blocks = [ConvNeXtBlock(width, kernel_size=kernel_size, **block) for _ in range(depth)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = GroupNorm1(width, **dd)
        self.head = nn.Conv2d(width, 1, 1, **dd)
        self.apply(_init_weights)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) -> score map (B, h, w)."""
        x = self.blocks(self.stem(images))
        return self.head(self.norm(x)).squeeze(1)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
