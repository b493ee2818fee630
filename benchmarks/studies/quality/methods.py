"""What is compared: rankers in front of the backbone, and the rivals at other settings."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peers.merge import merge_similar
from torch import Tensor

from ltrp_timm import create_ranker, drop_patches
from ltrp_timm.measure.payoff import twin
from ltrp_timm.selection import num_keep
from ltrp_timm.selection.cells import CellGrid
from studies.quality.judge import Encoded, encode, in_batches, normalised
from studies.quality.material import load_backbone

ORACLE, RANDOM = "the objects' masks", "random"
WEIGHT_FREE = ("border", "contrast", "cell_std", "pixel_std", "centre")
# behind a ranker's name
DITHERED, COARSE, THREE = ", dithered", ", coarse rest", ", three scales"
_BLOCKS, _RANK_SIDE = 4, 112  # of feature_contrast


def make_rankers(args: Any, full: Any, img_size: int) -> dict[str, Any]:
    """Pruned models by the name of their ranker, on twins of the full model."""
    rankers: dict[str, Any] = {name: create_ranker(name, patch_size=1) for name in WEIGHT_FREE}
    patch = full.patch_embed.patch_size[0]
    for ranker in rankers.values():
        ranker.set_input_size(patch_size=(patch, patch))
    side = max(_RANK_SIDE * img_size // 224 // patch, 3) * patch
    blocks = min(_BLOCKS, len(full.blocks))
    rankers["feature_contrast"] = create_ranker(
        "feature_contrast", backbone=load_backbone(args, side), blocks=blocks, img_size=side
    )
    if getattr(full, "cls_token", None) is not None:
        block = min(10, len(full.blocks) - 1)
        rankers["attention"] = create_ranker("attention", backbone=full, block=block)
    return {name: drop_patches(twin(full), ranker.eval()) for name, ranker in rankers.items()}


def make_coarse(full: Any, ranker: Any) -> dict[str, Any]:
    """Models that encode weak cells coarsely, by what follows the ranker's name."""
    return {
        COARSE: drop_patches(twin(full), ranker, rest="coarse"),
        THREE: drop_patches(twin(full), twin(ranker), rest="coarse", scales=(1, 2, 4)),
    }


def score_pictures(models: dict[str, Any], images: Tensor, share: Tensor) -> dict[str, Tensor]:
    """Scores (B, N) of each ranker, of chance and of an oracle that knows the objects."""
    found = {
        name: in_batches(
            lambda part, model=model: model.patch_scores(normalised(part, model)), images
        )
        for name, model in models.items()
    }
    chance = torch.Generator().manual_seed(0)
    found[RANDOM] = torch.rand(len(images), next(iter(found.values())).shape[1], generator=chance)
    if share.sum() > 0:
        found[ORACLE] = share + 1e-6 * found["border"]
    return found


class Rival:
    """A way to save time without a ranker.

    Attributes:
        method: "smaller image" or "token merging".
        setting: its knob, for readers.
        tokens: patch tokens, on average over the blocks.
        model: a plain model.
    """

    def __init__(self, method: str, setting: str, tokens: float, model: Any, size: int) -> None:
        self.method, self.setting, self.tokens, self.model = method, setting, tokens, model
        self._size = size

    def inputs(self, images: Tensor) -> Tensor:
        """uint8 images at the size that it takes."""
        if self._size == images.shape[-1]:
            return images
        size = (self._size, self._size)
        small = F.interpolate(images.float(), size, mode="bicubic", antialias=True)
        return small.round().clamp(0, 255).byte()

    def encoder(self, sets: dict[str, Any]) -> Callable[[str], Encoded]:
        """Features of a set by its name; with a map of whole photos where it has one."""
        return lambda name: encode(
            self.model,
            self.inputs(sets[name].images),
            dense=name != "several" and self.method == "smaller image",
        )


def make_rivals(args: Any, full: Any, img_size: int, keep_ratios: list[float]) -> list[Rival]:
    """The smaller images and the token mergings around the budgets of these keep ratios."""
    side = full.patch_embed.grid_size[0]
    patch, depth = full.patch_embed.patch_size[0], len(full.blocks)
    exact = [round(num_keep(side * side, ratio) ** 0.5) for ratio in keep_ratios]
    sides = sorted({max(2, one + more) for one in exact for more in (0, 1)} - {side})
    rivals = []
    for one in sides:
        small = load_backbone(args, one * patch)
        name = f"{one * patch} px"
        rivals.append(Rival("smaller image", name, one * one, small, one * patch))
    # r merges a block leave keep_ratio of the tokens on average; some settings around that
    most = {ratio: (1 - ratio) * 2 * side * side / depth for ratio in keep_ratios}
    steps = sorted({round(r * part) for r in most.values() for part in (0.5, 0.75, 1.0)})
    for r in steps:
        tokens = [max(side * side - r * block, 1) for block in range(depth)]
        if min(tokens) > r // 2 and r > 0:
            merged = merge_similar(twin(full), r, "proportional_fused")
            mean = sum(tokens) / depth
            rivals.append(Rival("token merging", f"r = {r}", mean, merged, img_size))
    return rivals


def ratios_of(model: Any, keep_ratios: list[float]) -> list[float]:
    """The keep ratios that a model's scales allow, and that it does not share with another one.

    Two scales end where all cells are coarse, three begin where that happens.
    """
    if model.rest == "drop":
        return keep_ratios
    if model.settings()["scales"] == (1, 2, 4):
        return [ratio for ratio in keep_ratios if ratio < 0.5]
    grid = CellGrid(model.patch_grid)
    least = (grid.num_cells + grid.num_edge_patches) / model.num_patches
    return [ratio for ratio in keep_ratios if ratio > least]


def timed_calls(
    full: Any, pruned: dict[str, Any], keep_ratios: list[float], rivals: list[Rival], images: Tensor
) -> dict[str, Callable[[], Any]]:
    """Calls to time interleaved: the full model, the pruned ones at each ratio, the rivals."""

    def call(model: Any, inputs: Tensor, keep_ratio: float | None = None) -> Callable[[], Any]:
        def run() -> Any:
            if keep_ratio is not None:
                model.keep_ratio = keep_ratio
            with torch.inference_mode():
                return model(inputs)

        return run

    calls = {"full": call(full, normalised(images, full))}
    for method, model in pruned.items():
        for ratio in ratios_of(model, keep_ratios):
            calls[f"{method} keep {ratio:g}"] = call(model, normalised(images, full), ratio)
    for rival in rivals:
        inputs = normalised(rival.inputs(images), full)
        calls[f"{rival.method} {rival.setting}"] = call(rival.model, inputs)
    return calls
