"""The rest of an image at half size: what ``rest="coarse"`` adds to an LTRPModel."""

import inspect
import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Callable, Dict, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ltrp_timm.selection.cells import SCALES, CellGrid, TokenLayout
from ltrp_timm.selection.rules import check_keep_indices, may_read, seeded_scores
from ltrp_timm.slots.base import run_with_slots
from ltrp_timm.slots.coarse import checkpointed, coarse_tokens

RESTS = ("drop", "coarse")
SIZE_BIAS = 0.5  # measured on photos, see docs/guides/coarse.md


@dataclass(frozen=True)
class CoarseRest:
    """Options of the coarse rest.

    Attributes:
        scales: (1, 2): a cell of 2 x 2 patches is four patches or one token of the image at half
            size; (1, 2, 4): a block of 4 x 4 patches may also be one token of the quarter size.
        size_bias: size_bias * log(patches that a token covers) is added to its attention logits;
            0 turns it off. It is also off where all tokens have one scale.

    Raises:
        ValueError: An option is out of range.
    """

    scales: Tuple[int, ...] = (1, 2)
    size_bias: float = SIZE_BIAS

    def __post_init__(self) -> None:
        scales = self.scales
        if not isinstance(scales, (list, tuple)) or tuple(scales) not in SCALES:
            raise ValueError(f"scales must be (1, 2) or (1, 2, 4), got {scales!r}.")
        object.__setattr__(self, "scales", tuple(int(each) for each in scales))
        bias = self.size_bias
        number = isinstance(bias, (int, float)) and not isinstance(bias, bool)
        if not number or not 0 <= bias <= 4:
            raise ValueError(f"size_bias must be a number from 0 to 4, got {bias!r}.")

    def check_backbone(self, backbone: Any) -> None:
        """Raise TypeError if the backbone takes no attention mask."""
        if self.size_bias and "attn_mask" not in inspect.signature(backbone.forward).parameters:
            kind = type(backbone).__name__
            raise TypeError(
                f"size_bias needs attn_mask, which {kind} of this timm does not take; use a newer "
                "timm, or size_bias=0."
            )

    def best(
        self, model: Any, grid_size: Tuple[int, int], scores: Callable[[], Tensor]
    ) -> Optional[TokenLayout]:
        """The tokens that the model's selection and budget choose; None if all patches stay.

        ``scores`` returns those of the ranker, (B, N); it is called where they decide. ValueError
        if the budget is too small.
        """
        grid = CellGrid(grid_size, self.scales)
        if model.keep_ratio == 1.0:
            return None
        refined, coarsest = grid.counts(model.keep_ratio)
        if refined == grid.num_cells:
            return None
        return grid.layout(_cell_scores(grid, scores(), model), refined, coarsest)

    def layout(
        self, model: Any, x: Tensor, keep_indices: Optional[Tensor] = None
    ) -> Optional[TokenLayout]:
        """The tokens of images x (B, C, H, W); None if all patches stay, without ranking.

        ``keep_indices`` (B, K) int64 are the patches to encode finely instead of ranked ones.
        ValueError if the budget is too small, or if they are not whole cells.
        """
        if isinstance(x, torch.fx.Proxy):
            raise ValueError("rest='coarse' cannot be traced by torch.fx: use torch.export.")
        h, w = model.checked_grid(x)
        if keep_indices is None:
            return self.best(model, (h, w), lambda: model._scores(x, h, w))
        check_keep_indices(keep_indices, x.shape[0], h * w, fewest=0)
        checked = model.validate and not torch.compiler.is_compiling()
        readable = checked or may_read(keep_indices)
        model._check_given(keep_indices, x, h * w, readable)
        grid = CellGrid((h, w), self.scales)
        cells = grid.refined_cells(keep_indices, readable)
        refined, coarsest = cells.shape[1], 0
        if refined == grid.num_cells:
            return None
        chosen = torch.zeros(cells.shape[0], grid.num_cells, device=cells.device)
        if grid.num_blocks:
            chosen = _cell_scores(grid, model._scores(x, h, w), model).float()
            chosen = chosen - chosen.amax(dim=1, keepdim=True) - 1
            coarsest = min(grid.counts(model.keep_ratio)[1], _free_blocks(cells, grid))
        # the given cells come first, and no block with one of them stays coarsest
        chosen = chosen.scatter(1, cells, 1e30)
        return grid.layout(chosen, refined, coarsest)

    def num_tokens(self, grid_size: Tuple[int, int], keep_ratio: float) -> int:
        """Patch tokens that a budget gives."""
        grid = CellGrid(grid_size, self.scales)
        refined, coarsest = grid.counts(keep_ratio)
        return grid.num_edge_patches + grid.num_cells + 3 * (refined - coarsest)

    def run(
        self,
        model: Any,
        call: Callable[..., Any],
        images: Tensor,
        keep_indices: Optional[Tensor],
        **kwargs: Any,
    ) -> Tuple[Any, Optional[TokenLayout]]:
        """Run the model's backbone on images: its output, and the layout of its tokens."""
        backbone, layout = model.backbone, self.layout(model, images, keep_indices)
        slots = model._adapter.slots(backbone)
        if layout is None:
            return run_with_slots(slots, None, call, images, **kwargs), None
        padded = model._padded(images, *layout.grid_size)
        mask = self._mask(layout, model.num_prefix_tokens, backbone.patch_embed)
        if mask is not None:
            kwargs["attn_mask"] = mask
        out = run_with_slots(
            slots,
            layout.indices[0],
            call,
            images,
            coarse=lambda: coarse_tokens(backbone, padded, layout, model.patch_size),
            within=nullcontext if mask is None else partial(checkpointed, backbone),
            **kwargs,
        )
        return out, layout

    def _mask(self, layout: TokenLayout, prefix: int, embed: Any) -> Optional[Tensor]:
        """(1, 1, 1, P + T), added to attention logits; None if nothing is to be added."""
        counts = [index.shape[1] for index in layout.indices]
        if not self.size_bias or sum(count > 0 for count in counts) < 2:
            return None
        weight = next(embed.parameters())
        mask = weight.new_zeros(1, 1, 1, prefix + counts[0])
        for scale, count in zip(layout.scales[1:], counts[1:]):
            mask = F.pad(mask, (0, count), value=2 * self.size_bias * math.log(scale))
        return mask


def coarse_rest(
    rest: str, scales: Optional[Tuple[int, ...]] = None, size_bias: Optional[float] = None
) -> Optional[CoarseRest]:
    """The options of ``rest="coarse"``; None for "drop", which has none; or ValueError."""
    if rest not in RESTS:
        raise ValueError(f"rest must be one of {', '.join(RESTS)}, got {rest!r}.")
    options: Dict[str, Any] = {"scales": scales, "size_bias": size_bias}
    given = {name: value for name, value in options.items() if value is not None}
    if rest == "coarse":
        return CoarseRest(**given)
    if given:
        raise ValueError(f"{next(iter(given))} goes with rest='coarse'.")
    return None


def _free_blocks(cells: Tensor, grid: CellGrid) -> int:
    """The fewest blocks without a refined cell over the images; reads values."""
    h, w = (side // 2 for side in grid.grid_size)
    marked = torch.zeros(cells.shape[0], h * w, device=cells.device).scatter(1, cells, 1.0)
    taken = F.max_pool2d(marked.view(-1, 1, h, w), 2).flatten(1).sum(dim=1)
    return grid.num_blocks - int(taken.max()) if len(cells) else 0


def _cell_scores(grid: CellGrid, scores: Tensor, model: Any) -> Tensor:
    """Scores (B, N) of patches -> (B, M) of cells, or random ones."""
    if model.selection != "random":
        return grid.cell_scores(scores)
    seed = int(model._selection_args["seed"])
    return seeded_scores(scores.shape[0], grid.num_cells, seed, scores.device)
