"""Augmentation and losses of fine-tuning, all of them timm's."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from timm.data import Mixup, create_transform
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from ltrp_timm.data.keyed import Batch, Transform
from ltrp_timm.runtime.keyed_rng import seeded
from ltrp_timm.train.settings import check_range

ERASE_MODES = ("const", "rand", "pixel")
MIXUP_MODES = ("batch", "pair", "elem")


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What is done to training images and their labels; the defaults are the published ones.

    Args:
        scale: share of a picture's area that a random crop takes, from and to.
        ratio: width / height of a random crop, from and to.
        hflip: probability of a flip from left to right.
        vflip: probability of a flip upside down.
        color_jitter: strength of random brightness, contrast and saturation; 0 for none. timm
            leaves it out beside ``aa``.
        aa: an AutoAugment or RandAugment policy of timm's; "none" for none.
        reprob: probability of a random rectangle being erased.
        remode: "const", "rand" or "pixel": what stands there then.
        recount: rectangles at most.
        smoothing: of labels.
        mixup: alpha of mixup; 0 for none.
        cutmix: alpha of cutmix; 0 for none.
        mixup_prob: probability that a batch is mixed at all.
        mixup_switch_prob: probability of cutmix where both are on.
        mixup_mode: "batch", "pair" or "elem": what shares one draw.
        mixup_off_epoch: no mixing from this epoch on; 0 for never.
        bce_loss: binary cross entropy for each class, in place of the cross entropy.

    Raises:
        ValueError: a value out of its range.
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.0
    aa: str = "rand-m9-mstd0.5-inc1"
    reprob: float = 0.25
    remode: str = "pixel"
    recount: int = 1
    smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_mode: str = "batch"
    mixup_off_epoch: int = 0
    bce_loss: bool = False

    def __post_init__(self) -> None:
        for name in ("hflip", "vflip", "reprob", "mixup_prob", "mixup_switch_prob"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must be in [0, 1], got {value}.")
        if not 0.0 <= self.smoothing < 1.0:
            raise ValueError(f"smoothing must be in [0, 1), got {self.smoothing}.")
        for name in ("color_jitter", "mixup", "cutmix", "mixup_off_epoch"):
            value = getattr(self, name)
            if not 0.0 <= value < float("inf"):
                raise ValueError(f"{name} must be at least 0, got {value}.")
        if self.recount < 1:
            raise ValueError(f"recount must be at least 1, got {self.recount}.")
        for name, top in (("scale", 1.0), ("ratio", float("inf"))):
            check_range(name, getattr(self, name), top)
        for name, allowed in (("remode", ERASE_MODES), ("mixup_mode", MIXUP_MODES)):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")

    @property
    def mixes(self) -> bool:
        """Whether images are mixed."""
        return self.mixup > 0.0 or self.cutmix > 0.0

    def transforms(self, data_config: Mapping[str, Any]) -> tuple[Transform, Transform]:
        """For training, and for measuring as the backbone's configuration says.

        Raises:
            ValueError: a policy that timm does not know.
        """
        shared = {name: data_config[name] for name in ("input_size", "interpolation")}
        shared |= {name: data_config[name] for name in ("mean", "std")}
        crop = {name: data_config[name] for name in ("crop_pct", "crop_mode")}
        try:
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
            raise ValueError(f"aa names no policy of timm's, got {self.aa!r}.") from error
        _keep_a_bit(train)
        return train, create_transform(**shared, **crop, is_training=False)

    def loss_function(self) -> nn.Module:
        """(logits (B, C), targets (B,) or (B, C)) -> scalar."""
        if self.bce_loss:
            loss: nn.Module = BinaryCrossEntropy(smoothing=self.smoothing)
        elif self.mixes:
            loss = SoftTargetCrossEntropy()
        elif self.smoothing > 0.0:
            loss = LabelSmoothingCrossEntropy(smoothing=self.smoothing)
        else:
            loss = nn.CrossEntropyLoss()
        return loss

    def config(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return dataclasses.asdict(self)


def _keep_a_bit(transform: Any) -> None:
    """Have timm's policies posterize to one bit at least: at none, newer Pillows raise."""
    for step in transform.transforms:
        parts = [getattr(step, "ops", []), *getattr(step, "policy", [])]
        for operation in (operation for part in parts for operation in part):
            if operation.name.startswith("Posterize"):
                operation.level_fn = partial(_one_bit_at_least, operation.level_fn)


def _one_bit_at_least(level_fn: Callable[..., tuple[int]], *args: Any) -> tuple[int]:
    return (max(1, level_fn(*args)[0]),)


class Mixer:
    """timm's mixup and cutmix, with random numbers that belong to the batch.

    Args:
        augmentation: says how.
        num_classes: C.
    """

    def __init__(self, augmentation: Augmentation, num_classes: int) -> None:
        a = augmentation
        self.off_epoch = a.mixup_off_epoch
        self.mixup = Mixup(
            mixup_alpha=a.mixup,
            cutmix_alpha=a.cutmix,
            prob=a.mixup_prob,
            switch_prob=a.mixup_switch_prob,
            mode=a.mixup_mode,
            label_smoothing=a.smoothing,
            num_classes=num_classes,
        )

    def __call__(self, batch: Batch, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The batch's images (B, 3, H, W) and targets (B,), mixed: (B, 3, H, W) and (B, C)."""
        self.mixup.mixup_enabled = self.off_epoch == 0 or batch.epoch < self.off_epoch
        with seeded(batch.seed("mixup")):
            images, mixed = self.mixup(batch.images.clone(), targets)
        return images, mixed
