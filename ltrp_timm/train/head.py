"""The classifier that is fine-tuned, and the images that its model takes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.data import resolve_model_data_config
from timm.layers import trunc_normal_
from torch import nn

from ltrp_timm.layers.ml_decoder import MLDecoder, make_head
from ltrp_timm.models.ltrp import LTRPModel

HEAD_STD = 2e-5  # of a new head, as published


def fit_head(model: Any, num_classes: int, class_names: Sequence[str]) -> bool:
    """Give a model a new head for these classes, unless its head is already for them.

    A head stays if it has C classes and did not record other names. A new head starts close to
    zero, so that the features decide the first steps. The names are recorded.

    Args:
        model: a timm model or an LTRPModel, changed in place.
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
            if isinstance(head, MLDecoder):  # weights close to zero would stop its own layers
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
    """Give a pruned model the named head, unless it has one with these arguments.

    Returns:
        Whether the head is new.

    Raises:
        TypeError: the model is not pruned, or its backbone does not return tokens.
        ValueError: an argument is out of its range.
    """
    if not isinstance(model, LTRPModel):
        raise TypeError(f"head {name!r} needs a pruned model: give a ranker or a keep_ratio.")
    found = model.get_classifier()
    if isinstance(found, MLDecoder) and {**found.config(), **(args or {})} == found.config():
        return False
    model.set_classifier(make_head(name, model.backbone, args))
    return True


def image_config(model: Any, img_size: int | None = None) -> dict[str, Any]:
    """timm's data configuration of a model at its present image size.

    Raises:
        ValueError: the model does not take RGB images.
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
    """Run a model once on an image of zeros.

    Raises:
        ValueError: the model does not return logits (B, C).
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
