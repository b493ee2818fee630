"""Slots under TorchScript: all families in one method.

TorchScript reaches a module only through the attributes of its parents, resolved at compile time. A
second registered reference to a slot would become a copy, which the backbone never reads.
"""

from typing import TYPE_CHECKING, Any, Optional

from torch import Tensor


class ScriptedSlots:
    """A mixin for scripted modules with a ``backbone``."""

    if TYPE_CHECKING:  # torch.jit.script would read the annotation as a TorchScript type
        backbone: Any

    def _fill_slots(self, keep: Optional[Tensor]) -> None:
        """Put keep indices (B, K), or None, into the backbone's slots."""
        if hasattr(self.backbone, "patch_drop"):
            self.backbone.patch_drop.keep_indices = keep
        elif hasattr(self.backbone, "shared_rel_pos"):
            self.backbone.patch_embed.norm.keep_indices = keep
            self.backbone.shared_rel_pos.keep_indices = keep
        else:
            self.backbone.pos_drop.keep_indices = keep
            if hasattr(self.backbone, "rel_pos_bias"):
                if self.backbone.rel_pos_bias is not None:
                    self.backbone.rel_pos_bias.keep_indices = keep
        if hasattr(self.backbone.patch_embed, "keep_indices"):
            self.backbone.patch_embed.keep_indices = keep
