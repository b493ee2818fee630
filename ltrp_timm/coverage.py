"""Selections that cover an image: by clusters of like patches, by cells of the grid.

A plain top-K set clusters in space. Both rules here are deterministic, never keep a patch twice,
and run a batch without a loop over its images.
"""

import math
from typing import Tuple

import torch
from torch import Tensor

from ltrp_timm.selection import check_k, select_top


def patch_pixels(images: Tensor, grid_size: Tuple[int, int]) -> Tensor:
    """Images (B, C, H, W) -> pixels of each patch (B, N, C * p * q), cut at the border."""
    h, w = grid_size
    rows, cols = images.shape[2] // h, images.shape[3] // w
    batch, channels = images.shape[0], images.shape[1]
    x = images[:, :, : h * rows, : w * cols].reshape(batch, channels, h, rows, w, cols)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, h * w, rows * cols * channels)


def patch_distances(tokens: Tensor) -> Tensor:
    """tokens (B, N, C) -> (B, N, N) float32: Euclid over the square root of C."""
    x = tokens.float()
    x = x - x.mean(dim=1, keepdim=True)  # smaller numbers, less cancellation
    squares = x.square().sum(dim=2)
    squared = squares.unsqueeze(2) + squares.unsqueeze(1) - 2.0 * torch.bmm(x, x.transpose(1, 2))
    same = torch.eye(x.shape[1], device=x.device, dtype=torch.bool)
    return (squared.clamp(min=0.0).masked_fill(same, 0.0) / x.shape[2]).sqrt()


def dpc_knn(tokens: Tensor, num_clusters: int, k: int = 5) -> Tuple[Tensor, Tensor]:
    """Cluster patches by density peaks (DPC-KNN).

    Density is exp(-mean of the k smallest squared distances, itself included); a patch's separation
    is its distance to the nearest denser patch, and the largest distance of the image for the
    densest. Centres are the patches with the largest density times separation, ties to the lower
    index; each patch joins its nearest centre, centres join themselves.

    Args:
        tokens: (B, N, C), distances are Euclid over the square root of C.
        num_clusters: number of centres, 1 <= num_clusters <= N.
        k: neighbours that make the density; fewer where N is smaller.

    Returns:
        Labels (B, N), indices into the centres; and the centres (B, num_clusters), patch indices,
        ascending.

    Raises:
        ValueError: num_clusters or k is out of range.

    Source: Du, Ding, Jia (2016), density peaks clustering based on k nearest neighbours.
    """
    distances = patch_distances(tokens)
    n = distances.shape[1]
    check_k(distances[:, 0], num_clusters)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
    nearest = distances.topk(min(k, n), dim=2, largest=False)[0]
    density = torch.exp(-nearest.square().mean(dim=2))
    denser = density.unsqueeze(1) > density.unsqueeze(2)  # [b, i, j]: j is denser than i
    largest = distances.amax(dim=(1, 2)).reshape(-1, 1, 1)
    separation = torch.where(denser, distances, largest).amin(dim=2)
    centres = select_top(density * separation, num_clusters)
    to_centres = distances.gather(1, centres.unsqueeze(2).expand(-1, -1, n))
    labels = to_centres.argmin(dim=1)
    own = torch.arange(num_clusters, device=centres.device).expand_as(centres)
    return labels.scatter(1, centres, own), centres


def select_mixed(
    scores: Tensor, k: int, tokens: Tensor, ratio: float = 0.7, neighbours: int = 5
) -> Tensor:
    """Keep int(ratio * K) best scores, and centres of the largest clusters for the rest.

    DPC-KNN makes K clusters; the centre stands for its cluster. Clusters whose centre is kept
    already drop out, the largest of the others fill the rest, ties in size to the lower index.

    Args:
        scores: (B, N), higher = keep first.
        k: number of patches to keep, 1 <= k <= N.
        tokens: (B, N, C) what is clustered; the published method takes the pixels of each patch.
        ratio: share of the K that goes by score, in [0, 1].
        neighbours: as ``k`` of ``dpc_knn``.

    Returns:
        (B, K) int64 indices, ascending.

    Raises:
        ValueError: an argument is out of its range.
    """
    check_k(scores, k)
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"ratio must be in [0, 1], got {ratio}.")
    num_ranked = int(ratio * k)
    if num_ranked == k:
        return select_top(scores, k)
    labels, centres = dpc_knn(tokens, k, neighbours)
    size = torch.zeros_like(centres).scatter_add(1, labels, torch.ones_like(labels))
    kept = torch.zeros_like(labels)
    if num_ranked > 0:
        kept = kept.scatter(1, select_top(scores, num_ranked), 1)
    size = size.masked_fill(kept.gather(1, centres) > 0, -1)  # those drop out
    chosen = centres.gather(1, select_top(size.float(), k - num_ranked))
    return select_top(kept.scatter(1, chosen, 1).float(), k)


def select_stratified(scores: Tensor, k: int, grid_size: Tuple[int, int], cell: int = 2) -> Tensor:
    """Keep the best patch of each cell of the grid first, then the best of the rest.

    With fewer patches than cells, those cells come first whose best patch is best.

    Args:
        scores: (B, N), higher = keep first; ties to the lower index, NaN last.
        k: number of patches to keep, 1 <= k <= N.
        grid_size: (h, w), N = h * w; the last cells of an odd grid are smaller.
        cell: side of a cell in patches.

    Returns:
        (B, K) int64 indices, ascending.

    Raises:
        ValueError: an argument is out of its range, or the grid does not fit the scores.
    """
    check_k(scores, k)
    h, w = grid_size
    if h * w != scores.shape[1] or cell < 1:
        raise ValueError(
            f"expected scores (B, {h * w}) for a grid of {h}x{w} and a cell of at least 1, got "
            f"{scores.shape[1]} scores and cell = {cell}."
        )
    scores = torch.nan_to_num(scores, nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    places = torch.arange(h * w, device=scores.device)
    cells = (places // w // cell) * (-(-w // cell)) + (places % w) // cell
    order = torch.sort(scores, dim=1, descending=True, stable=True)[1]
    # walking down the order, a patch is the first of its cell when no earlier one lies there
    cells_in_order = cells[order]
    by_cell = torch.sort(cells_in_order, dim=1, stable=True)
    new_cell = torch.ones_like(by_cell[0])
    new_cell[:, 1:] = (by_cell[0][:, 1:] != by_cell[0][:, :-1]).to(new_cell.dtype)
    first = torch.zeros_like(new_cell).scatter(1, by_cell[1], new_cell)
    stratified = torch.sort(first, dim=1, descending=True, stable=True)[1]
    return order.gather(1, stratified[:, :k]).sort(dim=1)[0]
