"""How each timm family lets go of tokens: one small adapter per family, and who is refused why."""

from typing import Any, Dict, Iterable, List

import torch
from timm.models import FeatureGraphNet
from timm.models._features import FeatureGetterNet, FeatureHookNet, FeatureListNet

from ltrp_timm.slots.base import SlotAdapter, TokenSlot, run_with_slots
from ltrp_timm.slots.beit import BeitAdapter
from ltrp_timm.slots.cait import CaitAdapter
from ltrp_timm.slots.kept_embed import install_kept_embed, restore_kept_embed
from ltrp_timm.slots.naflex import NaFlexAdapter
from ltrp_timm.slots.patch_drop import EvaAdapter, VitAdapter
from ltrp_timm.slots.refused import REFUSED, REFUSED_MODELS
from ltrp_timm.slots.relpos import RelPosAdapter

__all__ = [
    "ADAPTERS",
    "REFUSED",
    "SlotAdapter",
    "TokenSlot",
    "find_adapter",
    "install_kept_embed",
    "patch_embed_of",
    "restore_kept_embed",
    "run_with_slots",
    "support_rows",
]

ADAPTERS = (
    VitAdapter(),
    EvaAdapter(),
    BeitAdapter(),
    CaitAdapter(),
    RelPosAdapter(),
    NaFlexAdapter(),
)


def find_adapter(backbone: object) -> SlotAdapter:
    """The adapter for a timm ViT.

    Raises:
        TypeError: patches cannot be dropped from this model; the message says why. Nothing was
            changed.
    """
    kind = type(backbone).__name__
    for adapter in ADAPTERS:
        if isinstance(backbone, adapter.host):
            adapter.check(backbone)
            return adapter
    if isinstance(backbone, (FeatureGetterNet, FeatureListNet, FeatureHookNet, FeatureGraphNet)):
        raise TypeError(
            f"cannot drop patches from a features_only wrapper ({kind}): drop first, then wrap."
        )
    if isinstance(backbone, torch.fx.GraphModule):
        raise TypeError("cannot drop patches from a traced graph: drop first, then trace.")
    for base in type(backbone).__mro__:
        if base.__name__ in REFUSED:
            raise TypeError(f"cannot drop patches from {kind}: {REFUSED[base.__name__]}.")
    names = ", ".join(adapter.family for adapter in ADAPTERS)
    raise TypeError(
        f"cannot drop patches from {kind}: it is none of the timm families that can ({names})."
    )


def patch_embed_of(backbone: Any) -> Any:
    """The module that cuts images into patches, whatever the family calls it."""
    names = (a.patch_embed for a in ADAPTERS if isinstance(backbone, a.host))
    return getattr(backbone, next(names, SlotAdapter.patch_embed))


def support_rows() -> List[Dict[str, str]]:
    """Which timm models drop patches, which are refused, and why, as rows of text for a table."""
    rows = [
        _support_row(kinds, "supported", models, adapter.how)
        for adapter in ADAPTERS
        for kinds, models in adapter.examples.items()
    ]
    for reason, models in REFUSED_MODELS.items():
        kinds = ", ".join(f"`{kind}`" for kind in models)
        rows.append(_support_row(kinds, "refused", list(models.values())[:2], reason))
    return rows


def _support_row(kinds: str, answer: str, models: Iterable[str], why: str) -> Dict[str, str]:
    names = ", ".join(f"`{name}`" for name in models)
    return {"family": kinds, "drops patches": answer, "examples": names, "how, or why not": why}
