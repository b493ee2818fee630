"""LTRPModel: ranker + selection + backbone behind timm's model interface."""

import warnings
from typing import Any, Dict, Mapping, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ltrp_timm.layers import make_bridge, resize_score_map
from ltrp_timm.models.adaptive import AdaptiveBudget
from ltrp_timm.models.dense import DenseFeatures
from ltrp_timm.models.timm_interface import TimmInterface, wrap_pretrained_cfg
from ltrp_timm.selection import (
    SelectsPatches,
    check_fill,
    check_keep_indices,
    check_keep_ratio,
    check_selection,
    check_selection_args,
    choose_keep_indices,
    num_keep,
    validate_keep_indices,
)
from ltrp_timm.slots import (
    find_adapter,
    install_kept_embed,
    patch_embed_of,
    restore_kept_embed,
    run_with_slots,
)

torch.fx.wrap("choose_keep_indices")
torch.fx.wrap("resize_score_map")


class LTRPModel(SelectsPatches, AdaptiveBudget, DenseFeatures, TimmInterface, nn.Module):
    """A timm ViT that ranks the patches of an image and encodes only the best.

    Made by ``drop_patches`` or ``timm.create_model("ltrp…")``. One instance is for one thread: keep
    indices lie in the backbone while it runs. Calling ``model.backbone`` itself is always the plain
    model.

    Args:
        ranker: images (B, C, H, W) -> score map (B, h, w), higher = keep first. It is frozen and
            stays in eval.
        backbone: a timm ViT; changed in place, ``restore`` gives it back.
        keep_ratio: share of patches to encode, in (0, 1]; may be set between calls.
        selection: "top", "random", "mixed" (best scores, and centres of the largest clusters of
            pixels), "stratified" (the best of each cell of the grid first) or "adaptive" (each
            image as many as its scores ask for; see ``calibrate``).
        selection_args: options of the selection: "seed" of random; "ratio", "neighbours" and
            "pixels" of mixed; "cell" of stratified; "mass" or "threshold", and "buckets", of
            adaptive.
        validate: also check the values of given ``keep_indices`` and that scores are finite (eager
            only; reads from the device).
        fill: what stands at dropped places of dense features: "zeros" or "nearest".

    Raises:
        TypeError: patches cannot be dropped from the backbone; the message says why.
        ValueError: an argument is out of its range.
    """

    __jit_unused_properties__ = (*SelectsPatches.__jit_unused_properties__, "fill", "_model_args")

    def __init__(
        self,
        ranker: nn.Module,
        backbone: nn.Module,
        keep_ratio: float = 0.5,
        selection: str = "top",
        validate: bool = False,
        fill: str = "zeros",
        selection_args: Optional[Mapping[str, Any]] = None,
    ) -> None:
        super().__init__()
        if not isinstance(ranker, nn.Module):
            raise TypeError(f"ranker must be an nn.Module or a name, got {type(ranker).__name__}.")
        self._keep_ratio = check_keep_ratio(keep_ratio)
        self._selection = check_selection(selection)
        self._selection_args = check_selection_args(selection, selection_args)
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
        slot = self._adapter.install(backbone)
        self._originals = (slot, install_kept_embed(backbone, self._adapter))
        self._slots = tuple(self._adapter.slots(backbone))

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
        scores = self.ranker_scores(x, h, w).detach()
        if not torch.jit.is_scripting():
            self._check_scores(scores, x)
        return scores

    def ranker_scores(self, x: Tensor, h: int, w: int) -> Tensor:
        """What the ranker says to images (B, C, H, W) on the grid (h, w): (B, h * w), unchecked.

        It carries a gradient where the ranker has one: for who trains it.
        """
        images = self.bridge(self._padded(x, h, w))
        return resize_score_map(self.ranker(images), h, w)

    def _padded(self, x: Tensor, h: int, w: int) -> Tensor:
        """Images padded as the backbone does, so that h x w patches cover the same places."""
        if not self._pads:
            return x
        rows, cols = self._patch_pixels
        return F.pad(x, (0, w * cols - x.shape[-1], 0, h * rows - x.shape[-2]))

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
                return self._select(x, h, w, keep_indices)
        if keep_indices is None:
            if num_keep(n, self._keep_ratio) == n:
                return None
            if not torch.jit.is_scripting():
                if self._selection == "adaptive":
                    keep_indices = self._one_bucket(x)
                    return None if keep_indices.shape[1] == n else keep_indices
            return self._select(x, h, w, None)
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

    def _select(self, x: Tensor, h: int, w: int, keep_indices: Optional[Tensor]) -> Tensor:
        """Rank the patches of checked images and choose; given keep indices (B, K) pass."""
        if self._selection == "random":  # nobody needs to look at the images
            scores = x.new_zeros(x.shape[0], h * w)
        else:
            scores = self._rank(x, h, w)
        return choose_keep_indices(
            scores,
            keep_indices,
            self._keep_ratio,
            self._selection,
            self._selection_args,
            (h, w),
            self._padded(x, h, w),
        )

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
                f"means nothing. Pass ranker_weights={_sources(self.ranker)}, or use "
                "ranker='contrast'.",
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
        if torch.jit.is_scripting():
            self._put(self._choose(x, keep_indices))
            out = self.backbone(x)
            self._put(None)
            return out
        elif self._is_adaptive(keep_indices):
            return self._by_bucket(self.forward, x)
        else:
            return self._run("forward", x, self._choose(x, keep_indices))

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
        if hasattr(self.backbone.patch_embed, "keep_indices"):
            self.backbone.patch_embed.keep_indices = keep

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
            self._adapter.restore(self.backbone, self._originals[0])
            restore_kept_embed(self.backbone, self._adapter, self._originals[1])
        backbone: nn.Module = self.backbone
        return backbone


def _check_disjoint(ranker: nn.Module, backbone: nn.Module) -> None:
    """The ranker gets frozen: it must not hold parameters of the backbone."""
    own = {id(parameter) for parameter in backbone.parameters()}
    if any(id(parameter) in own for parameter in ranker.parameters()):
        raise ValueError("the ranker shares parameters with the backbone: give it a copy.")


def _sources(ranker: Any) -> str:
    """What ``ranker_weights`` may be, for a message."""
    brings = getattr(ranker, "brings_weights", False)
    own = "True (experimental ones that come along), " if brings else ""
    return f"{own}<folder, file or hf-hub:owner/name>"
