"""The registered names and the weights timm publishes for their backbones, default first.

timm keys its registry by the last part of this module's name; it must not be that of a module of
timm's.
"""

from typing import Any, Dict

from timm.models import generate_default_cfgs, register_model
from torch import nn

from ltrp_timm.models.factory import GENERIC, backbone_cfg, create_ltrp

_GENERIC_BACKBONE = "vit_base_patch16_224"

# registered name -> its backbone, and the backbones' published weights
_SOURCES = {
    "ltrp_vit_tiny": ("vit_tiny_patch16_224", "vit_tiny_patch16_224.augreg_in21k_ft_in1k"),
    "ltrp_vit_small": (
        "vit_small_patch16_224",
        "vit_small_patch16_224.augreg_in21k_ft_in1k",
        "vit_small_patch16_224.dino",
    ),
    "ltrp_vit_base": (
        "vit_base_patch16_224",
        "vit_base_patch16_224.augreg2_in21k_ft_in1k",
        "vit_base_patch16_224.mae",
        "vit_base_patch16_224.dino",
    ),
    "ltrp_vit_large": (
        "vit_large_patch16_224",
        "vit_large_patch16_224.augreg_in21k_ft_in1k",
        "vit_large_patch16_224.mae",
    ),
    "ltrp_vit_huge": ("vit_huge_patch14_224", "vit_huge_patch14_224.mae"),
    "ltrp_deit3_small": (
        "deit3_small_patch16_224",
        "deit3_small_patch16_224.fb_in22k_ft_in1k",
        "deit3_small_patch16_224.fb_in1k",
    ),
    "ltrp_deit3_base": (
        "deit3_base_patch16_224",
        "deit3_base_patch16_224.fb_in22k_ft_in1k",
        "deit3_base_patch16_224.fb_in1k",
    ),
    "ltrp_dinov2_small": ("vit_small_patch14_reg4_dinov2", "vit_small_patch14_reg4_dinov2.lvd142m"),
    "ltrp_dinov2_base": ("vit_base_patch14_reg4_dinov2", "vit_base_patch14_reg4_dinov2.lvd142m"),
    "ltrp_dinov3_small": ("vit_small_patch16_dinov3", "vit_small_patch16_dinov3.lvd1689m"),
    "ltrp_dinov3_base": ("vit_base_patch16_dinov3", "vit_base_patch16_dinov3.lvd1689m"),
    "ltrp_dinov3_large": (
        "vit_large_patch16_dinov3",
        "vit_large_patch16_dinov3.lvd1689m",
        "vit_large_patch16_dinov3.sat493m",
    ),
    "ltrp_clip_base": (
        "vit_base_patch16_clip_224",
        "vit_base_patch16_clip_224.laion2b_ft_in12k_in1k",
        "vit_base_patch16_clip_224.openai",
    ),
    "ltrp_siglip2_base": ("vit_base_patch16_siglip_224", "vit_base_patch16_siglip_224.v2_webli"),
    "ltrp_beitv2_base": (
        "beitv2_base_patch16_224",
        "beitv2_base_patch16_224.in1k_ft_in22k_in1k",
    ),
    "ltrp_eva02_tiny": (
        "eva02_tiny_patch14_224",
        "eva02_tiny_patch14_224.mim_in22k",
        "eva02_tiny_patch14_336.mim_in22k_ft_in1k",
    ),
    "ltrp_eva02_base": (
        "eva02_base_patch14_224",
        "eva02_base_patch14_224.mim_in22k",
        "eva02_base_patch14_448.mim_in22k_ft_in22k_in1k",
    ),
}


def _default_cfgs() -> Dict[str, Any]:
    cfgs: Dict[str, Any] = {}
    for name, (_, *sources) in _SOURCES.items():
        for source in sources:
            cfg = backbone_cfg(source)
            if cfg is not None:  # an older timm may lack a tag
                cfgs[f"{name}.{source.split('.', 1)[1]}"] = cfg
    cfgs[GENERIC] = backbone_cfg(_GENERIC_BACKBONE, hf_hub_id=None)
    return cfgs


default_cfgs = generate_default_cfgs(_default_cfgs())


def _registered(name: str, pretrained: bool, kwargs: Dict[str, Any]) -> nn.Module:
    if "backbone" in kwargs:
        raise TypeError(f"the backbone of {name} is fixed: timm.create_model('ltrp', backbone=…).")
    return create_ltrp(name, pretrained, backbone=_SOURCES[name][0], **kwargs)


@register_model
def ltrp(pretrained: bool = False, backbone: str = _GENERIC_BACKBONE, **kwargs: Any) -> nn.Module:
    """LTRP front-end on any timm ViT: ``backbone="vit_small_patch16_dinov3.lvd1689m"``."""
    return create_ltrp(GENERIC, pretrained, backbone=backbone, **kwargs)


@register_model
def ltrp_vit_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LTRP front-end on ViT-Ti/16."""
    return _registered("ltrp_vit_tiny", pretrained, kwargs)


@register_model
def ltrp_vit_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LTRP front-end on ViT-S/16."""
    return _registered("ltrp_vit_small", pretrained, kwargs)


@register_model
def ltrp_vit_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LTRP front-end on ViT-B/16."""
    return _registered("ltrp_vit_base", pretrained, kwargs)


@register_model
def ltrp_vit_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LTRP front-end on ViT-L/16."""
    return _registered("ltrp_vit_large", pretrained, kwargs)


@register_model
def ltrp_vit_huge(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LTRP front-end on ViT-H/14."""
    return _registered("ltrp_vit_huge", pretrained, kwargs)


@register_model
def ltrp_deit3_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LTRP front-end on DeiT-3 S/16."""
    return _registered("ltrp_deit3_small", pretrained, kwargs)


@register_model
def ltrp_deit3_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LTRP front-end on DeiT-3 B/16."""
    return _registered("ltrp_deit3_base", pretrained, kwargs)


@register_model
def ltrp_dinov2_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LTRP front-end on DINOv2 S/14 with 4 registers."""
    return _registered("ltrp_dinov2_small", pretrained, kwargs)


@register_model
def ltrp_dinov2_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LTRP front-end on DINOv2 B/14 with 4 registers."""
    return _registered("ltrp_dinov2_base", pretrained, kwargs)


@register_model
def ltrp_dinov3_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LTRP front-end on DINOv3 S/16."""
    return _registered("ltrp_dinov3_small", pretrained, kwargs)


@register_model
def ltrp_dinov3_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LTRP front-end on DINOv3 B/16."""
    return _registered("ltrp_dinov3_base", pretrained, kwargs)


@register_model
def ltrp_dinov3_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LTRP front-end on DINOv3 L/16."""
    return _registered("ltrp_dinov3_large", pretrained, kwargs)


@register_model
def ltrp_clip_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LTRP front-end on CLIP ViT-B/16 image tower."""
    return _registered("ltrp_clip_base", pretrained, kwargs)


@register_model
def ltrp_siglip2_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LTRP front-end on SigLIP-2 ViT-B/16 image tower."""
    return _registered("ltrp_siglip2_base", pretrained, kwargs)


@register_model
def ltrp_beitv2_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LTRP front-end on BEiT v2 B/16."""
    return _registered("ltrp_beitv2_base", pretrained, kwargs)


@register_model
def ltrp_eva02_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LTRP front-end on EVA-02 Ti/14."""
    return _registered("ltrp_eva02_tiny", pretrained, kwargs)


@register_model
def ltrp_eva02_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LTRP front-end on EVA-02 B/14."""
    return _registered("ltrp_eva02_base", pretrained, kwargs)
