"""LTRPModel: rank the patches of an image, choose the best, encode only those."""

import dataclasses
import warnings
from functools import partial
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ltrp_timm.layers.bridge import resize_score_map
from ltrp_timm.models import naflex
from ltrp_timm.models.coarse import CoarseRest, check_rest
from ltrp_timm.models.timm_interface import TimmInterface
from ltrp_timm.selection.adaptive import AdaptiveBudget, as_budget, buckets_of
from ltrp_timm.selection.cells import TokenLayout, all_fine
from ltrp_timm.selection.registry import SelectionSettings, select
from ltrp_timm.selection.rules import (
    check_fill,
    check_keep_indices,
    check_keep_ratio,
    num_keep,
    scatter_patches,
    validate_keep_indices,
)
from ltrp_timm.slots import install_slots
from ltrp_timm.slots.base import ScriptedSlots, run_with_slots, swap_back


def given_or_chosen(given: Optional[Tensor], chosen: Tensor, num_patches: int) -> Tensor:
    """A leaf of torch.fx, whose proxies are never None: decides when the graph runs."""
    if given is None:
        return chosen
    check_keep_indices(given, chosen.shape[0], num_patches)
    return given


def may_read(values: Tensor) -> bool:
    """Whether reading values costs nothing and does not end in a graph as a constant."""
    if not torch.jit.is_scripting():
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return False
    return values.device.type == "cpu"


def check_eager(x: Any) -> None:
    """Raise ValueError where the number of kept patches must not depend on values."""
    if isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing() or torch.compiler.is_exporting():
        raise ValueError(
            "an adaptive budget reads scores to know how many patches to encode: it runs in eager "
            "mode only. Set model.budget = None, or pass keep_indices."
        )


torch.fx.wrap("given_or_chosen")
torch.fx.wrap("num_keep")
torch.fx.wrap("resize_score_map")
torch.fx.wrap("select")


class LTRPModel(SelectionSettings, ScriptedSlots, TimmInterface):
    """A timm ViT that ranks the patches of an image and encodes only the best.

    ``drop_patches`` and ``timm.create_model("ltrp…")`` build it. Use one instance per thread: keep
    indices lie in the backbone while it runs; a second call meanwhile is a RuntimeError. Calling
    ``model.backbone`` runs the plain model.

    Args:
        ranker: images (B, C, H, W) -> score map (B, h, w), higher = keep first. It is frozen and
            stays in eval mode.
        backbone: a timm ViT; changed in place, ``restore`` returns it.
        keep_ratio: share of patches to encode, in (0, 1] (default: 0.5, or the budget's mean); may
            be set between calls.
        selection: "top", "random", "mixed" (best scores, and centres of the largest clusters of
            pixels) or "stratified" (the best of each grid cell first).
        selection_args: options of the selection: "seed" of random; "ratio", "neighbours" and
            "pixels" of mixed; "cell" of stratified.
        validate: also check the values of given ``keep_indices`` and that scores are finite (eager
            only; reads from the device).
        fill: what dropped places of dense features hold: "zeros" or "nearest".
        budget: how many patches each image keeps, instead of ``keep_ratio`` of each; ``calibrate``
            makes one.
        rest: what happens to the other patches: "drop", or "coarse": where a cell of 2 x 2 patches
            is not worth four tokens, it gets one, of the image at half size. ``keep_ratio`` is the
            share of patch tokens in both.
        scales: (1, 2), or (1, 2, 4) to give blocks of 4 x 4 patches one token too (default: (1, 2);
            with ``rest="coarse"`` only).
        size_bias: how much more attention a token gets that covers more patches (default: 0.5; see
            ``CoarseRest``; with ``rest="coarse"`` only).

    Raises:
        TypeError: Patches cannot be dropped from the backbone; the message says why.
        ValueError: An argument is out of range.
    """

    __jit_unused_properties__ = (
        *SelectionSettings.__jit_unused_properties__,
        *("budget", "fill", "patch_size", "patch_grid", "num_patches", "rest", "_model_args"),
    )

    def __init__(
        self,
        ranker: nn.Module,
        backbone: nn.Module,
        keep_ratio: Optional[float] = None,
        selection: str = "top",
        validate: bool = False,
        fill: str = "zeros",
        selection_args: Optional[Mapping[str, Any]] = None,
        budget: Optional[AdaptiveBudget] = None,
        rest: str = "drop",
        scales: Optional[Tuple[int, ...]] = None,
        size_bias: Optional[float] = None,
    ) -> None:
        if not isinstance(ranker, nn.Module):
            raise TypeError(f"ranker must be an nn.Module or a name, got {type(ranker).__name__}.")
        options: Dict[str, Any] = {"scales": scales, "size_bias": size_bias}
        options = {name: value for name, value in options.items() if value is not None}
        coarse = CoarseRest(**options) if check_rest(rest, options) == "coarse" else None
        if coarse is not None:
            coarse.check_backbone(backbone)
        super().__init__(ranker, backbone, rest)
        self._coarse, self._keep_ratio = coarse, 0.5
        self.budget = as_budget(budget)
        if keep_ratio is not None:
            self.keep_ratio = keep_ratio
        self._set_selection(selection, selection_args)
        self.fill = fill
        self.validate = bool(validate)
        self._warned = False
        # nothing was changed before, and nothing fails from here on
        self.ranker.requires_grad_(False).eval()
        # a library that fills it does not say so, and its new parameters are not frozen
        self._to_be_filled = any(p.is_meta for p in ranker.parameters())
        if self._to_be_filled and getattr(ranker, "learned", False):
            self.ranker.trained = True
        self._swaps = install_slots(backbone, self._adapter)

    @SelectionSettings.keep_ratio.setter  # type: ignore[attr-defined]
    def keep_ratio(self, value: float) -> None:
        """With a budget: only its mean, or 1 to keep all patches for a while."""
        value = check_keep_ratio(value)
        if self._budget is not None and value not in (1.0, self._budget.mean_keep_ratio):
            raise ValueError(
                f"keep_ratio may be 1 or the mean {self._budget.mean_keep_ratio:g} of the adaptive "
                f"budget, got {value}: call calibrate(images, mean_keep_ratio=…), or set budget = "
                "None first."
            )
        self._keep_ratio = value

    @property
    def budget(self) -> Optional[AdaptiveBudget]:
        """How many patches each image keeps by its scores; None keeps ``keep_ratio`` of each."""
        return self._budget

    @budget.setter
    def budget(self, value: Optional[AdaptiveBudget]) -> None:
        if value is not None and self._coarse is not None:
            raise ValueError("a budget goes with rest='drop'.")
        self._budget, self._has_budget = as_budget(value), value is not None
        if self._budget is not None:
            self._keep_ratio = self._budget.mean_keep_ratio

    @property
    def fill(self) -> str:
        """What dropped places of dense features hold: "zeros" or "nearest"."""
        return self._fill

    @fill.setter
    def fill(self, value: str) -> None:
        if check_fill(value) != "zeros" and self._coarse is not None:
            raise ValueError("fill goes with rest='drop': coarse tokens fill their places.")
        self._fill = value

    def _set_selection(self, selection: str, args: Optional[Mapping[str, Any]]) -> None:
        if self._coarse is not None and selection not in ("top", "random"):
            raise ValueError(
                f"selection must be top or random with rest='coarse', got {selection!r}."
            )
        super()._set_selection(selection, args)

    @property
    def rest(self) -> str:
        """What happens to patches that are not encoded finely: "drop" or "coarse"."""
        return "drop" if self._coarse is None else "coarse"

    @property
    def patch_size(self) -> Tuple[int, int]:
        """(height, width) of a patch in pixels."""
        return self._patch_pixels

    @property
    def patch_grid(self) -> Tuple[int, int]:
        """The patch grid (h, w) at the present image size."""
        size = self.data_config()["input_size"][-2:]
        return self.grid_size(torch.empty(1, self.in_chans, *size, device="meta"))

    @property
    def num_patches(self) -> int:
        """N at the present image size."""
        h, w = self.patch_grid
        return h * w

    @torch.jit.unused
    def num_tokens(self, keep_ratio: Optional[float] = None) -> int:
        """Patch tokens of an image at the present image size and keep ratio, or another one."""
        ratio = self._keep_ratio if keep_ratio is None else keep_ratio
        if self._coarse is None:
            return num_keep(self.num_patches, ratio)
        return self._coarse.num_tokens(self.patch_grid, ratio)

    def settings(self) -> Dict[str, Any]:
        """The arguments of ``drop_patches`` that give another model these settings."""
        settings: Dict[str, Any] = {
            "keep_ratio": self._keep_ratio,
            "selection": self._selection,
            "selection_args": self.selection_args,
            "fill": self._fill,
        }
        if self._budget is not None:
            settings["budget"] = dataclasses.asdict(self._budget)
        if self._coarse is not None:
            settings.update(rest="coarse", **dataclasses.asdict(self._coarse))
        return settings

    def grid_size(self, x: Tensor) -> Tuple[int, int]:
        """The backbone's patch grid (h, w) for images x (B, C, H, W)."""
        if torch.jit.is_scripting():
            embed = self.backbone.patch_embed
        else:
            embed = getattr(self.backbone, self._adapter.patch_embed)
        if hasattr(embed, "strict_img_size"):
            if embed.strict_img_size and embed.grid_size is not None:
                return embed.grid_size[0], embed.grid_size[1]
        h, w = embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))
        return h, w

    def patch_scores(self, x: Tensor) -> Tensor:
        """Images x (B, C, H, W), normalised for the backbone -> scores (B, N) float32.

        Higher = keep first; only the order matters. They have no gradient.

        Raises:
            ValueError: The backbone would refuse the images, the ranker's map is not (B, h, w), or
                (with ``validate``) scores are not finite.
        """
        if not torch.jit.is_scripting():
            if isinstance(x, dict):
                return naflex.patch_scores(self, naflex.opened(self, x))
            self._check_images(x)
            self._warn_if_untrained()
        h, w = self.grid_size(x)
        scores = self.ranker_scores(x, h, w).detach()
        if not torch.jit.is_scripting():
            self._check_scores(scores, x)
        return scores

    def ranker_scores(self, x: Tensor, h: int, w: int) -> Tensor:
        """The ranker's scores (B, h * w) of images x on the grid (h, w), unchecked.

        Differentiable if the ranker is.
        """
        return resize_score_map(self.ranker(self.bridge(self._padded(x, h, w))), h, w)

    def _padded(self, x: Tensor, h: int, w: int) -> Tensor:
        """Images padded as the backbone does, so that h x w patches cover the same places."""
        if not self._pads:
            return x
        rows, cols = self._patch_pixels
        return F.pad(x, (0, w * cols - x.shape[-1], 0, h * rows - x.shape[-2]))

    def select(self, scores: Tensor, images: Tensor) -> Tensor:
        """Scores (B, N), images (B, C, H, W) -> keep_indices (B, K) int64, ascending.

        The model's selection and keep ratio or budget decide; "mixed" clusters the images' pixels.
        With ``rest="coarse"`` they are the patches to encode finely.

        Raises:
            ValueError: By its budget, the images of the batch keep different numbers of patches.
        """
        if not torch.jit.is_scripting():
            if isinstance(images, dict):
                return naflex.choose(self, naflex.opened(self, images), scores)
        h, w = self.grid_size(images)
        if not torch.jit.is_scripting():
            if self._coarse is not None:
                return self.select_layout(scores, images).indices[0]
        images = self._padded(images, h, w)
        k = num_keep(h * w, self._keep_ratio)
        if self._has_budget and self._keep_ratio < 1.0:
            if torch.jit.is_scripting():
                raise ValueError("an adaptive budget runs in eager mode only: pass keep_indices.")
            else:
                k = self._common_count(scores)
        return select(scores, k, self._selection, self._selection_args, (h, w), images)

    def keep_indices(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> (B, K) int64, ascending: the patches that ``forward`` encodes.

        With ``rest="coarse"`` those that it encodes finely.
        """
        if isinstance(x, dict):
            return naflex.choose(self, naflex.opened(self, x))
        if self._coarse is not None:
            return self.token_layout(x).indices[0]
        keep = self._choose(x, None)
        return all_fine(self.grid_size(x), x).indices[0] if keep is None else keep

    @torch.jit.unused
    def token_layout(self, x: Tensor, keep_indices: Optional[Tensor] = None) -> TokenLayout:
        """Images (B, C, H, W) -> scale and place of each token, with ``rest="coarse"``.

        Raises:
            ValueError: The model drops the rest, or an argument of ``forward`` is wrong.
        """
        return self._layout(x, keep_indices) or all_fine(self.grid_size(x), x)

    @torch.jit.unused
    def select_layout(self, scores: Tensor, images: Tensor) -> TokenLayout:
        """Scores (B, N), images (B, C, H, W) -> the layout of the tokens, with ``rest="coarse"``.

        Raises:
            ValueError: The model drops the rest, or the budget is too small.
        """
        if self._coarse is None:
            raise ValueError("select_layout needs a model with rest='coarse'.")
        grid = self.grid_size(images)
        layout = self._coarse.layout(grid, self._keep_ratio, lambda: scores, self._seed())
        return layout or all_fine(grid, images)

    @torch.jit.unused
    def _layout(self, x: Tensor, keep_indices: Optional[Tensor]) -> Optional[TokenLayout]:
        """The tokens of a coarse rest; None if all patches stay, without ranking."""
        if self._coarse is None:
            raise ValueError("token_layout needs a model with rest='coarse'.")
        if isinstance(x, torch.fx.Proxy):
            raise ValueError("rest='coarse' cannot be traced by torch.fx: use torch.export.")
        self._check_images(x)
        grid = self.grid_size(x)
        readable, n = False, grid[0] * grid[1]
        if keep_indices is not None:
            check_keep_indices(keep_indices, x.shape[0], n, fewest=0)
            validate = self.validate and not torch.compiler.is_compiling()
            readable = validate or may_read(keep_indices)
            self._check_given(keep_indices, x, n, readable)
        scores = partial(self._scores, x)
        return self._coarse.layout(
            grid, self._keep_ratio, scores, self._seed(), keep_indices, readable
        )

    def _seed(self) -> Optional[int]:
        return int(self._selection_args["seed"]) if self._selection == "random" else None

    def _choose(self, x: Tensor, keep_indices: Optional[Tensor]) -> Optional[Tensor]:
        """Given or chosen keep indices (B, K); None if all patches stay, without ranking."""
        if not torch.jit.is_scripting():
            self._check_images(x)
        elif x.dim() != 4 or x.shape[1] != self.in_chans:  # before the slot is filled
            raise ValueError("images must be (B, C, H, W) with the model's number of channels.")
        h, w = self.grid_size(x)
        n = h * w
        if not torch.jit.is_scripting():
            if isinstance(x, torch.fx.Proxy):
                return given_or_chosen(keep_indices, self.select(self._scores(x), x), n)
        if keep_indices is None:
            if self._keep_ratio == 1.0:
                return None
            keep_indices = self.select(self._scores(x), x)
            if keep_indices.shape[1] == n:
                return None
        else:
            check_keep_indices(keep_indices, x.shape[0], n)
            if not torch.jit.is_scripting():
                values = self.validate and not torch.compiler.is_compiling()
                self._check_given(keep_indices, x, n, values)
            if keep_indices.shape[1] == n and may_read(keep_indices):
                if bool((keep_indices == torch.arange(n)).all()):
                    return None
        return keep_indices

    def _scores(self, x: Tensor) -> Tensor:
        """The ranker's scores (B, N), or zeros if they do not decide."""
        if self._reads_scores or self._has_budget:
            return self.patch_scores(x)
        h, w = self.grid_size(x)
        return x.new_zeros(x.shape[0], h * w)

    @torch.jit.unused
    def _check_given(self, keep_indices: Tensor, x: Tensor, n: int, values: bool) -> None:
        """Check where given indices lie, and their values."""
        if keep_indices.device != x.device:
            places = f"{keep_indices.device}, the images on {x.device}"
            raise ValueError(f"keep_indices are on {places}: move them.")
        if values:
            validate_keep_indices(keep_indices, n)

    @torch.jit.unused
    def _check_images(self, x: Tensor) -> None:
        if isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing():
            return
        if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[1] != self.in_chans:
            shape = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"images must be (B, {self.in_chans}, H, W), got {shape}.")
        if not x.is_floating_point():
            raise ValueError(
                f"images must be floating point, got {x.dtype}; normalise pixels of 0 to 255 as "
                "(pixels / 255 - mean) / std, with mean and std of model.data_config()."
            )
        embed = getattr(self.backbone, self._adapter.patch_embed)
        strict = getattr(embed, "strict_img_size", False)
        size = tuple(x.shape[-2:])
        if strict and embed.img_size is not None and size != tuple(embed.img_size):
            raise ValueError(
                f"images must be {embed.img_size[0]}x{embed.img_size[1]}, got {size[0]}x{size[1]}; "
                "create the model with img_size=… or dynamic_img_size=True, or call set_input_size."
            )
        rows, cols = self._patch_pixels
        if not strict and not self._pads and (size[0] % rows or size[1] % cols):
            raise ValueError(
                f"images must divide into patches of {rows}x{cols}, got {size[0]}x{size[1]}."
            )

    @torch.jit.unused
    def _check_scores(self, scores: Tensor, x: Tensor) -> None:
        if isinstance(scores, torch.fx.Proxy) or torch.jit.is_tracing():
            return
        if scores.shape[0] != x.shape[0]:
            raise ValueError(
                f"the ranker returned {scores.shape[0]} score maps for {x.shape[0]} images."
            )
        if self.validate and not torch.compiler.is_compiling():
            if not bool(scores.isfinite().all()):
                raise ValueError("the ranker returned scores that are not finite.")

    @torch.jit.unused
    def _warn_if_untrained(self) -> None:
        if self._warned or torch.compiler.is_compiling():
            return
        if getattr(self.ranker, "learned", False) and not getattr(self.ranker, "trained", True):
            self._warned = True
            brings = getattr(self.ranker, "brings_weights", False)
            own = "True (experimental weights of this package), " if brings else ""
            warnings.warn(
                f"the {getattr(self.ranker, 'name', '')} ranker has no trained weights: its choice "
                f"means nothing. Pass ranker_weights={own}<folder, file or hf-hub:owner/name>, or "
                "use ranker='border'.",
                stacklevel=2,
            )

    def forward(self, x: Tensor, keep_indices: Optional[Tensor] = None) -> Tensor:
        """Rank, drop, encode, classify.

        Args:
            x: images (B, C, H, W), normalised for the backbone; for a NaFlexVit also timm's dict of
                "patches", "patch_coord" and "patch_valid".
            keep_indices: (B, K) int64 patches to encode instead of ranked ones, 1 <= K <= N.
                Tokens keep their order; all patches in the grid's order run the plain model. With a
                dict, -1 stands where an image keeps fewer than K.

        Returns:
            (B, num_classes) logits, or the output of the backbone's head.

        Raises:
            ValueError: The shape of images, of a dict of patches or of keep_indices is wrong.
            TypeError: `keep_indices` has another dtype.
        """
        if torch.jit.is_scripting():
            self._fill_slots(self._choose(x, keep_indices))
            out = self.backbone(x)
            self._fill_slots(None)
            return out
        elif isinstance(x, dict):
            return self.forward_head(naflex.forward_features(self, x, keep_indices))
        elif self._counts_vary(keep_indices):
            return self._by_bucket(self.forward, x)
        else:
            return self._run(self.backbone, x, keep_indices)[0]

    def forward_features(self, x: Tensor, keep_indices: Optional[Tensor] = None) -> Tensor:
        """Images (B, C, H, W) -> prefix and kept tokens (B, P + K, D) after the final norm."""
        if isinstance(x, dict):
            return naflex.forward_features(self, x, keep_indices)  # type: ignore[return-value]
        return self._run(self.backbone.forward_features, x, keep_indices)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, P + K, D) -> (B, num_classes), or pooled (B, D) with ``pre_logits``."""
        if isinstance(x, dict):
            return self.backbone.forward_head(**x, pre_logits=pre_logits)
        return self.backbone.forward_head(x, pre_logits=pre_logits)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Optional[Union[int, List[int]]] = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        keep_indices: Optional[Tensor] = None,
        fill: Optional[str] = None,
    ) -> Any:
        """Features of intermediate blocks; kept tokens go back to their places on the grid.

        Arguments and results are those of timm: (final tokens (B, P + K, D), features), features
        alone, or a dict; features are (B, D, h, w) or, with ``output_fmt="NLC"``, (B, N, D). Also:
        ``keep_indices`` (B, K) int64 are patches to encode instead of ranked ones, ``fill`` is what
        dropped places hold, "zeros" or "nearest" (default: ``self.fill``). A coarse token fills all
        places that it covers.

        Raises:
            ValueError: `output_fmt` or `fill` is unknown.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be NCHW or NLC, got {output_fmt!r}.")
        if fill is not None and self._coarse is not None:
            raise ValueError("fill goes with rest='drop': coarse tokens fill their places.")
        if isinstance(x, dict):
            raise ValueError("forward_intermediates takes images; forward_features takes a dict.")
        fill = self._fill if fill is None else check_fill(fill)
        options: Dict[str, Any] = {"indices": indices, "norm": norm, "stop_early": stop_early}
        options["intermediates_only"] = intermediates_only
        if intermediates_only and self._counts_vary(keep_indices):
            options.update(return_prefix_tokens=return_prefix_tokens, output_fmt=output_fmt)
            options.update(output_dict=output_dict, fill=fill)
            return self._by_bucket(partial(self.forward_intermediates, **options), x)
        with_prefix = self.num_prefix_tokens > 0 and self._adapter.prefix_in_blocks
        if with_prefix:
            options["return_prefix_tokens"] = True
        call = self.backbone.forward_intermediates
        out, keep = self._run(call, x, keep_indices, output_fmt="NLC", **options)
        final, raw = (None, out) if intermediates_only else out
        features = [pair[0] for pair in raw] if with_prefix else list(raw)
        grid = self.grid_size(x)
        if isinstance(keep, TokenLayout):
            features = [keep.to_grid(each) for each in features]
        elif keep is not None:
            features = [scatter_patches(each, keep, grid, fill) for each in features]
        if output_fmt == "NCHW":
            maps = (each.unflatten(1, grid) for each in features)
            features = [each.permute(0, 3, 1, 2).contiguous() for each in maps]
        prefix = [pair[1] for pair in raw] if with_prefix and return_prefix_tokens else None
        if output_dict:
            found = {"image_intermediates": features, "image_intermediates_prefix": prefix}
            found["image_features"] = final
            return {name: value for name, value in found.items() if value is not None}
        pairs = features if prefix is None else list(zip(features, prefix))
        return pairs if intermediates_only else (final, pairs)

    @torch.jit.unused
    def _run(
        self, call: Callable[..., Any], x: Tensor, keep_indices: Optional[Tensor], **kwargs: Any
    ) -> Tuple[Any, Union[Tensor, TokenLayout, None]]:
        """Choose patches and run the backbone: its output, and the keep indices or the layout."""
        if self._coarse is not None:
            layout = self._layout(x, keep_indices)
            return self._coarse.run(self, call, x, layout, **kwargs), layout
        keep = self._choose(x, keep_indices)
        return run_with_slots(self._adapter.slots(self.backbone), keep, call, x, **kwargs), keep

    def keep_counts(self, x: Tensor) -> Tensor:
        """Images x (B, C, H, W) -> (B,) int64: how many patches each keeps by the budget.

        Raises:
            ValueError: The model has no budget, or the shape of the images is wrong.
        """
        if isinstance(x, dict):
            return (self.keep_indices(x) >= 0).sum(dim=1)
        return self._counts(self.patch_scores(x))

    def _counts(self, scores: Tensor) -> Tensor:
        if self._budget is None:
            raise ValueError("keep_counts needs an adaptive budget: call calibrate(images, …).")
        if self._keep_ratio == 1.0:
            return torch.full((scores.shape[0],), scores.shape[1], device=scores.device)
        return self._budget.counts(scores)

    def calibrate(
        self,
        images: Union[Tensor, Iterable[Tensor]],
        mean_keep_ratio: float,
        rule: str = "threshold",
        buckets: int = 8,
    ) -> float:
        """Set a budget with which images keep a given share of their patches on average.

        A batch then runs in buckets of images that keep equally many patches, without padding or
        masks; results come in the order of the images. Each call waits for the device once.

        Args:
            images: (B, C, H, W), or batches of them, like those that the model will see.
            mean_keep_ratio: share of patches to keep, averaged over the images, in (0, 1).
            rule: "threshold" or "mass", see ``AdaptiveBudget``. "threshold" needs scores that are
                comparable between images; those of ``border`` are not.
            buckets: number of sizes: the multiples of N / buckets.

        Returns:
            The mean share that these images keep: at most ``mean_keep_ratio``, if the sizes allow.

        Raises:
            ValueError: An argument is out of range, or there are no images.
        """
        budget = AdaptiveBudget(rule, 0.0, buckets, mean_keep_ratio)
        batches = [images] if isinstance(images, (Tensor, dict)) else images
        scores: List[Tensor] = []
        for batch in batches:
            if isinstance(batch, dict):
                parts = naflex.by_grid(self, naflex.opened(self, batch))
                scores += [self.patch_scores(part).cpu() for _, part in parts]
            else:
                scores.append(self.patch_scores(batch).cpu())
        budget, reached = budget.calibrated(scores)
        self.budget = budget
        return reached

    def _counts_vary(self, keep_indices: Optional[Tensor]) -> bool:
        """Whether images may keep different numbers of patches in this call."""
        return self._has_budget and keep_indices is None and self._keep_ratio < 1.0

    @torch.jit.unused
    def _by_bucket(self, call: Callable[..., Any], x: Tensor) -> Any:
        """Call with each bucket's images and ``keep_indices``; one batch in the images' order."""
        check_eager(x)
        scores = self.patch_scores(x)
        buckets, places = buckets_of(self._counts(scores))
        rule, args, grid = self._selection, self._selection_args, self.grid_size(x)
        images, outs = self._padded(x, *grid), []
        for k, rows in buckets or [(scores.shape[1], places)]:  # no images: one empty bucket
            keep = select(scores[rows], k, rule, args, grid, images[rows])
            outs.append(call(x[rows], keep_indices=keep))
        return tree_map(lambda *parts: torch.cat(parts)[places], *outs)

    @torch.jit.unused
    def _common_count(self, scores: Tensor) -> int:
        """K of images that keep equally many patches."""
        check_eager(scores)
        sizes = sorted(set(self._counts(scores).tolist()))
        if len(sizes) > 1:
            counts = ", ".join(str(k) for k in sizes)
            raise ValueError(
                f"the images of this batch keep different numbers of patches ({counts}): call the "
                "model itself, forward_intermediates(intermediates_only=True), or give one image."
            )
        return int(sizes[0]) if sizes else scores.shape[1]

    def train(self, mode: bool = True) -> "LTRPModel":
        """Set training mode; the frozen ranker stays in eval mode."""
        super().train(mode)
        self.ranker.eval()
        if self._to_be_filled and not any(p.is_meta for p in self.ranker.parameters()):
            self.ranker.requires_grad_(False)
            self._to_be_filled = False
        return self

    def requires_grad_(self, requires_grad: bool = True) -> "LTRPModel":
        """Freeze or unfreeze the backbone; the ranker stays frozen."""
        self.backbone.requires_grad_(requires_grad)
        return self

    def restore(self) -> nn.Module:
        """Return the backbone: the same object with its own modules and its present weights.

        This model cannot run afterwards.
        """
        swap_back(self.backbone, self._swaps)
        return self.backbone
