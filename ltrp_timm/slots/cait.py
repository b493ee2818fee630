"""CaiT: no ``patch_drop``, and no class token yet where positions are added."""

from typing import Any, List

from timm.models.cait import Cait
from torch import nn

from ltrp_timm.slots.base import SlotAdapter, TokenSlotWithDropout


class CaitAdapter(SlotAdapter):
    """The slot stands at ``pos_drop``; the class token joins behind the blocks."""

    family = "Cait"
    host = Cait
    prefix_in_blocks = False

    def install(self, backbone: Any) -> nn.Module:
        """Put an empty slot behind the position embedding; returns the dropout that stood there."""
        original: nn.Module = backbone.pos_drop
        backbone.pos_drop = TokenSlotWithDropout(0, backbone.pos_drop.p).train(original.training)
        return original

    def restore(self, backbone: Any, original: Any) -> None:
        """Put back what ``install`` returned."""
        backbone.pos_drop = original.train(backbone.pos_drop.training)

    def slots(self, backbone: Any) -> List[nn.Module]:
        """The one slot."""
        return [backbone.pos_drop]
