"""ViT and Eva: timm drops patches in a slot of their own, ``patch_drop``."""

import inspect
from typing import Any

import timm.models.eva
from timm.layers import PatchDropout, PatchDropoutWithIndices
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ltrp_timm.slots.base import SlotAdapter, TokenSlot, TokenSlotWithIndices


class VitAdapter(SlotAdapter):
    """Every model of timm's VisionTransformer class and its subclasses."""

    family = "VisionTransformer"
    host = VisionTransformer
    places = ("patch_drop",)

    def make_slot(self, backbone: Any) -> TokenSlot:
        """The slot of a ViT."""
        return TokenSlot(backbone.num_prefix_tokens)

    def check(self, backbone: Any) -> None:
        """Raise TypeError when ``patch_drop`` is in use."""
        kind, slot = type(backbone).__name__, backbone.patch_drop
        if isinstance(slot, (PatchDropout, PatchDropoutWithIndices)):
            raise TypeError(
                f"cannot drop patches from {kind}: its patch_drop is a live {type(slot).__name__}; "
                "create the model without patch_drop_rate."
            )
        if slot is not None and type(slot) is not nn.Identity:
            raise TypeError(
                f"cannot drop patches from {kind}: its patch_drop is already in use "
                f"({type(slot).__name__})."
            )


class EvaAdapter(VitAdapter):
    """Every model of timm's Eva class; it gathers its rotary embedding itself."""

    family = "Eva"
    host = Eva

    def make_slot(self, backbone: Any) -> TokenSlot:
        """The slot of an Eva, which hands out the indices as well."""
        _make_rope_gather_a_leaf()
        return TokenSlotWithIndices(backbone.num_prefix_tokens)


def _make_rope_gather_a_leaf() -> None:
    """Make timm's gather of rotary embeddings a leaf of torch.fx: it can be called, not traced.

    ``torch.fx.wrap`` must be called at the top level of the module whose name it wraps, hence the
    ``exec``. It changes symbolic tracing only.
    """
    source = "__import__('torch').fx.wrap('apply_keep_indices_nlc')"
    code = compile(source, inspect.getfile(timm.models.eva), "exec")
    exec(code, vars(timm.models.eva))  # noqa: S102  # a constant string
