"""Models that cannot drop patches, and why: timm's classes by name, and wrappers."""

from typing import Dict, Tuple

_WINDOWS = "it attends inside fixed windows of the full patch grid"
_POOLS = "it pools the patch grid between its stages"
_CONVOLVES = "it mixes neighbouring patches with convolutions over the full grid"
_MIXES = "its token-mixing weights have one entry for each patch position"
_TOWER = "it is the vision tower of a language model, and has no adapter in this version"

# reason -> classes
REFUSED_MODELS: Dict[str, Tuple[str, ...]] = {
    _WINDOWS: (
        *("SwinTransformer", "SwinTransformerV2", "SwinTransformerV2Cr", "VisionTransformerSAM"),
        *("DaVit", "GlobalContextVit", "TinyVit"),
    ),
    _POOLS: ("Hiera", "HieraDet", "PoolingVisionTransformer", "MultiScaleVit", "Nest", "Levit"),
    _CONVOLVES: (
        *("Xcit", "CoaT", "VOLO", "Twins", "MaxxVit", "ByobNet", "EfficientVit"),
        *("EfficientVitLarge", "EfficientVitMsra", "EfficientViM", "EfficientFormer"),
        *("EfficientFormerV2", "EdgeNeXt", "FastVit", "RepVit", "NextViT", "SHViT", "SwiftFormer"),
        *("Visformer", "MetaFormer", "IFormer", "LowFormer", "PyramidVisionTransformerV2"),
        *("CSATv2", "ConvMixer"),
    ),
    _MIXES: ("MlpMixer",),
    _TOWER: (
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
