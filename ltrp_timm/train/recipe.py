"""What a fine-tuning is made of, as plain values: the model, its budget, its teachers."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ltrp_timm.data.multi_label import MULTI_LABEL_LOSSES
from ltrp_timm.layers.ml_decoder import HEADS
from ltrp_timm.train.augment import Augmentation
from ltrp_timm.train.budget import check_keep_ratios
from ltrp_timm.train.settings import Settings, make_settings
from ltrp_timm.train.student import GATES

DEFAULTS: dict[str, Any] = {
    "epochs": 50,
    "base_lr": 1e-3,
    "weight_decay": 0.05,
    "layer_decay": 0.75,
    "min_lr": 1e-6,
}
MULTI_LABEL_DEFAULTS: dict[str, Any] = {
    "epochs": 100,
    "base_lr": 5e-4,
    "layer_decay": 0.65,
    "ema_decay": 0.9997,
}
MULTI_LABEL_KEEP_RATIO = 0.75
_ONE_CLASS = ("smoothing", "mixup", "cutmix", "bce_loss")  # what knows one class for an image
_BETAS = {"betas": (0.9, 0.999)}  # of AdamW


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is trained, and how patches, teacher and ranker take part.

    Args:
        num_classes: C; None: as many as the data has.
        pretrained: begin with the weights that timm publishes.
        checkpoint: begin with a file of weights, of the model or of its plain backbone.
        ranker: what scores the patches; None keeps the model's own, or takes contrast where a
            plain ViT is given a ``keep_ratio``.
        ranker_weights: folder, file or ``hf-hub:owner/name`` of the ranker.
        selection: how scores become patches; None keeps the model's own.
        index_cache: folder of ``rank --cache --crop-mode squash`` with orders of the training
            images, in place of the ranker while it trains; held-out images are ranked as ever.
        keep_ratio: share of patches to keep, in (0, 1]; several: one is drawn for each update, and
            each is measured. None keeps the model's own; a plain timm model keeps all.
        keep_schedule: "linear" or "cosine": from all patches to ``keep_ratio``, epoch by epoch.
        keep_schedule_epochs: how many epochs that takes; None for half of them.
        img_size: side of the images; None for the model's.
        model_kwargs: more arguments of timm's ``create_model``.
        drop_path: rate of stochastic depth; None keeps the model's own.
        distill: learn from an unpruned model too: "self" for the model as it begins, or a name, a
            folder (``local-dir:…``) or a repository (``hf-hub:…``) of another one.
        distill_weight: its share of the loss, in (0, 1].
        distill_temperature: of both softmaxes.
        distill_features: weight of the distance between kept tokens, beside the logits.
        train_ranker: train the ranker too, through ``gate``.
        gate: "straight-through": how a gradient is to reach the ranker.
        grad_checkpointing: recompute the blocks in the backward pass, to save memory.
        channels_last: memory layout of images and convolutions.
        multi_label: images have several classes, which ``labels`` names.
        labels: COCO's instance annotations (``.json``), or a ``.csv`` (image,labels with labels
            joined by semicolons; or image and a column of 0 and 1 for each class).
        val_labels: of ``val_data``.
        seen_classes: a file of class names, one a line: mAP of them, and of the others, apart.
        loss: of several classes: "asymmetric" or "bce"; None for "asymmetric".
        head: "ml_decoder" in place of the linear head; None keeps what the model has.
        head_args: options of that head.

    Raises:
        ValueError: a value out of its range.
    """

    num_classes: int | None = None
    pretrained: bool = False
    checkpoint: Any = None
    ranker: str | None = None
    ranker_weights: Any = None
    selection: str | None = None
    index_cache: Any = None
    keep_ratio: float | Sequence[float] | None = None
    keep_schedule: str | None = None
    keep_schedule_epochs: int | None = None
    img_size: int | None = None
    model_kwargs: Mapping[str, Any] | None = None
    drop_path: float | None = 0.1
    distill: str | None = None
    distill_weight: float = 0.5
    distill_temperature: float = 1.0
    distill_features: float = 0.0
    train_ranker: bool = False
    gate: str | None = None
    grad_checkpointing: bool = False
    channels_last: bool = False
    multi_label: bool = False
    labels: Any = None
    val_labels: Any = None
    seen_classes: Any = None
    loss: str | None = None
    head: str | None = None
    head_args: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.keep_ratio is not None:
            check_keep_ratios(self.keep_ratio)
        if self.num_classes is not None and self.num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {self.num_classes}.")
        if not 0.0 < self.distill_weight <= 1.0:
            raise ValueError(f"distill_weight must be in (0, 1], got {self.distill_weight}.")
        if not 0.0 < self.distill_temperature < math.inf:
            raise ValueError(
                f"distill_temperature must be above 0, got {self.distill_temperature}."
            )
        if not 0.0 <= self.distill_features < math.inf:
            raise ValueError(f"distill_features must be at least 0, got {self.distill_features}.")
        if self.drop_path is not None and not 0.0 <= self.drop_path < 1.0:
            raise ValueError(f"drop_path must be in [0, 1), got {self.drop_path}.")
        if self.gate is not None and self.gate not in GATES:
            raise ValueError(f"gate must be one of {', '.join(GATES)}, got {self.gate!r}.")
        if self.train_ranker and self.gate is None:
            raise ValueError(
                "train_ranker: choosing patches passes no gradient to the ranker, so it would not "
                "learn; choose gate='straight-through', or train it with train-ranker."
            )
        if self.gate and not self.train_ranker:
            raise ValueError("gate goes with train_ranker: a frozen ranker needs no gradient.")
        if self.distill is None and self.distill_features:
            raise ValueError("distill_features goes with distill.")
        if self.index_cache is not None and (self.gate or self.distill_features):
            raise ValueError("index_cache goes without gate and distill_features: they rank anew.")
        if self.selection == "adaptive":
            raise ValueError("selection 'adaptive' is calibrated on a trained model, not trained.")
        self._check_multi_label()

    def _check_multi_label(self) -> None:
        others = ("labels", "val_labels", "seen_classes", "loss", "head", "head_args")
        given = [name for name in others if getattr(self, name) is not None]
        if given and not self.multi_label:
            raise ValueError(f"{given[0]} goes with multi_label.")
        if self.multi_label and self.labels is None:
            raise ValueError("multi_label needs labels: COCO's annotations (.json) or a .csv.")
        if self.multi_label and self.distill is not None:
            raise ValueError("distill compares classes of which an image has one: no multi_label.")
        for name, allowed in (("loss", MULTI_LABEL_LOSSES), ("head", HEADS)):
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")
        if self.head_args is not None and self.head is None:
            raise ValueError("head_args go with head.")

    @property
    def front(self) -> dict[str, Any]:
        """Arguments of ``drop_patches`` that were given; none for a plain model with all patches.

        A whole share alone makes no pruned model of a plain one.
        """
        given = {name: getattr(self, name) for name in ("ranker", "ranker_weights", "selection")}
        front = {name: value for name, value in given.items() if value is not None}
        ratios = [] if self.keep_ratio is None else check_keep_ratios(self.keep_ratio)
        if not ratios or (ratios == [1.0] and not front and self.head is None):
            return front
        return {**front, "keep_ratio": ratios[0]}


def split_options(options: Mapping[str, Any]) -> tuple[Recipe, Augmentation, Settings]:
    """A user's values, by name, as the three sets of them.

    Raises:
        TypeError: a name that is in none.
        ValueError: a value out of its range.
    """
    parts = [
        {
            field.name: options[field.name]
            for field in dataclasses.fields(kind)
            if field.name in options
        }
        for kind in (Recipe, Augmentation)
    ]
    several = bool(options.get("multi_label"))
    if several:
        mixed = [name for name in _ONE_CLASS if name in parts[1]]
        if mixed:
            raise ValueError(f"{mixed[0]} is for images with one class: no multi_label.")
        parts[1]["smoothing"] = 0.0
    rest = {name: value for name, value in options.items() if not any(name in p for p in parts)}
    defaults = {**DEFAULTS, **(MULTI_LABEL_DEFAULTS if several else {})}
    if rest.get("opt", "adamw") == "adamw":
        defaults["opt_args"] = _BETAS
    return Recipe(**parts[0]), Augmentation(**parts[1]), make_settings(defaults, rest)
