"""ViT and Eva: timm drops patches in a slot of their own, ``patch_drop``."""

import inspect
from typing import Any

import timm.models.eva
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from ltrp_timm.slots.base import SlotAdapter, TokenSlot, TokenSlotWithIndices, check_free


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
        check_free(backbone, "patch_drop")


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
