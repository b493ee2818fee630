"""Two or three resolutions in one sequence: which cells of the patch grid are encoded finely.

A cell is a square of 2 x 2 patches, a block one of 4 x 4. Each part of the image is covered by
exactly one token: a patch of the image, a cell of the image at half size, or a block of the image
at quarter size. Rows and columns that fill no cell keep their patches; cells that fill no block are
at least cells. The number of tokens of each scale depends on the grid and the budget alone.
"""

from dataclasses import dataclass
from typing import Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ltrp_timm.selection.rules import best_first, check_k, gather_patches, num_keep, select_top

SCALES = ((1, 2), (1, 2, 4))
COARSEST_SHARE = 0.5  # of the range that a budget leaves; measured on photos


@dataclass(frozen=True)
class TokenLayout:
    """Scale and place of each token: patches first, then cells, then blocks.

    Attributes:
        grid_size: the patch grid (h, w).
        scales: patches a token covers along each side, one entry for each of ``indices``.
        indices: (B, K_s) int64, ascending: row-major places on the grid of each scale.
    """

    grid_size: Tuple[int, int]
    scales: Tuple[int, ...]
    indices: Tuple[Tensor, ...]

    @property
    def num_tokens(self) -> int:
        """T: patch tokens of one image."""
        return sum(each.shape[1] for each in self.indices)

    @property
    def scale(self) -> Tensor:
        """(T,) int64: how many patches each token covers along a side, the same in all images."""
        counts = [each.shape[1] for each in self.indices]
        parts = [torch.full((count,), scale) for scale, count in zip(self.scales, counts)]
        return torch.cat(parts).to(self.indices[0].device)

    @property
    def row(self) -> Tensor:
        """(B, T) int64: the upper row of patches that each token covers."""
        return self._places(0)

    @property
    def column(self) -> Tensor:
        """(B, T) int64: the left column of patches that each token covers."""
        return self._places(1)

    def _places(self, axis: int) -> Tensor:
        parts = []
        for scale, index in zip(self.scales, self.indices):
            width = self.grid_size[1] // scale
            parts.append((index % width if axis else index // width) * scale)
        return torch.cat(parts, dim=1)

    def in_pyramid(self) -> Tensor:
        """(B, T) int64: places in the concatenation of the grids of all scales, finest first."""
        start, parts = 0, []
        for scale, index in zip(self.scales, self.indices):
            parts.append(index + start)
            start += (self.grid_size[0] // scale) * (self.grid_size[1] // scale)
        return torch.cat(parts, dim=1)

    def token_of_patch(self) -> Tensor:
        """(B, N) int64: the token that covers each patch."""
        h, w = self.grid_size
        owner = self.indices[0].new_zeros(self.indices[0].shape[0], h * w)
        start = 0
        for scale, index in zip(self.scales, self.indices):
            tokens = torch.arange(start, start + index.shape[1], device=index.device)
            tokens = tokens.repeat_interleave(scale * scale).expand(index.shape[0], -1)
            owner = owner.scatter(1, patches_of(index, self.grid_size, scale), tokens)
            start += index.shape[1]
        return owner

    def to_grid(self, tokens: Tensor) -> Tensor:
        """Patch tokens (B, T, D) -> (B, N, D): each token fills the patches that it covers."""
        return gather_patches(tokens, self.token_of_patch())


def all_fine(grid_size: Tuple[int, int], images: Tensor) -> TokenLayout:
    """The layout of images (B, C, H, W) whose patches are all encoded."""
    every = torch.arange(grid_size[0] * grid_size[1], device=images.device)
    return TokenLayout(grid_size, (1,), (every.expand(images.shape[0], -1),))


def patches_of(index: Tensor, grid_size: Tuple[int, int], scale: int) -> Tensor:
    """Places (B, K) on the grid of a scale -> (B, K * scale²): the patches in them, place by place.

    >>> patches_of(torch.tensor([[1]]), (4, 4), 2)
    tensor([[2, 3, 6, 7]])
    """
    every = torch.arange(grid_size[0] * grid_size[1], device=index.device).view(grid_size)
    squares = every.unfold(0, scale, scale).unfold(1, scale, scale)  # (h, w, scale, scale)
    return squares.reshape(-1, scale * scale)[index].flatten(1)


def select_cells(scores: Tensor, k: int, grid_size: Tuple[int, int], cell: int = 2) -> Tensor:
    """Keep the best cells of the grid, whole: for models that pool or shuffle them behind the ViT.

    A cell is as good as the mean score of its patches; ties go to the lower index.

    Args:
        scores: (B, N), higher = keep first.
        k: number of patches to keep, a multiple of cell².
        grid_size: (h, w), N = h * w, both multiples of ``cell``.
        cell: side of a cell in patches.

    Returns:
        (B, K) int64 indices, cell by cell: ``tokens.unflatten(1, (-1, cell * cell))`` has the
        patches of each cell, row by row.

    Raises:
        ValueError: `k` or the grid splits a cell, or the shapes do not match.

    >>> select_cells(torch.arange(8.0).view(1, 8), 4, (2, 4))
    tensor([[2, 3, 6, 7]])
    """
    h, w = grid_size
    check_k(scores, k)
    if h * w != scores.shape[1] or cell < 1 or h % cell or w % cell:
        raise ValueError(
            f"expected scores (B, {h * w}) for a grid of {h}x{w} in whole cells of {cell}x{cell}, "
            f"got {list(scores.shape)}."
        )
    if k % (cell * cell):
        fewer = k // (cell * cell) * cell * cell
        raise ValueError(
            f"{k} of {h * w} patches split a cell of {cell}x{cell}: keep {fewer} or "
            f"{fewer + cell * cell}, that is keep_ratio={fewer / (h * w):.6g} or "
            f"{(fewer + cell * cell) / (h * w):.6g}."
        )
    means = square_means(scores.float(), grid_size, cell)
    return patches_of(select_top(means, k // (cell * cell)), grid_size, cell)


def cell_by_cell(keep_indices: Tensor, grid_size: Tuple[int, int], cell: int = 2) -> Tensor:
    """Whole cells (B, K) in any order -> (B, K), ordered as by ``select_cells``.

    It reads values: ValueError if an image keeps a part of a cell.
    """
    w, size = grid_size[1], cell * cell
    row, col = keep_indices // w, keep_indices % w
    place = (row // cell) * (w // cell) + col // cell
    inside = (row % cell) * cell + col % cell
    order = (place * size + inside).sort(dim=1)[0]
    found = patches_of(order[:, ::size] // size, grid_size, cell)
    if not torch.equal(found.sort(dim=1)[0], keep_indices.sort(dim=1)[0]):
        raise ValueError(f"keep_indices must be whole cells of {cell}x{cell} patches, each once.")
    return found


def square_means(values: Tensor, grid_size: Tuple[int, int], side: int) -> Tensor:
    """Values (B, h * w) of places -> (B, M): the mean of each square of side x side places."""
    return F.avg_pool2d(values.view(-1, 1, *grid_size), side).flatten(1)


@dataclass(frozen=True)
class CellGrid:
    """The cells of a patch grid, at least one, and how many of each scale a budget pays for."""

    grid_size: Tuple[int, int]
    scales: Tuple[int, ...] = (1, 2)

    def __post_init__(self) -> None:
        if min(self.grid_size) < 2:
            h, w = self.grid_size
            raise ValueError(f"a grid of {h}x{w} patches is too small for cells of 2x2.")

    @property
    def num_cells(self) -> int:
        """M: whole cells of 2 x 2 patches."""
        return (self.grid_size[0] // 2) * (self.grid_size[1] // 2)

    @property
    def num_edge_patches(self) -> int:
        """Patches of the last row or column of odd grids, which are in no cell."""
        return self.grid_size[0] * self.grid_size[1] - 4 * self.num_cells

    @property
    def num_blocks(self) -> int:
        """Whole blocks of 4 x 4 patches; 0 without that scale."""
        return (self.grid_size[0] // 4) * (self.grid_size[1] // 4) if 4 in self.scales else 0

    @property
    def num_smallest(self) -> int:
        """Tokens without a refined cell, all blocks coarsest: the smallest budget."""
        return self.num_edge_patches + self.num_cells - 3 * self.num_blocks

    def pays(self, keep_ratio: float) -> bool:
        """Whether a budget pays for a refined cell."""
        n = self.grid_size[0] * self.grid_size[1]
        return num_keep(n, keep_ratio) >= self.num_smallest + 3

    def counts(self, keep_ratio: float) -> Tuple[int, int]:
        """How many cells are refined, and how many blocks stay coarsest, for a budget.

        Raises:
            ValueError: `keep_ratio` does not pay for the coarsest tokens.
        """
        n = self.grid_size[0] * self.grid_size[1]
        budget, cells, blocks = num_keep(n, keep_ratio), self.num_cells, self.num_blocks
        smallest = self.num_smallest
        if budget < smallest:
            least, (h, w) = -(-10000 * smallest // n) / 10000, self.grid_size
            or_blocks = CellGrid(self.grid_size, SCALES[-1]).num_smallest <= budget
            raise ValueError(
                f"keep_ratio {keep_ratio:g} is too small for a {h}x{w} grid with scales "
                f"{self.scales}: it gives {budget} tokens, the coarsest ones alone are {smallest}; "
                f"use at least {least:g}{' or scales=(1, 2, 4)' if or_blocks else ''}."
            )
        coarsest = 0
        if blocks:
            # from the fewest that the budget allows to the most that leave it something to refine
            fewest = max(0, -((budget - self.num_edge_patches - cells) // 3))
            most = max(fewest, min(blocks, (n - budget) // 15))
            coarsest = fewest + int((most - fewest) * COARSEST_SHARE + 0.5)
        spare = budget - (smallest + 3 * (blocks - coarsest))
        refined = min(spare // 3, cells - 4 * coarsest)
        if refined == cells:
            return cells, 0
        return refined, coarsest

    def layout(self, cell_scores: Tensor, refined: int, coarsest: int = 0) -> TokenLayout:
        """Scores (B, M) of cells, numbers of ``counts`` -> the layout: the best cells are refined.

        The blocks with the lowest mean score stay coarsest. Ties go to the lower index.
        """
        h, w = self.grid_size
        scores, indices = cell_scores, []
        if coarsest:
            scores = torch.nan_to_num(scores.float(), nan=-1e38, posinf=1e38, neginf=-1e38)
            order = best_first(square_means(scores, (h // 2, w // 2), 2))
            blocks = order[:, order.shape[1] - coarsest :].sort(dim=1).values
            inside = patches_of(blocks, (h // 2, w // 2), 2)
            scores = scores.scatter(1, inside, -torch.inf)
            indices = [blocks]
        order = best_first(scores)
        rest = order[:, refined : self.num_cells - 4 * coarsest].sort(dim=1).values
        fine = self.fine_patches(order[:, :refined])
        scales = self.scales[: 2 + len(indices)]
        return TokenLayout(self.grid_size, scales, (fine, rest, *indices))

    def cell_scores(self, scores: Tensor) -> Tensor:
        """Scores (B, N) of this grid's patches -> (B, M) of cells: the mean of the four."""
        n = self.grid_size[0] * self.grid_size[1]
        if scores.dim() != 2 or scores.shape[1] != n:
            raise ValueError(f"scores must be (B, N) with N = {n}, got {list(scores.shape)}.")
        return square_means(scores, self.grid_size, 2)

    def fine_patches(self, cells: Tensor) -> Tensor:
        """Refined cells (B, F) -> (B, 4 F + edge) int64, ascending: the patches encoded finely."""
        h, w = self.grid_size
        edge = [torch.arange((h - 1) * w, h * w)] if h % 2 else []
        edge += [torch.arange(h // 2 * 2) * w + w - 1] if w % 2 else []
        parts = [part.to(cells.device).expand(cells.shape[0], -1) for part in edge]
        inside = patches_of(cells, self.grid_size, 2)
        return (torch.cat([inside, *parts], dim=1) if parts else inside).sort(dim=1).values

    def refined_cells(self, keep_indices: Tensor, check: bool = True) -> Tensor:
        """Patches (B, 4 F + edge) -> (B, F) int64: the cells that they fill.

        ValueError if their number, or with ``check`` (reads values) their places, are not those of
        whole cells and the edge of an odd grid.
        """
        count = keep_indices.shape[1] - self.num_edge_patches
        wrong = (
            "keep_indices must be whole cells of 2x2 patches"
            + (", and all patches of the odd last row and column" if self.num_edge_patches else "")
            + ", each patch once: model.keep_indices(images) returns such."
        )
        if count < 0 or count % 4:
            raise ValueError(wrong)
        h, w = self.grid_size
        marked = keep_indices.new_zeros(keep_indices.shape[0], h * w).scatter(1, keep_indices, 1)
        first = marked.view(-1, h, w)[:, : h // 2 * 2 : 2, : w // 2 * 2 : 2].flatten(1)
        cells = best_first(first.float(), count // 4).sort(dim=1).values
        if check and not torch.equal(self.fine_patches(cells), keep_indices.sort(dim=1).values):
            raise ValueError(wrong)
        return cells
