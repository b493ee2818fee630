"""Rankers without weights: by statistics of patches, by their clusters, at random."""

import math
from typing import Dict, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from ltrp_timm.rankers.base import PatchSizeRanker
from ltrp_timm.selection.coverage import density_peaks, patch_pixels, squared_distances
from ltrp_timm.selection.rules import places_in_order, seeded_scores

PARTS: Dict[str, float] = {"std": 1.0, "colour": 1.0, "centre": 0.7}
STATISTICS = ("pixel_std", "cell_std", "gradient", "colour", "centre")


class BorderRanker(PatchSizeRanker):
    """Distance of each patch to the most similar patches on the border of the image.

    What has nothing like it on the border is probably an object; sky, grass and wall may all be on
    the border at once. A patch is described by its colour, the spread of its pixels and how fine
    its texture is. Scores are rank(distance to the nearest border patches)
    + 0.4 * rank(distance to the border's mean) + 0.4 * rank(nearness to the centre). No weights, no
    training, no labels. Ranks are taken within an image; so scores are not comparable between
    images.

    Args:
        patch_size: side of a patch in pixels, or (height, width).
        img_size: its image size, (H, W) or one side; None accepts any size.

    Raises:
        ValueError: `img_size` is smaller than a patch.
    """

    name = "border"
    scores_are_ranks = True

    def forward(self, images: Tensor) -> Tensor:
        """images (B, C, H, W), pixels in [0, 1] -> score map (B, h, w) float32."""
        return border_scores(images, self.patch_size)


class ContrastRanker(PatchSizeRanker):
    """rank(patch std) + rank(colour contrast to the border) + 0.7 * rank(nearness to the centre).

    No weights, no training, no labels. Ranks are taken within an image, ties share their mean rank;
    so scores are not comparable between images.

    Args:
        patch_size: side of a patch in pixels, or (height, width).
        parts: which of "std", "colour" and "centre" count; a mapping sets their weights.
        img_size: its image size, (H, W) or one side; None accepts any size.
    """

    name = "contrast"
    scores_are_ranks = True
    own_args = ("patch_size", "img_size", "parts")

    def __init__(
        self,
        patch_size: Union[int, Sequence[int]] = 16,
        parts: Union[Sequence[str], Dict[str, float]] = ("std", "colour", "centre"),
        img_size: Union[int, Sequence[int], None] = None,
    ) -> None:
        super().__init__(patch_size, img_size)
        weights = parts if isinstance(parts, dict) else {part: PARTS.get(part) for part in parts}
        if not weights or any(part not in PARTS for part in weights):
            raise ValueError(f"parts must be some of {', '.join(PARTS)}, got {parts!r}.")
        self.parts = {part: float(weights.get(part) or 0.0) for part in PARTS}
        if not 0.0 < sum(abs(weight) for weight in self.parts.values()) < math.inf:
            raise ValueError(f"the weights of parts must be finite and not all 0, got {parts!r}.")

    def forward(self, images: Tensor) -> Tensor:
        """images (B, C, H, W), pixels in [0, 1] -> score map (B, h, w) float32."""
        return contrast_scores(images, self.patch_size, self.parts)


class StatisticRanker(PatchSizeRanker):
    """One statistic of each patch: no weights, no training, no labels.

    Unlike those of ``contrast``, its scores are comparable between images, so that an adaptive
    budget can tell a busy image from an empty one.

    Args:
        statistic: "pixel_std", the standard deviation of the pixels within a channel; "cell_std",
            that of the cell of 2 x 2 patches around it, for ``rest="coarse"`` on whole scenes;
            "gradient", the mean length of the step to the next pixels, right and below; "colour",
            the distance of the mean colour from that of the outermost patches; "centre", minus the
            squared distance from the middle of the grid, in half grids.
        patch_size: side of a patch in pixels, or (height, width).
        img_size: its image size, (H, W) or one side; None accepts any size.

    >>> StatisticRanker("gradient", patch_size=8)(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 4, 4])
    """

    own_args = ("patch_size", "img_size")  # the name says which statistic

    def __init__(
        self,
        statistic: str,
        patch_size: Union[int, Sequence[int]] = 16,
        img_size: Union[int, Sequence[int], None] = None,
    ) -> None:
        super().__init__(patch_size, img_size)
        if statistic not in STATISTICS:
            known = ", ".join(STATISTICS)
            raise ValueError(f"statistic must be one of {known}, got {statistic!r}.")
        self.statistic = statistic

    def forward(self, images: Tensor) -> Tensor:
        """images (B, C, H, W), pixels in [0, 1] -> score map (B, h, w) float32."""
        return statistic_scores(images, self.patch_size, self.statistic)


class DpcKnnRanker(PatchSizeRanker):
    """The centres of density-peak clusters of the patches' pixels: no weights, no labels.

    For any K, the K best patches are the centres of ``dpc_knn`` with K clusters. It keeps one patch
    of each kind and so covers an image; it does not look for objects.
    Cost: the distances of all pairs of patches.

    Args:
        patch_size: side of a patch in pixels, or (height, width).
        neighbours: number of neighbours for the density, the patch itself included.
        side: average each patch to side x side pixels first; 0 keeps its pixels.
        img_size: its image size, (H, W) or one side; None accepts any size.

    Source: Du, Ding, Jia (2016), density peaks clustering based on k nearest neighbours.

    >>> DpcKnnRanker(patch_size=8)(torch.zeros(1, 3, 32, 32)).shape
    torch.Size([1, 4, 4])
    """

    own_args = ("patch_size", "img_size", "neighbours", "side")

    def __init__(
        self,
        patch_size: Union[int, Sequence[int]] = 16,
        neighbours: int = 5,
        side: int = 0,
        img_size: Union[int, Sequence[int], None] = None,
    ) -> None:
        super().__init__(patch_size, img_size)
        if neighbours < 1 or side < 0:
            raise ValueError(
                f"neighbours must be at least 1 and side at least 0, got {neighbours} and {side}."
            )
        self.neighbours, self.side = neighbours, side

    def forward(self, images: Tensor) -> Tensor:
        """images (B, C, H, W), pixels in [0, 1] -> score map (B, h, w) float32."""
        return cluster_scores(images, self.patch_size, self.neighbours, self.side)


class RandomRanker(PatchSizeRanker):
    """Uniform scores, a function of (seed, N): the same for every image and every call.

    Args:
        patch_size: side of a patch in pixels, or (height, width).
        seed: chooses the map.
        generator: if set (also later, as an attribute), every call draws fresh scores per image
            from it; eager only.
    """

    name = "random"
    own_args = ("patch_size", "seed")  # a generator cannot be saved

    def __init__(
        self,
        patch_size: Union[int, Sequence[int]] = 16,
        seed: int = 0,
        generator: Optional[torch.Generator] = None,
    ) -> None:
        super().__init__(patch_size)
        self.mean = self.std = None  # images need no normalisation
        self.seed = int(seed)
        self.generator = generator

    def forward(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) -> score map (B, h, w) float32 in [0, 1)."""
        if not torch.jit.is_scripting():
            if self.generator is not None:
                h, w = grid_of(images, self.patch_size)
                draw = torch.rand(
                    images.shape[0], h, w, generator=self.generator, device=self.generator.device
                )
                return draw.to(images.device)
        return random_map(images, self.patch_size, self.seed)


def border_scores(images: Tensor, patch_size: Tuple[int, int]) -> Tensor:
    """images (B, C, H, W) -> (B, h, w) float32: the weighted sum of three ranks."""
    h, w = grid_of(images, patch_size)
    nearest, to_mean = border_distances(describe_patches(images, patch_size))
    centre = centre_distance(h, w, images.device).expand(images.shape[0], 1, -1, -1)
    parts = torch.cat([_smoothed(nearest), to_mean, centre]).flatten(1)
    # whole steps, far above rounding noise: flat patches must tie
    places = places_in_order((parts * 1024.0).round())
    nearest, to_mean, centre = places.reshape(3, -1, h, w).unbind(0)
    # whole numbers until the end: equal sums tie on every device
    return torch.add(nearest * 5, to_mean - centre, alpha=2) / (10 * h * w)


def describe_patches(images: Tensor, patch_size: Tuple[int, int]) -> Tensor:
    """Images (B, C, H, W) -> (B, C + 3, h, w) float32, each channel divided by its spread.

    Lightness, colours, the spread of the pixels, and their distance to a blurred image. Patches of
    8 pixels and more are looked at in half size: noise of the camera counts less.
    """
    rows, cols = patch_size
    if rows % 2 == 0 and cols % 2 == 0 and min(rows, cols) >= 8:
        images, rows, cols = F.avg_pool2d(images, 2), rows // 2, cols // 2
    pixels = images if images.dtype == torch.float32 else images.float()
    size = [rows, cols]
    mean = F.avg_pool2d(pixels, size)
    # negative by rounding where a patch is flat
    variance = torch.addcmul(F.avg_pool2d(pixels.square(), size), mean, mean, value=-1.0)
    spread = variance.mean(1, keepdim=True).clamp(min=1e-6).sqrt()
    light, grey = mean.mean(1, keepdim=True), pixels.mean(1, keepdim=True)
    blurred = F.avg_pool2d(grey, 3, stride=1, padding=1, count_include_pad=False)
    detail = F.avg_pool2d((grey - blurred).abs(), size)
    described = torch.cat([light, mean - light, spread, detail], dim=1)
    return described / described.std([2, 3], correction=0, keepdim=True).clamp(min=1e-3)


def contrast_scores(
    images: Tensor, patch_size: Tuple[int, int], weights: Dict[str, float]
) -> Tensor:
    """images (B, C, H, W) -> (B, h, w) float32: the weighted sum of the ranks of the parts."""
    h, w = grid_of(images, patch_size)
    batch = images.shape[0]
    mean, variance = patch_statistics(images, patch_size, h, w)
    pixels = torch.cat([variance.mean(1).sqrt(), border_contrast(mean)])
    # whole sixteenths of a grey level: less is rounding noise, and flat patches must tie
    pixels = (pixels * 4080.0).round()  # 255 * 16
    parts = torch.cat([pixels, centre_distance(h, w, images.device).expand(batch, -1, -1)])
    # all parts in one sort; NaN comes lowest
    places = places_in_order(torch.nan_to_num(parts.flatten(1), nan=-1.0))
    std, colour, centre = places.float().reshape(3, batch, h, w).unbind(0)
    scores = torch.add(std * (100.0 * weights["std"]), colour, alpha=100.0 * weights["colour"])
    scores = torch.sub(scores, centre, alpha=100.0 * weights["centre"])
    # whole hundredths of a place: equal sums tie on every device
    return scores.round() / (200 * h * w)


def statistic_scores(images: Tensor, patch_size: Tuple[int, int], statistic: str) -> Tensor:
    """images (B, C, H, W) -> (B, h, w) float32: that statistic of each patch."""
    h, w = grid_of(images, patch_size)
    if statistic == "centre":
        distance = centre_distance(h, w, images.device) / -(float(h * w) ** 2)
        return distance.expand(images.shape[0], -1, -1)
    if statistic == "gradient":
        return gradient_length(images, patch_size, h, w)
    mean, variance = patch_statistics(images, patch_size, h, w)
    if statistic == "colour":
        return border_contrast(mean)
    if statistic == "cell_std":
        variance = cell_variance(mean, variance)
    return variance.mean(1).sqrt()


def cell_variance(mean: Tensor, variance: Tensor) -> Tensor:
    """Mean and variance of patches (B, C, h, w) -> that of the pixels of their cells of 2 x 2.

    The last row or column of an odd grid has cells of its own patches alone.
    """
    return cell_mean(variance + (mean - cell_mean(mean)).square())


def cell_mean(values: Tensor) -> Tensor:
    """Values (B, C, h, w) -> the mean over each cell of 2 x 2 places, at all its places."""
    cells = F.avg_pool2d(values, 2, ceil_mode=True, count_include_pad=False)
    cells = cells.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return cells[:, :, : values.shape[2], : values.shape[3]]


def cluster_scores(
    images: Tensor, patch_size: Tuple[int, int], neighbours: int, side: int
) -> Tensor:
    """images (B, C, H, W) -> (B, h, w) float32: how well each patch represents a cluster."""
    h, w = grid_of(images, patch_size)
    rows, cols = h * patch_size[0], w * patch_size[1]
    tokens = patch_pixels(images[:, :, :rows, :cols], (h, w), side)
    return density_peaks(squared_distances(tokens), neighbours).reshape(-1, h, w)


def random_map(images: Tensor, patch_size: Tuple[int, int], seed: int) -> Tensor:
    """images (B, C, H, W), of which only shape and device are used -> (B, h, w)."""
    h, w = grid_of(images, patch_size)
    return seeded_scores(images.shape[0], h * w, seed, images.device).reshape(images.shape[0], h, w)


torch.fx.wrap("border_scores")
torch.fx.wrap("contrast_scores")
torch.fx.wrap("statistic_scores")
torch.fx.wrap("cluster_scores")
torch.fx.wrap("random_map")


def grid_of(images: Tensor, patch_size: Tuple[int, int]) -> Tuple[int, int]:
    """images (B, C, H, W) -> (h, w), the number of whole patches."""
    h, w = images.shape[-2] // patch_size[0], images.shape[-1] // patch_size[1]
    if not torch.jit.is_scripting() and not torch.jit.is_tracing() and (h < 1 or w < 1):
        size = f"{images.shape[-2]}x{images.shape[-1]}"
        raise ValueError(f"images of {size} are smaller than a patch {patch_size}.")
    return h, w


def patch_statistics(
    images: Tensor, patch_size: Tuple[int, int], h: int, w: int
) -> Tuple[Tensor, Tensor]:
    """Images (B, C, H, W) -> mean and variance over each patch's pixels, (B, C, h, w) float32."""
    rows, cols = patch_size
    pixels = images[:, :, : h * rows, : w * cols].float()
    pixels = pixels.reshape(images.shape[0], images.shape[1], h, rows, w, cols)
    mean = pixels.mean(5, keepdim=True).mean(3, keepdim=True)
    # in place and axis by axis: memory traffic dominates the cost
    variance = (pixels - mean).square_().mean(5).mean(3)
    return mean.reshape(images.shape[0], images.shape[1], h, w), variance


def border_distances(described: Tensor) -> Tuple[Tensor, Tensor]:
    """Distances of patches (B, D, h, w) to the border, each (B, 1, h, w).

    Returns:
        The mean distance to the three nearest border patches, and the distance to their mean. A
        border patch is its own nearest one.
    """
    batch, depth, h, w = described.shape
    rows, sides = described[:, :, :: max(h - 1, 1)], described[:, :, 1:-1, :: max(w - 1, 1)]
    size = (batch, depth, 1, 1)
    ends = [each.reshape(*size, each.shape[2] * each.shape[3]) for each in (rows, sides)]
    border = torch.cat(ends, dim=4)  # (B, D, 1, 1, R)
    # pair by pair, (B, D, h, w, R): autocast would round the operands of a matrix product
    squares = (described.unsqueeze(4) - border).square_().sum(1, keepdim=True)
    nearest = squares.topk(min(3, border.shape[4]), dim=4, largest=False)[0]
    to_mean = torch.linalg.vector_norm(described - border.mean(4), dim=1, keepdim=True)
    return nearest.sqrt().mean(4), to_mean


def _smoothed(scores: Tensor) -> Tensor:
    """scores (B, 1, h, w) -> the same, averaged over 3 x 3 patches where the grid is fine.

    Up to 8 x 8 patches a neighbour is often another object and nothing is averaged; from 14 x 14 on
    the mean counts alone.
    """
    weight = (min(scores.shape[2], scores.shape[3]) - 8) / 6.0
    if weight <= 0.0:
        return scores
    around = F.avg_pool2d(scores, 3, stride=1, padding=1, count_include_pad=False)
    return around if weight >= 1.0 else torch.lerp(scores, around, weight)


def border_contrast(mean: Tensor) -> Tensor:
    """Mean colours (B, C, h, w) -> (B, h, w): distance to the mean of the outermost patches."""
    inside = mean[:, :, 1:-1, 1:-1]
    count = mean.shape[2] * mean.shape[3] - inside.shape[2] * inside.shape[3]
    ring = mean.sum([2, 3], keepdim=True) - inside.sum([2, 3], keepdim=True)
    return torch.linalg.vector_norm(torch.sub(mean, ring, alpha=1.0 / count), dim=1)


def centre_distance(h: int, w: int, device: torch.device) -> Tensor:
    """(1, h, w) squared distance of each patch from the centre: 1 / (h * w)² of half a grid.

    Whole numbers, so that places as far from the centre tie on every device.
    """
    rows = torch.arange(w - h * w, h * w, 2 * w, device=device, dtype=torch.float32)
    cols = torch.arange(h - h * w, h * w, 2 * h, device=device, dtype=torch.float32)
    return rows.square().reshape(1, h, 1) + cols.square()


def gradient_length(images: Tensor, patch_size: Tuple[int, int], h: int, w: int) -> Tensor:
    """images (B, C, H, W) -> (B, h, w): mean length over C of the step to the next pixels."""
    rows, cols = patch_size
    pixels = F.pad(images[:, :, : h * rows, : w * cols].float(), [0, 1, 0, 1], mode="replicate")
    inner = pixels[:, :, :-1, :-1]
    squares = (pixels[:, :, :-1, 1:] - inner).square() + (pixels[:, :, 1:, :-1] - inner).square()
    length = squares.sum(1).sqrt()
    return length.reshape(-1, h, rows, w, cols).mean(4).mean(2)
