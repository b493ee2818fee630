"""Models that cannot drop patches, and why: timm's classes by name, and wrappers."""

from typing import Dict

_WINDOWS = "it attends inside fixed windows of the full patch grid"
_POOLS = "it pools the patch grid between its stages"
_CONVOLVES = "it mixes neighbouring patches with convolutions over the full grid"
_MIXES = "its token-mixing weights have one entry for each patch position"
_TOWER = "it is the vision tower of a language model, and has no adapter in this version"

# reason -> class -> a model of that class
REFUSED_MODELS: Dict[str, Dict[str, str]] = {
    _WINDOWS: {
        "SwinTransformer": "swin_tiny_patch4_window7_224",
        "SwinTransformerV2": "swinv2_tiny_window8_256",
        "SwinTransformerV2Cr": "swinv2_cr_tiny_224",
        "VisionTransformerSAM": "samvit_base_patch16_224",
        "DaVit": "davit_tiny",
        "GlobalContextVit": "gcvit_xxtiny",
        "TinyVit": "tiny_vit_5m_224",
    },
    _POOLS: {
        "Hiera": "hiera_tiny_224",
        "HieraDet": "sam2_hiera_tiny",
        "PoolingVisionTransformer": "pit_ti_224",
        "MultiScaleVit": "mvitv2_tiny",
        "Nest": "nest_tiny",
        "Levit": "levit_256d",
    },
    _CONVOLVES: {
        "Xcit": "xcit_nano_12_p16_224",
        "CoaT": "coat_tiny",
        "VOLO": "volo_d1_224",
        "Twins": "twins_svt_small",
        "MaxxVit": "maxvit_tiny_tf_224",
        "ByobNet": "mobilevit_xxs",
        "EfficientVit": "efficientvit_b0",
        "EfficientVitLarge": "efficientvit_l1",
        "EfficientVitMsra": "efficientvit_m0",
        "EfficientViM": "efficientvim_m1",
        "EfficientFormer": "efficientformer_l1",
        "EfficientFormerV2": "efficientformerv2_s0",
        "EdgeNeXt": "edgenext_xx_small",
        "FastVit": "fastvit_t8",
        "RepVit": "repvit_m0_9",
        "NextViT": "nextvit_small",
        "SHViT": "shvit_s1",
        "SwiftFormer": "swiftformer_xs",
        "Visformer": "visformer_tiny",
        "MetaFormer": "poolformer_s12",
        "IFormer": "iformer_t",
        "LowFormer": "lowformer_b0",
        "PyramidVisionTransformerV2": "pvt_v2_b0",
        "CSATv2": "csatv2",
        "ConvMixer": "convmixer_768_32",
    },
    _MIXES: {"MlpMixer": "mixer_s32_224"},
    _TOWER: {
        "DeepseekVitEncoder": "deepseek_vit_412m_enc",
        "DeepseekVitClassifier": "deepseek_vit_412m",
        "Gemma4VitEncoder": "gemma4_vit_167m_enc",
        "Gemma4VitClassifier": "gemma4_vit_167m",
        "Qwen3VitEncoder": "qwen3_vit_88m_enc",
        "Qwen3VitClassifier": "qwen3_vit_88m",
    },
    "it runs recurrent layers along the rows and columns of the full grid": {
        "Sequencer2d": "sequencer2d_s"
    },
    "its attention positions are laid out for the full patch grid": {"ConVit": "convit_tiny"},
    "it carries a second, pixel-level token stream": {"TNT": "tnt_s_legacy_patch16_224"},
    "it carries two token streams of different patch sizes": {"CrossVit": "crossvit_9_240"},
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
