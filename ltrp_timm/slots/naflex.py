"""NaFlexVit: its ``patch_drop`` works in training only, so the slot stands one module further on.

It takes batches of images of one size only: a dict of patches cannot be ranked.
"""

from typing import Any, ClassVar, Dict, Optional

from timm.layers import LayerNorm
from timm.models.naflexvit import NaFlexVit
from torch import Tensor, nn

from ltrp_timm._timm import ROTARY_EMBEDDINGS
from ltrp_timm.slots.base import SlotAdapter, TokenSlot, as_slot, check_free, named_twins


class TokenSlotWithNorm(TokenSlot, LayerNorm):
    """Stands at ``norm_pre`` where that is a LayerNorm: the slot, then the norm."""

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, P + N, D) -> (B, P + K, D)."""
        return LayerNorm.forward(self, self.take(x)[0])


def rope_of_kept(rope: Tensor, keep_indices: Tensor) -> Any:
    """Rotary embedding of all patches, keep_indices (B, K) -> that of the kept ones.

    It is (N, 2d) -> (B, 1, K, 2d). One for each block, (depth, H, N, 2d), becomes an iterator over
    blocks of (B, H, K, 2d): never are all of them in memory.
    """
    if rope.dim() == 2:
        return rope[keep_indices].unsqueeze(1)
    return (layer[:, keep_indices].transpose(0, 1) for layer in rope.unbind(0))


class RopeSlot:
    """A mixin for timm's rotary embeddings: the embedding of the kept patches."""

    keep_indices: Optional[Tensor]

    def get_embed(self, *args: Any, **kwargs: Any) -> Any:
        """timm's embedding, or that of the kept patches."""
        rope = super().get_embed(*args, **kwargs)  # type: ignore[misc]  # of the host
        keep = self.keep_indices
        if keep is None:
            return rope
        self.keep_indices = None
        return rope_of_kept(rope, keep)


SLOTS = named_twins(RopeSlot, ROTARY_EMBEDDINGS, globals())


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
        if backbone.rope is not None and type(backbone.rope) not in SLOTS:
            raise TypeError(
                f"cannot drop patches from {self.family}: its rope is a "
                f"{type(backbone.rope).__name__}, not one of "
                f"{', '.join(kind.__name__ for kind in SLOTS)}."
            )
