"""The table of families: where each drops patches, and models of it; models that are refused."""

# family of an adapter -> how it drops patches, and kinds of models -> names of such models
SUPPORTED: dict[str, tuple[str, dict[str, tuple[str, ...]]]] = {
    "VisionTransformer": (
        "in timm's own slot, `patch_drop`",
        {
            "ViT, registers, average pooling": (
                "vit_base_patch16_224",
                "vit_betwixt_patch16_reg4_gap_256",
                "vit_base_patch16_gap_224",
            ),
            "DINOv2": ("vit_small_patch14_reg4_dinov2",),
            "CLIP, SigLIP": ("vit_base_patch16_clip_224", "vit_base_patch16_siglip_224"),
            "DeiT, distilled, DeiT-3": (
                "deit_tiny_distilled_patch16_224",
                "deit3_small_patch16_224",
            ),
            "FlexiViT, AIMv2": ("flexivit_small", "aimv2_large_patch14_224"),
            "hybrids, ViTamin": ("vit_tiny_r_s16_p8_224", "vitamin_small_224"),
        },
    ),
    "Eva": (
        "in timm's own slot, `patch_drop`; the RoPE follows",
        {
            "EVA-02, RoPE ViTs, PE-core": (
                "eva02_tiny_patch14_224",
                "vit_small_patch16_rope_mixed_224",
                "vit_pe_core_tiny_patch16_384",
            ),
            "DINOv3": ("vit_small_patch16_dinov3",),
        },
    ),
    "Beit": (
        "at `pos_drop`; the relative position bias follows, own or shared",
        {"BEiT, BEiT v2": ("beit_base_patch16_224", "beitv2_base_patch16_224")},
    ),
    "Cait": (
        "at `pos_drop`; the class token joins behind the blocks",
        {"CaiT": ("cait_xxs24_224",)},
    ),
    "VisionTransformerRelPos": (
        "behind `patch_embed`; the relative position bias follows, own or shared",
        {
            "ViT-RelPos, ViT-SRelPos": (
                "vit_relpos_base_patch16_cls_224",
                "vit_srelpos_small_patch16_224",
            )
        },
    ),
    "NaFlexVit": (
        "at `norm_pre`; the RoPE follows; a dict of patches: in timm's own slot, `patch_drop`",
        {
            "NaFlexVit, and what `use_naflex=True` makes": (
                "naflexvit_base_patch16_gap",
                "naflexvit_base_patch16_siglip",
            )
        },
    ),
}

# class that is refused -> a model of it
REFUSED_EXAMPLES = {
    "SwinTransformer": "swin_tiny_patch4_window7_224",
    "SwinTransformerV2": "swinv2_tiny_window8_256",
    "SwinTransformerV2Cr": "swinv2_cr_tiny_224",
    "VisionTransformerSAM": "samvit_base_patch16_224",
    "DaVit": "davit_tiny",
    "GlobalContextVit": "gcvit_xxtiny",
    "TinyVit": "tiny_vit_5m_224",
    "Hiera": "hiera_tiny_224",
    "HieraDet": "sam2_hiera_tiny",
    "PoolingVisionTransformer": "pit_ti_224",
    "MultiScaleVit": "mvitv2_tiny",
    "Nest": "nest_tiny",
    "Levit": "levit_256d",
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
    "MlpMixer": "mixer_s32_224",
    "DeepseekVitEncoder": "deepseek_vit_412m_enc",
    "DeepseekVitClassifier": "deepseek_vit_412m",
    "Gemma4VitEncoder": "gemma4_vit_167m_enc",
    "Gemma4VitClassifier": "gemma4_vit_167m",
    "Qwen3VitEncoder": "qwen3_vit_88m_enc",
    "Qwen3VitClassifier": "qwen3_vit_88m",
    "Sequencer2d": "sequencer2d_s",
    "ConVit": "convit_tiny",
    "TNT": "tnt_s_legacy_patch16_224",
    "CrossVit": "crossvit_9_240",
}
