"""Selections that cover an image: by clusters of like patches, by cells of the grid.

A plain top-K set clusters in space. Both rules here are deterministic, never keep a patch twice,
and run a batch without a loop over its images.
"""

import math
from typing import Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ltrp_timm.selection.rules import best_first, check_k, select_top


def patch_pixels(images: Tensor, grid_size: Tuple[int, int], side: int = 0) -> Tensor:
    """Pixels of each patch, cut at the border.

    Args:
        images: (B, C, H, W).
        grid_size: (h, w) in patches.
        side: average each patch to so many pixels a side first; 0 takes them as they are.

    Returns:
        (B, N, C * p * q) for patches of p x q pixels, or (B, N, C * side * side).
    """
    h, w = grid_size
    rows, cols = images.shape[2] // h, images.shape[3] // w
    x = images[:, :, : h * rows, : w * cols]
    if side > 0 and (side < rows or side < cols):
        rows, cols = min(side, rows), min(side, cols)
        x = F.adaptive_avg_pool2d(x, (h * rows, w * cols))
    x = x.reshape(x.shape[0], x.shape[1], h, rows, w, cols)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(x.shape[0], h * w, -1)


def squared_distances(tokens: Tensor) -> Tensor:
    """tokens (B, N, C) -> (B, N, N) float32: squares of Euclid over the square root of C."""
    x = tokens.float()
    x = x - x.mean(dim=1, keepdim=True)  # smaller numbers, less cancellation
    squares = x.square().sum(dim=2, keepdim=True)
    ones = torch.ones_like(squares)
    # |x|^2 + |y|^2 - 2xy as one product
    left, right = torch.cat([-2.0 * x, squares, ones], 2), torch.cat([x, ones, squares], 2)
    distances = torch.bmm(left, right.transpose(1, 2)).clamp(min=0.0) / x.shape[2]
    same = torch.eye(x.shape[1], device=x.device, dtype=torch.bool)
    return distances.masked_fill(same, 0.0)


def smallest(values: Tensor, k: int, group: int = 7) -> Tensor:
    """The k smallest of each row (B, N, M) -> (B, N, k), in no order.

    They lie in the k groups of columns with the smallest minima: looking at those alone takes about
    half as long on a CPU as ``topk`` over whole rows.
    """
    batch, rows, columns = values.shape
    groups = -(-columns // group)
    if groups <= 2 * k:
        return values.topk(k, dim=2, largest=False, sorted=False)[0]
    padded = F.pad(values, [0, groups * group - columns], value=math.inf)
    grouped = padded.reshape(batch, rows, groups, group)
    near = grouped.amin(dim=3).topk(k, dim=2, largest=False, sorted=False)[1]
    near = near.unsqueeze(3).expand(-1, -1, -1, group)
    return grouped.gather(2, near).flatten(2).topk(k, dim=2, largest=False, sorted=False)[0]


def density_peaks(tokens: Tensor, k: int = 5) -> Tensor:
    """How well each patch stands for a cluster: density times separation, as in ``dpc_knn``.

    The K patches with the largest values are the centres of ``dpc_knn`` with K clusters, for any K.

    Args:
        tokens: (B, N, C).
        k: neighbours that make the density; fewer where N is smaller.

    Returns:
        (B, N) float32.

    Raises:
        ValueError: k is below 1.
    """
    return _peaks(squared_distances(tokens), k)


def _peaks(distances: Tensor, k: int) -> Tensor:
    """Squared distances (B, N, N) -> (B, N): density times separation."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
    density = torch.exp(-smallest(distances, min(k, distances.shape[1])).mean(dim=2))
    not_denser = density.unsqueeze(1) <= density.unsqueeze(2)  # [b, i, j]: j is not denser than i
    nearest_denser = distances.masked_fill(not_denser, math.inf).amin(dim=2)
    largest = distances.flatten(1).amax(dim=1, keepdim=True)  # what the densest patch gets
    return density * torch.minimum(nearest_denser, largest).sqrt()


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
    distances = squared_distances(tokens)
    n = distances.shape[1]
    check_k(distances[:, 0], num_clusters)
    centres = select_top(_peaks(distances, k), num_clusters)
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
    best = best_first(scores)
    place = torch.arange(h * w, device=scores.device)
    # the standing of each patch, N for the best and 1 for the last: whole numbers, no ties
    standing = torch.zeros_like(best).scatter(1, best, (h * w - place).expand_as(best)).float()
    grid = standing.reshape(-1, 1, h, w)
    champion = F.max_pool2d(grid, cell, ceil_mode=True)
    champion = champion.repeat_interleave(cell, 2).repeat_interleave(cell, 3)[:, :, :h, :w]
    return select_top(standing + h * w * (grid == champion).flatten(1), k)
