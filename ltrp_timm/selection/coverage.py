"""Selections that cover an image: by clusters of similar patches, by cells, by dithering.

A plain top-K set clusters in space. These rules are deterministic, never keep a patch twice, and
process a batch without a loop over its images.
"""

import math
from typing import Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ltrp_timm.selection.rules import best_first, check_k, places_in_order, select_top


def patch_pixels(images: Tensor, grid_size: Tuple[int, int], side: int = 0) -> Tensor:
    """Pixels of each patch; pixels beyond the last whole patch are cut off.

    Images (B, C, H, W), grid_size (h, w) -> (B, N, C * p * q) for patches of p x q pixels. With a
    ``side``, each patch is averaged to side x side pixels first: (B, N, C * side * side).
    """
    h, w = grid_size
    rows, cols = images.shape[2] // h, images.shape[3] // w
    x = images[:, :, : h * rows, : w * cols]
    if side > 0 and (side < rows or side < cols):
        rows, cols = min(side, rows), min(side, cols)
        x = F.adaptive_avg_pool2d(x, (h * rows, w * cols))
    x = x.reshape(x.shape[0], x.shape[1], h, rows, w, cols)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def squared_distances(tokens: Tensor) -> Tensor:
    """tokens (B, N, C) -> (B, N, N) float32: squared Euclidean distances divided by C."""
    x = tokens.float()
    x = x - x.mean(dim=1, keepdim=True)  # smaller numbers, less cancellation
    squares = x.square().sum(dim=2, keepdim=True)
    ones = torch.ones_like(squares)
    # |x|^2 + |y|^2 - 2xy as one product
    left, right = torch.cat([-2.0 * x, squares, ones], 2), torch.cat([x, ones, squares], 2)
    distances = torch.bmm(left, right.transpose(1, 2)).clamp(min=0.0) / x.shape[2]
    same = torch.eye(x.shape[1], device=x.device, dtype=torch.bool)
    return distances.masked_fill(same, 0.0)


def density_peaks(distances: Tensor, k: int) -> Tensor:
    """Squared distances (B, N, N) -> (B, N) float32: how well each patch represents a cluster.

    That is density times separation, see ``dpc_knn`` (also for ``k``, at least 1). For any K, the K
    largest values are the centres of ``dpc_knn`` with K clusters.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}.")
    nearest = distances.topk(min(k, distances.shape[1]), dim=2, largest=False, sorted=False)[0]
    density = torch.exp(-nearest.mean(dim=2))
    not_denser = density.unsqueeze(1) <= density.unsqueeze(2)  # [b, i, j]: j is not denser than i
    nearest_denser = distances.masked_fill(not_denser, math.inf).amin(dim=2)
    largest = distances.flatten(1).amax(dim=1, keepdim=True)  # of the densest patch
    return density * torch.minimum(nearest_denser, largest).sqrt()


def dpc_knn(tokens: Tensor, num_clusters: int, k: int = 5) -> Tuple[Tensor, Tensor]:
    """Cluster patches by density peaks (DPC-KNN).

    The density of a patch is exp(-mean of its k smallest squared distances, itself included). Its
    separation is the distance to the nearest denser patch; the densest patch gets the largest
    distance of the image. Centres have the largest density times separation, ties go to the lower
    index. Each patch joins its nearest centre, a centre joins itself.

    Args:
        tokens: (B, N, C); distances are Euclidean, divided by the square root of C.
        num_clusters: number of centres, 1 <= num_clusters <= N.
        k: number of neighbours for the density, at most N are used.

    Returns:
        Labels (B, N), indices into the centres; and the centres (B, num_clusters), patch indices,
        ascending.

    Raises:
        ValueError: `num_clusters` or `k` is out of range.

    Source: Du, Ding, Jia (2016), density peaks clustering based on k nearest neighbours.
    """
    distances = squared_distances(tokens)
    n = distances.shape[1]
    check_k(distances[:, 0], num_clusters)
    centres = select_top(density_peaks(distances, k), num_clusters)
    to_centres = distances.gather(1, centres.unsqueeze(2).expand(-1, -1, n))
    labels = to_centres.argmin(dim=1)
    own = torch.arange(num_clusters, device=centres.device).expand_as(centres)
    return labels.scatter(1, centres, own), centres


def select_mixed(
    scores: Tensor, k: int, tokens: Tensor, ratio: float = 0.7, neighbours: int = 5
) -> Tensor:
    """Keep the int(ratio * K) best scores, then the centres of the largest clusters.

    DPC-KNN makes K clusters. Clusters with a kept centre are skipped; the centres of the largest
    others fill the rest, ties in size go to the lower index.

    Args:
        scores: (B, N), higher = keep first.
        k: number of patches to keep, 1 <= k <= N.
        tokens: (B, N, C) to cluster; the published method clusters the pixels of each patch.
        ratio: share of K chosen by score, in [0, 1].
        neighbours: ``k`` of ``dpc_knn``.

    Returns:
        (B, K) int64 indices, ascending.

    Raises:
        ValueError: An argument is out of range.
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
    size = size.masked_fill(kept.gather(1, centres) > 0, -1)  # skipped
    chosen = centres.gather(1, select_top(size.float(), k - num_ranked))
    return select_top(kept.scatter(1, chosen, 1).float(), k)


def select_stratified(scores: Tensor, k: int, grid_size: Tuple[int, int], cell: int = 2) -> Tensor:
    """Keep the best patch of each grid cell first, then the best of the others.

    With K below the number of cells, the cells with the best patches come first.

    Args:
        scores: (B, N), higher = keep first; ties to the lower index, NaN last.
        k: number of patches to keep, 1 <= k <= N.
        grid_size: (h, w), N = h * w; cells at the right and lower border may be smaller.
        cell: side of a cell in patches.

    Returns:
        (B, K) int64 indices, ascending.

    Raises:
        ValueError: An argument is out of range, or the grid does not match the scores.
    """
    _check_grid(scores, k, grid_size)
    h, w = grid_size
    if cell < 1:
        raise ValueError(f"cell must be at least 1, got {cell}.")
    best = best_first(scores)
    place = torch.arange(h * w, device=scores.device)
    # N for the best patch, 1 for the worst: whole numbers without ties
    standing = torch.zeros_like(best).scatter(1, best, (h * w - place).expand_as(best)).float()
    grid = standing.reshape(-1, 1, h, w)
    champion = F.max_pool2d(grid, cell, ceil_mode=True)
    champion = champion.repeat_interleave(cell, 2).repeat_interleave(cell, 3)[:, :, :h, :w]
    return select_top(standing + h * w * (grid == champion).flatten(1), k)


def select_dithered(
    scores: Tensor, k: int, grid_size: Tuple[int, int], strength: float = 0.5
) -> Tensor:
    """Keep many patches where scores are high and few where they are low, like the dots of a print.

    The rank of each patch, from 0 to 1, is raised by ``strength`` times a fixed pattern (Bayer's
    4 x 4 matrix, from 0 to 15/16); the best K stay. So patches get rarer where scores fall, and no
    region ends at an edge.

    Args:
        scores: (B, N), higher = keep first; equal ones share their rank, NaN is the lowest.
        k: number of patches to keep, 1 <= k <= N.
        grid_size: (h, w), N = h * w.
        strength: 0 keeps the best K; far above 1 the dots are an even grid.

    Returns:
        (B, K) int64 indices, ascending.

    Raises:
        ValueError: An argument is out of range, or the grid does not match the scores.

    Source: Bayer (1973), ordered dither.

    >>> select_dithered(torch.zeros(1, 16), 4, (4, 4))
    tensor([[ 4,  6, 12, 14]])
    """
    _check_grid(scores, k, grid_size)
    if not 0.0 <= strength < math.inf:
        raise ValueError(f"strength must be at least 0 and finite, got {strength}.")
    row = torch.arange(grid_size[0], device=scores.device).unsqueeze(1)
    col = torch.arange(grid_size[1], device=scores.device)
    fine, coarse = _pattern_2x2(row % 2, col % 2), _pattern_2x2(row // 2 % 2, col // 2 % 2)
    pattern = (4 * fine + coarse).flatten() * (strength * scores.shape[1] / 8.0)
    # finite, as -inf - -inf is NaN; NaN becomes the lowest number, which float16 cannot hold
    wide = scores if scores.element_size() > 4 else scores.float()
    places = places_in_order(torch.nan_to_num(wide, nan=-3.4028234663852886e38))
    # whole numbers: equal sums tie on every device
    return select_top(places.float() + pattern.round(), k)


def _pattern_2x2(row: Tensor, col: Tensor) -> Tensor:
    """Bayer's matrix [[0, 2], [3, 1]] at places (h, 1), (w,) of 0 or 1 -> (h, w)."""
    return 2 * ((row + col) % 2) + row


def _check_grid(scores: Tensor, k: int, grid_size: Tuple[int, int]) -> None:
    check_k(scores, k)
    h, w = grid_size
    if h * w != scores.shape[1]:
        raise ValueError(
            f"expected scores (B, {h * w}) for a grid of {h}x{w}, got {scores.shape[1]} scores: "
            "give their own grid_size."
        )
