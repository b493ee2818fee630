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
from ltrp_timm.models.coarse import coarse_rest
from ltrp_timm.models.timm_interface import TimmInterface
from ltrp_timm.rankers.base import warn_of_untrained
from ltrp_timm.selection import AdaptiveBudget, adaptive
from ltrp_timm.selection.cells import TokenLayout, all_fine
from ltrp_timm.selection.registry import SelectionSettings, select
from ltrp_timm.selection.rules import (
    check_fill,
    check_keep_indices,
    check_keep_ratio,
    may_read,
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

    The other arguments are those of ``drop_patches``; ``keep_ratio``, ``selection``,
    ``selection_args``, ``fill``, ``budget`` and ``validate`` may be set between calls.

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
            hint = ": pass the share of patches as keep_ratio" if isinstance(ranker, float) else ""
            kind = type(ranker).__name__
            raise TypeError(f"ranker must be an nn.Module or a name, got {kind}{hint}.")
        coarse = coarse_rest(rest, scales, size_bias)
        if coarse is not None:
            coarse.check_backbone(backbone)
        super().__init__(ranker, backbone, rest)
        self._coarse, self._keep_ratio = coarse, 0.5
        self.budget = adaptive.as_budget(budget)
        if keep_ratio is not None:
            self.keep_ratio = keep_ratio
        self._set_selection(selection, selection_args)
        self.fill = fill
        self.validate = bool(validate)
        self._warned = False
        # nothing was changed before, and nothing fails from here on
        self._freeze_ranker()
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
        self._budget, self._has_budget = adaptive.as_budget(value), value is not None
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
        h, w = self.checked_grid(x)
        return self._rank(x, h, w)

    def _rank(self, x: Tensor, h: int, w: int) -> Tensor:
        """Scores (B, h * w) of images whose grid is checked."""
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
            if self._coarse is not None:
                return self.select_layout(scores, images).indices[0]
        h, w = self.grid_size(images)
        return self._select(scores, images, h, w)

    def _select(
        self, scores: Tensor, images: Tensor, h: int, w: int, k: Optional[int] = None
    ) -> Tensor:
        """Scores (B, h * w), images -> keep_indices (B, K); None is the model's own K."""
        images = self._padded(images, h, w)
        if k is None:
            k = num_keep(h * w, self._keep_ratio)
            if self._has_budget and self._keep_ratio < 1.0:
                if torch.jit.is_scripting():
                    raise ValueError(
                        "an adaptive budget runs in eager mode only: pass keep_indices."
                    )
                else:
                    adaptive.check_eager(scores)  # before they are counted, which a graph cannot
                    k = adaptive.common_count(self._counts(scores), h * w)
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
        if self._coarse is None:
            raise ValueError("token_layout needs a model with rest='coarse'.")
        return self._coarse.layout(self, x, keep_indices) or all_fine(self.grid_size(x), x)

    @torch.jit.unused
    def select_layout(self, scores: Tensor, images: Tensor) -> TokenLayout:
        """Scores (B, N), images (B, C, H, W) -> the layout of the tokens, with ``rest="coarse"``.

        Raises:
            ValueError: The model drops the rest, or the budget is too small.
        """
        if self._coarse is None:
            raise ValueError("select_layout needs a model with rest='coarse'.")
        grid = self.grid_size(images)
        return self._coarse.best(self, grid, lambda: scores) or all_fine(grid, images)

    def _choose(self, x: Tensor, keep_indices: Optional[Tensor]) -> Optional[Tensor]:
        """Given or chosen keep indices (B, K); None if all patches stay, without ranking."""
        h, w = self.checked_grid(x)
        n = h * w
        if not torch.jit.is_scripting():
            if isinstance(x, torch.fx.Proxy):
                chosen = self._select(self._scores(x, h, w), x, h, w)
                return given_or_chosen(keep_indices, chosen, n)
        if keep_indices is None:
            if self._keep_ratio == 1.0:
                return None
            keep_indices = self._select(self._scores(x, h, w), x, h, w)
            if keep_indices.shape[1] == n:
                return None
        else:
            check_keep_indices(keep_indices, x.shape[0], n)
            if not torch.jit.is_scripting():
                self._check_given(keep_indices, x, n)
            if keep_indices.shape[1] == n and may_read(keep_indices):
                if bool((keep_indices == torch.arange(n)).all()):
                    return None
        return keep_indices

    def _scores(self, x: Tensor, h: int, w: int) -> Tensor:
        """The ranker's scores (B, N) of checked images, or zeros if they do not decide."""
        if self._reads_scores or self._has_budget:
            return self._rank(x, h, w)
        return x.new_zeros(x.shape[0], h * w)

    @torch.jit.unused
    def _check_given(self, keep_indices: Tensor, x: Tensor, n: int, read: bool = False) -> None:
        """Check where given indices lie and, with ``validate`` or ``read``, their values."""
        if keep_indices.device != x.device:
            places = f"{keep_indices.device}, the images on {x.device}"
            raise ValueError(f"keep_indices are on {places}: move them.")
        if read or (self.validate and not torch.compiler.is_compiling()):
            validate_keep_indices(keep_indices, n)

    @torch.jit.unused
    def _check_scores(self, scores: Tensor, x: Tensor) -> None:
        if not torch.compiler.is_compiling() and not self._warned:
            if getattr(self.ranker, "learned", False) and not getattr(self.ranker, "trained", True):
                self._warned = True
                warn_of_untrained(self.ranker)
        if isinstance(scores, torch.fx.Proxy) or torch.jit.is_tracing():
            return
        if scores.shape[0] != x.shape[0]:
            raise ValueError(
                f"the ranker returned {scores.shape[0]} score maps for {x.shape[0]} images."
            )
        if self.validate and not torch.compiler.is_compiling():
            if not bool(scores.isfinite().all()):
                raise ValueError("the ranker returned scores that are not finite.")

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
            return self._coarse.run(self, call, x, keep_indices, **kwargs)
        keep = self._choose(x, keep_indices)
        return run_with_slots(self._adapter.slots(self.backbone), keep, call, x, **kwargs), keep

    def keep_counts(self, x: Tensor) -> Tensor:
        """Images x (B, C, H, W) -> (B,) int64: how many patches each keeps by the budget.

        Raises:
            ValueError: The model has no budget, or the images do not fit it.
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
            rule: "threshold" or "mass", see ``AdaptiveBudget``. Both need scores that are
                comparable between images; a warning says so for ``border`` and ``contrast``.
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
        if getattr(self.ranker, "scores_are_ranks", False):
            warnings.warn(
                f"scores of {self.ranker.name} are ranks within an image: all images keep about as "
                "many patches. pixel_std and learned rankers tell busy images from empty ones.",
                stacklevel=2,
            )
        return reached

    def _counts_vary(self, keep_indices: Optional[Tensor]) -> bool:
        """Whether images may keep different numbers of patches in this call."""
        return self._has_budget and keep_indices is None and self._keep_ratio < 1.0

    @torch.jit.unused
    def _by_bucket(self, call: Callable[..., Any], x: Tensor) -> Any:
        """Call with each bucket's images and ``keep_indices``; one batch in the images' order."""
        adaptive.check_eager(x)
        h, w = self.checked_grid(x)
        scores = self._rank(x, h, w)
        buckets, places = adaptive.buckets_of(self._counts(scores))
        outs = []
        for k, rows in buckets or [(h * w, places)]:  # no images: one empty bucket
            keep = self._select(scores[rows], x[rows], h, w, k)
            outs.append(call(x[rows], keep_indices=keep))
        return tree_map(lambda *parts: torch.cat(parts)[places], *outs)

    def restore(self) -> nn.Module:
        """Return the backbone: the same object with its own modules and its present weights.

        This model cannot run afterwards.
        """
        swap_back(self.backbone, self._swaps)
        return self.backbone
