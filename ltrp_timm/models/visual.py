"""Vision-language models of transformers: fewer visual tokens from the timm tower inside."""

from typing import Any, Optional, Tuple, Union

import torch
from torch import Tensor, nn

from ltrp_timm.layers.bridge import to_pair
from ltrp_timm.models.front_end import drop_patches
from ltrp_timm.models.ltrp import LTRPModel
from ltrp_timm.rankers import DEFAULT_RANKER
from ltrp_timm.selection.cells import cell_by_cell, select_cells
from ltrp_timm.selection.rules import num_keep
from ltrp_timm.slots import find_adapter

_SELECTION = "visual tokens are kept by selection='top', without a budget."


class VisualTower(nn.Module):
    """Stands at ``timm_model`` of a tower: what the projector behind it needs.

    Kept patches come cell by cell. With ``rest="coarse"`` the grid is full: a coarse token stands
    at each patch that it covers.
    """

    def __init__(self, model: LTRPModel, cell: int) -> None:
        super().__init__()
        self.model, self.cell = model, cell

    def forward_features(self, x: Tensor, keep_indices: Optional[Tensor] = None) -> Tensor:
        """Images (B, C, H, W) -> tokens (B, P + K, D), or (B, P + N, D) with all patches."""
        model = self.model
        if model.selection != "top" or model.budget is not None:  # set since then
            raise ValueError(_SELECTION)
        grid = model.grid_size(x)
        if model.rest == "coarse":
            found: Any = model._run(model.backbone.forward_features, x, keep_indices)
            tokens, layout = found
            if layout is None:
                return tokens
            p = model.num_prefix_tokens
            return torch.cat([tokens[:, :p], layout.to_grid(tokens[:, p:])], dim=1)
        if keep_indices is not None:
            if model.keep_ratio == 1.0:  # the pooling behind goes by the ratio
                raise ValueError("keep_indices need a keep_ratio below 1 here.")
            keep_indices = cell_by_cell(keep_indices, grid, self.cell)
        elif model.keep_ratio < 1.0:
            k = num_keep(grid[0] * grid[1], model.keep_ratio)
            keep_indices = select_cells(model.patch_scores(x), k, grid, self.cell)
        return model.forward_features(x, keep_indices=keep_indices)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, P + K, D) -> pooled (B, D)."""
        return self.model.forward_head(x, pre_logits=pre_logits)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass."""
        self.model.set_grad_checkpointing(enable)


class CellPooling(nn.Module):
    """Stands at the pooling of a projector: the mean of each kept cell."""

    def __init__(self, pooling: nn.Module, tower: VisualTower) -> None:
        super().__init__()
        self.pooling = pooling
        self._tower = (tower,)  # a module of another part of the model

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, K, D), cell by cell -> (B, K / cell², D); a full grid is pooled as before."""
        tower = self._tower[0]
        if tower.model.rest == "coarse" or tower.model.keep_ratio == 1.0:
            return self.pooling(tokens)
        return tokens.unflatten(1, (-1, tower.cell**2)).mean(dim=2)


def drop_visual_tokens(
    model: Any,
    ranker: Union[str, nn.Module] = DEFAULT_RANKER,
    keep_ratio: Optional[float] = None,
    **kwargs: Any,
) -> LTRPModel:
    """Give a vision-language model fewer visual tokens, in place: the best cells of each image.

    For models of transformers with a timm ViT as ``vision_tower`` and a ``multi_modal_projector``
    that pools its patches (PerceptionLM). The tower encodes the kept patches only, and the language
    model reads one token for each kept cell; ``num_visual_tokens`` says how many. With
    ``rest="coarse"`` the tower does less work and the language model reads as many as before.

    Args:
        model: such a model, with or without its language head.
        ranker: as in ``drop_patches``.
        keep_ratio: share of patches to encode; it must not split a cell.
        **kwargs: other arguments of ``drop_patches``.

    Returns:
        The pruned tower; its ``keep_ratio`` may be set between calls.

    Raises:
        TypeError: The model has no such tower; the message says why.
        ValueError: An argument is out of range, or the budget splits a cell.
    """
    host = _host(model)
    backbone, cell = host.vision_tower.timm_model, _cell(host)
    if isinstance(backbone, VisualTower):
        raise TypeError("this model drops visual tokens already: set keep_ratio of its tower.")
    if kwargs.get("selection", "top") != "top" or kwargs.get("budget") is not None:
        raise ValueError(_SELECTION)
    pruned = drop_patches(backbone, ranker, keep_ratio, **kwargs)
    tower = VisualTower(pruned, cell)
    try:
        _tokens(pruned, pruned.patch_grid, cell)
    except ValueError:
        pruned.restore()
        raise
    tower.train(host.vision_tower.training)
    host.vision_tower.timm_model = tower
    host.multi_modal_projector.pooling = CellPooling(host.multi_modal_projector.pooling, tower)
    return pruned


def restore_visual_tokens(model: Any) -> nn.Module:
    """Undo ``drop_visual_tokens``, for example before saving; returns the timm ViT."""
    host = _host(model)
    tower = host.vision_tower.timm_model
    if not isinstance(tower, VisualTower):
        raise TypeError("this model drops no visual tokens.")
    host.multi_modal_projector.pooling = host.multi_modal_projector.pooling.pooling
    host.vision_tower.timm_model = tower.model.restore()
    return host.vision_tower.timm_model


def num_visual_tokens(model: Any, image_size: Union[int, Tuple[int, int], None] = None) -> int:
    """How many tokens the language model reads for an image or tile: its placeholders in a prompt.

    Args:
        model: a model for ``drop_visual_tokens``, before or after it.
        image_size: (height, width) or one side of the image or tile (default: the tower's).

    Raises:
        TypeError: The model has no timm tower.
        ValueError: The budget splits a cell at this size.
    """
    host = _host(model)
    tower = host.vision_tower.timm_model
    pruned = tower.model if isinstance(tower, VisualTower) else None
    backbone = tower if pruned is None else pruned.backbone
    adapter = find_adapter(backbone) if pruned is None else pruned._adapter
    embed = adapter.embed_of(backbone)
    size = embed.img_size if image_size is None else to_pair(image_size)
    return _tokens(pruned, embed.dynamic_feat_size(size), _cell(host))


def _tokens(pruned: Optional[LTRPModel], grid: Tuple[int, int], cell: int) -> int:
    """Cells of a patch grid that a tower keeps; ValueError if it would split one."""
    every = (grid[0] // cell) * (grid[1] // cell)
    if pruned is None or pruned.rest == "coarse" or pruned.keep_ratio == 1.0:
        return every
    n = grid[0] * grid[1]
    k = num_keep(n, pruned.keep_ratio)
    return select_cells(torch.zeros(1, n), k, grid, cell).shape[1] // cell**2


def _host(model: Any) -> Any:
    """The part with a timm tower and a projector."""
    for host in (model, getattr(model, "model", None)):
        tower = getattr(getattr(host, "vision_tower", None), "timm_model", None)
        pooling = getattr(getattr(host, "multi_modal_projector", None), "pooling", None)
        if isinstance(tower, nn.Module) and isinstance(pooling, nn.Module):
            return host
    raise TypeError(
        f"{type(model).__name__} has no vision_tower.timm_model with a multi_modal_projector that "
        "pools: put drop_patches(…) in place of its timm ViT, with select_cells where cells of "
        "patches are pooled or shuffled behind it."
    )


def _cell(host: Any) -> int:
    pooling = host.multi_modal_projector.pooling
    pooling = pooling.pooling if isinstance(pooling, CellPooling) else pooling
    return int(getattr(pooling, "pooling_ratio", 1))  # an Identity pools nothing
