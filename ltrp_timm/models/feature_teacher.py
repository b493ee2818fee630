"""A timm ViT as the teacher of rankers: its feature changes when a visible patch is taken away."""

import copy
from typing import Any, Tuple, Union

import timm
import torch
from torch import Tensor, nn

from ltrp_timm.models.front_end import drop_patches
from ltrp_timm.teacher import PatchTeacher
from ltrp_timm.teacher.density import all_but


class FeatureTeacher(PatchTeacher, nn.Module):
    """A frozen timm ViT that encodes chosen patches of an image into one feature.

    ``semantic_density`` takes it in place of an MAE. The feature is what the model's head would
    get: the class token, or the pooled tokens where the model pools.

    Args:
        backbone: a timm ViT whose patches can be dropped, which is copied; or its name, to load the
            weights that timm publishes.
        img_size: side of the images, or (height, width), for a name (default: the model's own).

    Attributes:
        img_size: (H, W).
        patch_size: (height, width) of a patch in pixels.
        grid_size: (h, w) in patches.
        num_patches: N = h * w.
        in_chans: channels of an image.
        mean: normalisation of its images, for pixels in [0, 1].
        std: see ``mean``.

    Raises:
        TypeError: The patches of this model cannot be dropped; the message says why.

    >>> teacher = FeatureTeacher(timm.create_model("vit_tiny_patch16_224", depth=1, img_size=64))
    >>> teacher.features(torch.zeros(2, 3, 64, 64), torch.tensor([[0, 5], [3, 4]])).shape
    torch.Size([2, 192])
    """

    def __init__(
        self, backbone: Union[str, nn.Module], img_size: Union[int, Tuple[int, int], None] = None
    ) -> None:
        super().__init__()
        if isinstance(backbone, str):
            size = {} if img_size is None else {"img_size": img_size}
            net: Any = timm.create_model(backbone, pretrained=True, num_classes=0, **size)
        elif img_size is not None:
            raise ValueError("img_size goes with a backbone's name; a model has its own.")
        else:
            net = copy.deepcopy(backbone)
        self.net = drop_patches(net).eval().requires_grad_(False)
        config = self.net.data_config()
        self.img_size: Tuple[int, int] = tuple(config["input_size"][-2:])
        self.mean, self.std = tuple(config["mean"]), tuple(config["std"])
        self.patch_size, self.grid_size = self.net.patch_size, self.net.patch_grid
        self.num_patches, self.in_chans = self.net.num_patches, self.net.in_chans

    def train(self, mode: bool = True) -> "FeatureTeacher":
        """It stays in eval mode: it is frozen."""
        return super().train(False)

    @torch.no_grad()
    def features(self, images: Tensor, visible_indices: Tensor) -> Tensor:
        """Images (n, C, H, W) of which patches (n, V) are visible -> features (n, D)."""
        tokens = self.net.forward_features(images, keep_indices=visible_indices)
        found: Tensor = self.net.forward_head(tokens, pre_logits=True)
        return found

    def without(self, images: Tensor, visible_indices: Tensor, columns: Tensor) -> Tensor:
        """Features (n, D) when the visible patch of each image at columns (n,) is taken away."""
        return self.features(images, all_but(visible_indices, columns))
