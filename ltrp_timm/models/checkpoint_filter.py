"""Checkpoints of plain backbones and of whole models as weights of an LTRPModel."""

import logging
from typing import Any, Dict, List, Mapping

from torch import Tensor

from ltrp_timm._timm import backbone_filter
from ltrp_timm.layers.ml_decoder import BY_CLASS, MLDecoder, classifier_name
from ltrp_timm.models.ltrp import LTRPModel
from ltrp_timm.models.timm_interface import is_plain
from ltrp_timm.rankers.base import adapt_channels
from ltrp_timm.weights.files import check_keys

_logger = logging.getLogger(__name__)
_PREFIX = "backbone."


def checkpoint_filter_fn(
    state_dict: Dict[str, Any],
    model: LTRPModel,
    antialias: bool = True,
    keep_ranker: bool = False,
) -> Dict[str, Tensor]:
    """Weights of a plain backbone or of a whole model -> names and shapes of ``model``.

    The backbone's part goes through timm's own filter (other layouts, position embeddings of
    another size, see ``backbone_filter``). A plain file leaves the ranker's weights unchanged, and
    so does ``keep_ranker``. Whatever is left out is logged.

    Raises:
        RuntimeError: Names or shapes do not match; the message lists all of them.
    """
    for wrapper in ("model", "state_dict"):
        if isinstance(state_dict.get(wrapper), dict):
            state_dict = state_dict[wrapper]
    plain = is_plain(state_dict)
    inner = state_dict if plain else _with_prefix(state_dict, _PREFIX)
    inner = _fit_pooling(backbone_filter(inner, model.backbone, antialias), model.backbone)
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
    prefix = f"{classifier_name(model.backbone)}."
    own = {f"{prefix}{name}": tensor for name, tensor in classifier.state_dict().items()}
    out = dict(state_dict)
    if f"{prefix}{BY_CLASS[0]}" not in out:
        _logger.warning("Ignoring the checkpoint's classifier: this model's ML-Decoder is new.")
        return {**{name: out[name] for name in out if not name.startswith(prefix)}, **own}
    if (model.pretrained_cfg or {}).get("num_classes") != model.num_classes:
        out.update({f"{prefix}{name}": own[f"{prefix}{name}"] for name in BY_CLASS})
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
