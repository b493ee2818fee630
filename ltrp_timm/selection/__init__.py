"""From scores to keep indices to tokens: the arithmetic of patch selection.

Axes in this room: B images, N patches, P prefix tokens, L = P + N, D width, K kept patches.
Functions depend on their arguments alone, run without host synchronisation (`buckets_of`,
`cell_by_cell` and `validate_keep_indices` excepted), and can be scripted, traced, compiled and
exported.
"""

from ltrp_timm.selection.adaptive import AdaptiveBudget
from ltrp_timm.selection.cells import select_cells
from ltrp_timm.selection.coverage import dpc_knn, select_dithered, select_mixed, select_stratified
from ltrp_timm.selection.registry import PatchSelector
from ltrp_timm.selection.rules import (
    gather_patches,
    num_keep,
    scatter_patches,
    select_random,
    select_top,
)

__all__ = [
    "AdaptiveBudget",
    "PatchSelector",
    "dpc_knn",
    "gather_patches",
    "num_keep",
    "scatter_patches",
    "select_cells",
    "select_dithered",
    "select_mixed",
    "select_random",
    "select_stratified",
    "select_top",
]
