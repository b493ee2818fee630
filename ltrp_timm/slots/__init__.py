"""How each timm family drops tokens, and which models are refused and why."""

from typing import Any, Dict

import torch
from torch import nn

from ltrp_timm._timm import FEATURE_WRAPPERS
from ltrp_timm.slots.base import SlotAdapter, Swaps, as_slot, swap_in
from ltrp_timm.slots.beit import BeitAdapter
from ltrp_timm.slots.kept_embed import KeptPatchEmbed, can_embed_kept
from ltrp_timm.slots.naflex import NaFlexAdapter
from ltrp_timm.slots.refused import REFUSED
from ltrp_timm.slots.relpos import RelPosAdapter
from ltrp_timm.slots.vit import CaitAdapter, EvaAdapter, VitAdapter

ADAPTERS = (
    VitAdapter(),
    EvaAdapter(),
    BeitAdapter(),
    CaitAdapter(),
    RelPosAdapter(),
    NaFlexAdapter(),
)


def find_adapter(backbone: object, rest: str = "drop") -> SlotAdapter:
    """The adapter for a timm ViT; TypeError, with the reason, for a model without one.

    ``rest`` is what happens to the weak patches: "drop" or "coarse".
    """
    kind = type(backbone).__name__
    for adapter in ADAPTERS:
        if isinstance(backbone, adapter.host):
            found = adapter if rest == "drop" else adapter.coarse
            if isinstance(found, str):
                raise TypeError(f"rest='coarse' does not work with a {kind}: {found}.")
            found.check(backbone)
            return found
    if isinstance(backbone, FEATURE_WRAPPERS):
        raise TypeError(
            f"cannot drop patches from a features_only wrapper ({kind}): drop first, then wrap."
        )
    if isinstance(backbone, torch.fx.GraphModule):
        raise TypeError("cannot drop patches from a traced graph: drop first, then trace.")
    for base in type(backbone).__mro__:
        for name in (f"{base.__module__}.{base.__name__}", base.__name__):
            if name in REFUSED:
                origin = f" of {base.__module__}" if "." in name else ""
                raise TypeError(f"cannot drop patches from {kind}{origin}: {REFUSED[name]}.")
    names = ", ".join(adapter.family for adapter in ADAPTERS)
    raise TypeError(
        f"cannot drop patches from {kind} of {type(backbone).__module__}: it is not one of the "
        f"supported timm families ({names})."
    )


def install_slots(backbone: nn.Module, adapter: SlotAdapter) -> Swaps:
    """Put empty slots into a backbone; returns what ``swap_back`` needs."""
    swaps = swap_in(backbone, adapter.modules(backbone))
    embed = adapter.embed_of(backbone)
    if can_embed_kept(embed):  # asked last: a slot may stand inside the patch embedding
        kept: Dict[str, Any] = {adapter.patch_embed: as_slot(embed, KeptPatchEmbed)}
        swaps.update(swap_in(backbone, kept))
    return swaps
