"""Families that need only a slot for their tokens: ViT, Eva and CaiT.

timm drops patches of ViT and Eva in a place made for it, ``patch_drop``; Eva gathers its rotary
embedding itself. CaiT has no ``patch_drop``, and no class token where it adds positions.
"""

from typing import Any, Dict, Optional, Tuple, Type

from timm.models.cait import Cait
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ltrp_timm._timm import make_rope_gather_a_leaf
from ltrp_timm.slots.base import (
    SlotAdapter,
    TokenSlot,
    TokenSlotWithDropout,
    as_slot,
    check_free,
    check_known,
)
from ltrp_timm.slots.coarse import TWINS, CoarseSlot, CoarseSlotWithIndices


class TokenSlotWithIndices(TokenSlot):
    """Stands at ``patch_drop`` of an Eva, which gathers its rotary embedding by the indices."""

    def forward(self, x: Tensor) -> Tuple[Tensor, Optional[Tensor]]:  # type: ignore[override]
        """Tokens (B, P + N, D) -> (B, P + K, D), and the indices (B, K)."""
        return self.take(x)


class VitAdapter(SlotAdapter):
    """Every model of timm's VisionTransformer class and its subclasses."""

    family = "VisionTransformer"
    host = VisionTransformer
    places: Tuple[str, ...] = ("patch_drop",)
    slot: Type[TokenSlot] = TokenSlot

    def modules(self, backbone: Any) -> Dict[str, nn.Module]:
        """The tokens' slot."""
        return {"patch_drop": self.slot(backbone.num_prefix_tokens)}

    def check(self, backbone: Any) -> None:
        """Raise TypeError if ``patch_drop`` is in use."""
        check_free(backbone, "patch_drop")


class EvaAdapter(VitAdapter):
    """Every model of timm's Eva class."""

    family = "Eva"
    host = Eva
    slot: Type[TokenSlot] = TokenSlotWithIndices

    def modules(self, backbone: Any) -> Dict[str, nn.Module]:
        """The tokens' slot, which also returns the indices."""
        make_rope_gather_a_leaf()
        return super().modules(backbone)


class CoarseVitAdapter(VitAdapter):
    """A ViT with tokens of several scales."""

    slot = CoarseSlot


class CoarseEvaAdapter(EvaAdapter):
    """An Eva with tokens of several scales; its RoPE has an embedding for each of them."""

    places = ("patch_drop", "rope")
    slot = CoarseSlotWithIndices

    def modules(self, backbone: Any) -> Dict[str, nn.Module]:
        """The tokens' slot, and the rotary embedding of all scales."""
        found = super().modules(backbone)
        if backbone.rope is not None:
            found["rope"] = as_slot(backbone.rope, TWINS[type(backbone.rope)])
        return found

    def check(self, backbone: Any) -> None:
        """Raise TypeError if ``patch_drop`` is in use, or the RoPE is not one of timm's."""
        super().check(backbone)
        if backbone.rope is not None:
            check_known("Eva with rest='coarse'", "rope", backbone.rope, TWINS)


VitAdapter.coarse = CoarseVitAdapter()
EvaAdapter.coarse = CoarseEvaAdapter()


class CaitAdapter(SlotAdapter):
    """The slot stands at ``pos_drop``; the class token joins behind the blocks."""

    family = "Cait"
    host = Cait
    places = ("pos_drop",)
    prefix_in_blocks = False
    coarse = "its attention takes no mask for the sizes of tokens"

    def modules(self, backbone: Any) -> Dict[str, nn.Module]:
        """The tokens' slot."""
        return {"pos_drop": TokenSlotWithDropout(0, backbone.pos_drop.p)}
