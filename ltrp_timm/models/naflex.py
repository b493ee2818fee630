"""A dict of patches in place of images: rank each image on its grid, encode all as one batch.

Images of different sizes keep different numbers of patches; -1 fills their rows of keep indices.
"""

from typing import TYPE_CHECKING, Any, Dict, Iterator, List, Mapping, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ltrp_timm.layers.ml_decoder import MLDecoder
from ltrp_timm.selection.adaptive import buckets_of
from ltrp_timm.selection.rules import check_keep_indices
from ltrp_timm.slots.naflex import NaFlexAdapter, NaFlexBatch, check_batch, check_kept, run_batch

if TYPE_CHECKING:
    from ltrp_timm.models.ltrp import LTRPModel


def opened(model: "LTRPModel", batch: Mapping[str, Any]) -> NaFlexBatch:
    """A checked dict of patches; ValueError if it is wrong or the model takes none."""
    if not isinstance(model._adapter, NaFlexAdapter):
        raise ValueError(
            f"images must be (B, {model.in_chans}, H, W), got dict: only a NaFlexVit takes a dict "
            "of patches."
        )
    if isinstance(model.get_classifier(), MLDecoder):
        raise ValueError("an ML-Decoder head takes no dict of patches: it would read the padding.")
    return check_batch(batch, model.backbone)


def by_grid(model: "LTRPModel", batch: NaFlexBatch) -> Iterator[Tuple[List[int], Tensor]]:
    """The images (b, C, H, W) of each grid, in the model's patch size; and their places."""
    channels_last = getattr(model.backbone.embeds, "channels_last", True)
    rows, cols = model.patch_size
    by_size: Dict[Tuple[int, int], List[int]] = {}
    for image, grid in enumerate(batch.grids):
        by_size.setdefault(grid, []).append(image)
    for (h, w), places in by_size.items():
        images = batch.images(places, channels_last)
        if batch.patch_size != (rows, cols):
            size = [h * rows, w * cols]
            images = F.interpolate(images, size=size, mode="bilinear", antialias=True)
        yield places, images


def patch_scores(model: "LTRPModel", batch: NaFlexBatch) -> Tensor:
    """The ranker's scores (B, N) float32, -inf at padding."""
    scores = torch.full(batch.patch_valid.shape, -torch.inf, device=batch.patches.device)
    for rows, images in by_grid(model, batch):
        found = model.patch_scores(images)
        scores[rows, : found.shape[1]] = found
    return scores


def choose(model: "LTRPModel", batch: NaFlexBatch, scores: Optional[Tensor] = None) -> Tensor:
    """Keep indices (B, K) by the model's selection and budget, -1 where an image keeps fewer.

    ``scores`` (B, N) replace the ranker's.
    """
    shape = batch.patch_valid.shape
    if scores is not None and scores.shape != shape:
        raise ValueError(f"scores must be (B, N) = {list(shape)}, got {list(scores.shape)}.")
    keep = torch.full(shape, -1, device=batch.patches.device)
    most = 1
    for rows, images in by_grid(model, batch):
        h, w = model.grid_size(images)
        found = model._scores(images, h, w) if scores is None else scores[rows, : h * w]
        groups: List[Tuple[Optional[int], Tensor]] = [(None, torch.arange(len(rows)))]
        if model._counts_vary(None):
            groups = list(buckets_of(model._counts(found))[0])
        for k, part in groups:
            kept = model._select(found[part], images[part], h, w, k)
            keep[torch.tensor(rows)[part.cpu()], : kept.shape[1]] = kept
            most = max(most, kept.shape[1])
    return keep[:, :most]


def forward_features(
    model: "LTRPModel", batch: Mapping[str, Any], given: Optional[Tensor]
) -> Dict[str, Tensor]:
    """Kept tokens "patches" (B, P + K, D) and their "patch_valid" (B, K)."""
    found = opened(model, batch)
    if given is not None:
        check_keep_indices(given, *found.patch_valid.shape)
        check_kept(given, found)
    elif model.keep_ratio < 1.0:
        given = choose(model, found)
    return run_batch(model.backbone, model._adapter.slots(model.backbone)[0], found, given)
