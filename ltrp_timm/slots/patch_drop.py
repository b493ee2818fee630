"""ViT and Eva: timm drops patches in a slot of their own, ``patch_drop``."""

import inspect
from typing import Any, ClassVar

import timm.models.eva
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from ltrp_timm.slots.base import SlotAdapter, TokenSlot, TokenSlotWithIndices, check_free


class VitAdapter(SlotAdapter):
    """Every model of timm's VisionTransformer class and its subclasses."""

    family = "VisionTransformer"
    host = VisionTransformer
    places = ("patch_drop",)
    how = "in timm's own slot, `patch_drop`"
    examples: ClassVar = {
        "ViT, registers, average pooling": (
            "vit_base_patch16_224",
            "vit_betwixt_patch16_reg4_gap_256",
            "vit_base_patch16_gap_224",
        ),
        "DINOv2": ("vit_small_patch14_reg4_dinov2",),
        "CLIP, SigLIP": ("vit_base_patch16_clip_224", "vit_base_patch16_siglip_224"),
        "DeiT, distilled, DeiT-3": ("deit_tiny_distilled_patch16_224", "deit3_small_patch16_224"),
        "FlexiViT, AIMv2": ("flexivit_small", "aimv2_large_patch14_224"),
        "hybrids, ViTamin": ("vit_tiny_r_s16_p8_224", "vitamin_small_224"),
    }

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
    how = "in timm's own slot, `patch_drop`; the RoPE follows"
    examples: ClassVar = {
        "EVA-02, RoPE ViTs, PE-core": (
            "eva02_tiny_patch14_224",
            "vit_small_patch16_rope_mixed_224",
            "vit_pe_core_tiny_patch16_384",
        ),
        "DINOv3": ("vit_small_patch16_dinov3",),
    }

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
