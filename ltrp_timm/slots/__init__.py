"""How each timm family lets go of tokens: one small adapter per family, and who is refused why."""

from typing import Any, Dict

import torch
from timm.models import FeatureGraphNet
from timm.models._features import FeatureGetterNet, FeatureHookNet, FeatureListNet

from ltrp_timm.slots.base import SlotAdapter, TokenSlot, run_with_slots
from ltrp_timm.slots.beit import BeitAdapter
from ltrp_timm.slots.cait import CaitAdapter
from ltrp_timm.slots.naflex import NaFlexAdapter
from ltrp_timm.slots.patch_drop import EvaAdapter, VitAdapter
from ltrp_timm.slots.relpos import RelPosAdapter

__all__ = [
    "ADAPTERS",
    "REFUSED",
    "SlotAdapter",
    "TokenSlot",
    "find_adapter",
    "patch_embed_of",
    "run_with_slots",
]

ADAPTERS = (
    VitAdapter(),
    EvaAdapter(),
    BeitAdapter(),
    CaitAdapter(),
    RelPosAdapter(),
    NaFlexAdapter(),
)

_WINDOWS = "it attends inside fixed windows of the full patch grid"
_POOLS = "it pools the patch grid between its stages"
_CONVOLVES = "it mixes neighbouring patches with convolutions over the full grid"
_MIXES = "its token-mixing weights have one entry for each patch position"

REFUSED: Dict[str, str] = {
    "LTRPModel": "it drops patches already; set its keep_ratio instead",
    "OptimizedModule": "it is compiled; drop patches first, then compile",
    "DataParallel": "it is a wrapper; drop patches from the model inside, then wrap",
    "DistributedDataParallel": "it is a wrapper; drop patches from the model inside, then wrap",
    "RecursiveScriptModule": "it is scripted; drop patches first, then script",
    "SwinTransformer": _WINDOWS,
    "SwinTransformerV2": _WINDOWS,
    "SwinTransformerV2Cr": _WINDOWS,
    "VisionTransformerSAM": _WINDOWS,
    "Twins": _WINDOWS,
    "MaxxVit": _WINDOWS,
    "Hiera": _POOLS,
    "HieraDet": _POOLS,
    "PoolingVisionTransformer": _POOLS,
    "MultiScaleVit": _POOLS,
    "Nest": _POOLS,
    "Xcit": _CONVOLVES,
    "CoaT": _CONVOLVES,
    "Levit": _CONVOLVES,
    "VOLO": _CONVOLVES,
    "MlpMixer": _MIXES,
    "ConVit": "its attention positions are laid out for the full patch grid",
    "TNT": "it carries a second, pixel-level token stream",
    "CrossVit": "it carries two token streams of different patch sizes",
}


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
    if kind in REFUSED:
        raise TypeError(f"cannot drop patches from {kind}: {REFUSED[kind]}.")
    names = ", ".join(adapter.family for adapter in ADAPTERS)
    raise TypeError(
        f"cannot drop patches from {kind}: it is none of the timm families that can ({names})."
    )


def patch_embed_of(backbone: Any) -> Any:
    """The module that cuts images into patches, whatever the family calls it."""
    names = (a.patch_embed for a in ADAPTERS if isinstance(backbone, a.host))
    return getattr(backbone, next(names, SlotAdapter.patch_embed))
