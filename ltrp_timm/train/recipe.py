"""What a fine-tuning is made of, as plain values: the model, its budget, its images and labels."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal

from timm.data import Mixup, create_transform
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn

from ltrp_timm.data.keyed import Transform
from ltrp_timm.data.sources import SCALE, Sources
from ltrp_timm.layers.ml_decoder import Head
from ltrp_timm.losses import MultiLabelLoss
from ltrp_timm.runtime.keyed_rng import sample_seed
from ltrp_timm.runtime.world import World
from ltrp_timm.selection.registry import check_selection
from ltrp_timm.selection.rules import check_keep_ratio
from ltrp_timm.train.distill import Gate
from ltrp_timm.train.settings import (
    AtLeastOne,
    BelowOne,
    CropRatio,
    CropScale,
    NotNegative,
    Positive,
    Probability,
    Settings,
    Share,
    check_fields,
    make_settings,
    make_sources,
)
from ltrp_timm.weights.files import PathLike

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
Schedule = Literal["linear", "cosine"]
_FRONT = ("ranker", "ranker_weights", "selection", "rest", "scales", "size_bias")
_ONE_CLASS = ("smoothing", "mixup", "cutmix", "bce_loss")  # what needs one class per image
_MULTI_LABEL = (
    *("labels", "val_labels", "skip_absent", "seen_classes", "loss", "head", "head_args"),
)
_BETAS = {"betas": (0.9, 0.999)}  # of AdamW


@dataclasses.dataclass(frozen=True, kw_only=True)
class RestOptions:
    """What happens to the patches that are not kept.

    Args:
        rest: What happens to the other patches: drop, or coarse for tokens of a smaller image
            (default: the model's own, else drop).
        scales: With a coarse rest: 1 2, or 1 2 4 for blocks of 4 x 4 patches too (default: 1 2).
        size_bias: With a coarse rest: how much more attention a coarse token gets (default: 0.5).
    """

    rest: Literal["drop", "coarse"] | None = None
    scales: Sequence[int] | None = None
    size_bias: float | None = None


@dataclasses.dataclass(frozen=True)
class Recipe(RestOptions):
    """What is trained, and how patches, teacher and ranker take part.

    Args:
        num_classes: Number of classes (default: counted from the data).
        pretrained: Start from the weights that timm publishes.
        checkpoint: File of weights to start from, of the model or of its plain backbone.
        ranker: Ranker that scores the patches (default: the model's own; border where a plain ViT
            gets a ``keep_ratio``).
        ranker_weights: Weights of the ranker: a folder, a file or ``hf-hub:owner/name``.
        selection: How scores become patches (default: the model's own).
        index_cache: Folder of ``ltrp-timm rank --crop-mode squash`` with scores of the training
            images, used in training in place of the ranker.
        keep_ratio: Share of patches to keep, in (0, 1]; with several, one is drawn for each update
            and each is measured (default: the model's own; a plain timm model keeps all).
        keep_schedule: Go from all patches down to ``keep_ratio``, epoch by epoch.
        keep_schedule_epochs: Epochs until ``keep_ratio`` is reached (default: half of all).
        img_size: Side of the images (default: the model's).
        model_kwargs: More arguments of timm's ``create_model``.
        drop_path: Rate of stochastic depth, or None for the model's own.
        distill: Unpruned model to learn from besides the labels: "self" for the start weights, a
            model's name, ``local-dir:…`` or ``hf-hub:…``.
        distill_weight: Share of the distillation in the loss.
        distill_temperature: Temperature of both softmaxes.
        distill_features: Weight of the distance between kept tokens, beside the logits.
        train_ranker: Train the ranker too, through ``gate``.
        gate: How a gradient reaches the ranker.
        grad_checkpointing: Recompute the blocks in the backward pass, to save memory.
        channels_last: Use the channels-last memory layout for images and convolutions.
        multi_label: Images have several classes each, which ``labels`` lists.
        labels: COCO's instance annotations (``.json``), or a ``.csv`` (image,labels with labels
            joined by semicolons; or image and a column of 0 and 1 for each class).
        val_labels: Labels of ``val_data``, in the same form.
        skip_absent: Leave out images that a label file names and its folder lacks.
        seen_classes: File of class names, one per line, to report the mAP of these classes and of
            all others separately.
        loss: Loss of several classes (default: asymmetric).
        head: Head to use in place of the model's own.
        head_args: Arguments of that head.

    Raises:
        ValueError: A value is out of its range.
    """

    num_classes: Annotated[int, "at least 2"] | None = None
    pretrained: bool = False
    checkpoint: PathLike | None = None
    ranker: str | None = None
    ranker_weights: PathLike | bool | None = None
    selection: str | None = None
    index_cache: PathLike | None = None
    keep_ratio: float | Sequence[float] | None = None
    keep_schedule: Schedule | None = None
    keep_schedule_epochs: int | None = None
    img_size: int | None = None
    model_kwargs: Mapping[str, Any] | None = None
    drop_path: BelowOne | None = 0.1
    distill: str | None = None
    distill_weight: Share = 0.5
    distill_temperature: Positive = 1.0
    distill_features: NotNegative = 0.0
    train_ranker: bool = False
    gate: Gate | None = None
    grad_checkpointing: bool = False
    channels_last: bool = False
    multi_label: bool = False
    labels: PathLike | None = None
    val_labels: PathLike | None = None
    skip_absent: bool = False
    seen_classes: PathLike | None = None
    loss: MultiLabelLoss | None = None
    head: Head | None = None
    head_args: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.keep_ratio is not None:
            check_keep_ratios(self.keep_ratio)
        check_fields(self)
        if self.train_ranker and self.gate is None:
            raise ValueError(
                "train_ranker: choosing patches passes no gradient to the ranker, so it would not "
                "learn; choose gate='straight-through', or train it with train-ranker."
            )
        if self.gate and not self.train_ranker:
            raise ValueError("gate goes with train_ranker: a frozen ranker needs no gradient.")
        if self.distill is None and self.distill_features:
            raise ValueError("distill_features goes with distill.")
        if self.rest == "coarse" and (self.gate or self.distill_features):
            raise ValueError("gate and distill_features go with rest='drop'.")
        if self.index_cache is not None and (self.gate or self.distill_features):
            raise ValueError(
                "index_cache replaces the ranker in training; gate and distill_features run it."
            )
        if self.selection is not None:
            check_selection(self.selection)
        self._check_multi_label()

    def _check_multi_label(self) -> None:
        given = [name for name in _MULTI_LABEL if getattr(self, name) not in (None, False)]
        if given and not self.multi_label:
            raise ValueError(f"{given[0]} goes with multi_label.")
        if self.multi_label and self.labels is None:
            raise ValueError("multi_label needs labels: COCO's annotations (.json) or a .csv.")
        if self.multi_label and self.distill is not None:
            raise ValueError("distill needs one class per image; it does not go with multi_label.")
        if self.head_args is not None and self.head is None:
            raise ValueError("head_args go with head.")

    @property
    def front(self) -> dict[str, Any]:
        """The given arguments of ``drop_patches``; none for a plain model with all patches.

        ``keep_ratio=1`` alone does not make a plain model a pruned one.
        """
        given = {name: getattr(self, name) for name in _FRONT}
        front = {name: value for name, value in given.items() if value is not None}
        ratios = [] if self.keep_ratio is None else check_keep_ratios(self.keep_ratio)
        if not ratios or (ratios == [1.0] and not front and self.head is None):
            return front
        return {**front, "keep_ratio": ratios[0]}


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What is done to training images and their labels; the defaults are the published ones.

    Args:
        scale: Share of a picture's area that a random crop takes, from and to.
        ratio: Width / height of a random crop, from and to.
        hflip: Probability of a horizontal flip.
        vflip: Probability of a vertical flip.
        color_jitter: Strength of random brightness, contrast and saturation; 0 turns it off, and
            timm ignores it beside ``aa``.
        aa: AutoAugment or RandAugment policy, by timm's name; "none" turns it off.
        reprob: Probability of erasing a random rectangle.
        remode: What fills an erased rectangle.
        recount: Most rectangles to erase.
        smoothing: Label smoothing.
        mixup: Alpha of mixup; 0 turns it off.
        cutmix: Alpha of cutmix; 0 turns it off.
        mixup_prob: Probability of mixing a batch at all.
        mixup_switch_prob: Probability of cutmix where mixup and cutmix are both on.
        mixup_mode: What shares one draw: the batch, a pair of images or nothing.
        mixup_off_epoch: Epoch from which images are no longer mixed; 0 mixes to the end.
        bce_loss: Use binary cross entropy for each class in place of cross entropy.

    Raises:
        ValueError: A value is out of its range.
    """

    scale: CropScale = (0.08, 1.0)
    ratio: CropRatio = (3 / 4, 4 / 3)
    hflip: Probability = 0.5
    vflip: Probability = 0.0
    color_jitter: NotNegative = 0.0
    aa: str = "rand-m9-mstd0.5-inc1"
    reprob: Probability = 0.25
    remode: Literal["const", "rand", "pixel"] = "pixel"
    recount: AtLeastOne = 1
    smoothing: BelowOne = 0.1
    mixup: NotNegative = 0.0
    cutmix: NotNegative = 0.0
    mixup_prob: Probability = 1.0
    mixup_switch_prob: Probability = 0.5
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"
    mixup_off_epoch: Annotated[int, "at least 0"] = 0
    bce_loss: bool = False

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def mixes(self) -> bool:
        """Whether images are mixed."""
        return self.mixup > 0.0 or self.cutmix > 0.0

    def transforms(self, data_config: Mapping[str, Any]) -> tuple[Transform, Transform]:
        """Make the transforms for training and measuring; ValueError if ``aa`` is no policy."""
        shared = {key: data_config[key] for key in ("input_size", "interpolation", "mean", "std")}
        crop = {key: data_config[key] for key in ("crop_pct", "crop_mode")}
        try:
            if not re.fullmatch(r"\w+(-((?!t)[a-z]+\d[^-]*|tweights|t3aw?))*", self.aa):
                raise ValueError("timm would skip the part that it does not know.")
            train = create_transform(
                **shared,
                is_training=True,
                scale=tuple(self.scale),
                ratio=tuple(self.ratio),
                hflip=self.hflip,
                vflip=self.vflip,
                color_jitter=self.color_jitter or None,
                auto_augment=None if self.aa == "none" else self.aa,
                re_prob=self.reprob,
                re_mode=self.remode,
                re_count=self.recount,
            )
        except (AssertionError, KeyError, ValueError) as error:
            raise ValueError(
                f"aa names no policy of timm's, such as rand-m9-mstd0.5, got {self.aa!r}."
            ) from error
        _keep_a_bit(train)
        return train, create_transform(**shared, **crop, is_training=False)

    def mixup_function(self, num_classes: int) -> Any:
        """Make timm's mixup: images (B, 3, H, W) and targets (B,) -> the same and (B, C)."""
        return Mixup(
            mixup_alpha=self.mixup,
            cutmix_alpha=self.cutmix,
            prob=self.mixup_prob,
            switch_prob=self.mixup_switch_prob,
            mode=self.mixup_mode,
            label_smoothing=self.smoothing,
            num_classes=num_classes,
        )

    def loss_function(self) -> Any:
        """Make the loss: (logits (B, C), targets (B,) or (B, C)) -> scalar."""
        if self.bce_loss:
            return BinaryCrossEntropy(smoothing=self.smoothing)
        if self.mixes:
            return SoftTargetCrossEntropy()
        if self.smoothing > 0.0:
            return LabelSmoothingCrossEntropy(smoothing=self.smoothing)
        return nn.CrossEntropyLoss()


def _keep_a_bit(transform: Any) -> None:
    """Have timm's policies posterize to one bit at least: newer Pillows refuse zero bits."""
    for step in transform.transforms:
        parts = [getattr(step, "ops", []), *getattr(step, "policy", [])]
        for operation in (operation for part in parts for operation in part):
            if operation.name.startswith("Posterize"):
                operation.level_fn = partial(_one_bit_at_least, operation.level_fn)


def _one_bit_at_least(level_fn: Callable[..., tuple[int]], *args: Any) -> tuple[int]:
    return (max(1, level_fn(*args)[0]),)


def check_keep_ratios(keep_ratio: float | Sequence[float]) -> list[float]:
    """Shares of patches as a list; ValueError if one is out of range or comes twice."""
    ratios = list(keep_ratio) if isinstance(keep_ratio, Sequence) else [keep_ratio]
    if not ratios:
        raise ValueError("keep_ratio must be a number, or several, got none.")
    ratios = [check_keep_ratio(ratio) for ratio in ratios]
    if len(set(ratios)) < len(ratios):
        raise ValueError(f"keep_ratio names one share twice: {ratios}.")
    return ratios


class KeepPlan:
    """The keep ratio of each update, a function of (seed, epoch, update); see ``Recipe``.

    >>> plan = KeepPlan(0.5, "linear", 4, epochs=8)
    >>> [plan.ratio(epoch, 0) for epoch in range(6)]
    [1.0, 0.875, 0.75, 0.625, 0.5, 0.5]
    """

    def __init__(
        self,
        keep_ratio: float | Sequence[float],
        schedule: Schedule | None = None,
        schedule_epochs: int | None = None,
        *,
        epochs: int = 1,
        seed: int = 0,
    ) -> None:
        self.ratios = check_keep_ratios(keep_ratio)
        if schedule is None and schedule_epochs is not None:
            raise ValueError("keep_schedule_epochs goes with keep_schedule.")
        if schedule is not None and len(self.ratios) > 1:
            raise ValueError(f"keep_schedule leads to one keep_ratio, got {self.ratios}.")
        if schedule_epochs is not None and not 1 <= schedule_epochs <= epochs:
            raise ValueError(
                f"keep_schedule_epochs must be from 1 to {epochs}, got {schedule_epochs}."
            )
        self.schedule, self.seed = schedule, seed
        self.length = schedule_epochs or max(1, epochs // 2)
        self.epochs = epochs

    def ratio(self, epoch: int, update: int) -> float:
        """The share of patches that all processes keep in this update."""
        if len(self.ratios) > 1:
            draw = sample_seed(self.seed, epoch, update, "keep ratio")
            return self.ratios[draw % len(self.ratios)]
        if self.schedule is None or epoch >= self.length:
            return self.ratios[0]
        done = epoch / self.length
        if self.schedule == "cosine":
            done = (1.0 - math.cos(math.pi * done)) / 2.0
        return 1.0 + (self.ratios[0] - 1.0) * done

    def count(self) -> int:
        """Number of ratios in a run: each of them is a compiled graph."""
        if self.schedule is None:
            return len(self.ratios)
        return len({self.ratio(epoch, 0) for epoch in range(self.epochs)})

    def config(self) -> dict[str, Any]:
        """What a continuation must not change."""
        length = None if self.schedule is None else self.length
        return {"keep_ratio": self.ratios, "schedule": self.schedule, "schedule_epochs": length}


def split_options(options: Mapping[str, Any]) -> tuple[Recipe, Augmentation, Settings]:
    """Sort a user's values, by name, into recipe, augmentation and settings."""
    recipe, augmentation = (
        {field.name: options[field.name] for field in fields if field.name in options}
        for fields in map(dataclasses.fields, (Recipe, Augmentation))
    )
    rest = {name: v for name, v in options.items() if name not in {**recipe, **augmentation}}
    defaults = dict(DEFAULTS)
    if options.get("multi_label"):
        defaults |= MULTI_LABEL_DEFAULTS
        mixed = [name for name in _ONE_CLASS if name in augmentation]
        if mixed:
            raise ValueError(f"{mixed[0]} is for images with one class: no multi_label.")
        augmentation["smoothing"] = 0.0
    if rest.get("opt", "adamw") == "adamw":
        defaults["opt_args"] = _BETAS
    return Recipe(**recipe), Augmentation(**augmentation), make_settings(defaults, rest)


def crop_transforms(
    img_size: tuple[int, int], mean: Any, std: Any, scale: Any = SCALE
) -> tuple[Transform, Transform]:
    """The published augmentation of images without labels, and a centre crop, both (H, W)."""
    config = {"input_size": (3, *img_size), "interpolation": "bicubic", "mean": mean, "std": std}
    crop = {"crop_pct": 1.0, "crop_mode": "center"}
    return Augmentation(scale=scale, aa="none", reprob=0.0).transforms({**config, **crop})


def cropped_sources(
    data: Any, settings: Settings, world: World, model: Any, scale: Sequence[float], **options: Any
) -> Sources:
    """Open images without labels, as random crops and as centre crops.

    Size, normalisation and the smallest side are those of ``model``, a teacher or targets.
    """
    train, evaluation = crop_transforms(model.img_size, model.mean, model.std, scale)
    sources = make_sources(
        data,
        settings,
        world,
        train_transform=train,
        eval_transform=evaluation,
        img_size=model.img_size,
        min_side=max(model.patch_size),
        **options,
    )
    if tuple(scale) != SCALE:
        sources.fingerprint["scale"] = list(scale)
    return sources
