"""How each timm family drops tokens, and which models are refused and why."""

from typing import Any, Dict, Tuple

import torch
from torch import nn

from ltrp_timm._timm import FEATURE_WRAPPERS
from ltrp_timm.slots.base import (
    KeptPatchEmbed,
    SlotAdapter,
    Swaps,
    as_slot,
    can_embed_kept,
    swap_in,
)
from ltrp_timm.slots.naflex import NaFlexAdapter
from ltrp_timm.slots.pair_bias import BeitAdapter, RelPosAdapter
from ltrp_timm.slots.vit import CaitAdapter, EvaAdapter, VitAdapter

ADAPTERS = (
    VitAdapter(),
    EvaAdapter(),
    BeitAdapter(),
    CaitAdapter(),
    RelPosAdapter(),
    NaFlexAdapter(),
)

# reason -> classes
REFUSED_MODELS: Dict[str, Tuple[str, ...]] = {
    "it attends inside fixed windows of the full patch grid": (
        *("SwinTransformer", "SwinTransformerV2", "SwinTransformerV2Cr", "VisionTransformerSAM"),
        *("DaVit", "GlobalContextVit", "TinyVit"),
    ),
    "it pools the patch grid between its stages": (
        *("Hiera", "HieraDet", "PoolingVisionTransformer", "MultiScaleVit", "Nest", "Levit"),
    ),
    "it mixes neighbouring patches with convolutions over the full grid": (
        *("Xcit", "CoaT", "VOLO", "Twins", "MaxxVit", "ByobNet", "EfficientVit"),
        *("EfficientVitLarge", "EfficientVitMsra", "EfficientViM", "EfficientFormer"),
        *("EfficientFormerV2", "EdgeNeXt", "FastVit", "RepVit", "NextViT", "SHViT", "SwiftFormer"),
        *("Visformer", "MetaFormer", "IFormer", "LowFormer", "PyramidVisionTransformerV2"),
        *("CSATv2", "ConvMixer"),
    ),
    "its token-mixing weights have one entry for each patch position": ("MlpMixer",),
    "it is the vision tower of a language model, and has no adapter in this version": (
        *("DeepseekVitEncoder", "DeepseekVitClassifier", "Gemma4VitEncoder", "Gemma4VitClassifier"),
        *("Qwen3VitEncoder", "Qwen3VitClassifier"),
    ),
    "it runs recurrent layers along the rows and columns of the full grid": ("Sequencer2d",),
    "its attention positions are laid out for the full patch grid": ("ConVit",),
    "it carries a second, pixel-level token stream": ("TNT",),
    "it carries two token streams of different patch sizes": ("CrossVit",),
}

_WRAPPER = "it is a wrapper; drop patches from the model inside, then wrap"
_TRUNK = "it holds the image tower: clip.visual.trunk = drop_patches(clip.visual.trunk)"
_TIMM_MODEL = "it is a wrapper: wrapper.timm_model = drop_patches(wrapper.timm_model)"

REFUSED: Dict[str, str] = {
    "LTRPModel": "it drops patches already; set its keep_ratio instead",
    "OptimizedModule": "it is compiled; drop patches first, then compile",
    "DataParallel": _WRAPPER,
    "DistributedDataParallel": _WRAPPER,
    "RecursiveScriptModule": "it is scripted; drop patches first, then script",
    "open_clip.transformer.VisionTransformer": (
        "it is open_clip's own class; take a model with a timm ViT as visual.trunk, such as "
        "ViT-B-16-SigLIP2 or PE-Core-B-16, or the same weights from timm, such as "
        "vit_base_patch16_clip_224.openai"
    ),
    **dict.fromkeys(("CLIP", "CustomTextCLIP", "TimmModel"), _TRUNK),
    **dict.fromkeys(("TimmWrapperModel", "TimmWrapperForImageClassification"), _TIMM_MODEL),
    **{kind: reason for reason, kinds in REFUSED_MODELS.items() for kind in kinds},
}


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
