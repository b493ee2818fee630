"""LTRPModel: ranker + selection + backbone behind timm's model interface."""

import warnings
from typing import Any, Dict, List, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltrp_timm.rankers import make_bridge, resize_score_map
from ltrp_timm.selection import (
    HasKeepRatio,
    check_fill,
    check_keep_indices,
    check_keep_ratio,
    check_selection,
    choose_keep_indices,
    num_keep,
    scatter_patches,
    select_patches,
    validate_keep_indices,
)
from ltrp_timm.slots import find_adapter, patch_embed_of, run_with_slots
from ltrp_timm.timm_interface import TimmInterface, wrap_pretrained_cfg

torch.fx.wrap("choose_keep_indices")
torch.fx.wrap("resize_score_map")


class LTRPModel(HasKeepRatio, TimmInterface, nn.Module):
    """A timm ViT that ranks the patches of an image and encodes only the best.

    Made by ``drop_patches`` or ``timm.create_model("ltrp…")``. One instance is for one thread: keep
    indices lie in the backbone while it runs. Calling ``model.backbone`` itself is always the plain
    model.

    Args:
        ranker: images (B, C, H, W) -> score map (B, h, w), higher = keep first. It is frozen and
            stays in eval.
        backbone: a timm ViT; changed in place, ``restore`` gives it back.
        keep_ratio: share of patches to encode, in (0, 1]; may be set between calls.
        selection: "top" or "random".
        validate: also check the values of given ``keep_indices`` and that scores are finite (eager
            only; reads from the device).
        fill: what stands at dropped places of dense features: "zeros" or "nearest".

    Raises:
        TypeError: patches cannot be dropped from the backbone; the message says why.
        ValueError: an argument is out of its range.
    """

    __jit_unused_properties__ = ("keep_ratio", "selection", "fill", "_model_args")

    def __init__(
        self,
        ranker: nn.Module,
        backbone: nn.Module,
        keep_ratio: float = 0.5,
        selection: str = "top",
        validate: bool = False,
        fill: str = "zeros",
    ) -> None:
        super().__init__()
        if not isinstance(ranker, nn.Module):
            raise TypeError(f"ranker must be an nn.Module or a name, got {type(ranker).__name__}.")
        self._keep_ratio = check_keep_ratio(keep_ratio)
        self._selection = check_selection(selection)
        self._fill = check_fill(fill)
        self.validate = bool(validate)
        self._adapter = find_adapter(backbone)
        _check_disjoint(ranker, backbone)
        self.ranker = ranker
        self.bridge = make_bridge(ranker, backbone).eval()
        self.backbone = backbone
        self._warned = False
        self._build_args = {}
        self._copy_from_backbone()
        self.pretrained_cfg = wrap_pretrained_cfg(getattr(backbone, "pretrained_cfg", None))
        self.default_cfg = self.pretrained_cfg
        self.training = backbone.training
        # nothing was changed before and nothing fails from here on; tuples hide their modules
        self.ranker.requires_grad_(False).eval()
        self._original_slot = (self._adapter.install(backbone),)
        self._slots = tuple(self._adapter.slots(backbone))

    @property
    def selection(self) -> str:
        """How scores become keep indices: "top" or "random"."""
        return self._selection

    @selection.setter
    def selection(self, value: str) -> None:
        self._selection = check_selection(value)

    @property
    def fill(self) -> str:
        """What stands at dropped places of dense features: "zeros" or "nearest"."""
        return self._fill

    @fill.setter
    def fill(self, value: str) -> None:
        self._fill = check_fill(value)

    def grid_size(self, x: Tensor) -> Tuple[int, int]:
        """The backbone's patch grid (h, w) for images x (B, C, H, W)."""
        if torch.jit.is_scripting():
            embed = self.backbone.patch_embed
        else:
            embed = patch_embed_of(self.backbone)
        if hasattr(embed, "strict_img_size"):
            if embed.strict_img_size and embed.grid_size is not None:
                return embed.grid_size[0], embed.grid_size[1]
        h, w = embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))
        return h, w

    def patch_scores(self, x: Tensor) -> Tensor:
        """Rank the patches of images normalised for the backbone.

        Args:
            x: (B, C, H, W).

        Returns:
            (B, N) float32, higher = keep first. Only their order means anything; it carries no
            gradient.

        Raises:
            ValueError: images that the backbone would refuse, a ranker whose map is not (B, h, w),
                or (with ``validate``) scores that are not finite.
        """
        if not torch.jit.is_scripting():
            self._check_images(x)
        h, w = self.grid_size(x)
        return self._rank(x, h, w)

    def _rank(self, x: Tensor, h: int, w: int) -> Tensor:
        """Scores (B, h * w) of images that were checked."""
        if not torch.jit.is_scripting():
            self._warn_if_untrained()
        images = x.detach()
        if self._pads:  # as the backbone does, so that the maps cover the same places
            rows, cols = self._patch_pixels
            images = F.pad(images, (0, w * cols - x.shape[-1], 0, h * rows - x.shape[-2]))
        scores = resize_score_map(self.ranker(self.bridge(images)), h, w).detach()
        if not torch.jit.is_scripting():
            self._check_scores(scores, x)
        return scores

    def keep_indices(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> (B, K) int64, ascending: the patches that ``forward`` encodes."""
        keep = self._choose(x, None)
        h, w = self.grid_size(x)
        if keep is None:
            keep = torch.arange(h * w, device=x.device).expand(x.shape[0], -1)
        return keep

    def _choose(self, x: Tensor, keep_indices: Optional[Tensor]) -> Optional[Tensor]:
        """Given or ranked keep indices (B, K); None when all stay: nothing is ranked then."""
        if not torch.jit.is_scripting():
            self._check_images(x)
        elif x.dim() != 4 or x.shape[1] != self.in_chans:  # before the slot is filled
            raise ValueError("images must be (B, C, H, W) with the model's number of channels.")
        h, w = self.grid_size(x)
        n = h * w
        if not torch.jit.is_scripting():
            if isinstance(x, torch.fx.Proxy):  # a proxy is never None: the leaf asks when it runs
                scores = self._rank(x, h, w)
                return choose_keep_indices(scores, keep_indices, self._keep_ratio, self._selection)
        if keep_indices is None:
            k = num_keep(n, self._keep_ratio)
            if k == n:
                return None
            if self._selection == "random":  # nobody needs to look at the images
                return select_patches(torch.zeros(x.shape[0], n, device=x.device), k, "random")
            return select_patches(self._rank(x, h, w), k, self._selection)
        check_keep_indices(keep_indices, x.shape[0], n)
        if not torch.jit.is_scripting():
            if keep_indices.device != x.device:
                places = f"{keep_indices.device}, the images on {x.device}"
                raise ValueError(f"keep_indices are on {places}: move them.")
            if self.validate and not torch.compiler.is_compiling():
                validate_keep_indices(keep_indices, n)
        if keep_indices.shape[1] == n:
            return None
        return keep_indices

    @torch.jit.unused
    def _check_images(self, x: Tensor) -> None:
        if isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing():
            return
        if not isinstance(x, Tensor) or x.dim() != 4 or x.shape[1] != self.in_chans:
            shape = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"images must be (B, {self.in_chans}, H, W), got {shape}.")
        embed = patch_embed_of(self.backbone)
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
            warnings.warn(
                f"the {getattr(self.ranker, 'name', '')} ranker has no trained weights: its choice "
                "means nothing. Pass ranker_weights=<folder or file>, or use ranker='contrast'.",
                stacklevel=2,
            )

    def forward(self, x: Tensor, keep_indices: Optional[Tensor] = None) -> Tensor:
        """Rank, drop, encode, classify.

        Args:
            x: images (B, C, H, W), normalised for the backbone.
            keep_indices: (B, K) int64 patches to encode instead of the ranked ones, 1 <= K <= N.
                Tokens come in their order; with K = N the plain model runs.

        Returns:
            (B, num_classes) logits, or what the backbone's head gives.

        Raises:
            ValueError: images or keep_indices of a wrong shape.
            TypeError: keep_indices of another dtype.
        """
        keep = self._choose(x, keep_indices)
        if torch.jit.is_scripting():
            self._put(keep)
            out = self.backbone(x)
            self._put(None)
            return out
        else:
            return self._run("forward", x, keep)

    def forward_features(self, x: Tensor, keep_indices: Optional[Tensor] = None) -> Tensor:
        """Images (B, C, H, W) -> tokens (B, P + K, D), prefix and kept, after the final norm."""
        out: Tensor = self._run("forward_features", x, self._choose(x, keep_indices))
        return out

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, P + K, D) -> (B, num_classes), or pooled (B, D) with ``pre_logits``."""
        out: Tensor = self.backbone.forward_head(x, pre_logits=pre_logits)
        return out

    @torch.jit.unused
    def _run(
        self,
        method: str,
        x: Tensor,
        keep: Optional[Tensor],
        kwargs: Optional[Dict[str, Any]] = None,
    ) -> Any:
        slots = self._adapter.slots(self.backbone)
        if not slots or not all(hasattr(slot, "keep_indices") for slot in slots):
            raise RuntimeError(
                "this LTRPModel gave its backbone back (restore), or its patch_drop was changed."
            )
        call = self.backbone if method == "forward" else getattr(self.backbone, method)
        return run_with_slots(slots, keep, call, x, **(kwargs or {}))

    def _put(self, keep: Optional[Tensor]) -> None:
        """Fill the slots, through the backbone alone; for TorchScript, which has no finally."""
        if hasattr(self.backbone, "patch_drop"):
            self.backbone.patch_drop.keep_indices = keep
        elif hasattr(self.backbone, "shared_rel_pos"):
            self.backbone.patch_embed.norm.keep_indices = keep
            self.backbone.shared_rel_pos.keep_indices = keep
        else:
            self.backbone.pos_drop.keep_indices = keep
            if hasattr(self.backbone, "rel_pos_bias"):
                if self.backbone.rel_pos_bias is not None:
                    self.backbone.rel_pos_bias.keep_indices = keep

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
        """Features of intermediate blocks, kept tokens put back at their places of the grid.

        Args:
            x: images (B, C, H, W).
            indices: last n blocks if int, all if None, else these blocks.
            return_prefix_tokens: also return prefix tokens (B, P, D) with each feature.
            norm: apply the final norm to every feature.
            stop_early: stop after the last block asked for.
            output_fmt: "NCHW" for (B, D, h, w), "NLC" for (B, N, D).
            intermediates_only: return the list of features alone.
            output_dict: return a dict with timm's names instead.
            keep_indices: (B, K) int64 patches to encode instead of the ranked ones.
            fill: "zeros" or "nearest" at dropped places; None takes ``self.fill``.

        Returns:
            As timm: (final tokens (B, P + K, D), features), features, or a dict.

        Raises:
            ValueError: ``output_fmt`` or ``fill`` is none of the above.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be NCHW or NLC, got {output_fmt!r}.")
        fill = self._fill if fill is None else check_fill(fill)
        keep = self._choose(x, keep_indices)
        with_prefix = self.num_prefix_tokens > 0 and self._adapter.prefix_in_blocks
        kwargs: Dict[str, Any] = {
            "indices": indices,
            "norm": norm,
            "stop_early": stop_early,
            "output_fmt": "NLC",
            "intermediates_only": intermediates_only,
        }
        if with_prefix:
            kwargs["return_prefix_tokens"] = True
        out = self._run("forward_intermediates", x, keep, kwargs)
        final, raw = (None, out) if intermediates_only else out
        prefix = [pair[1] for pair in raw] if with_prefix else None
        features = [pair[0] for pair in raw] if with_prefix else list(raw)
        grid = self.grid_size(x)
        if keep is not None:
            features = [scatter_patches(feature, keep, grid, fill) for feature in features]
        if output_fmt == "NCHW":
            features = [_to_nchw(feature, grid) for feature in features]
        prefix = prefix if return_prefix_tokens else None
        if output_dict:
            return _feature_dict(final, features, prefix)
        pairs = features if prefix is None else list(zip(features, prefix))
        return pairs if intermediates_only else (final, pairs)

    def train(self, mode: bool = True) -> "LTRPModel":
        """Set training mode; the frozen ranker stays in eval."""
        super().train(mode)
        self.ranker.eval()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> "LTRPModel":
        """Freeze or unfreeze the backbone; the ranker stays frozen."""
        self.backbone.requires_grad_(requires_grad)
        return self

    def restore(self) -> nn.Module:
        """Give the backbone back: the same object with its own modules, weights as they are now.

        Returns:
            The backbone. This model cannot run afterwards.
        """
        if self._adapter.slots(self.backbone)[:1] == list(self._slots[:1]):
            self._adapter.restore(self.backbone, self._original_slot[0])
        backbone: nn.Module = self.backbone
        return backbone


def _check_disjoint(ranker: nn.Module, backbone: nn.Module) -> None:
    """The ranker gets frozen: it must not hold parameters of the backbone."""
    own = {id(parameter) for parameter in backbone.parameters()}
    if any(id(parameter) in own for parameter in ranker.parameters()):
        raise ValueError("the ranker shares parameters with the backbone: give it a copy.")


def _to_nchw(feature: Tensor, grid: Tuple[int, int]) -> Tensor:
    return feature.reshape(feature.shape[0], *grid, -1).permute(0, 3, 1, 2).contiguous()


def _feature_dict(
    final: Optional[Tensor], features: List[Tensor], prefix: Optional[List[Tensor]]
) -> Dict[str, Any]:
    out: Dict[str, Any] = {"image_intermediates": features}
    if prefix is not None:
        out["image_intermediates_prefix"] = prefix
    if final is not None:
        out["image_features"] = final
    return out
