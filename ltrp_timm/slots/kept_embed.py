"""Embed kept patches only: dropped patches need no embedding.

timm adds position embeddings to a full grid. So the kept rows are written into zeros, and the slot
behind the position embedding takes them out again.
"""

from operator import index
from typing import Any, Optional

import torch
import torch.nn.functional as F
from timm.layers import Format, PatchEmbed
from torch import Tensor, nn

from ltrp_timm.slots.base import renamed


def embed_kept(
    images: Tensor, keep_indices: Tensor, weight: Tensor, bias: Optional[Tensor]
) -> Tensor:
    """Images (B, C, H, W), keep_indices (B, K) -> (B, h, w, D), zeros at dropped places.

    The projection of a patch embedding: weight (D, C, p, q) of a convolution with stride = kernel
    size, bias (D,) or None.
    """
    rows, cols = weight.shape[-2:]
    h, w = images.shape[2] // rows, images.shape[3] // cols
    if images.shape[2] != h * rows or images.shape[3] != w * cols:
        size = f"{images.shape[2]}x{images.shape[3]}"
        raise ValueError(f"images must divide into patches of {rows}x{cols}, got {size}.")
    cut = images.reshape(images.shape[0], images.shape[1], h, rows, w, cols)
    cut = cut.permute(0, 2, 4, 1, 3, 5)
    batch = torch.arange(images.shape[0], device=images.device).unsqueeze(1)
    row, col = keep_indices // w, keep_indices % w
    tokens = F.linear(cut[batch, row, col].flatten(2), weight.flatten(1), bias)
    dense = tokens.new_zeros(images.shape[0], h, w, weight.shape[0])
    return dense.index_put((batch, row, col), tokens)


torch.fx.wrap("embed_kept")


class KeptPatchEmbed(PatchEmbed):
    """timm's patch embedding; with keep indices in it, it embeds kept patches only."""

    keep_indices: Optional[Tensor]
    output_fmt: Format  # TorchScript reads annotations of the class itself only
    dynamic_img_pad: torch.jit.Final[bool]  # type: ignore[misc]  # timm sets it
    _timm_forward = renamed(PatchEmbed.forward, "_timm_forward")

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> timm's output, with zeros for dropped patches."""
        keep = self.keep_indices
        if keep is None:
            return self._timm_forward(x)
        self.keep_indices = None
        if not torch.jit.is_scripting():
            if not _is_plain(self.proj):  # an adapter or a hook inside must run
                return self._timm_forward(x)
            compiling = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
            if compiling and torch.is_grad_enabled():
                # for one image size, as timm's convolution is: the gradient of a resized position
                # table cannot be compiled for several
                for side in x.shape[2:]:
                    index(side)
        elif self.strict_img_size and self.img_size is not None:
            if x.shape[2] != self.img_size[0] or x.shape[3] != self.img_size[1]:
                raise ValueError("images must have the size that the model was made for.")
        if self.dynamic_img_pad:
            h, w = self.dynamic_feat_size((x.shape[-2], x.shape[-1]))
            rows, cols = self.patch_size
            x = F.pad(x, (0, w * cols - x.shape[-1], 0, h * rows - x.shape[-2]))
        x = self.norm(embed_kept(x, keep, self.proj.weight, self.proj.bias))
        return x.flatten(1, 2) if self.flatten else x


def _is_plain(proj: nn.Module) -> bool:
    hooks = proj._forward_hooks or proj._forward_pre_hooks
    return type(proj) is nn.Conv2d and "forward" not in proj.__dict__ and not hooks


def can_embed_kept(patch_embed: Any) -> bool:
    """Whether a patch embedding is one projection of each patch, then at most a LayerNorm."""
    if type(patch_embed) is not PatchEmbed:
        return False
    if not patch_embed.flatten and patch_embed.output_fmt != "NHWC":
        return False
    proj, norm = patch_embed.proj, patch_embed.norm
    if not _is_plain(proj) or not isinstance(norm, (nn.Identity, nn.LayerNorm)):
        return False
    patch = tuple(patch_embed.patch_size)
    plain = proj.kernel_size == patch and proj.stride == patch and proj.padding == (0, 0)
    return plain and proj.groups == 1 and proj.dilation == (1, 1)
