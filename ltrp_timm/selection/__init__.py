"""Scores to keep indices to tokens: the arithmetic of patch selection."""

from ltrp_timm.selection.by_name import (
    SELECTIONS,
    PatchSelector,
    SelectsPatches,
    check_selection,
    check_selection_args,
    choose_keep_indices,
    select_patches,
)
from ltrp_timm.selection.coverage import (
    density_peaks,
    dpc_knn,
    patch_pixels,
    select_mixed,
    select_stratified,
)
from ltrp_timm.selection.rules import (
    best_first,
    check_keep_ratio,
    mean_rank,
    num_keep,
    seeded_scores,
    select_random,
    select_top,
)
from ltrp_timm.selection.tokens import (
    check_fill,
    check_keep_indices,
    gather_patches,
    keep_tokens,
    scatter_patches,
    token_indices,
    validate_keep_indices,
)

__all__ = [
    "SELECTIONS",
    "PatchSelector",
    "SelectsPatches",
    "best_first",
    "check_fill",
    "check_keep_indices",
    "check_keep_ratio",
    "check_selection",
    "check_selection_args",
    "choose_keep_indices",
    "density_peaks",
    "dpc_knn",
    "gather_patches",
    "keep_tokens",
    "mean_rank",
    "num_keep",
    "patch_pixels",
    "scatter_patches",
    "seeded_scores",
    "select_mixed",
    "select_patches",
    "select_random",
    "select_stratified",
    "select_top",
    "token_indices",
    "validate_keep_indices",
]
