"""How arguments of ``timm.create_model`` become an LTRPModel: backbone, cfg, weights."""

import dataclasses
import importlib
import inspect
import logging
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple, Union

import timm
from timm.models import PretrainedCfg, build_model_with_cfg
from timm.models._builder import resolve_pretrained_cfg
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from ltrp_timm.layers.ml_decoder import BY_CLASS, MLDecoder, classifier_name
from ltrp_timm.models.front_end import drop_patches
from ltrp_timm.models.ltrp import LTRPModel
from ltrp_timm.models.timm_interface import GENERIC, is_plain, wrap_pretrained_cfg
from ltrp_timm.rankers import adapt_channels
from ltrp_timm.weights.files import WEIGHT_SUFFIXES, check_keys, locate
from ltrp_timm.weights.hub import PREFIX, hub_errors
from ltrp_timm.weights.untrusted import NEVER_SAVED, check_saved_args, shapes_of

_logger = logging.getLogger(__name__)

_FRONT_END = (
    "ranker",
    "keep_ratio",
    "selection",
    "selection_args",
    "validate",
    "fill",
    "ranker_weights",
    "ranker_args",
    "head",
    "head_args",
)
_FEATURES = ("features_only", "out_indices", "feature_cls")
_SOURCES = ("file", "url", "hf_hub_id", "state_dict")
_PREFIX = "backbone."
_DESCRIPTIVE = (  # fields of a cfg that nothing is built of
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
    without weights, and one file, of a plain backbone or of a whole model, fills it. So does that
    of the generic one, or an overlay with a weight source; without them its ``pretrained=True``
    pulls the backbone's weights as timm would.

    Args:
        variant: the registered name.
        pretrained: load weights.
        backbone: name of the timm ViT; for the generic model with a tag, or a source as in timm.
        pretrained_cfg: as in timm.
        pretrained_cfg_overlay: as in timm.
        cache_dir: as in timm.
        **kwargs: arguments of ``drop_patches`` and of timm's feature wrapper; the rest goes to the
            backbone.

    Raises:
        TypeError: patches cannot be dropped from the backbone, or it does not know an argument.
        ValueError: a tag for the generic model (tags belong to the backbone's name), or a value out
            of its range.
        RuntimeError: weights do not fit.
        OSError: weights are not there, or the Hub does not give them.
    """
    generic = variant == GENERIC
    if generic and isinstance(pretrained_cfg, str) and pretrained_cfg:
        raise ValueError(
            f"{variant} has no tag {pretrained_cfg!r}: write the tag behind the backbone's name."
        )
    overlay = dict(pretrained_cfg_overlay or {})
    front, features, rest = _split_kwargs(kwargs)
    whole = not generic or bool(pretrained_cfg) or any(overlay.get(key) for key in _SOURCES)
    front["cache_dir"] = cache_dir
    if not whole:
        source = {"pretrained": pretrained, "cache_dir": cache_dir}
        with hub_errors(str(_cfg_of(backbone).get("hf_hub_id") or backbone)):
            net = timm.create_model(
                backbone, pretrained_cfg_overlay=overlay or None, **source, **rest
            )
        cfg = wrap_pretrained_cfg(getattr(net, "pretrained_cfg", None))
        return _assemble(net, variant, False, cfg, front, features, rest, cache_dir)
    base = _plain(pretrained_cfg or (wrap_pretrained_cfg(_cfg_of(backbone)) if generic else None))
    saved = _check_saved(base, kwargs.get("pretrained_model_args"))
    cfg = resolve_pretrained_cfg(variant, base, overlay).to_dict()
    if saved and "device" not in rest:
        own = {name: value for name, value in front.items() if name != "ranker_weights"}
        weights = _weights_size(cfg, cache_dir) if pretrained else None
        shapes_of(lambda: drop_patches(_bare_backbone(backbone, cfg, rest), **own), saved, weights)
    net = _bare_backbone(backbone, cfg, rest)
    with hub_errors(str(cfg.get("hf_hub_id") or variant)):
        return _assemble(net, variant, pretrained, cfg, front, features, rest, cache_dir)


def _weights_size(cfg: Mapping[str, Any], cache_dir: Optional[str]) -> Optional[int]:
    """Bytes of the weights in a folder or repository; None when that has none."""
    if cfg.get("source") == "local-dir":
        folder = Path(str(cfg.get("file")))
    else:
        folder = locate(f"{PREFIX}{cfg.get('hf_hub_id')}", cache_dir=cache_dir)
    files = [path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES]
    return max((path.stat().st_size for path in files), default=None)


def _check_saved(cfg: Any, args: Any) -> str:
    """Check a configuration out of a folder or repository; returns where it is from, or "".

    Raises:
        ValueError: it says what only the caller may say, or what no model is made of.
    """
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
    if ":" in name:  # a folder or a repository says itself what it holds
        return timm.create_model(name, **kwargs)
    if cfg.get("fixed_input_size"):  # a tag may have been trained at another size
        kwargs = {"img_size": tuple(cfg["input_size"][-2:]), **kwargs}
    architecture = timm.models.get_arch_name(name)
    return timm.create_model(architecture, pretrained_cfg=_unwrap_cfg(cfg, architecture), **kwargs)


def _assemble(
    net: nn.Module,
    variant: str,
    pretrained: bool,
    cfg: Dict[str, Any],
    front: Dict[str, Any],
    features: Dict[str, Any],
    rest: Dict[str, Any],
    cache_dir: Optional[str],
) -> nn.Module:
    """Wrap a built backbone and have timm load weights and make feature wrappers."""

    def wrap(**_: Any) -> LTRPModel:
        model = drop_patches(net, **front)
        model._fixed_backbone = variant != GENERIC
        return model

    model: nn.Module = build_model_with_cfg(
        wrap,
        variant,
        pretrained,
        pretrained_cfg=cfg,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        cache_dir=cache_dir,
        **rest,
        **features,
    )
    return model


def _split_kwargs(kwargs: Dict[str, Any]) -> Tuple[Dict[str, Any], Dict[str, Any], Dict[str, Any]]:
    """Arguments for the front-end, for timm's feature wrapper, and for the backbone.

    Raises:
        ValueError: a feature wrapper that would hand out tokens without their places.
    """
    front = {name: kwargs[name] for name in _FRONT_END if name in kwargs}
    features = {name: kwargs[name] for name in _FEATURES if name in kwargs}
    rest = {name: kwargs[name] for name in kwargs if name not in (*_FRONT_END, *_FEATURES)}
    wrapper = features.get("feature_cls", "getter")
    if wrapper != "getter" and wrapper is not FeatureGetterNet:
        raise ValueError(f"features of a pruned model need feature_cls='getter', got {wrapper!r}.")
    saved = kwargs.get("pretrained_model_args") or {}
    for part in ("ranker", "selection"):
        options = f"{part}_args"
        if saved and front.get(part) != saved.get(part):
            if front.get(options) == saved.get(options):
                front.pop(options, None)  # those that were saved do not fit another one
    return front, features, rest


def _cfg_of(backbone: str) -> Dict[str, Any]:
    if ":" in backbone:
        return {}
    cfg = timm.models.get_pretrained_cfg(backbone)
    return cfg.to_dict() if cfg is not None else {}


def _plain(cfg: Any) -> Any:
    return cfg.to_dict() if isinstance(cfg, PretrainedCfg) else cfg


def backbone_cfg(tag: str, **changes: Any) -> Optional[PretrainedCfg]:
    """timm's cfg of ``arch.tag`` as that of a registered model; None where this timm lacks it."""
    cfg = timm.models.get_pretrained_cfg(tag)
    if cfg is None:
        return None
    wrapped = wrap_pretrained_cfg(cfg.to_dict())
    # the Hub holds native weights also where the url names an original JAX file
    changes = {"url": None, "custom_load": False, "architecture": None, "tag": None, **changes}
    return dataclasses.replace(PretrainedCfg(**wrapped), **changes)


def _unwrap_cfg(cfg: Mapping[str, Any], backbone: str) -> Dict[str, Any]:
    """The whole model's cfg as its backbone's, without a weight source."""
    out = {name: value for name, value in cfg.items() if name not in (*_SOURCES, "source", "tag")}
    out["architecture"] = timm.models.get_arch_name(backbone)
    for name in ("first_conv", "classifier"):
        value = out.get(name)
        if isinstance(value, str):
            out[name] = value.removeprefix(_PREFIX)
        elif value is not None:
            out[name] = tuple(part.removeprefix(_PREFIX) for part in value)
    return out


def checkpoint_filter_fn(state_dict: Dict[str, Any], model: LTRPModel) -> Dict[str, Tensor]:
    """Weights of a plain backbone or of a whole model -> names and shapes of ``model``.

    The backbone's part goes through timm's own filter (other layouts, position embeddings of
    another size). A plain file leaves the ranker's weights as they are. Nothing is left out in
    silence.

    Raises:
        RuntimeError: a table of what is missing, unexpected or of another shape.
    """
    for wrapper in ("model", "state_dict"):
        if isinstance(state_dict.get(wrapper), dict):
            state_dict = state_dict[wrapper]
    plain = is_plain(state_dict)
    inner = state_dict if plain else _with_prefix(state_dict, _PREFIX)
    inner = _fit_backbone(backbone_filter(inner, model.backbone), model.backbone)
    inner = _fit_head(inner, model)
    own = model.ranker.state_dict()
    ranker = own if plain else adapt_channels(_with_prefix(state_dict, "ranker."), own)
    if ranker and not own:
        _logger.warning("Leaving out the checkpoint's ranker: this model's has no weights.")
        ranker = {}
    out = {f"ranker.{name}": tensor for name, tensor in ranker.items()}
    out.update({f"{_PREFIX}{name}": tensor for name, tensor in inner.items()})
    if not plain:  # names that belong to neither are named below
        known = (_PREFIX, "ranker.")
        out.update({name: state_dict[name] for name in state_dict if not name.startswith(known)})
    _check_complete(model, out)
    return out


def _fit_head(state_dict: Dict[str, Any], model: LTRPModel) -> Dict[str, Any]:
    """A new ML-Decoder stays new where the file has another classifier, or other classes."""
    classifier = model.backbone.get_classifier()
    if not isinstance(classifier, MLDecoder):
        return state_dict
    prefix = f"{classifier_name(model.backbone)}."
    own = {f"{prefix}{name}": tensor for name, tensor in classifier.state_dict().items()}
    queries = state_dict.get(f"{prefix}{BY_CLASS[0]}")
    out = dict(state_dict)
    if queries is None:
        _logger.warning("Leaving out the checkpoint's classifier: this model's ML-Decoder is new.")
        return {**{name: out[name] for name in out if not name.startswith(prefix)}, **own}
    if (model.pretrained_cfg or {}).get("num_classes") != model.num_classes:
        out.update({f"{prefix}{name}": own[f"{prefix}{name}"] for name in BY_CLASS})
    return out


def _check_complete(model: LTRPModel, found: Dict[str, Tensor]) -> None:
    """Check keys; what timm adapts later may differ: a stem in channels, a head in classes."""
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


def backbone_filter(state_dict: Dict[str, Any], backbone: nn.Module) -> Dict[str, Any]:
    """timm's filter of a model's family: other layouts, position tables of another size."""
    for kind in type(backbone).__mro__:
        fn = getattr(importlib.import_module(kind.__module__), "checkpoint_filter_fn", None)
        if fn is not None:
            # DeiT-3 files name LayerScale otherwise; the option touches no other names
            named = "adapt_layer_scale" in inspect.signature(fn).parameters
            out: Dict[str, Any] = fn(
                state_dict, backbone, **({"adapt_layer_scale": True} if named else {})
            )
            return out
    return state_dict


def _fit_backbone(state_dict: Dict[str, Any], backbone: Any) -> Dict[str, Any]:
    """Follow a changed ``global_pool``, and say so: the norm moves, an attention pool goes."""
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
        _logger.warning("Leaving out the checkpoint's attention pool: global_pool is another one.")
        out = {name: value for name, value in out.items() if name not in unused}
    return out
