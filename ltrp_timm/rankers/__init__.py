"""Rankers: images (B, C, H, W) -> score map (B, h, w), higher = keep first."""

import inspect
from functools import partial
from importlib.resources import as_file, files
from typing import Any, Callable, Dict, List, Optional, Union

from torch import nn

from ltrp_timm.rankers.attention import AttentionRanker, FeatureContrastRanker
from ltrp_timm.rankers.base import adapt_channels
from ltrp_timm.rankers.class_map import CamRanker, GradCamRanker
from ltrp_timm.rankers.conv import ConvRanker
from ltrp_timm.rankers.vit import VitRanker
from ltrp_timm.rankers.weight_free import (
    STATISTICS,
    BorderRanker,
    ContrastRanker,
    DpcKnnRanker,
    RandomRanker,
    StatisticRanker,
)
from ltrp_timm.weights.files import PathLike, build_and_load, read_weights
from ltrp_timm.weights.hub import hub_errors
from ltrp_timm.weights.untrusted import NEVER_SAVED, check_saved_args

DEFAULT_RANKER = "border"
PUBLISHED = "score_net."  # prefix of the ranker in checkpoints of the paper's authors
_RANKERS: Dict[str, Callable[..., Any]] = {
    "attention": AttentionRanker,
    "border": BorderRanker,
    "cam": CamRanker,
    "contrast": ContrastRanker,
    "conv": ConvRanker,
    "dpc_knn": DpcKnnRanker,
    "feature_contrast": FeatureContrastRanker,
    "grad_cam": GradCamRanker,
    "vit_tiny": partial(VitRanker, embed_dim=192, depth=12, num_heads=3),
    "vit_small": partial(VitRanker, embed_dim=384, depth=12, num_heads=6),
    "vit_base": partial(VitRanker, embed_dim=768, depth=12, num_heads=12),
    "random": RandomRanker,
    **{name: partial(StatisticRanker, name) for name in STATISTICS},
}


def list_rankers() -> List[str]:
    """Names that ``create_ranker`` accepts.

    >>> list_rankers()[:3]
    ['attention', 'border', 'cam']
    """
    return sorted(_RANKERS)


def ranker_class(name: str) -> Any:
    """The class of a ranker; ValueError if the name is unknown."""
    if name not in _RANKERS:
        raise ValueError(
            f"ranker must be one of {', '.join(list_rankers())} or an nn.Module, got {name!r}."
        )
    return getattr(_RANKERS[name], "func", _RANKERS[name])


def create_ranker(
    name: str,
    pretrained: Union[bool, PathLike] = False,
    cache_dir: Optional[PathLike] = None,
    token: Optional[str] = None,
    **kwargs: Any,
) -> Any:
    """Create a ranker.

    Args:
        name: one of ``list_rankers()``.
        pretrained: a folder written by ``ranker.save``, a file with weights of this ranker (also a
            checkpoint of the paper's authors), or ``hf-hub:owner/name[@revision]``. True loads the
            conv ranker's experimental weights from this package, which find objects no better than
            the weight-free border, or the weights that timm publishes for the backbone of
            attention, feature_contrast, cam and grad_cam.
        cache_dir: folder for downloads; as in huggingface_hub.
        token: for private repositories; as in huggingface_hub.
        **kwargs: arguments of the ranker's class; they override a saved configuration.

    Returns:
        The ranker, an ``nn.Module`` images -> (B, h, w).

    Raises:
        ValueError: `name` is unknown, the ranker has no weights or none are published, or the saved
            configuration is of another ranker.
        FileNotFoundError: ``pretrained`` does not exist.
        OSError: The Hub refuses or does not answer; the message says what to do.
        RuntimeError: The weights do not fit; every missing or unexpected name is listed.

    >>> create_ranker("contrast", patch_size=14).patch_size
    (14, 14)
    """
    kind = ranker_class(name)
    if pretrained is False or pretrained is None:
        return _named(name, kwargs)
    if not kind.learned:
        raise ValueError(
            f"the {name} ranker has no weights: leave {pretrained!r} (--ranker-weights) out."
        )
    if pretrained is not True:
        return _load(name, pretrained, kwargs, cache_dir, token)
    if not kind.has_published_weights:
        raise ValueError(
            f"no published weights exist for the {name} ranker: pass pretrained=<folder, file "
            "or hf-hub:owner/name>."
        )
    if not kind.brings_weights:
        with hub_errors(str(kwargs.get("backbone", name))):
            return _named(name, {**kwargs, "pretrained": True})
    from ltrp_timm import __version__

    with as_file(files("ltrp_timm") / "weights" / f"{name}.safetensors") as path:
        ranker = _load(name, path, kwargs)
    ranker.origin = f"experimental, part of ltrp_timm {__version__}"
    return ranker


def _load(
    name: str,
    source: PathLike,
    kwargs: Dict[str, Any],
    cache_dir: Optional[PathLike] = None,
    token: Optional[str] = None,
) -> Any:
    found = read_weights(source, cache_dir=cache_dir, token=token)
    inner = {n[len(PUBLISHED) :]: t for n, t in found.tensors.items() if n.startswith(PUBLISHED)}
    tensors = inner or found.tensors
    saved = _saved_args(name, found.config, source)
    if not any(n.startswith("border.") for n in tensors):  # conv of an older version
        saved = {**ranker_class(name).older_args, **saved}
    ranker: Any = build_and_load(
        lambda **args: _named(name, args),
        {**saved, **kwargs},
        tensors,
        str(source),
        lambda tensors, model: adapt_channels(tensors, model.state_dict()),
    )
    ranker.trained = True
    return ranker


def _named(name: str, kwargs: Dict[str, Any]) -> nn.Module:
    ranker: nn.Module = _RANKERS[name](**kwargs)
    ranker.name = name  # type: ignore[assignment]  # several names may have one class
    return ranker


def _saved_args(name: str, config: Any, source: PathLike) -> Dict[str, Any]:
    if config is None:
        return {}
    saved = config.get("ranker")
    if saved is None and "architecture" in config:
        raise ValueError(f"{source} holds a whole model, not a {name} ranker alone.")
    if saved != name:
        what = "no ranker" if saved is None else f"a {saved!r} ranker, not {name!r}"
        raise ValueError(f"{source} holds {what}.")
    parameters = inspect.signature(ranker_class(name).__init__).parameters
    known = set(parameters) - {"self", "generator", *NEVER_SAVED}
    takes_more = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    return check_saved_args(config.get("args"), source, None if takes_more else known, NEVER_SAVED)
