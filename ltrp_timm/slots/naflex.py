"""NaFlexVit: its ``patch_drop`` works in training only, so the slot stands one module further on.

That is for images. A dict of patches brings a validity mask and, for each image, positions of its
own; timm gathers all of them behind ``patch_drop``, which stands there while such a batch runs.
"""

from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Tuple

import torch
from einops import rearrange
from timm.layers import LayerNorm
from timm.models.naflexvit import NaFlexVit
from torch import Tensor, nn

from ltrp_timm._timm import ROTARY_EMBEDDINGS
from ltrp_timm.selection.rules import keep_tokens
from ltrp_timm.slots.base import (
    SlotAdapter,
    TokenSlot,
    alone,
    as_slot,
    check_free,
    check_known,
    named_twins,
)


class TokenSlotWithNorm(TokenSlot, LayerNorm):
    """Stands at ``norm_pre`` where that is a LayerNorm: the slot, then the norm."""

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, P + N, D) -> (B, P + K, D)."""
        return LayerNorm.forward(self, self.take(x)[0])


class RopeSlot:
    """A mixin for timm's rotary embeddings: the embedding of the kept patches."""

    keep_indices: Optional[Tensor]

    def get_embed(self, *args: Any, **kwargs: Any) -> Any:
        """timm's embedding, or that of the kept patches (B, K).

        It is (N, 2d) -> (B, 1, K, 2d). One for each block, (depth, H, N, 2d), becomes an iterator
        over blocks of (B, H, K, 2d): never are all of them in memory.
        """
        rope = super().get_embed(*args, **kwargs)  # type: ignore[misc]  # of the host
        keep = self.keep_indices
        if keep is None:
            return rope
        self.keep_indices = None
        if rope.dim() == 2:
            return rope[keep].unsqueeze(1)
        return (layer[:, keep].transpose(0, 1) for layer in rope.unbind(0))


SLOTS = named_twins(RopeSlot, ROTARY_EMBEDDINGS, globals())


class NaFlexAdapter(SlotAdapter):
    """The slot stands at ``norm_pre``; the rotary embedding, where there is one, follows."""

    family = "NaFlexVit"
    host = NaFlexVit
    places = ("norm_pre", "rope")
    patch_embed = "embeds"
    coarse = "its patch embedding adds the positions itself; use a model without use_naflex"

    def modules(self, backbone: Any) -> Dict[str, nn.Module]:
        """The tokens' slot, and the rotary embedding of kept patches."""
        norm: Any = TokenSlot(backbone.num_prefix_tokens)
        if type(backbone.norm_pre) is not nn.Identity:
            norm = as_slot(backbone.norm_pre, TokenSlotWithNorm)
            norm.num_prefix_tokens = backbone.num_prefix_tokens
        found: Dict[str, nn.Module] = {"norm_pre": norm}
        if backbone.rope is not None:
            found["rope"] = as_slot(backbone.rope, SLOTS[type(backbone.rope)])
        return found

    def check(self, backbone: Any) -> None:
        """Raise TypeError if a place is in use or holds a module that timm does not build here."""
        check_free(backbone, "patch_drop")
        if type(backbone.norm_pre) is not LayerNorm:
            check_free(backbone, "norm_pre")
        if backbone.rope is not None:
            check_known(self.family, "rope", backbone.rope, SLOTS)


class NaFlexBatch(NamedTuple):
    """timm's dict of patches, checked: images of different sizes, padded to N patches.

    Attributes:
        patches: (B, N, p * q * C), or (B, N, p, q, C).
        patch_coord: (B, N, 2), the (y, x) of each patch.
        patch_valid: (B, N) bool, False where an image is padded.
        grids: the patch grid (h, w) of each image; its patches come first, row by row.
        patch_size: (height, width) of a patch in pixels.
    """

    patches: Tensor
    patch_coord: Tensor
    patch_valid: Tensor
    grids: List[Tuple[int, int]]
    patch_size: Tuple[int, int]

    def images(self, rows: List[int], channels_last: bool) -> Tensor:
        """The pixels (b, C, H, W) of images that have one grid."""
        (h, w), (p, q) = self.grids[rows[0]], self.patch_size
        flat = "(p q c)" if channels_last else "(c p q)"
        cut = self.patches[rows, : h * w].flatten(2)
        return rearrange(cut, f"b (h w) {flat} -> b c (h p) (w q)", h=h, p=p, q=q)


def check_batch(batch: Mapping[str, Any], backbone: Any) -> NaFlexBatch:
    """Check a dict of patches for a NaFlexVit; reads from the device, as timm does.

    ValueError if a part is missing or has another shape, or an image is not its whole grid.
    """
    names = ("patches", "patch_coord", "patch_valid")
    if not all(isinstance(batch.get(name), Tensor) for name in names):
        found = ", ".join(name for name in batch if isinstance(batch[name], Tensor)) or "none"
        raise ValueError(f"a dict of patches needs the tensors {', '.join(names)}, got {found}.")
    if batch.get("attn_mask") is not None:
        raise ValueError("a dict of patches must not have an attn_mask: patch_valid makes it.")
    patches, coord, valid = (batch[name] for name in names)
    embeds = backbone.embeds
    if not embeds.is_linear:
        raise ValueError(
            "this NaFlexVit embeds images by a convolution and takes no dict of patches: create it "
            "with embed_proj_type='linear'."
        )
    size = _patch_size(patches, embeds, backbone.in_chans)
    b, n = patches.shape[:2]
    whole = not (coord.is_floating_point() or coord.is_complex() or coord.dtype == torch.bool)
    if tuple(coord.shape) != (b, n, 2) or not whole:
        raise ValueError(
            f"patch_coord must be integers (B, N, 2) = {[b, n, 2]}, got {coord.dtype} "
            f"{list(coord.shape)}."
        )
    if tuple(valid.shape) != (b, n):
        raise ValueError(f"patch_valid must be (B, N) = {[b, n]}, got {list(valid.shape)}.")
    valid = valid.bool()
    return NaFlexBatch(patches, coord, valid, _grids(coord, valid), size)


def _patch_size(patches: Tensor, embeds: Any, in_chans: int) -> Tuple[int, int]:
    """(height, width) of the patches; ValueError unless the model can embed them."""
    p, q = embeds.patch_size
    if patches.dim() == 5:
        shape = tuple(patches.shape[2:])
        last = getattr(embeds, "channels_last", True)
        size, chans = (shape[:2], shape[2]) if last else (shape[1:], shape[0])
        fits = chans == in_chans and (embeds.enable_patch_interpolator or size == (p, q))
    else:
        size, fits = (p, q), patches.dim() == 3 and patches.shape[2] == p * q * in_chans
    if not fits or not patches.is_floating_point():
        raise ValueError(
            f"patches must be floating point (B, N, {p * q * in_chans}) for a model with patches "
            f"of {p}x{q} and {in_chans} channels, got {patches.dtype} {list(patches.shape)}."
        )
    return int(size[0]), int(size[1])


def _grids(coord: Tensor, valid: Tensor) -> List[Tuple[int, int]]:
    """The grid (h, w) of each image of coordinates (B, N, 2), validity (B, N)."""
    grid = coord.masked_fill(~valid.unsqueeze(2), -1).amax(1) + 1
    inside = ((coord >= 0) & (coord < grid.unsqueeze(1))).all(2).all(1)
    place = torch.arange(coord.shape[1], device=coord.device)
    w = grid[:, 1:].clamp(min=1)
    row_by_row = (coord[..., 0] == place // w) & (coord[..., 1] == place % w)
    first = valid == (place < grid.prod(1, keepdim=True))
    in_order = (first & (row_by_row | ~valid)).all(1)
    whole = in_order & (valid.sum(1) == grid.prod(1))
    facts = torch.stack([grid[:, 0], grid[:, 1], inside.long(), whole.long(), valid.sum(1)], dim=1)
    found = []
    for image, (rows, cols, is_inside, is_whole, count) in enumerate(facts.tolist()):
        if count == 0:
            raise ValueError(f"image {image} of the batch has no valid patch.")
        if not is_inside:
            raise ValueError(
                f"patch_coord of image {image} leaves its grid of {rows}x{cols} valid patches: "
                "(y, x) must lie in the grid, also at padding, where timm has zeros."
            )
        if not is_whole:
            raise ValueError(
                f"image {image} must hold its whole grid of {rows}x{cols} patches first, row by "
                f"row, got {count} valid patches: timm reads positions from that order. Give all "
                "patches, and choose with keep_indices."
            )
        found.append((rows, cols))
    return found


def check_kept(keep_indices: Tensor, batch: NaFlexBatch) -> None:
    """Check indices (B, K) into a batch, -1 where an image keeps fewer; reads from the device.

    ValueError if one is out of range, at padding or twice, or if an image keeps nothing.
    """
    n = batch.patch_valid.shape[1]
    counts = batch.patch_valid.sum(1)
    ordered = keep_indices.sort(dim=1)[0]
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(1)
    wrong = (keep_indices >= counts.unsqueeze(1)).any(1) | (keep_indices < -1).any(1)
    wrong = wrong | twice | (keep_indices < 0).all(1)
    if bool(wrong.any()):
        image = int(wrong.nonzero()[0])
        raise ValueError(
            f"keep_indices of image {image} must name some of its patches 0 … "
            f"{int(counts[image]) - 1} (of {n} with padding) once each, and -1 where it keeps "
            f"fewer, got {keep_indices[image].tolist()}."
        )


def run_batch(
    backbone: Any, slot: Any, batch: NaFlexBatch, keep_indices: Optional[Tensor]
) -> Dict[str, Tensor]:
    """Run a NaFlexVit, with its empty slot for tokens, on a batch up to the final norm.

    Of each image the patches keep_indices (B, K) stay, -1 where it keeps fewer; None keeps all. It
    returns "patches" (B, P + K, D) and "patch_valid" (B, K), as ``forward_features`` does.
    """
    inputs = {name: getattr(batch, name) for name in ("patches", "patch_coord", "patch_valid")}
    call: Callable[..., Dict[str, Tensor]] = backbone.forward_features
    if keep_indices is None:
        return call(**inputs)
    missing = keep_indices < 0
    if bool(missing.any()):  # they take a patch of padding behind the others
        parts = inputs.items()
        inputs = {n: torch.cat([x, torch.zeros_like(x[:, :1])], dim=1) for n, x in parts}
        keep_indices = keep_indices.masked_fill(missing, batch.patch_valid.shape[1])

    def keep(tokens: Tensor) -> Tuple[Tensor, Tensor]:
        return keep_tokens(tokens, keep_indices, backbone.num_prefix_tokens), keep_indices

    training = backbone.training
    with alone(slot, type(backbone).__name__):
        # timm visits patch_drop in training only; no other part of this one module asks for it
        backbone.patch_drop, backbone.training = keep, True
        try:
            return call(**inputs)
        finally:
            backbone.patch_drop, backbone.training = None, training
