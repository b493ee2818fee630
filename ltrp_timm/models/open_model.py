"""Models by name, with their weights: the one way from a name to a model."""

import contextlib
import difflib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn

from ltrp_timm._text import one_line, printable
from ltrp_timm._timm import backbone_filter
from ltrp_timm.models.factory import checkpoint_filter_fn
from ltrp_timm.models.front_end import drop_patches
from ltrp_timm.models.ltrp import LTRPModel
from ltrp_timm.models.timm_interface import GENERIC
from ltrp_timm.rankers import ranker_class
from ltrp_timm.weights.files import PathLike, load_strictly, read_weights
from ltrp_timm.weights.hub import hub_errors

_SOURCES = ("hf-hub:", "hf_hub:", "local-dir:")
_RANKER, _REST = ("ranker", "ranker_weights", "ranker_args"), ("rest", "scales", "size_bias")
_FRONT_END = (*_RANKER, "keep_ratio", "selection", *_REST)


def is_source(name: str) -> bool:
    """Whether a name is that of a repository or a folder: its weights are there too."""
    return name.startswith(_SOURCES)


def check_name(name: str, label: str = "model") -> None:
    """Raise ValueError if timm does not know a model; a repository or a folder is not checked.

    ``label`` is the name of the argument in the error.
    """
    if is_source(name):
        return
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "see timm.list_models('ltrp*')."
        hint = f"a folder is given as {'local-dir:' + name!r}." if Path(name).is_dir() else hint
        if Path(name).is_file():
            hint = "it is a file: name the model, and give the file as checkpoint (--checkpoint)."
        raise ValueError(f"{label} {name!r} is unknown: {hint}")
    try:
        timm.models.get_pretrained_cfg(name)
    except RuntimeError as error:  # a tag that does not exist
        raise ValueError(f"{label} {name!r}: {error}") from error


def open_model(
    name: str,
    *,
    pretrained: bool | None = None,
    checkpoint: PathLike | None = None,
    plain: bool = False,
    **kwargs: Any,
) -> tuple[Any, str | None]:
    """Build a model by name and load its weights. Arguments that are None are left out.

    Args:
        name: an ``ltrp_*`` name, any timm model, ``hf-hub:…`` or ``local-dir:…``.
        pretrained: True downloads the published weights, and those of a named ranker that has
            some; False loads none; None loads what is on this machine, in a repository or a folder
            that ``name`` stands for, or in the Hub's local cache.
        checkpoint: weights of the model or of its plain backbone instead (see ``read_weights``).
            Position tables of another image size are resampled, as timm does, and where the file
            holds its weights under "model" as MAE's and LTRP's authors do: without antialiasing.
            ``num_classes`` is that of the file's head, unless it is given.
        plain: leave a timm model as it is; otherwise patches are dropped from it.
        **kwargs: ``ranker``, ``ranker_weights``, ``ranker_args``, ``keep_ratio``, ``selection``,
            ``rest``, ``scales`` and ``size_bias`` of ``drop_patches``, which replace the model's;
            and arguments of ``timm.create_model`` (``img_size``, ``num_classes``, …).

    Returns:
        The model in eval mode, and where its backbone's weights are from (None: they are random).

    Raises:
        ValueError: the name is unknown, or an argument is wrong or does not fit the model.
        TypeError: patches cannot be dropped from the model, or it does not know an argument.
        RuntimeError: weights do not fit; the message lists every difference.
        OSError: a file does not exist, or the Hub refuses or does not answer.
    """
    check_name(name)
    given = {key: value for key, value in kwargs.items() if value is not None}
    front = {key: given.pop(key) for key in _FRONT_END if key in given}
    if plain and front:
        raise ValueError(f"{', '.join(front)}: patches are not dropped from a plain model.")
    if pretrained and checkpoint is not None:
        raise ValueError("pretrained and checkpoint both name weights: give one, not both.")
    if pretrained and isinstance(front.get("ranker"), str) and "ranker_weights" not in front:
        if ranker_class(front["ranker"]).has_published_weights:
            front["ranker_weights"] = True
    if checkpoint is None:
        with _known_errors(name):
            model, origin = _create(name, pretrained, plain, front, given)
        published = (model.pretrained_cfg or {}).get("num_classes")
        if origin and model.num_classes not in (0, published):
            origin += f"; the head for {model.num_classes} classes is new and random"
        return model.eval(), origin
    found = read_weights(checkpoint)
    if "ranker_weights" in front and any(key.startswith("ranker.") for key in found.tensors):
        raise ValueError(f"{checkpoint} has a ranker: leave ranker_weights (--ranker-weights) out.")
    if not is_source(name):
        given.setdefault("num_classes", _num_classes(name, found.tensors))
    with _known_errors(name):
        model, _ = _create(name, False, plain, front, given)
    fit = checkpoint_filter_fn if isinstance(model, LTRPModel) else backbone_filter
    load_strictly(model, fit(found.tensors, model, not found.by_authors), str(checkpoint))
    average = " (average of the weights)" if found.averaged else ""
    return model.eval(), f"read from {printable(str(checkpoint))}{average}"


def with_front_end(found: nn.Module, front: Mapping[str, Any]) -> LTRPModel:
    """Drop patches from a model with these settings; all its other settings stay.

    Another ranker, or another ``rest``, ends an adaptive budget: its mean becomes the
    ``keep_ratio``.
    """
    if not isinstance(found, LTRPModel):
        return drop_patches(found, **front)
    coarse, ranker = set(_REST) & set(front), set(_RANKER) & set(front)
    if coarse or ranker:
        name = front.get("ranker") or getattr(found.ranker, "name", "")
        own = {**found.settings(), "validate": found.validate}
        other = front.get("rest", found.rest) != found.rest
        if other:  # these go with one of the two
            own = {key: own[key] for key in own if key not in ("scales", "size_bias", "fill")}
        if not ranker or (ranker == {"ranker"} and name == getattr(found.ranker, "name", "")):
            name = found.ranker  # with its weights
        if front.get("selection", found.selection) != found.selection:
            own.pop("selection_args")
        if ranker or other:
            own.pop("budget", None)  # its level belongs to the scores of the old ranker
        pruned = drop_patches(found.restore(), **{**own, **front, "ranker": name})
        # the same registered model, with the same classes
        pruned.pretrained_cfg = pruned.default_cfg = found.pretrained_cfg
        pruned._fixed_backbone, pruned._build_args = found._fixed_backbone, found._build_args
        return pruned
    for key, value in front.items():
        setattr(found, key, value)
    return found


@contextlib.contextmanager
def _known_errors(name: str) -> Iterator[None]:
    """Errors of timm and of file formats as one of four types."""
    repository = name.partition(":")[2] if is_source(name) else name
    try:
        with hub_errors(repository):
            yield
    except json.JSONDecodeError as error:
        text = f"the configuration in {printable(repository)} is not JSON: {error}."
        raise ValueError(text) from error
    except (ValueError, TypeError, RuntimeError, OSError):
        raise
    except Exception as error:
        raise ValueError(f"{printable(name)} cannot be built: {one_line(error)}") from error


def _create(
    name: str,
    pretrained: bool | None,
    plain: bool,
    front: Mapping[str, Any],
    kwargs: Mapping[str, Any],
) -> tuple[Any, str | None]:
    if is_source(name):
        load = pretrained is not False
        model = timm.create_model(name, pretrained=load, **kwargs)
        origin = f"those of {printable(name)}" if load else None
        return model if plain else with_front_end(model, front), origin
    origin = f"those that timm publishes for {name}" if pretrained else None
    kwargs = {**kwargs, **front, "pretrained": bool(pretrained)}
    cached = None if pretrained is False else _cached_weights(name)
    if cached is not None:
        origin = "found in the local cache"
        kwargs |= {"pretrained": True, "pretrained_cfg_overlay": {"file": cached}}
    if not plain and not name.startswith(GENERIC):
        name, kwargs["backbone"] = GENERIC, name
    try:
        return timm.create_model(name, **kwargs), origin
    except TypeError as error:
        if "argument 'img_size'" not in str(error) or kwargs.pop("img_size", None) is None:
            raise
        if not plain:
            timm.create_model(name, **kwargs)  # it refuses models that cannot drop patches
        raise TypeError(f"{name} takes no img_size (--img-size): leave it out.") from error


def _cached_weights(name: str) -> str | None:
    """The file with a model's weights in the local Hub cache."""
    repository = getattr(timm.models.get_pretrained_cfg(name), "hf_hub_id", None)
    if not repository:
        return None
    repository, _, revision = repository.partition("@")
    found = try_to_load_from_cache(repository, "model.safetensors", revision=revision or None)
    return found if isinstance(found, str) else None


def _num_classes(name: str, weights: Mapping[str, Tensor]) -> int:
    """Classes of the head in a file of weights; 0 where it has none."""
    names = getattr(timm.models.get_pretrained_cfg(name), "classifier", None) or "head"
    for head in [names] if isinstance(names, str) else names:
        for part in {head, f"backbone.{head}", head.removeprefix("backbone.")}:
            if f"{part}.weight" in weights:
                return int(weights[f"{part}.weight"].shape[0])
    return 0
