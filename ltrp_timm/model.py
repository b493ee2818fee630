"""LTRPModel: ranker + selection + backbone behind timm's model interface; ``drop_patches`` makes one."""

import copy
import re
import warnings
from typing import Any, Dict, List, Mapping, Optional, Sequence, Set, Tuple, Union

import torch
from torch import Tensor, nn

from ltrp_timm.checkpoints import PathLike
from ltrp_timm.rankers import InputBridge, create_ranker, resize_score_map
from ltrp_timm.rankers.base import to_pair
from ltrp_timm.selection import (
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
from ltrp_timm.slots import TokenSlot, find_adapter

torch.fx.wrap("choose_keep_indices")
torch.fx.wrap("resize_score_map")

# what timm's tools read from a model, mirrored from the backbone whenever it may have changed
_MIRRORED = (
    "num_classes",
    "num_features",
    "head_hidden_size",
    "embed_dim",
    "in_chans",
    "num_prefix_tokens",
)


class LTRPModel(nn.Module):
    """A timm ViT that ranks the patches of an image and encodes only the best.

    Made by ``drop_patches`` or ``timm.create_model("ltrp…")``. One instance is for one thread: keep indices lie in
    the backbone while it runs. Calling ``model.backbone`` itself is always the plain model.

    Args:
        ranker: images (B, C, H, W) -> score map (B, h, w), higher = keep first. It is frozen and stays in eval.
        backbone: a timm ViT; changed in place, ``restore`` gives it back.
        keep_ratio: share of patches to encode, in (0, 1]; may be set between calls.
        selection: "top" or "random".
        validate: also check the values of given ``keep_indices`` and that scores are finite (eager only; reads
            from the device).
        fill: what stands at dropped places of dense features: "zeros" or "nearest".

    Raises:
        TypeError: patches cannot be dropped from the backbone; the message says why.
        ValueError: an argument is out of its range.
    """

    # torch.jit.script would compile properties; the plain attributes behind them serve it
    __jit_unused_properties__ = ["keep_ratio", "selection", "fill"]

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
        if isinstance(backbone, LTRPModel):
            raise TypeError(
                "cannot drop patches from an LTRPModel: it already does; set its keep_ratio instead."
            )
        self._adapter = find_adapter(backbone)
        bridge = _make_bridge(ranker, backbone)
        self._original_slot = (
            self._adapter.install(backbone),
        )  # in a tuple: no submodule of this model
        self.ranker = ranker.requires_grad_(False)
        self.bridge = bridge
        self.backbone: Any = backbone
        self._warned = False
        self._copy_from_backbone()
        self.pretrained_cfg = wrap_pretrained_cfg(getattr(backbone, "pretrained_cfg", None))
        self.default_cfg = self.pretrained_cfg
        self._model_args = self._reconstruction_args()
        self.train(backbone.training)

    def _copy_from_backbone(self) -> None:
        for name in _MIRRORED:
            if hasattr(self.backbone, name):
                setattr(self, name, getattr(self.backbone, name))
        self.global_pool = getattr(self.backbone, "global_pool", "")
        infos = getattr(self.backbone, "feature_info", [])
        self.feature_info = [dict(info, module=f"backbone.{info['module']}") for info in infos]
        traits = getattr(self.backbone, "_traits", None)
        if traits is not None:
            self._traits = dict(traits, first_conv=_prefixed(traits.get("first_conv")))

    def _reconstruction_args(self) -> Dict[str, Any]:
        """Arguments of ``timm.create_model("ltrp", …)`` that rebuild this model."""
        cfg = getattr(self.backbone, "pretrained_cfg", None) or {}
        args = dict(getattr(self.backbone, "_model_args", {}))
        args.pop("pretrained_cfg", None)
        config = getattr(self.ranker, "config", None)
        ranker_args = {"ranker_args": config()} if callable(config) else {}
        return {
            **args,
            "backbone": cfg.get("architecture"),
            "ranker": getattr(self.ranker, "name", type(self.ranker).__name__),
            **ranker_args,
            "keep_ratio": self._keep_ratio,
            "selection": self._selection,
            "fill": self._fill,
        }

    # -- settings -------------------------------------------------------------------------------------------------

    @property
    def keep_ratio(self) -> float:
        """Share of patches to encode, in (0, 1]. Each K is one graph to ``torch.compile``."""
        return self._keep_ratio

    @keep_ratio.setter
    def keep_ratio(self, value: float) -> None:
        self._keep_ratio = check_keep_ratio(value)
        self._model_args = dict(self._model_args, keep_ratio=self._keep_ratio)

    @property
    def selection(self) -> str:
        """How scores become keep indices: "top" or "random"."""
        return self._selection

    @selection.setter
    def selection(self, value: str) -> None:
        self._selection = check_selection(value)
        self._model_args = dict(self._model_args, selection=value)

    @property
    def fill(self) -> str:
        """What stands at dropped places of dense features: "zeros" or "nearest"."""
        return self._fill

    @fill.setter
    def fill(self, value: str) -> None:
        self._fill = check_fill(value)
        self._model_args = dict(self._model_args, fill=value)

    # -- ranking and selection ------------------------------------------------------------------------------------

    def grid_size(self, x: Tensor) -> Tuple[int, int]:
        """The backbone's patch grid (h, w) for images x (B, C, H, W)."""
        embed = self.backbone.patch_embed
        if embed.strict_img_size and embed.grid_size is not None:
            return embed.grid_size[0], embed.grid_size[1]
        h, w = embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))
        return h, w

    def patch_scores(self, x: Tensor) -> Tensor:
        """Rank the patches of images normalised for the backbone.

        Args:
            x: (B, C, H, W).

        Returns:
            (B, N) float32, higher = keep first. Only their order means anything; it carries no gradient.

        Raises:
            ValueError: images that the backbone would refuse, a ranker whose map is not (B, h, w), or (with
                ``validate``) scores that are not finite.
        """
        h, w = self.grid_size(x)
        if not torch.jit.is_scripting():
            self._check_images(x)
            self._warn_if_untrained()
        scores = resize_score_map(self.ranker(self.bridge(x.detach())), h, w)
        if not torch.jit.is_scripting():
            self._check_scores(scores, x)
        return scores

    def keep_indices(self, x: Tensor) -> Tensor:
        """images (B, C, H, W) -> (B, K) int64, ascending, prefix tokens not counted: what ``forward`` encodes."""
        h, w = self.grid_size(x)
        keep = self._choose(x, None)
        if keep is None:
            keep = torch.arange(h * w, device=x.device).expand(x.shape[0], -1)
        return keep

    def _choose(self, x: Tensor, keep_indices: Optional[Tensor]) -> Optional[Tensor]:
        """Given or ranked keep indices (B, K); None when all patches stay, for then nothing is ranked."""
        h, w = self.grid_size(x)
        n = h * w
        if not torch.jit.is_scripting():
            if isinstance(
                x, torch.fx.Proxy
            ):  # `keep_indices is None` cannot be asked of a proxy: ask when it runs
                return choose_keep_indices(
                    self.patch_scores(x), keep_indices, self._keep_ratio, self._selection
                )
            self._check_images(x)
        if keep_indices is None:
            k = num_keep(n, self._keep_ratio)
            if k == n:
                return None
            return select_patches(self.patch_scores(x), k, self._selection)
        check_keep_indices(keep_indices, x.shape[0], n)
        if not torch.jit.is_scripting():
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
        embed = self.backbone.patch_embed
        size = tuple(x.shape[-2:])
        if embed.strict_img_size and embed.img_size is not None and size != tuple(embed.img_size):
            raise ValueError(
                f"images must be {embed.img_size[0]}x{embed.img_size[1]}, got {size[0]}x{size[1]}; create the model "
                "with img_size=… or dynamic_img_size=True, or call set_input_size."
            )

    @torch.jit.unused
    def _check_scores(self, scores: Tensor, x: Tensor) -> None:
        if isinstance(scores, torch.fx.Proxy) or torch.jit.is_tracing():
            return
        if scores.shape[0] != x.shape[0]:
            raise ValueError(
                f"the ranker returned {scores.shape[0]} score maps for {x.shape[0]} images."
            )
        if (
            self.validate
            and not torch.compiler.is_compiling()
            and not bool(scores.isfinite().all())
        ):
            raise ValueError("the ranker returned scores that are not finite.")

    @torch.jit.unused
    def _warn_if_untrained(self) -> None:
        untrained = getattr(self.ranker, "learned", False) and not getattr(
            self.ranker, "trained", True
        )
        if untrained and not self._warned and not torch.compiler.is_compiling():
            self._warned = True
            warnings.warn(
                f"the {getattr(self.ranker, 'name', '')} ranker has no trained weights: it keeps patches at random. "
                "Pass ranker_weights=<folder or file>, or use ranker='contrast'.",
                stacklevel=2,
            )

    # -- running the backbone -------------------------------------------------------------------------------------

    def forward(self, x: Tensor, keep_indices: Optional[Tensor] = None) -> Tensor:
        """Rank, drop, encode, classify.

        Args:
            x: images (B, C, H, W), normalised for the backbone.
            keep_indices: (B, K) int64 patches to encode instead of the ranked ones; any 1 <= K <= N.

        Returns:
            (B, num_classes) logits, or what the backbone's head gives.

        Raises:
            ValueError: images or keep_indices of a wrong shape.
            TypeError: keep_indices of another dtype.
        """
        keep = self._choose(x, keep_indices)
        if torch.jit.is_scripting():
            self.backbone.patch_drop.keep_indices = keep
            out = self.backbone(x)
            self.backbone.patch_drop.keep_indices = None
            return out
        else:
            return self._run("forward", x, keep)

    def forward_features(self, x: Tensor, keep_indices: Optional[Tensor] = None) -> Tensor:
        """images (B, C, H, W) -> tokens (B, P + K, D) of prefix and kept patches, after the final norm."""
        out: Tensor = self._run("forward_features", x, self._choose(x, keep_indices))
        return out

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, P + K, D) -> (B, num_classes), or pooled features (B, D) with ``pre_logits``."""
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
        slot = self.backbone.patch_drop
        if not isinstance(slot, TokenSlot):
            raise RuntimeError(
                "this LTRPModel gave its backbone back (restore) or the backbone's patch_drop changed."
            )
        call = self.backbone if method == "forward" else getattr(self.backbone, method)
        slot.keep_indices = keep
        try:
            out = call(x, **(kwargs or {}))
            if slot.keep_indices is not None:
                raise RuntimeError(
                    f"{type(self.backbone).__name__} ran without visiting its patch_drop."
                )
        finally:
            slot.keep_indices = None
        return out

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
        with_prefix = self.num_prefix_tokens > 0
        kwargs = {
            "indices": indices,
            "return_prefix_tokens": with_prefix,
            "norm": norm,
            "stop_early": stop_early,
            "output_fmt": "NLC",
            "intermediates_only": intermediates_only,
        }
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

    # -- timm's model interface -----------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> "LTRPModel":
        """Set training mode; the frozen ranker stays in eval."""
        super().train(mode)
        self.ranker.eval()
        return self

    def restore(self) -> nn.Module:
        """Give the backbone back: the same object with its own modules, weights as they are now.

        Returns:
            The backbone. This model cannot run afterwards.
        """
        if isinstance(self.backbone.patch_drop, TokenSlot):
            self._adapter.restore(self.backbone, self._original_slot[0])
        backbone: nn.Module = self.backbone
        return backbone

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The backbone's classifier (a pair for distilled models)."""
        classifier: nn.Module = self.backbone.get_classifier()
        return classifier

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Give the backbone a new classifier; None keeps the pooling."""
        if global_pool is None:
            self.backbone.reset_classifier(num_classes)
        else:
            self.backbone.reset_classifier(num_classes, global_pool)
        self._follow_backbone()

    @torch.jit.ignore
    def set_input_size(
        self,
        img_size: Optional[Union[int, Tuple[int, int]]] = None,
        patch_size: Optional[Union[int, Tuple[int, int]]] = None,
    ) -> None:
        """Change image or patch size of the backbone; the ranker follows, or images are resized for it."""
        sizes = {
            "img_size": None if img_size is None else to_pair(img_size),
            "patch_size": None if patch_size is None else to_pair(patch_size),
        }
        self.backbone.set_input_size(**sizes)
        follow = getattr(self.ranker, "set_input_size", None)
        if callable(follow):
            follow(**sizes)
        self._follow_backbone()
        changed = {name: size for name, size in sizes.items() if size is not None}
        self._model_args = {**self._reconstruction_args(), **self._model_args, **changed}

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: Union[int, List[int]] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> List[int]:
        """Drop the backbone's layers behind the last of ``indices``; returns the indices taken."""
        taken: List[int] = self.backbone.prune_intermediate_layers(indices, prune_norm, prune_head)
        self._follow_backbone()
        return taken

    def _follow_backbone(self) -> None:
        self._copy_from_backbone()
        args = getattr(self.backbone, "_model_args", {})
        kept = {name: args[name] for name in ("fc_norm", "use_fc_norm") if name in args}
        self._model_args = {**self._model_args, **kept}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """timm's layer groups of the backbone, the ranker in a group of its own in front."""
        groups: Dict[str, Any] = {"ranker": r"^ranker\."}
        for name, spec in self.backbone.group_matcher(coarse=coarse).items():
            if isinstance(spec, str):
                groups[name] = _prefix_pattern(spec)
            elif spec is not None:
                groups[name] = [(_prefix_pattern(pattern), *rest) for pattern, *rest in spec]
        return groups

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Names of parameters that take no weight decay."""
        names: Set[str] = set()
        for part in ("ranker", "backbone"):
            listed = getattr(getattr(self, part), "no_weight_decay", None)
            names |= {f"{part}.{name}" for name in listed()} if callable(listed) else set()
        return names

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's blocks in the backward pass."""
        self.backbone.set_grad_checkpointing(enable)

    @torch.jit.ignore
    def load_pretrained(self, checkpoint_path: str, prefix: str = "") -> None:
        """Load an original JAX ``.npz`` file into the backbone."""
        self.backbone.load_pretrained(checkpoint_path, prefix)

    @torch.jit.ignore
    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load weights of such a model, or of its plain backbone; the ranker then keeps its own.

        Args:
            state_dict: names ``backbone.*`` and ``ranker.*``, or those of the plain ViT.
            strict: as in ``nn.Module``.
            assign: as in ``nn.Module``.

        Raises:
            RuntimeError: names or shapes do not fit (``strict``).
        """
        plain = is_plain(state_dict)
        if plain:
            own = {f"ranker.{name}": tensor for name, tensor in self.ranker.state_dict().items()}
            state_dict = {
                **own,
                **{f"backbone.{name}": tensor for name, tensor in state_dict.items()},
            }
        result = super().load_state_dict(state_dict, strict=strict, assign=assign)
        if not plain and hasattr(self.ranker, "trained"):
            self.ranker.trained = self.ranker.trained or any(
                name.startswith("ranker.") for name in state_dict
            )
        return result


def drop_patches(
    model: nn.Module,
    ranker: Union[str, nn.Module] = "contrast",
    keep_ratio: float = 0.5,
    selection: str = "top",
    validate: bool = False,
    fill: str = "zeros",
    ranker_weights: Optional[PathLike] = None,
    ranker_args: Optional[Dict[str, Any]] = None,
) -> LTRPModel:
    """Put an LTRP front-end on a timm ViT: rank its patches, drop the weak ones, encode the rest.

    Works in place, copies no weights; ``model.restore()`` gives the backbone back.

    Args:
        model: a timm ViT (ViT, DeiT, DINOv2, CLIP, SigLIP, FlexiViT, hybrids, AIMv2, EVA-02, DINOv3, RoPE ViTs, …).
        ranker: a name of ``list_rankers()``, or any module images -> (B, h, w).
        keep_ratio: share of patches to encode, in (0, 1].
        selection: "top" or "random".
        validate: also check values (see ``LTRPModel``).
        fill: "zeros" or "nearest" at dropped places of dense features.
        ranker_weights: folder or ``.safetensors`` file with weights of the ranker.
        ranker_args: further arguments of ``create_ranker``.

    Returns:
        An LTRPModel around the same backbone object.

    Raises:
        TypeError: patches cannot be dropped from this model; the message says why and nothing was changed.
        ValueError: an argument is out of its range.

    >>> import timm
    >>> model = drop_patches(timm.create_model("vit_tiny_patch16_224"), keep_ratio=0.25)
    """
    if isinstance(model, LTRPModel):
        raise TypeError(
            "cannot drop patches from an LTRPModel: it already does; set its keep_ratio instead."
        )
    find_adapter(model)
    if isinstance(ranker, str):
        ranker = make_ranker(ranker, model, ranker_weights, ranker_args)
    elif ranker_weights is not None or ranker_args is not None:
        raise ValueError(
            "ranker_weights and ranker_args go with a ranker's name; this ranker is a module already."
        )
    return LTRPModel(ranker, model, keep_ratio, selection, validate, fill)


def make_ranker(
    name: str,
    backbone: Any,
    weights: Optional[PathLike] = None,
    args: Optional[Dict[str, Any]] = None,
) -> nn.Module:
    """Create a ranker by name to go with a backbone: its channels, patch size, device and dtype."""
    from ltrp_timm.rankers import ranker_class

    kind = ranker_class(name)
    defaults: Dict[str, Any] = {}
    if weights is None and kind.follows_patch_size:
        defaults["patch_size"] = _patch_size(backbone)
    if weights is None and kind.learned:
        defaults["in_chans"] = getattr(backbone, "in_chans", 3)
    parameter = next(backbone.parameters())
    ranker: nn.Module = create_ranker(name, weights or False, **{**defaults, **(args or {})})
    return ranker.to(device=parameter.device, dtype=parameter.dtype)


def _patch_size(backbone: Any) -> Tuple[int, int]:
    """Pixels per token, also where a convolutional stem stands in front (hybrids)."""
    ratio: Sequence[int] = backbone.patch_embed.feat_ratio(as_scalar=False)
    return int(ratio[0]), int(ratio[1])


def _make_bridge(ranker: Any, backbone: Any) -> nn.Module:
    cfg = getattr(backbone, "pretrained_cfg", None) or {}
    source = (cfg.get("mean"), cfg.get("std"))
    target = (getattr(ranker, "mean", None) or source[0], getattr(ranker, "std", None) or source[1])
    if (
        source[0] is None or source[1] is None
    ):  # a backbone that does not say: images go to the ranker as they are
        source = target = ((0.0,), (1.0,))
    size = getattr(ranker, "img_size", None)
    same = all(tuple(a) == tuple(b) for a, b in zip(source, target))
    if same and size is None:
        return nn.Identity()
    parameter = next(backbone.parameters())
    return InputBridge(
        (source[0], source[1]),
        (target[0], target[1]),
        None if size is None else to_pair(size),
        getattr(backbone, "in_chans", 3),
        device=parameter.device,
        dtype=parameter.dtype,
    )


def is_plain(state_dict: Mapping[str, Any]) -> bool:
    """Whether weights are those of a backbone alone, not of an LTRPModel."""
    return not any(name.startswith("backbone.") for name in state_dict)


def wrap_pretrained_cfg(cfg: Optional[Mapping[str, Any]]) -> Dict[str, Any]:
    """A backbone's ``pretrained_cfg`` as that of the model around it: names prefixed, architecture "ltrp"."""
    wrapped = {
        name: copy.deepcopy(value) for name, value in (cfg or {}).items() if name != "state_dict"
    }
    wrapped["architecture"] = "ltrp"
    for name in ("first_conv", "classifier"):
        wrapped[name] = _prefixed(wrapped.get(name))
    return wrapped


def _prefixed(names: Any) -> Any:
    if names is None:
        return None
    return (
        f"backbone.{names}"
        if isinstance(names, str)
        else tuple(f"backbone.{name}" for name in names)
    )


def _prefix_pattern(pattern: str) -> str:
    """Anchors inside a pattern go, its groups keep their numbers."""
    free = re.sub(r"(?<!\[)\^", "", pattern)
    return rf"^backbone\.(?:{free})"


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
