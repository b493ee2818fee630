"""From scores to keep indices to tokens: the arithmetic of patch selection.

Axes in this room: B images, N patches, P prefix tokens, L = P + N, D width, K kept patches.
Functions depend on their arguments alone, run without host synchronisation (`validate_keep_indices`
and `buckets_of` excepted), and can be scripted, traced, compiled and exported.
"""

from ltrp_timm.selection.adaptive import AdaptiveBudget, as_budget, buckets_of
from ltrp_timm.selection.coverage import (
    density_peaks,
    dpc_knn,
    patch_pixels,
    select_mixed,
    select_stratified,
)
from ltrp_timm.selection.dense import check_fill, scatter_features, scatter_patches
from ltrp_timm.selection.registry import (
    SELECTIONS,
    PatchSelector,
    SelectionSettings,
    check_selection,
    check_selection_args,
    select,
)
from ltrp_timm.selection.rules import (
    best_first,
    check_keep_indices,
    check_keep_ratio,
    gather_patches,
    keep_tokens,
    mean_rank,
    num_keep,
    seeded_scores,
    select_random,
    select_top,
    token_indices,
    validate_keep_indices,
)

__all__ = [
    "SELECTIONS",
    "AdaptiveBudget",
    "PatchSelector",
    "SelectionSettings",
    "as_budget",
    "best_first",
    "buckets_of",
    "check_fill",
    "check_keep_indices",
    "check_keep_ratio",
    "check_selection",
    "check_selection_args",
    "density_peaks",
    "dpc_knn",
    "gather_patches",
    "keep_tokens",
    "mean_rank",
    "num_keep",
    "patch_pixels",
    "scatter_features",
    "scatter_patches",
    "seeded_scores",
    "select",
    "select_mixed",
    "select_random",
    "select_stratified",
    "select_top",
    "token_indices",
    "validate_keep_indices",
]
