"""NaFlexVit: its ``patch_drop`` works in training alone, so a slot stands one module further on.

Only batches of images of one size: a dict of patches has been cut up before a ranker could see it.
"""

from typing import Any, ClassVar, Dict, Optional, Type

from timm.layers import (
    LayerNorm,
    RotaryEmbeddingCat,
    RotaryEmbeddingDinoV3,
    RotaryEmbeddingMixed,
    pos_embed_sincos,
)
from timm.models.naflexvit import NaFlexVit
from torch import Tensor, nn

from ltrp_timm.slots.base import SlotAdapter, TokenSlot, as_slot, check_free, undo_slot


class TokenSlotWithNorm(TokenSlot, LayerNorm):
    """Stands at ``norm_pre`` where that is a LayerNorm: the slot, then the norm."""

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, P + N, D) -> (B, P + K, D)."""
        return LayerNorm.forward(self, self.take(x)[0])


def rope_of_kept(rope: Tensor, keep_indices: Tensor) -> Any:
    """Rotary embedding of all patches -> that of the kept ones.

    Args:
        rope: (N, 2d), or (depth, H, N, 2d) where every block has its own.
        keep_indices: (B, K).

    Returns:
        (B, 1, K, 2d), or an iterator over blocks of (B, H, K, 2d): never all of them in memory.
    """
    if rope.dim() == 2:
        return rope[keep_indices].unsqueeze(1)
    return (layer[:, keep_indices].transpose(0, 1) for layer in rope.unbind(0))


class RopeSlot:
    """A mixin for timm's rotary embeddings: that of the kept patches alone."""

    keep_indices: Optional[Tensor]

    def get_embed(self, *args: Any, **kwargs: Any) -> Any:
        """The embedding as timm gives it, or that of the kept patches."""
        rope = super().get_embed(*args, **kwargs)  # type: ignore[misc]  # of the host
        keep = self.keep_indices
        if keep is None:
            return rope
        self.keep_indices = None
        return rope_of_kept(rope, keep)


class CatSlot(RopeSlot, RotaryEmbeddingCat):
    """Axial."""


class DinoV3Slot(RopeSlot, RotaryEmbeddingDinoV3):
    """Axial, as DINOv3 has it."""


class MixedSlot(RopeSlot, RotaryEmbeddingMixed):
    """Learned, another one for each block."""


SLOTS: Dict[Any, Type[nn.Module]] = {
    RotaryEmbeddingCat: CatSlot,
    RotaryEmbeddingDinoV3: DinoV3Slot,
    RotaryEmbeddingMixed: MixedSlot,
}

if hasattr(pos_embed_sincos, "RotaryEmbeddingMRope"):  # an older timm has none

    class MRopeSlot(RopeSlot, pos_embed_sincos.RotaryEmbeddingMRope):
        """Multimodal."""

    SLOTS[pos_embed_sincos.RotaryEmbeddingMRope] = MRopeSlot


class NaFlexAdapter(SlotAdapter):
    """The slot stands at ``norm_pre``; the rotary embedding, where there is one, follows."""

    family = "NaFlexVit"
    host = NaFlexVit
    places = ("norm_pre", "rope")
    how = "at `norm_pre`; the RoPE follows; image tensors only, no dict of patches"
    examples: ClassVar = {
        "NaFlexVit, and what `use_naflex=True` makes": (
            "naflexvit_base_patch16_gap",
            "naflexvit_base_patch16_siglip",
        )
    }
    patch_embed = "embeds"

    def make_slot(self, backbone: Any) -> TokenSlot:
        """The slot of the tokens."""
        if type(backbone.norm_pre) is nn.Identity:
            return TokenSlot(backbone.num_prefix_tokens)
        slot: TokenSlot = as_slot(backbone.norm_pre, TokenSlotWithNorm)
        slot.num_prefix_tokens = backbone.num_prefix_tokens
        return slot

    def check(self, backbone: Any) -> None:
        """Raise TypeError when a place is in use, or its module is none that timm builds here."""
        check_free(backbone, "patch_drop")
        if type(backbone.norm_pre) is not LayerNorm:
            check_free(backbone, "norm_pre")
        if backbone.rope is not None and type(backbone.rope) not in SLOTS:
            raise TypeError(
                f"cannot drop patches from {self.family}: its rope is a "
                f"{type(backbone.rope).__name__}, not one of "
                f"{', '.join(kind.__name__ for kind in SLOTS)}."
            )

    def install(self, backbone: Any) -> Any:
        """Put empty slots in; returns the modules that stood there."""
        original = (super().install(backbone), backbone.rope)
        if backbone.rope is not None:
            backbone.rope = as_slot(backbone.rope, SLOTS[type(backbone.rope)])
        return original

    def restore(self, backbone: Any, original: Any) -> None:
        """Put the original modules back, with everything as it is now."""
        norm, rope = original
        if type(norm) is not nn.Identity:
            del backbone.norm_pre.num_prefix_tokens
            undo_slot(norm, backbone.norm_pre)
        super().restore(backbone, norm)
        if rope is not None:
            backbone.rope = undo_slot(rope, backbone.rope)
