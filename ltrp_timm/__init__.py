"""Faster timm Vision Transformers: rank the patches of an image, encode only the best.

The import registers the ``ltrp_*`` models with timm.
"""

import importlib
from typing import Any

from ltrp_timm.models import ltrp_vit as _ltrp_vit  # registers the models
from ltrp_timm.models.feature_teacher import FeatureTeacher
from ltrp_timm.models.front_end import drop_patches
from ltrp_timm.models.ltrp import LTRPModel
from ltrp_timm.models.visual import drop_visual_tokens, num_visual_tokens, restore_visual_tokens
from ltrp_timm.rankers import create_ranker, list_rankers
from ltrp_timm.selection import (
    AdaptiveBudget,
    PatchSelector,
    dpc_knn,
    gather_patches,
    num_keep,
    scatter_patches,
    select_cells,
    select_dithered,
    select_mixed,
    select_random,
    select_stratified,
    select_top,
)
from ltrp_timm.share import push_to_hub, save_pretrained
from ltrp_timm.teacher import MAETeacher, create_teacher
from ltrp_timm.teacher.density import semantic_density

__version__ = "0.1.0"

__all__ = [
    "AdaptiveBudget",
    "FeatureTeacher",
    "LTRPModel",
    "MAETeacher",
    "PatchSelector",
    "create_ranker",
    "create_teacher",
    "dpc_knn",
    "drop_patches",
    "drop_visual_tokens",
    "export_model",
    "gather_patches",
    "list_rankers",
    "num_keep",
    "num_visual_tokens",
    "push_to_hub",
    "restore_visual_tokens",
    "save_pretrained",
    "scatter_patches",
    "select_cells",
    "select_dithered",
    "select_mixed",
    "select_random",
    "select_stratified",
    "select_top",
    "semantic_density",
]

del _ltrp_vit


def __getattr__(name: str) -> Any:
    """Import what deployment, training, pictures and measurements need when it is first used."""
    if name in ("deploy", "losses", "measure", "metrics", "train", "visualize"):
        return importlib.import_module(f"ltrp_timm.{name}")
    if name == "throughput":
        return importlib.import_module("ltrp_timm.measure.throughput")
    if name == "export_model":
        return importlib.import_module("ltrp_timm.deploy.export").export_model
    raise AttributeError(f"module 'ltrp_timm' has no attribute {name!r}")
