"""From arguments of ``timm.create_model`` to an LTRPModel: backbone, cfg, weights of either."""

import dataclasses
import inspect
import logging
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple, Union

import timm
from timm.models import PretrainedCfg, build_model_with_cfg
from torch import Tensor, nn

from ltrp_timm import _timm
from ltrp_timm.layers.ml_decoder import BY_CLASS, MLDecoder
from ltrp_timm.models.front_end import drop_patches
from ltrp_timm.models.ltrp import LTRPModel
from ltrp_timm.models.timm_interface import GENERIC, is_plain, wrap_pretrained_cfg
from ltrp_timm.rankers import list_rankers, ranker_class
from ltrp_timm.rankers.base import adapt_channels
from ltrp_timm.selection import AdaptiveBudget
from ltrp_timm.weights.files import WEIGHT_SUFFIXES, check_keys, locate
from ltrp_timm.weights.hub import PREFIX, hub_errors
from ltrp_timm.weights.untrusted import NEVER_SAVED, check_saved_args, shapes_of

_logger = logging.getLogger(__name__)

# arguments of drop_patches, without the model and the cache_dir that timm has too
_FRONT_END = list(set(inspect.signature(drop_patches).parameters) - {"model", "cache_dir"})
_FEATURES = ("features_only", "out_indices", "feature_cls")
_SOURCES = ("file", "url", "hf_hub_id", "state_dict")
_PREFIX = "backbone."
_DESCRIPTIVE = (  # fields of a cfg that do not affect the model
    *("license", "description", "origin_url", "paper_name", "paper_ids", "notes"),
    *("label_names", "label_descriptions"),
)


def create_ltrp(
    variant: str,
    pretrained: bool = False,
    *,
    backbone: str,
    pretrained_cfg: Union[str, Mapping[str, Any], PretrainedCfg, None] = None,
    pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
    cache_dir: Optional[str] = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a registered model, or the generic one around any timm ViT.

    The ``pretrained_cfg`` of a registered name describes the whole model: the backbone is built
    without weights, then one file of a plain backbone or of a whole model is loaded. The same holds
    for a ``pretrained_cfg`` of the generic model, or an overlay with a weight source; without them,
    its ``pretrained=True`` loads the backbone's weights as timm does.

    The other arguments are as in timm: ``backbone`` is the name of a ViT, for the generic model
    also with a tag or a source; ``kwargs`` are arguments of ``drop_patches``, of timm's feature
    wrapper and of the backbone.

    Raises:
        TypeError: Patches cannot be dropped from the backbone, or an argument is unknown.
        ValueError: The generic model has a tag (tags belong to the backbone's name), or a value is
            out of range.
        RuntimeError: Weights do not fit.
        OSError: Weights do not exist, or the Hub does not return them.
    """
    generic = variant == GENERIC
    if generic and isinstance(pretrained_cfg, str) and pretrained_cfg:
        raise ValueError(
            f"{variant} has no tag {pretrained_cfg!r}: append the tag to the backbone's name."
        )
    overlay = dict(pretrained_cfg_overlay or {})
    front, features, rest = _split_kwargs(kwargs)
    whole = not generic or bool(pretrained_cfg) or any(overlay.get(key) for key in _SOURCES)
    front["cache_dir"] = cache_dir
    # a ranker with weights of its own is not overwritten by that of a whole model
    given = isinstance(front.get("ranker"), nn.Module) or bool(front.get("ranker_weights"))
    if whole:
        base = pretrained_cfg or (wrap_pretrained_cfg(_cfg_of(backbone)) if generic else None)
        base = base.to_dict() if isinstance(base, PretrainedCfg) else base
        saved = _check_saved(base, kwargs.get("pretrained_model_args"))
        cfg = _timm.resolve_pretrained_cfg(variant, base, overlay).to_dict()
        if saved and "device" not in rest:
            own = {name: value for name, value in front.items() if name != "ranker_weights"}
            size = _weights_size(cfg, cache_dir) if pretrained else None
            shapes_of(lambda: drop_patches(_bare_backbone(backbone, cfg, rest), **own), saved, size)
        net = _bare_backbone(backbone, cfg, rest)
    else:
        source = {"pretrained": pretrained, "cache_dir": cache_dir}
        with hub_errors(str(_cfg_of(backbone).get("hf_hub_id") or backbone)):
            net = timm.create_model(
                backbone, pretrained_cfg_overlay=overlay or None, **source, **rest
            )
        cfg = wrap_pretrained_cfg(getattr(net, "pretrained_cfg", None))
        pretrained = False  # the backbone has its weights

    def wrap(**_: Any) -> LTRPModel:
        model = drop_patches(net, **front)
        model.bridge.to(rest.get("device"))  # also to the meta device, if that was asked for
        model._fixed_backbone = not generic
        return model

    with hub_errors(str(cfg.get("hf_hub_id") or variant)):
        model: nn.Module = build_model_with_cfg(
            wrap,
            variant,
            pretrained,
            pretrained_cfg=cfg,
            pretrained_filter_fn=partial(checkpoint_filter_fn, keep_ranker=given),
            feature_cfg={"out_indices": 3, "feature_cls": "getter"},
            cache_dir=cache_dir,
            **rest,
            **features,
        )
    return model


def _weights_size(cfg: Mapping[str, Any], cache_dir: Optional[str]) -> Optional[int]:
    """Bytes of the weights in a folder or repository; None if there are none."""
    if cfg.get("source") == "local-dir":
        folder = Path(str(cfg.get("file")))
    else:
        folder = locate(f"{PREFIX}{cfg.get('hf_hub_id')}", cache_dir=cache_dir)
    files = [path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES]
    return max((path.stat().st_size for path in files), default=None)


def _check_saved(cfg: Any, args: Any) -> str:
    """Check that a configuration from a folder or repository is safe; returns its source, or ""."""
    if not isinstance(cfg, Mapping) or cfg.get("source") not in ("hf-hub", "local-dir"):
        return ""
    source = str(cfg.get("file") or cfg.get("hf_hub_id"))
    check_saved_args(args or {}, source, refused=NEVER_SAVED)
    for name in ("custom_load", "hf_hub_filename", "state_dict"):
        if cfg.get(name):
            raise ValueError(f"the configuration in {source} must not set {name!r}.")
    stated = {name: value for name, value in cfg.items() if name not in (*_SOURCES, *_DESCRIPTIVE)}
    check_saved_args(stated, source)
    size = cfg.get("input_size")
    if size is not None and (
        not isinstance(size, (list, tuple))
        or len(size) != 3
        or not all(isinstance(side, int) and side > 0 for side in size)
    ):
        raise ValueError(f"input_size in {source} must be three sizes, got {size!r}.")
    return source


def _bare_backbone(name: str, cfg: Mapping[str, Any], kwargs: Dict[str, Any]) -> nn.Module:
    """The backbone of a whole model's cfg, without weights."""
    if ":" in name:  # a folder or a repository has its own cfg
        return timm.create_model(name, **kwargs)
    if cfg.get("fixed_input_size"):  # a tag may have been trained at another size
        kwargs = {"img_size": tuple(cfg["input_size"][-2:]), **kwargs}
    own = {key: value for key, value in cfg.items() if key not in (*_SOURCES, "source", "tag")}
    own["architecture"] = timm.models.get_arch_name(name)
    for key in ("first_conv", "classifier"):
        value = own.get(key)
        if isinstance(value, str):
            own[key] = value.removeprefix(_PREFIX)
        elif value is not None:
            own[key] = tuple(part.removeprefix(_PREFIX) for part in value)
    return timm.create_model(own["architecture"], pretrained_cfg=own, **kwargs)


def _split_kwargs(kwargs: Dict[str, Any]) -> Tuple[Dict[str, Any], Dict[str, Any], Dict[str, Any]]:
    """Arguments for the front-end, for timm's feature wrapper, and for the backbone."""
    front = {name: kwargs[name] for name in _FRONT_END if name in kwargs}
    features = {name: kwargs[name] for name in _FEATURES if name in kwargs}
    rest = {name: kwargs[name] for name in kwargs if name not in (*_FRONT_END, *_FEATURES)}
    wrapper = features.get("feature_cls", "getter")
    if wrapper != "getter" and wrapper is not _timm.FeatureGetterNet:
        raise ValueError(f"features of a pruned model need feature_cls='getter', got {wrapper!r}.")
    saved = kwargs.get("pretrained_model_args") or {}
    if front.get("selection") == "adaptive" == saved.get("selection"):
        # it was saved when "adaptive" was a selection
        args, mean = saved.get("selection_args") or {}, saved.get("keep_ratio", 0.5)
        rule = "mass" if args.get("mass") else "threshold"
        budget = AdaptiveBudget(rule, args.get(rule, 0.0), args.get("buckets", 8), mean)
        now = {"selection": "top", "selection_args": None, "budget": budget}
        saved, front = {**saved, **now}, {**front, **now}
    pairs = (
        *(("ranker", "ranker_args"), ("selection", "selection_args")),
        *(("keep_ratio", "budget"), ("budget", "keep_ratio")),
        *(("rest", name) for name in ("scales", "size_bias", "fill", "budget")),
    )
    for part, options in pairs:
        default = "drop" if part == "rest" else None
        if saved and front.get(part, default) != saved.get(part, default):
            if front.get(options) == saved.get(options):
                front.pop(options, None)  # saved for another one
    args = front.get("ranker_args")
    if args and args == saved.get("ranker_args"):  # the backbone's channels may be others now
        name = front.get("ranker")
        older = ranker_class(name).older_args if name in list_rankers() else {}
        args = {**older, **args}
        front["ranker_args"] = {name: args[name] for name in args if name != "in_chans"}
    return front, features, rest


def _cfg_of(backbone: str) -> Dict[str, Any]:
    if ":" in backbone:
        return {}
    cfg = timm.models.get_pretrained_cfg(backbone)
    return cfg.to_dict() if cfg is not None else {}


def backbone_cfg(tag: str, **changes: Any) -> Optional[PretrainedCfg]:
    """timm's cfg of ``arch.tag`` as that of a registered model; None if this timm lacks it."""
    cfg = timm.models.get_pretrained_cfg(tag)
    if cfg is None:
        return None
    wrapped = wrap_pretrained_cfg(cfg.to_dict())
    # the Hub has native weights even if the url names an original JAX file
    changes = {"url": None, "custom_load": False, "architecture": None, "tag": None, **changes}
    return dataclasses.replace(PretrainedCfg(**wrapped), **changes)


def checkpoint_filter_fn(
    state_dict: Dict[str, Any], model: LTRPModel, antialias: bool = True, keep_ranker: bool = False
) -> Dict[str, Tensor]:
    """Weights of a plain backbone or of a whole model -> names and shapes of ``model``.

    The backbone's part goes through timm's own filter (other layouts, position embeddings of
    another size, see ``backbone_filter``). A plain file leaves the ranker's weights unchanged, and
    so does ``keep_ranker``. Whatever is left out is logged. RuntimeError lists all names and shapes
    that do not match.
    """
    for wrapper in ("model", "state_dict"):
        if isinstance(state_dict.get(wrapper), dict):
            state_dict = state_dict[wrapper]
    plain = is_plain(state_dict)
    inner = state_dict if plain else _with_prefix(state_dict, _PREFIX)
    inner = _fit_pooling(_timm.backbone_filter(inner, model.backbone, antialias), model.backbone)
    inner = _fit_head(inner, model)
    own = model.ranker.state_dict()
    ranker = (
        own if plain or keep_ranker else adapt_channels(_with_prefix(state_dict, "ranker."), own)
    )
    if ranker and not own:
        _logger.warning("Ignoring the checkpoint's ranker: this model's ranker has no weights.")
        ranker = {}
    out = {f"ranker.{name}": tensor for name, tensor in ranker.items()}
    out.update({f"{_PREFIX}{name}": tensor for name, tensor in inner.items()})
    if not plain:  # names with neither prefix: the check below lists them
        known = (_PREFIX, "ranker.")
        out.update({name: state_dict[name] for name in state_dict if not name.startswith(known)})
    _check_complete(model, out)
    return out


def _fit_pooling(state_dict: Dict[str, Any], backbone: Any) -> Dict[str, Any]:
    """Follow another ``global_pool``: rename the norm, ignore an attention pool."""
    wanted = backbone.state_dict()
    out = dict(state_dict)
    for old, new in (("norm", "fc_norm"), ("fc_norm", "norm")):
        for part in ("weight", "bias"):
            before, after = f"{old}.{part}", f"{new}.{part}"
            if before in out and before not in wanted and after in wanted and after not in out:
                out[after] = out.pop(before)
                _logger.warning(
                    "Loading %s of the checkpoint as %s: the pooling differs.", before, after
                )
    unused = [name for name in out if name.startswith("attn_pool.") and name not in wanted]
    if unused and getattr(backbone, "attn_pool", None) is None:
        _logger.warning("Ignoring the checkpoint's attention pool: global_pool differs.")
        out = {name: value for name, value in out.items() if name not in unused}
    return out


def _fit_head(state_dict: Dict[str, Any], model: LTRPModel) -> Dict[str, Any]:
    """Keep a new ML-Decoder where the file has another classifier or other classes."""
    classifier = model.backbone.get_classifier()
    if not isinstance(classifier, MLDecoder):
        return state_dict
    own = {f"head.{name}": tensor for name, tensor in classifier.state_dict().items()}
    out = dict(state_dict)
    if f"head.{BY_CLASS[0]}" not in out:
        _logger.warning("Ignoring the checkpoint's classifier: this model's ML-Decoder is new.")
        return {**{name: out[name] for name in out if not name.startswith("head.")}, **own}
    if (model.pretrained_cfg or {}).get("num_classes") != model.num_classes:
        out.update({f"head.{name}": own[f"head.{name}"] for name in BY_CLASS})
    return out


def _check_complete(model: LTRPModel, found: Dict[str, Tensor]) -> None:
    """Check names and shapes, but for what timm adapts: a stem's channels, a head's classes."""
    cfg, expected = model.pretrained_cfg or {}, dict(model.state_dict())
    for name in _names(cfg, "first_conv"):
        stem, own = found.get(f"{name}.weight"), expected.get(f"{name}.weight")
        if stem is not None and own is not None and stem.dim() == own.dim() == 4:
            if stem.shape[0] == own.shape[0] and stem.shape[2:] == own.shape[2:]:
                expected[f"{name}.weight"] = stem
    heads = _names(cfg, "classifier") if cfg.get("num_classes") != model.num_classes else []
    optional = [f"{name}.{part}" for name in heads for part in ("weight", "bias")]
    check_keys(expected, found, "the checkpoint", optional=optional)


def _names(cfg: Mapping[str, Any], key: str) -> List[str]:
    value = cfg.get(key)
    return [value] if isinstance(value, str) else list(value or ())


def _with_prefix(state_dict: Mapping[str, Any], prefix: str) -> Dict[str, Any]:
    return {
        name[len(prefix) :]: value for name, value in state_dict.items() if name.startswith(prefix)
    }
