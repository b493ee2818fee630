"""CaiT: no ``patch_drop``, and no class token yet where positions are added."""

from typing import Any, ClassVar

from timm.models.cait import Cait

from ltrp_timm.slots.base import SlotAdapter, TokenSlot, TokenSlotWithDropout


class CaitAdapter(SlotAdapter):
    """The slot stands at ``pos_drop``; the class token joins behind the blocks."""

    family = "Cait"
    host = Cait
    places = ("pos_drop",)
    how = "at `pos_drop`; the class token joins behind the blocks"
    examples: ClassVar = {"CaiT": ("cait_xxs24_224",)}
    prefix_in_blocks = False

    def make_slot(self, backbone: Any) -> TokenSlot:
        """The slot behind the position embedding."""
        return TokenSlotWithDropout(0, backbone.pos_drop.p)
