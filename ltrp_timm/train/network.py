"""What is fine-tuned: a model by name with its weights, front-end and head."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from timm.layers import trunc_normal_
from timm.models import load_checkpoint
from torch import nn

from ltrp_timm._text import printable
from ltrp_timm.layers.ml_decoder import MLDecoder, make_head
from ltrp_timm.models.factory import checkpoint_filter_fn
from ltrp_timm.models.ltrp import LTRPModel
from ltrp_timm.models.open_model import is_source, with_front_end
from ltrp_timm.models.timm_interface import GENERIC
from ltrp_timm.weights.files import check_keys, read_weights

HEAD_STD = 2e-5  # of a new head, as published
RANDOM = "random: this trains from the start (pretrained or checkpoint begins with weights)"


def build_network(
    name: str,
    front: Mapping[str, Any],
    pretrained: bool,
    checkpoint: Any,
    kwargs: Mapping[str, Any],
) -> tuple[Any, str | None]:
    """A model to fine-tune, with the head that its weights bring.

    Args:
        name: an ``ltrp_*`` name, any timm model, ``hf-hub:…`` or ``local-dir:…``.
        front: arguments of ``drop_patches``; a timm model without any stays as it is.
        pretrained: with the weights that timm publishes.
        checkpoint: file with weights of the model or of its plain backbone; or None.
        kwargs: arguments of timm's ``create_model``.

    Returns:
        The model, and where its weights are from; None: they are random.

    Raises:
        ValueError: unknown, or an argument that does not go with it.
        TypeError: patches cannot be dropped from it, or it does not know an argument.
        RuntimeError: weights do not fit.
        OSError: weights are not there.
    """
    if pretrained and checkpoint is not None:
        raise ValueError("a model begins with published weights or with a checkpoint, not both.")
    if is_source(name):
        if checkpoint is not None:
            raise ValueError(f"{name} has weights of its own: leave the checkpoint out.")
        found = timm.create_model(name, pretrained=True, **kwargs)
        prune = front or isinstance(found, LTRPModel)
        return (with_front_end(found, dict(front)) if prune else found), f"those of {name}"
    if not timm.is_model(name):
        raise ValueError(f"{name!r} is no model of timm's: see timm.list_models('ltrp*').")
    kwargs = dict(kwargs)
    if checkpoint is not None:
        kwargs["num_classes"] = _rows_of_head(name, Path(checkpoint))
    ours = name.split(".")[0] in timm.list_models(f"{GENERIC}*")
    if ours or not front:
        model = timm.create_model(name, pretrained=pretrained, **front, **kwargs)
    else:
        model = timm.create_model(GENERIC, pretrained, backbone=name, **front, **kwargs)
    if checkpoint is None:
        return model, f"those that timm publishes for {name}" if pretrained else None
    _load(model, Path(checkpoint))
    return model, f"read from {printable(checkpoint)}"


def _rows_of_head(name: str, checkpoint: Path) -> int:
    """Classes of the head in a file of weights; 0 where it has none."""
    weights, _ = read_weights(checkpoint)
    cfg = timm.models.get_pretrained_cfg(name)
    names = (cfg.classifier if cfg is not None else None) or "head"
    for head in [names] if isinstance(names, str) else names:
        for part in {head, f"backbone.{head}", head.removeprefix("backbone.")}:
            if f"{part}.weight" in weights:
                return int(weights[f"{part}.weight"].shape[0])
    return 0


def _load(model: Any, checkpoint: Path) -> None:
    if not isinstance(model, LTRPModel):
        load_checkpoint(model, str(checkpoint))
        return
    weights, _ = read_weights(checkpoint)
    weights = checkpoint_filter_fn(weights, model)
    check_keys(model.state_dict(), weights, str(checkpoint))
    model.load_state_dict(weights)


def fit_head(model: Any, num_classes: int, class_names: Sequence[str]) -> bool:
    """Give the model a head for these classes, unless it has one; and record their names.

    A head stays where it has as many classes, and those that it recorded, if it did, are the same.

    A new head begins at nearly nothing (standard deviation 2e-5), so that the features under it
    decide the first steps.

    Args:
        model: timm's or ours, changed in place.
        num_classes: C.
        class_names: C names, or none.

    Returns:
        Whether the head is new.
    """
    cfg = dict(getattr(model, "pretrained_cfg", None) or {})
    known = cfg.get("label_names")
    known = list(known.values()) if isinstance(known, Mapping) else list(known or ())
    others = bool(known and class_names) and set(known) != set(class_names)
    new = model.num_classes != num_classes or others
    if new:
        model.reset_classifier(num_classes)
        heads = model.get_classifier()
        for head in heads if isinstance(heads, tuple) else (heads,):
            if isinstance(head, MLDecoder):  # with layers of its own, which nothing would reach
                continue
            for module in head.modules():
                if isinstance(module, nn.Linear):
                    trunc_normal_(module.weight, std=HEAD_STD)
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
    for key in ("label_names", "label_descriptions"):
        cfg.pop(key, None)
    names = list(class_names) if new or not known else known
    model.pretrained_cfg = model.default_cfg = {
        **cfg,
        "num_classes": num_classes,
        **({"label_names": names} if names else {}),
    }
    return new


def put_head(model: Any, name: str, args: Mapping[str, Any] | None) -> bool:
    """Give a model a head of that name, unless it has such a one.

    Returns:
        Whether it is new.

    Raises:
        TypeError: no pruned model, or its backbone hands on no tokens.
        ValueError: an argument out of its range.
    """
    if not isinstance(model, LTRPModel):
        raise TypeError(f"head {name!r} needs a pruned model: give a ranker or a keep_ratio.")
    found = model.get_classifier()
    if isinstance(found, MLDecoder) and {**found.config(), **(args or {})} == found.config():
        return False
    model.set_classifier(make_head(name, model.backbone, args))
    return True


def image_config(model: Any, img_size: int | None = None) -> dict[str, Any]:
    """timm's data configuration of the model, with the image size that it has now.

    Raises:
        ValueError: it wants other images than RGB.
    """
    if isinstance(model, LTRPModel):
        config = model.data_config()
    else:
        config = resolve_model_data_config(model)
        size = getattr(getattr(model, "patch_embed", None), "img_size", None)
        size = (img_size, img_size) if size is None and img_size else size
        if size is not None:
            config["input_size"] = (config["input_size"][0], *size)
    channels = getattr(model, "in_chans", config["input_size"][0])
    if channels != 3:
        raise ValueError(f"pictures have 3 channels, the model takes {channels}.")
    return config


def check_network(model: Any) -> None:
    """Run a model once on zeros.

    Raises:
        ValueError: it has no head that a loss could be computed of.
    """
    size = image_config(model)["input_size"]
    parameter = next(model.parameters())
    images = torch.zeros(1, *size, device=parameter.device, dtype=parameter.dtype)
    training = model.training
    with torch.no_grad():
        out = model.eval()(images)
    model.train(training)
    if not isinstance(out, torch.Tensor) or out.dim() != 2:
        raise ValueError(f"{type(model).__name__} gives no logits (B, C).")
