"""Coarse tokens beside patches, with the backbone's own embedding and positions.

A coarse token is a patch of the image at half or quarter size. Where the backbone's positions
depend on the size of the grid (tables, DINOv3's RoPE), it gets the position that the backbone gives
that patch; other RoPEs count patches, and a coarse token gets the mean angle of the patches that it
covers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, List, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from timm.layers import RotaryEmbeddingDinoV3, resample_abs_pos_embed
from timm.models import checkpoint
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ltrp_timm._timm import ROTARY_EMBEDDINGS
from ltrp_timm.selection.cells import SCALES, TokenLayout
from ltrp_timm.selection.rules import gather_patches, keep_tokens
from ltrp_timm.slots.base import TokenSlot, named_twins

UNSCRIPTABLE = (
    "a model with rest='coarse' cannot be scripted: torch deprecates TorchScript; use "
    "torch.export, or export_model with format='pt2' or 'onnx'."
)


class Coarse(NamedTuple):
    """What a slot adds to the refined patches.

    Attributes:
        tokens: (B, T - K, D) with positions.
        layout: of all tokens.
    """

    tokens: Tensor
    layout: TokenLayout


class CoarseSlot(TokenSlot):
    """Stands at ``patch_drop``: keeps the refined patches and appends the coarse tokens."""

    coarse: Optional[Coarse] = None

    def __prepare_scriptable__(self) -> "CoarseSlot":
        """Called by ``torch.jit.script``, whose own error would be about this class."""
        raise ValueError(UNSCRIPTABLE)

    def take(self, x: Tensor) -> Tuple[Tensor, Optional[Tensor]]:
        """Tokens (B, P + N, D) -> (B, P + T, D), and the indices of the refined patches."""
        keep, coarse = self.keep_indices, self.coarse
        if keep is None or coarse is None:
            return super().take(x)
        self._check_thread()
        self.keep_indices = None
        return keep_tokens(x, keep, self.num_prefix_tokens, coarse.tokens), keep


class CoarseSlotWithIndices(CoarseSlot):
    """Stands at ``patch_drop`` of an Eva, which gathers its rotary embedding by the places."""

    def forward(self, x: Tensor) -> Tuple[Tensor, Optional[Tensor]]:  # type: ignore[override]
        """Tokens (B, P + N, D) -> (B, P + T, D), and their places in all grids (B, T)."""
        x, keep = self.take(x)
        return x, keep if self.coarse is None else self.coarse.layout.in_pyramid()


class RopePyramid:
    """A mixin for timm's rotary embeddings: those of all scales, one after another."""

    keep_indices: Optional[Tensor]

    def get_embed(self, shape: Optional[List[int]] = None, *args: Any, **kwargs: Any) -> Any:
        """timm's embedding (…, N, 2d), or with cells and blocks appended: (…, N + M + Q, 2d)."""
        host: Any = super()
        rope = host.get_embed(shape, *args, **kwargs)
        if self.keep_indices is None:
            return rope
        self.keep_indices = None
        h, w = shape or self.feat_shape  # type: ignore[attr-defined]  # of the host
        exact = isinstance(self, RotaryEmbeddingDinoV3) and not (self.training and self.aug_active)
        parts = [rope]
        for scale in SCALES[-1][1:]:
            if exact and h % scale == w % scale == 0:
                coarse = host.get_embed([h // scale, w // scale], *args, **kwargs)
                parts.append(coarse.to(rope.dtype))
            else:
                parts.append(mean_angle(rope, (h, w), scale))
        return torch.cat(parts, dim=-2)


TWINS = named_twins(RopePyramid, ROTARY_EMBEDDINGS, globals())


def mean_angle(rope: Tensor, grid_size: Tuple[int, int], scale: int) -> Tensor:
    """Sines and cosines (…, N, 2d) -> (…, M, 2d): of the mean angle in each square of patches.

    Angles grow evenly over the grid, so that the mean is that of the four patches in the middle.
    Exact while neighbouring patches differ by less than half a turn.
    """
    h, w = grid_size[0] // scale, grid_size[1] // scale
    table = rope.unflatten(-2, grid_size)[..., : h * scale, : w * scale, :].float()
    table = table.unflatten(-2, (w, scale)).unflatten(-4, (h, scale))
    first, last = scale // 2 - 1, scale // 2 + 1
    middle = table[..., first:last, :, first:last, :].mean(dim=(-4, -2))
    sin, cos = middle.flatten(-3, -2).chunk(2, dim=-1)
    length = (sin * sin + cos * cos).sqrt().clamp(min=1e-12)
    return torch.cat([sin / length, cos / length], dim=-1).to(rope.dtype)


def positions(backbone: Any, grid_size: Tuple[int, int], scale: int) -> Optional[Tensor]:
    """The backbone's position table for the image at 1 / scale of its size, (1, M, D), or None."""
    table = backbone.pos_embed
    if table is None:
        return None
    table = table[:, 0 if backbone.no_embed_class else backbone.num_prefix_tokens :]
    size, (h, w) = backbone.patch_embed.grid_size, (side // scale for side in grid_size)
    if grid_size[0] % scale or grid_size[1] % scale:  # the part of the grid in whole squares
        table = resample_abs_pos_embed(table, list(grid_size), size, num_prefix_tokens=0)
        table = table.unflatten(1, grid_size)[:, : h * scale, : w * scale].flatten(1, 2)
        size = [h * scale, w * scale]
    return resample_abs_pos_embed(table, [h, w], size, num_prefix_tokens=0)


def coarse_tokens(
    backbone: Any, images: Tensor, layout: TokenLayout, patch_size: Tuple[int, int]
) -> Coarse:
    """Tokens of cells, then of blocks, of images (B, C, H, W) that are padded to the grid."""
    tokens = []
    for scale, index in zip(layout.scales[1:], layout.indices[1:]):
        h, w = (side // scale * scale for side in layout.grid_size)
        small = F.avg_pool2d(images[..., : h * patch_size[0], : w * patch_size[1]], scale)
        rows = _embed(backbone.patch_embed, small, index)
        table = positions(backbone, layout.grid_size, scale)
        tokens.append(rows if table is None else rows + table[0][index])
    found = tokens[0] if len(tokens) == 1 else torch.cat(tokens, dim=1)
    return Coarse(backbone.pos_drop(found) if backbone.training else found, layout)


def _embed(embed: Any, images: Tensor, index: Tensor) -> Tensor:
    """Embed the patches (B, K) of images of any size -> (B, K, D)."""
    # a wrapper reads the flag through, but keeps a new one
    inside = [each for each in embed.modules() if "strict_img_size" in each.__dict__]
    strict = [each for each in inside if each.strict_img_size]
    for each in strict:
        each.strict_img_size = False
    try:
        tokens = embed(images)
    finally:
        for each in strict:
            each.strict_img_size = True
    return gather_patches(tokens.flatten(1, 2) if tokens.dim() == 4 else tokens, index)


@contextmanager
def checkpointed(backbone: Any) -> Iterator[None]:
    """Checkpoint blocks that get a mask, which timm's VisionTransformer does not do itself."""
    blocks = backbone.blocks
    if isinstance(backbone, VisionTransformer) and backbone.grad_checkpointing:
        backbone.blocks = nn.Sequential(*(_Checkpointed(block) for block in blocks))
    try:
        yield
    finally:
        backbone.blocks = blocks


class _Checkpointed(nn.Module):
    """Recomputes a block in the backward pass."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Tokens (B, L, D) -> (B, L, D)."""
        return checkpoint(self.block, x, **kwargs)
