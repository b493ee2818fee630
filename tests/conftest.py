import copy
import gc
import importlib.util
import re
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from benchmark_setup import Done, run_once
from torch import Tensor, nn

from ltrp_timm.deploy.formats import FORMATS
from ltrp_timm.teacher import MAETeacher

SMALL = {"embed_dim": 64, "num_heads": 2}

# one small model for every kind of backbone that can drop patches: name, changes, image side
FAMILIES: dict[str, tuple[str, dict[str, Any], int]] = {
    "vit": ("vit_tiny_patch16_224", {}, 96),
    "vit_gap": ("vit_base_patch16_gap_224", {"embed_dim": 64, "num_heads": 2}, 96),
    "registers": ("vit_small_patch14_reg4_dinov2", {"embed_dim": 64, "num_heads": 2}, 84),
    "dinov2": ("vit_small_patch14_dinov2", {"embed_dim": 64, "num_heads": 2}, 84),
    "dinov3": ("vit_small_patch16_dinov3", {"embed_dim": 64, "num_heads": 2}, 96),
    "clip": ("vit_base_patch16_clip_224", {"embed_dim": 64, "num_heads": 2}, 96),
    "siglip": ("vit_base_patch16_siglip_224", {"embed_dim": 64, "num_heads": 2}, 96),
    "deit": ("deit_tiny_patch16_224", {}, 96),
    "distilled": ("deit_tiny_distilled_patch16_224", {}, 96),
    "deit3": ("deit3_small_patch16_224", {"embed_dim": 64, "num_heads": 2}, 96),
    "flexivit": ("flexivit_small", {"embed_dim": 64, "num_heads": 2}, 96),
    "hybrid": ("vit_tiny_r_s16_p8_224", {}, 192),
    "aimv2": ("aimv2_large_patch14_224", {"embed_dim": 64, "num_heads": 2}, 84),
    "dynamic": ("vit_tiny_patch16_224", {"dynamic_img_size": True}, 96),
    "eva02": ("eva02_tiny_patch14_224", {}, 84),
    "rope_axial": ("vit_small_patch16_rope_224", {"embed_dim": 64, "num_heads": 2}, 96),
    "rope_mixed": ("vit_small_patch16_rope_mixed_224", {"embed_dim": 64, "num_heads": 2}, 96),
    "rope_ape": ("vit_small_patch16_rope_ape_224", {"embed_dim": 64, "num_heads": 2}, 96),
    "beit": ("beit_base_patch16_224", {"embed_dim": 64, "num_heads": 2}, 96),
    "beit_shared": (
        "beit_base_patch16_224",
        {
            "embed_dim": 64,
            "num_heads": 2,
            "use_shared_rel_pos_bias": True,
            "use_rel_pos_bias": False,
            "use_abs_pos_emb": True,
        },
        96,
    ),
    "beitv2": ("beitv2_base_patch16_224", {"embed_dim": 64, "num_heads": 2}, 96),
    "cait": ("cait_xxs24_224", {"embed_dim": 64, "num_heads": 2}, 96),
    "pe_core": ("vit_pe_core_tiny_patch16_384", {}, 96),
    "vitamin": ("vitamin_small_224", {}, 96),
    "relpos": ("vit_relpos_small_patch16_224", SMALL, 96),
    "relpos_shared": ("vit_srelpos_small_patch16_224", SMALL, 96),
    "relpos_cls": ("vit_relpos_base_patch16_cls_224", SMALL, 96),
    "relpos_cls_shared": ("vit_relpos_base_patch16_cls_224", {"shared_rel_pos": True, **SMALL}, 96),
    "relpos_clsgap": ("vit_relpos_base_patch16_clsgap_224", SMALL, 96),
    "relpos_rpn": ("vit_relpos_base_patch16_rpn_224", SMALL, 96),
    "relpos_swin": ("vit_relpos_base_patch16_224", {"rel_pos_type": "mlp-swin", **SMALL}, 96),
    "relpos_bias": ("vit_relpos_small_patch16_224", {"rel_pos_type": "bias", **SMALL}, 96),
    "relpos_bias_cls": ("vit_relpos_base_patch16_cls_224", {"rel_pos_type": "bias", **SMALL}, 96),
    "relpos_bias_shared": ("vit_srelpos_small_patch16_224", {"rel_pos_type": "bias", **SMALL}, 96),
    "naflex": ("naflexvit_base_patch16_gap", SMALL, 96),
    "naflex_par": ("naflexvit_base_patch16_par_gap", SMALL, 96),
    "naflex_parfac": ("naflexvit_base_patch16_parfac_gap", SMALL, 96),
    "naflex_map": ("naflexvit_base_patch16_map", SMALL, 96),
    "naflex_siglip": ("naflexvit_base_patch16_siglip", SMALL, 96),
    "naflex_so150m2": ("naflexvit_so150m2_patch16_reg1_gap", SMALL, 96),
    "naflex_clip": ("vit_base_patch16_clip_224", {"use_naflex": True, **SMALL}, 96),
    "naflex_eva02": ("eva02_base_patch14_224", {"use_naflex": True, **SMALL}, 84),
    "naflex_mixed": ("vit_small_patch16_rope_mixed_224", {"use_naflex": True, **SMALL}, 96),
}
if hasattr(timm.layers.pos_embed_sincos, "RotaryEmbeddingMRope"):  # an older timm has none
    changes = {"rope_type": "mrope", "rope_mrope_section": (4, 6, 6), "pos_embed": "none"}
    FAMILIES["naflex_dinov3"] = ("vit_small_patch16_dinov3", {"use_naflex": True, **SMALL}, 96)
    FAMILIES["naflex_mrope"] = ("naflexvit_base_patch16_gap", {**changes, **SMALL}, 96)


# every format of deployment; AOTInductor compiles for ten seconds, with a C++ compiler
no_compiler = not any(shutil.which(name) for name in ("g++", "clang++"))
every_format = pytest.mark.parametrize(
    "format",
    [
        pytest.param(name, marks=pytest.mark.skipif(no_compiler, reason="needs g++"))
        if name == "aoti"
        else name
        for name in FORMATS
    ],
)
aoti_is_slow = pytest.mark.parametrize(  # one test of the default run compiles a file
    "format", ["onnx", "pt2", "torchscript", pytest.param("aoti", marks=pytest.mark.slow)]
)


# TorchScript knows its builtins by their ids, also those that are gone (an ONNX export frees four):
# now and then an attribute of a model lies where one was and is taken for it. Keep them all.
_register_builtin = torch.jit._builtins._register_builtin
_builtins = []


def _register_and_keep(fn: Any, op: str) -> None:
    _builtins.append(fn)
    _register_builtin(fn, op)


torch.jit._builtins._register_builtin = _register_and_keep


# an older timm keeps no record of how a model was built: what saves by it cannot work there
records_arguments = pytest.mark.skipif(
    importlib.util.find_spec("timm.models._input") is None,
    reason=f"timm {timm.__version__} does not record model arguments",
)


@pytest.fixture(autouse=True)
def _one_thread_one_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def awaken(model: nn.Module) -> nn.Module:
    """Undo initial values that would hide a wrong token: LayerScale near 0, tiny heads and biases.

    A post-norm ViT scales its branches by the weight of a norm instead.
    """
    for name, parameter in model.named_parameters():
        if "relative_position_bias_table" in name or "rel_pos.mlp" in name:
            nn.init.normal_(parameter)
        if re.search(r"blocks.*norm[12]\.weight", name):
            nn.init.ones_(parameter)
        if "gamma" in name:
            nn.init.ones_(parameter)
        if name.startswith(("head", "backbone.head")) and parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.1)
    return model


def grid_of(backbone: Any, images: Tensor) -> tuple[int, int]:
    """The patch grid (h, w) of a plain backbone."""
    embed = backbone.embeds if hasattr(backbone, "embeds") else backbone.patch_embed
    h, w = embed.dynamic_feat_size(tuple(images.shape[-2:]))
    return h, w


def make_backbone(family: str, **changes: Any) -> tuple[Any, Tensor]:
    """A small backbone in eval mode, and three images for it."""
    name, defaults, side = FAMILIES[family]
    args = {"img_size": side, "depth": 2, "num_classes": 7, **defaults, **changes}
    torch.manual_seed(0)
    model = awaken(timm.create_model(name, **args)).eval()
    return model, torch.randn(3, args.get("in_chans", 3), side, side)


@pytest.fixture
def backbone_of() -> Callable[..., tuple[Any, Tensor]]:
    cache: dict[str, tuple[Any, Tensor]] = {}

    def make(family: str, **changes: Any) -> tuple[Any, Tensor]:
        key = f"{family}{changes}"
        if key not in cache:
            cache[key] = make_backbone(family, **changes)
        model, images = cache[key]
        return copy.deepcopy(model), images

    return make


def pytest_collection_finish() -> None:
    """Measuring and compiling collect garbage, which takes long where much is imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def run_benchmark(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Done]:
    """Run a benchmark once for each set of options."""
    done: dict[tuple[str, ...], Done] = {}

    def run(name: str, *options: str) -> Done:
        key = (name, *options)
        if key not in done:
            done[key] = run_once(name, tmp_path_factory.mktemp(name), *options)
        return done[key]

    return run


# a small MAE: 16 patches
SMALL_MAE: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 4,
    "decoder_embed_dim": 24,
    "decoder_depth": 2,
    "decoder_num_heads": 3,
}


def small_teacher(**changes: Any) -> MAETeacher:
    return lively(MAETeacher(**{**SMALL_MAE, **changes}))


def lively(model: Any) -> Any:
    """Random biases and LayerNorms too: a tensor at the wrong place must show."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model
