"""The tasks of fine-tuning: one class per image, or several, at one keep ratio or several."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ltrp_timm._text import first_names, say
from ltrp_timm.data.keyed import Batch
from ltrp_timm.losses import MultiLabelLoss, multi_label_loss
from ltrp_timm.measure.accuracy import AccuracyCounter, PrecisionCounter
from ltrp_timm.models.ltrp import LTRPModel
from ltrp_timm.runtime.keyed_rng import sample_seed, seeded
from ltrp_timm.runtime.world import World
from ltrp_timm.share.save import model_config, save_pretrained
from ltrp_timm.train.distill import Distillation, Student
from ltrp_timm.train.loop import Task
from ltrp_timm.train.recipe import Augmentation, KeepPlan
from ltrp_timm.visualize import keeping, kept_patches, show_images
from ltrp_timm.weights.files import save_weights

_MAX_NAMES = 3  # classes in a caption


class ClassifyTask(Task):
    """A model that learns one class per image, pruned or timm's as it is.

    Args:
        model: On the device.
        plan: Keep ratio of each update; ignored by a plain model.
        augmentation: Its loss and mixing are applied here.
        distillation: Distillation from an unpruned model, or None.
        gate: Train the ranker too, see ``Student``.
        channels_last: Use the channels-last memory layout for the images.
        cached: Training images bring the scores of their patches.
    """

    name = "finetune"
    metric = "top1"

    def __init__(
        self,
        model: Any,
        plan: KeepPlan,
        augmentation: Augmentation,
        *,
        distillation: Distillation | None = None,
        gate: bool = False,
        channels_last: bool = False,
        cached: bool = False,
    ) -> None:
        needs_tokens = gate or (distillation is not None and distillation.features > 0)
        super().__init__(model, Student(model, gate) if needs_tokens else None)
        self.plan, self.augmentation = plan, augmentation
        self.distillation, self.gate = distillation, gate
        self.channels_last, self.cached = channels_last, cached
        self.pruned = isinstance(model, LTRPModel)
        self.num_graphs = plan.count() if self.pruned else 1
        loss = augmentation.loss_function().to(next(model.parameters()).device)
        self.loss_function: Callable[[Tensor, Tensor], Tensor] = loss
        self.mixup = augmentation.mixup_function(model.num_classes) if augmentation.mixes else None
        if distillation is None and not augmentation.bce_loss:
            self.chance = math.log(model.num_classes)
        self.counters: defaultdict[str, AccuracyCounter] = defaultdict(AccuracyCounter)
        self.absent: tuple[str, ...] = ()

    def config(self) -> dict[str, Any]:
        """What a continuation must not change."""
        names = (self.model.pretrained_cfg or {}).get("label_names") or ()
        rest = self.model.settings() if self.pruned else {}
        return {
            "num_classes": self.model.num_classes,
            "classes": sample_seed(0, 0, 0, "\n".join(map(str, names))),
            "selection": self.model.selection if self.pruned else None,
            "augmentation": dataclasses.asdict(self.augmentation),
            "distill": self.distillation.config() if self.distillation else None,
            "gate": self.gate,
            "index_cache": self.cached,
            **(self.plan.config() if self.pruned else {}),
            **{name: rest[name] for name in ("rest", "scales", "size_bias") if name in rest},
        }

    def loss(self, forward: nn.Module, batch: Batch) -> Tensor:
        """Mean loss against the labels and, with distillation, against the teacher."""
        images, targets = self.mixed(batch)
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        given = {}
        if self.pruned:
            self.model.keep_ratio = self.plan.ratio(batch.epoch, batch.update)
        if batch.scores is not None:
            given["keep_indices"] = self.model.select(batch.scores, images)
        out = forward(images, **given)
        logits, tokens, keep = out if isinstance(out, tuple) else (out, None, None)
        loss: Tensor = self.loss_function(logits, targets)
        if self.distillation is None:
            return loss
        distilled = self.distillation.loss(images, logits, tokens, keep)
        return torch.lerp(loss, distilled, self.distillation.weight)

    def mixed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Images and targets of a batch, mixed by random numbers that belong to it."""
        images, targets = batch.images, self.checked_targets(batch)
        if self.mixup is None:
            return images, targets
        off = self.augmentation.mixup_off_epoch
        self.mixup.mixup_enabled = off == 0 or batch.epoch < off
        with seeded(batch.seed("mixup")):
            return self.mixup(images.clone(), targets)

    def checked_targets(self, batch: Batch) -> Tensor:
        """The class numbers (B,) of a batch; ValueError if one is missing or is no class."""
        targets, count = batch.targets, self.model.num_classes
        wrong = targets[batch.real & ((targets < 0) | (targets >= count))]
        if len(wrong):
            raise ValueError(f"a label is {int(wrong[0])}, but there are {count} classes.")
        return targets

    @property
    def budget_names(self) -> list[str]:
        """Suffix of the metrics of each keep ratio; "" for the only one."""
        several = self.pruned and len(self.plan.ratios) > 1
        return [f"@{ratio:g}" for ratio in self.plan.ratios] if several else [""]

    def budgets(self, model: Any) -> Iterator[str]:
        """Set each keep ratio in turn; yields its suffix."""
        for ratio, name in zip(self.plan.ratios, self.budget_names):
            with keeping(model, ratio) if self.pruned else nullcontext():
                yield name

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of each held-out image, (B,)."""
        return F.cross_entropy(logits, targets.clamp(min=0), reduction="none")  # -1: unreadable

    def measure(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        """The loss of each image at each keep ratio; logits are counted for ``measure_set``."""
        targets, out = self.checked_targets(batch), {}
        for name in self.budgets(model):
            logits = model(batch.images).float()
            self.counters[name].add(logits, targets, batch.indices, batch.real)
            out[f"loss{name}"] = self.losses(logits, targets)
        return out

    def measure_set(self, world: World) -> dict[str, float]:
        """Accuracies over all processes at each keep ratio; with several, also their mean."""
        out: dict[str, float] = {}
        for name in self.budget_names:
            found = self.counters[name].total(world)
            out |= {f"{mean}{name}": value for mean, value in found.means.items()}
            if self.model.num_classes <= 5:
                out.pop(f"top5{name}", None)
            if world.main and found.absent != self.absent:  # once: the images stay the same
                names = first_names(found.absent)
                say(f"excluded from the mAP, no held-out image has them: {names}")
            self.absent = found.absent
        self.counters.clear()
        each = [value for mean, value in out.items() if mean.startswith(f"{self.metric}@")]
        return {**out, self.metric: sum(each) / len(each)} if each else out

    def save(self, model: Any, folder: Path) -> None:
        """Write the model for ``timm.create_model("local-dir:…")``."""
        if isinstance(model, LTRPModel):
            model.keep_ratio = self.plan.ratios[0]
            save_pretrained(model, folder, overwrite=True)
        else:
            save_weights(folder, model_config(model), model.state_dict(), overwrite=True)

    def panels(self, model: Any, batch: Batch) -> list[list[tuple[Image.Image, str]]]:
        """The photo and its class; what is kept, and the predicted class, at each keep ratio."""
        cfg = model.pretrained_cfg or {}
        photos = show_images(batch.images, cfg.get("mean", (0.0,)), cfg.get("std", (1.0,)))
        labels = self.captions(self.checked_targets(batch))
        panels = [[(photo, label)] for photo, label in zip(photos, labels)]
        for _ in self.budgets(model):
            predicted = self.captions(model(batch.images))
            kept = model.keep_indices(batch.images) if self.pruned else [None] * len(photos)
            for parts, photo, keep, text in zip(panels, photos, kept, predicted):
                caption = f"{text}?"
                if keep is not None:
                    photo = kept_patches(photo, keep, model.grid_size(batch.images))
                    caption += f" at {model.keep_ratio:g}"
                parts.append((photo, caption))
        return panels

    @property
    def class_names(self) -> list[str]:
        """C names; numbers where the classes have none."""
        names = (self.model.pretrained_cfg or {}).get("label_names")
        return [str(name) for name in names or range(self.model.num_classes)]

    def captions(self, values: Tensor) -> list[str]:
        """The class of each image by targets (B,), or by logits (B, C)."""
        numbers = values if values.dim() == 1 else values.argmax(1)
        return [self.class_names[number] for number in numbers.tolist()]


class MultiLabelTask(ClassifyTask):
    """A model that learns several classes per image; see ``ClassifyTask``.

    ``loss`` is that of ``multi_label_loss``; the mAP of ``seen_classes`` is reported separately.
    """

    metric = "map"

    def __init__(
        self,
        *args: Any,
        loss: MultiLabelLoss = "asymmetric",
        seen_classes: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.loss_name, self.loss_function, self.chance = loss, multi_label_loss(loss), None
        self.counters.default_factory = partial(PrecisionCounter, self.class_names, seen_classes)

    def config(self) -> dict[str, Any]:
        """What a continuation must not change."""
        return {**super().config(), "loss": self.loss_name}

    def checked_targets(self, batch: Batch) -> Tensor:
        """The targets (B, C) of a batch."""
        return batch.targets

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of each held-out image, (B,)."""
        pairs = zip(logits.split(1), targets.split(1))
        return torch.stack([self.loss_function(*pair) for pair in pairs])

    def captions(self, values: Tensor) -> list[str]:
        """The classes of each image by targets; by logits the likely ones, likeliest first."""
        lines = []
        for row in values.tolist():
            found = sorted((-value, number) for number, value in enumerate(row) if value > 0)
            lines.append(first_names([self.class_names[n] for _, n in found], _MAX_NAMES) or "none")
        return lines
