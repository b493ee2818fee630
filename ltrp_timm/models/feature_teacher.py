"""A timm ViT as the teacher of rankers: its feature changes when a visible patch is taken away.

Or when a cell of 2 x 2 patches is given coarsely in place of finely.
"""

import copy
from typing import Any, Tuple, Union

import timm
import torch
from torch import Tensor, nn

from ltrp_timm.models.front_end import drop_patches
from ltrp_timm.selection.cells import CellGrid
from ltrp_timm.teacher import PatchTeacher
from ltrp_timm.teacher.density import all_but


class FeatureTeacher(PatchTeacher, nn.Module):
    """A frozen timm ViT that encodes chosen patches of an image into one feature.

    ``semantic_density`` takes it in place of an MAE. The feature is what the model's head would
    get: the class token, or the pooled tokens where the model pools. Its attributes are those of
    ``PatchTeacher``.

    Args:
        backbone: a timm ViT whose patches can be dropped, which is copied; or its name, to load the
            weights that timm publishes.
        img_size: side of the images, or (height, width), for a name (default: the model's own).
        rest: "drop"; or "coarse": the teacher's patches are the cells of 2 x 2 patches of the
            backbone, and a cell that is taken away is given as one token of the half-size image.

    Raises:
        TypeError: The patches of this model cannot be dropped; the message says why.

    >>> teacher = FeatureTeacher(timm.create_model("vit_tiny_patch16_224", depth=1, img_size=64))
    >>> teacher.features(torch.zeros(2, 3, 64, 64), torch.tensor([[0, 5], [3, 4]])).shape
    torch.Size([2, 192])
    """

    def __init__(
        self,
        backbone: Union[str, nn.Module],
        img_size: Union[int, Tuple[int, int], None] = None,
        rest: str = "drop",
    ) -> None:
        super().__init__()
        if isinstance(backbone, str):
            size = {} if img_size is None else {"img_size": img_size}
            net: Any = timm.create_model(backbone, pretrained=True, num_classes=0, **size)
        elif img_size is not None:
            raise ValueError("img_size goes with a backbone's name; a model has its own.")
        else:
            net = copy.deepcopy(backbone)
        self.net = drop_patches(net, rest=rest).eval().requires_grad_(False)
        self.rest = rest
        config = self.net.data_config()
        self.img_size: Tuple[int, int] = tuple(config["input_size"][-2:])
        self.mean, self.std = tuple(config["mean"]), tuple(config["std"])
        self.patch_size, self.grid_size = self.net.patch_size, self.net.patch_grid
        self.in_chans = self.net.in_chans
        self.cells = CellGrid(self.grid_size) if rest == "coarse" else None
        if self.cells is not None:
            h, w = self.grid_size
            self.grid_size = h // 2, w // 2
            self.patch_size = 2 * self.patch_size[0], 2 * self.patch_size[1]
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def train(self, mode: bool = True) -> "FeatureTeacher":
        """It stays in eval mode: it is frozen."""
        return super().train(False)

    @torch.no_grad()
    def features(self, images: Tensor, visible_indices: Tensor) -> Tensor:
        """Images (n, C, H, W) of which patches, or cells, (n, V) are visible -> (n, D)."""
        if self.cells is not None:
            visible_indices = self.cells.fine_patches(visible_indices)
        tokens = self.net.forward_features(images, keep_indices=visible_indices)
        return self.net.forward_head(tokens, pre_logits=True)

    def without(self, images: Tensor, visible_indices: Tensor, columns: Tensor) -> Tensor:
        """Features (n, D) when the visible patch of each image at columns (n,) is taken away."""
        return self.features(images, all_but(visible_indices, columns))
