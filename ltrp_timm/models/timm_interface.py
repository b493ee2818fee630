"""timm's model interface for a backbone inside another module, with a ranker beside it."""

import copy
from typing import Any, Dict, List, Mapping, Optional, Set, Tuple, TypeVar, Union

import torch
from timm.data import resolve_model_data_config
from timm.models import group_modules, group_parameters
from torch import Tensor, nn

from ltrp_timm import _timm
from ltrp_timm.layers.bridge import make_bridge, to_pair
from ltrp_timm.layers.ml_decoder import HEADS, MLDecoder, make_head
from ltrp_timm.rankers import list_rankers, ranker_class
from ltrp_timm.slots import find_adapter

GENERIC = "ltrp"  # the registered name of a model around any backbone

# attributes mirrored from the backbone whenever they may have changed
_MIRRORED = ("num_classes", "num_features", "head_hidden_size", "embed_dim", "in_chans")

# arguments that a model reports as they are now, or that are not saved
_NOT_RECORDED = (
    *("backbone", "ranker", "ranker_args", "ranker_weights", "validate"),
    *("head", "head_args", "budget", "rest", "scales", "size_bias"),
)

Kept = TypeVar("Kept", bound="TimmInterface")  # the type of a model that returns itself


class TimmInterface(nn.Module):
    """A ranker and a backbone that answer timm's tools as one model."""

    in_chans: int
    num_classes: int
    _fixed_backbone: bool = False  # whether the registered name implies the backbone

    def __init__(self, ranker: nn.Module, backbone: Any, rest: str = "drop") -> None:
        super().__init__()
        self._adapter = find_adapter(backbone, rest)
        own = {id(parameter) for parameter in backbone.parameters()}
        if any(id(parameter) in own for parameter in ranker.parameters()):  # the ranker is frozen
            raise ValueError("the ranker shares parameters with the backbone: give it a copy.")
        self.ranker: Any = ranker
        self.bridge = make_bridge(ranker, backbone).eval()
        self.backbone = backbone
        self._build_args: Any = {}
        self.register_state_dict_post_hook(_note_trained)
        self._copy_from_backbone()
        self.pretrained_cfg = wrap_pretrained_cfg(getattr(backbone, "pretrained_cfg", None))
        self.default_cfg = self.pretrained_cfg
        self.training = backbone.training

    def _copy_from_backbone(self) -> None:
        for name in _MIRRORED:
            if hasattr(self.backbone, name):
                setattr(self, name, getattr(self.backbone, name))
        self.num_prefix_tokens = _timm.num_prefix_tokens(self.backbone)
        self.global_pool = getattr(self.backbone, "global_pool", "")
        self._patch_pixels = self._adapter.patch_pixels(self.backbone)
        self._pads = bool(self._adapter.embed_of(self.backbone).dynamic_img_pad)
        infos = getattr(self.backbone, "feature_info", [])
        self.feature_info = [dict(info, module=f"backbone.{info['module']}") for info in infos]
        traits = _timm.traits(self.backbone)
        if traits is not None:
            self._traits = dict(traits, first_conv=_prefixed(traits.get("first_conv")))

    def _freeze_ranker(self) -> None:
        self.ranker.requires_grad_(False).eval()
        # a library that fills it does not say so, and its new parameters are not frozen
        self._to_be_filled = any(p.is_meta for p in self.ranker.parameters())
        if self._to_be_filled and getattr(self.ranker, "learned", False):
            self.ranker.trained = True

    def train(self: Kept, mode: bool = True) -> Kept:
        """Set training mode; the frozen ranker stays in eval mode."""
        super().train(mode)
        self.ranker.eval()
        if self._to_be_filled and not any(p.is_meta for p in self.ranker.parameters()):
            self.ranker.requires_grad_(False)
            self._to_be_filled = False
        return self

    def requires_grad_(self: Kept, requires_grad: bool = True) -> Kept:
        """Freeze or unfreeze the backbone; the ranker stays frozen."""
        self.backbone.requires_grad_(requires_grad)
        return self

    @property
    def _model_args(self) -> Dict[str, Any]:
        """Arguments of ``timm.create_model`` that rebuild this model as it is now; timm saves them.

        A part without a name (a module that is not ours) stands there itself, which timm refuses to
        save.
        """
        cfg = getattr(self.backbone, "pretrained_cfg", None) or {}
        args = {**self._build_args, **_timm.recorded_args(self.backbone)}
        now = {"num_classes": self.num_classes, "global_pool": self.global_pool}
        args.update({name: value for name, value in now.items() if name in args})
        if not self._fixed_backbone:
            args["backbone"] = cfg.get("architecture") or self.backbone
        name = getattr(self.ranker, "name", None)
        known = name in list_rankers() and isinstance(self.ranker, ranker_class(str(name)))
        args["ranker"] = name if known else self.ranker
        if known:
            args["ranker_args"] = self.ranker.config()
        classifier = self.backbone.get_classifier()
        if isinstance(classifier, MLDecoder):
            args.update(head=HEADS[0], head_args=classifier.config())
        return {**args, **self.settings()}

    @_model_args.setter
    def _model_args(self, args: Mapping[str, Any]) -> None:
        """Record the arguments of the factory's call."""
        self._build_args = {name: args[name] for name in args if name not in _NOT_RECORDED}

    def settings(self) -> Dict[str, Any]:
        """Arguments that a subclass adds to ``_model_args``."""
        return {}

    @torch.jit.ignore
    def data_config(self) -> Dict[str, Any]:
        """timm's data configuration (input_size, mean, std, …) at the present image size."""
        config: Dict[str, Any] = resolve_model_data_config(self)
        size = getattr(self._adapter.embed_of(self.backbone), "img_size", None)
        if size is not None:  # the cfg keeps the published size after img_size=… and set_input_size
            config["input_size"] = (config["input_size"][0], *size)
        return config

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

    def checked_grid(self, x: Tensor) -> Tuple[int, int]:
        """``grid_size``, and ValueError for images that the backbone would refuse."""
        if not torch.jit.is_scripting():
            self._check_images(x)
        elif x.dim() != 4 or x.shape[1] != self.in_chans:  # before the slot is filled
            raise ValueError("images must be (B, C, H, W) with the model's number of channels.")
        return self.grid_size(x)

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

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The backbone's classifier (a pair for distilled models)."""
        return self.backbone.get_classifier()

    @torch.jit.ignore
    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Give the backbone a new classifier; None keeps the pooling, or an ML-Decoder head.

        With ``num_classes=0`` a model with an ML-Decoder returns its tokens, unpooled.
        """
        head = self.backbone.get_classifier()
        if isinstance(head, MLDecoder) and not global_pool and num_classes > 0:
            self.backbone.num_classes = num_classes
            self.set_classifier(make_head(HEADS[0], self.backbone, head.config()))
            return
        pool = () if global_pool is None else (global_pool,)
        self.backbone.reset_classifier(num_classes, *pool)
        self._copy_from_backbone()

    @torch.jit.ignore
    def set_classifier(self, head: MLDecoder) -> None:
        """Make a head from ``make_head`` the backbone's classifier, which then gets all tokens."""
        _timm.reset_to_tokens(self.backbone, head.num_classes)
        self.backbone.head = head  # so timm names the classifier of all families that drop patches
        self._copy_from_backbone()

    @torch.jit.ignore
    def set_input_size(
        self,
        img_size: Optional[Union[int, Tuple[int, int]]] = None,
        patch_size: Optional[Union[int, Tuple[int, int]]] = None,
    ) -> None:
        """Change the backbone's image or patch size; the ranker follows, or images are resized."""
        sizes = {
            "img_size": None if img_size is None else to_pair(img_size),
            "patch_size": None if patch_size is None else to_pair(patch_size),
        }
        self.backbone.set_input_size(**sizes)
        follow = getattr(self.ranker, "set_input_size", None)
        if callable(follow):
            follow(**sizes)
        self._copy_from_backbone()

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: Union[int, List[int]] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> List[int]:
        """Remove the backbone's layers behind the last of ``indices``; returns the used indices."""
        taken = self.backbone.prune_intermediate_layers(indices, prune_norm, prune_head)
        self._copy_from_backbone()
        return taken

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Any:
        """timm's layer groups of the backbone; the ranker is in the last one, with the head."""
        matcher = self.backbone.group_matcher(coarse=coarse)
        layers: Dict[str, int] = group_parameters(self.backbone, matcher, reverse=True)
        last = max(layers.values())
        layers = {**group_modules(self.backbone, matcher, reverse=True), **layers}
        return lambda name: layers.get(name.removeprefix("backbone."), last)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Names of parameters that are excluded from weight decay."""
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
        """As in ``nn.Module``, for weights of this model or of its plain backbone.

        The ranker keeps its own weights beside those of a plain backbone.
        """
        own = {f"ranker.{name}": tensor for name, tensor in self.ranker.state_dict().items()}
        if is_plain(state_dict):
            given = {f"backbone.{name}": tensor for name, tensor in state_dict.items()}
            state_dict = {**own, **given}
        result = super().load_state_dict(state_dict, strict=strict, assign=assign)
        place = next(self.backbone.parameters()).device
        for module in (*self.bridge.modules(), *self.backbone.modules()):
            if hasattr(module, "init_non_persistent_buffers"):  # to_empty() leaves them empty
                for name, buffer in module.named_buffers(recurse=False):
                    if buffer.is_meta or (assign and buffer.device != place):
                        setattr(module, name, torch.empty_like(buffer, device=place))
                module.init_non_persistent_buffers()
        if hasattr(self.ranker, "trained"):
            new = (name for name in own if name in state_dict)
            changed = any(state_dict[name].data_ptr() != own[name].data_ptr() for name in new)
            if changed:
                noted = getattr(state_dict, "_metadata", {}).get("", {})
                self.ranker.trained = noted.get("ranker_trained", True)
                self.ranker.origin = ""
        return result


def _note_trained(model: Any, _: Any, prefix: str, metadata: Dict[str, Any]) -> None:
    """Let a state dict say whether its ranker is trained."""
    metadata["ranker_trained"] = getattr(model.ranker, "trained", True)


def is_plain(state_dict: Mapping[str, Any]) -> bool:
    """Whether weights are those of a backbone alone, not of an LTRPModel."""
    return not any(name.startswith("backbone.") for name in state_dict)


def wrap_pretrained_cfg(cfg: Optional[Mapping[str, Any]]) -> Dict[str, Any]:
    """A backbone's ``pretrained_cfg`` as that of the generic model around it, names prefixed."""
    kept = {name: value for name, value in (cfg or {}).items() if name != "state_dict"}
    wrapped = copy.deepcopy(kept)
    wrapped["architecture"] = GENERIC
    for name in ("first_conv", "classifier"):
        wrapped[name] = _prefixed(wrapped.get(name))
    return wrapped


def _prefixed(names: Any) -> Any:
    if names is None or isinstance(names, str):
        return None if names is None else f"backbone.{names}"
    return tuple(f"backbone.{name}" for name in names)
