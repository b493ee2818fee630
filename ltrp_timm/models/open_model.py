"""Models by the names a user types: what a command builds, and what it says about it."""

import contextlib
import difflib
import os
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from timm.models import load_state_dict

from ltrp_timm._text import one_line, printable, say
from ltrp_timm.commands._console import CommandError
from ltrp_timm.models.front_end import drop_patches
from ltrp_timm.models.ltrp import LTRPModel
from ltrp_timm.models.timm_interface import GENERIC
from ltrp_timm.rankers import list_rankers, ranker_class
from ltrp_timm.selection import num_keep

_IDS = ("hf-hub:", "hf_hub:", "local-dir:")  # names that say where to find a model
_LONGEST = 300  # characters of somebody else's error


def is_source(name: str) -> bool:
    """Whether a name says where a model lies, with weights and all: a repository or a folder."""
    return name.startswith(_IDS)


def check_names(model_name: str, ranker: str | None, option: str = "--model") -> None:
    """Say before any long work that a name is unknown.

    Args:
        model_name: an ``ltrp_*`` name, any timm model, or ``hf-hub:…`` or ``local-dir:…``.
        ranker: one of ``list_rankers()``, or None.
        option: how the command calls the model's name.

    Raises:
        CommandError: one of them is unknown; similar names are named.
    """
    if ranker is not None and ranker not in list_rankers():
        raise CommandError(f"--ranker must be one of {', '.join(list_rankers())}, got {ranker!r}.")
    if is_source(model_name):
        return
    if not timm.is_model(model_name):
        near = difflib.get_close_matches(model_name, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "see timm.list_models('ltrp*')."
        raise CommandError(f"{option} {model_name!r} is unknown: {hint}")
    try:
        timm.models.get_pretrained_cfg(model_name)
    except RuntimeError as error:  # a tag that does not exist
        raise CommandError(f"{option} {model_name!r}: {error}") from error


def build_model(
    name: str,
    *,
    ranker: str | None = None,
    pretrained: bool = False,
    option: str = "--model",
    checkpoint: str | None = None,
    ranker_weights: str | None = None,
    keep_ratio: float | None = None,
    selection: str | None = None,
    **sizes: Any,
) -> tuple[LTRPModel, str | None]:
    """Build a model by name, with the weights that are at hand.

    Args:
        name: an ``ltrp_*`` name, any timm ViT, or ``hf-hub:…`` or ``local-dir:…``.
        ranker: replaces the model's own; None keeps it, or takes contrast where there is none.
        pretrained: download weights that are not in the Hub's local cache.
        option: how the command calls the model's name.
        checkpoint: file with weights of the model or of its plain backbone.
        ranker_weights: folder or file with weights of the ranker.
        keep_ratio: share of patches to keep; None keeps the model's own.
        selection: the model's; None keeps its own.
        **sizes: arguments of timm for the backbone (``img_size``, ``num_classes``), None where the
            model's own stays.

    Returns:
        The model in eval mode, and where its backbone's weights are from; None: they are random.

    Raises:
        CommandError: the model cannot be built; one line.
    """
    front: dict[str, Any] = {
        "ranker": ranker,
        "ranker_weights": weights_of_ranker(ranker, ranker_weights, pretrained),
        "keep_ratio": keep_ratio,
        "selection": selection,
    }
    front = {key: value for key, value in front.items() if value is not None}
    sizes = {key: value for key, value in sizes.items() if value is not None}
    with _in_one_line(option, name):
        model, weights = _create(name, front, sizes, pretrained and checkpoint is None, checkpoint)
        if checkpoint is not None:
            weights = _load(model, checkpoint, ranker_weights)
    return model.eval(), _with_head(weights, model, checkpoint)


def weights_of_ranker(ranker: str | None, given: str | None, pretrained: bool) -> Any:
    """What ``--ranker``, ``--ranker-weights`` and ``--pretrained`` together ask for.

    Args:
        ranker: its name; None where the model keeps its own.
        given: folder, file or repository; goes before all else.
        pretrained: published weights are wanted: the ranker's too, where there are some (those of
            ``attention`` are a backbone's that timm publishes).

    Returns:
        ``ranker_weights`` of ``create_model`` and ``drop_patches``.
    """
    if given is not None or ranker is None or not pretrained:
        return given
    return ranker_class(ranker).has_published_weights or None


def build_plain(
    name: str,
    *,
    pretrained: bool = False,
    option: str = "--model",
    checkpoint: str | None = None,
    **sizes: Any,
) -> tuple[Any, str | None]:
    """Build a timm model as it is, with the weights that are at hand; see ``build_model``.

    Raises:
        CommandError: the model cannot be built; one line.
    """
    sizes = {key: value for key, value in sizes.items() if value is not None}
    with _in_one_line(option, name):
        if is_source(name):
            model = timm.create_model(name, pretrained=checkpoint is None, **sizes)
            weights: str | None = f"those of {printable(name)}"
        else:
            weights, kwargs = _weights_of(name, pretrained and checkpoint is None, checkpoint)
            model = timm.create_model(name, **kwargs, **sizes)
        if checkpoint is not None:
            weights = _load(model, checkpoint, None)
    return model.eval(), _with_head(weights, model, checkpoint)


@contextlib.contextmanager
def _in_one_line(option: str, name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # timm, the Hub's client and file formats: no common type
        reason = textwrap.shorten(one_line(error), _LONGEST, placeholder=" …")
        raise CommandError(f"{option} {printable(name)}: {reason}") from error


def _with_head(weights: str | None, model: Any, checkpoint: str | None) -> str | None:
    published = (model.pretrained_cfg or {}).get("num_classes")
    if weights and checkpoint is None and model.num_classes not in (0, published):
        return f"{weights}; the head for {model.num_classes} classes is new and random"
    return weights


def _create(
    name: str,
    front: dict[str, Any],
    sizes: dict[str, Any],
    pretrained: bool,
    checkpoint: str | None,
) -> tuple[LTRPModel, str | None]:
    if is_source(name):
        found = timm.create_model(name, pretrained=checkpoint is None, **sizes)
        return with_front_end(found, front), f"those of {printable(name)}"
    weights, kwargs = _weights_of(name, pretrained, checkpoint)
    kwargs = {**kwargs, **front, **sizes}
    ours = name.startswith(GENERIC)
    if not ours:
        kwargs["backbone"] = name
    return timm.create_model(name if ours else GENERIC, **kwargs), weights


def _weights_of(
    name: str, pretrained: bool, checkpoint: str | None
) -> tuple[str | None, dict[str, Any]]:
    """Where a model's weights come from, and what tells timm."""
    cached = _cached_weights(name) if checkpoint is None else None
    if cached is None:
        return "downloaded" if pretrained else None, {"pretrained": pretrained}
    overlay = {"pretrained": True, "pretrained_cfg_overlay": {"file": cached}}
    return "found in the local cache", overlay


def with_front_end(found: torch.nn.Module, front: dict[str, Any]) -> LTRPModel:
    """A model of any kind with these settings; a ranker that it has stays unless one is named."""
    if not isinstance(found, LTRPModel):
        return drop_patches(found, **front)
    if "ranker" in front or "ranker_weights" in front:
        name = front.get("ranker") or getattr(found.ranker, "name", "")
        own = {"keep_ratio": found.keep_ratio, "selection": found.selection}
        return drop_patches(found.restore(), **{**own, **front, "ranker": name})
    for key, value in front.items():
        setattr(found, key, value)
    return found


def _load(model: Any, checkpoint: str, ranker_weights: str | None) -> str:
    if not os.path.isfile(checkpoint):
        raise FileNotFoundError(f"the checkpoint {checkpoint} is no file.")
    try:
        state_dict = load_state_dict(checkpoint, weights_only=True)
    except Exception as error:  # what unpicklers raise has no common type
        raise ValueError(f"{checkpoint} is no readable checkpoint: {one_line(error)}") from error
    if ranker_weights is not None and any(key.startswith("ranker.") for key in state_dict):
        raise ValueError(f"{checkpoint} brings a ranker of its own: leave --ranker-weights out.")
    model.load_state_dict(state_dict)
    return f"read from {printable(checkpoint)}"


def _cached_weights(name: str) -> str | None:
    """The file with a model's weights in the local Hub cache."""
    repository = getattr(timm.models.get_pretrained_cfg(name), "hf_hub_id", None)
    if not repository:
        return None
    repository, _, revision = repository.partition("@")
    found = try_to_load_from_cache(repository, "model.safetensors", revision=revision or None)
    return found if isinstance(found, str) else None


def describe_model(
    model: LTRPModel, name: str, weights: str | None, keep_ratios: Sequence[float]
) -> None:
    """Say what a model is: its size, its ranker, how many patches it keeps, its weights."""
    size = model.data_config()["input_size"][-2:]
    h, w = model.grid_size(torch.empty(1, model.in_chans, *size, device="meta"))
    kept = ", ".join(f"{num_keep(h * w, r)} of {h * w} at {r:g}" for r in keep_ratios)
    backbone = f"{_millions(model.backbone)}, images of {size[0]}x{size[1]}"
    say(f"model       {printable(name)}, {backbone}")
    say(f"ranker      {model.ranker.name}: {_about_ranker(model.ranker)}")
    say(f"patches     keeps {kept}")
    random = "random (not in the cache; --pretrained downloads them)"
    say(f"backbone weights: {weights or random}")


def _about_ranker(ranker: Any) -> str:
    if ranker.name == "random":
        return "a fixed random order, looks at nothing"
    if not ranker.learned:
        return "weight-free, no learning"
    state = "learned" if ranker.trained else "untrained here, so its choice means nothing"
    state += f" ({ranker.origin})" if ranker.origin else ""
    return f"{_millions(ranker)}, {state}"


def _millions(module: Any) -> str:
    count = sum(parameter.numel() for parameter in module.parameters())
    return f"{count / 1e6:.{1 if count > 1e6 else 2}f} M parameters"


@contextlib.contextmanager
def quiet_about_training() -> Iterator[None]:
    """The line on the ranker says already what the model's warning would."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the .* ranker has no trained weights")
        yield
