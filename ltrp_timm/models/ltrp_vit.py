"""The registered models, and the weights that timm publishes for their backbones.

timm keys its registry by the last part of this module's name, which must not be that of a module of
timm.
"""

from typing import Any, Callable, Dict, Tuple

from timm.models import generate_default_cfgs, register_model
from torch import nn

from ltrp_timm.models.factory import GENERIC, backbone_cfg, create_ltrp

_GENERIC_BACKBONE = "vit_base_patch16_224"

# registered name -> its backbone's name in timm, and the tags of its published weights
_BACKBONES: Dict[str, Tuple[str, Tuple[str, ...]]] = {
    "ltrp_vit_tiny": ("vit_tiny_patch16_224", ("augreg_in21k_ft_in1k",)),
    "ltrp_vit_small": ("vit_small_patch16_224", ("augreg_in21k_ft_in1k", "dino")),
    "ltrp_vit_base": ("vit_base_patch16_224", ("augreg2_in21k_ft_in1k", "mae", "dino")),
    "ltrp_vit_large": ("vit_large_patch16_224", ("augreg_in21k_ft_in1k", "mae")),
    "ltrp_vit_huge": ("vit_huge_patch14_224", ("mae",)),
    "ltrp_deit3_small": ("deit3_small_patch16_224", ("fb_in22k_ft_in1k", "fb_in1k")),
    "ltrp_deit3_base": ("deit3_base_patch16_224", ("fb_in22k_ft_in1k", "fb_in1k")),
    "ltrp_dinov2_small": ("vit_small_patch14_reg4_dinov2", ("lvd142m",)),
    "ltrp_dinov2_base": ("vit_base_patch14_reg4_dinov2", ("lvd142m",)),
    "ltrp_dinov3_small": ("vit_small_patch16_dinov3", ("lvd1689m",)),
    "ltrp_dinov3_base": ("vit_base_patch16_dinov3", ("lvd1689m",)),
    "ltrp_dinov3_large": ("vit_large_patch16_dinov3", ("lvd1689m", "sat493m")),
    "ltrp_clip_base": ("vit_base_patch16_clip_224", ("laion2b_ft_in12k_in1k", "openai")),
    "ltrp_siglip2_base": ("vit_base_patch16_siglip_224", ("v2_webli",)),
    "ltrp_beitv2_base": ("beitv2_base_patch16_224", ("in1k_ft_in22k_in1k",)),
    "ltrp_eva02_tiny": (
        "eva02_tiny_patch14_224",
        ("mim_in22k", "eva02_tiny_patch14_336.mim_in22k_ft_in1k"),
    ),
    "ltrp_eva02_base": (
        "eva02_base_patch14_224",
        ("mim_in22k", "eva02_base_patch14_448.mim_in22k_ft_in22k_in1k"),
    ),
}


def _default_cfgs() -> Dict[str, Any]:
    """timm's cfgs by ``name.tag``, the default tag of a name first."""
    cfgs: Dict[str, Any] = {}
    for name, (backbone, tags) in _BACKBONES.items():
        for tag in tags:
            cfg = backbone_cfg(tag if "." in tag else f"{backbone}.{tag}")
            if cfg is not None:  # older versions of timm lack some tags
                cfgs[f"{name}.{tag.rpartition('.')[2]}"] = cfg
    cfgs[GENERIC] = backbone_cfg(_GENERIC_BACKBONE, hf_hub_id=None)
    return cfgs


default_cfgs = generate_default_cfgs(_default_cfgs())


@register_model
def ltrp(pretrained: bool = False, backbone: str = _GENERIC_BACKBONE, **kwargs: Any) -> nn.Module:
    """LTRP front-end on any timm ViT: ``backbone="vit_small_patch16_dinov3.lvd1689m"``."""
    return create_ltrp(GENERIC, pretrained, backbone=backbone, **kwargs)


def _entry_point(name: str) -> Callable[..., nn.Module]:
    """The function that timm registers under a name."""
    backbone = _BACKBONES[name][0]

    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        if "backbone" in kwargs:
            raise TypeError(
                f"the backbone of {name} is fixed: timm.create_model('ltrp', backbone=…)."
            )
        return create_ltrp(name, pretrained, backbone=backbone, **kwargs)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"LTRP front-end on timm's {backbone}."
    return build


for _name in _BACKBONES:
    globals()[_name] = register_model(_entry_point(_name))
