"""The task of fine-tuning: a class for each image, at one share of patches or several."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ltrp_timm.data.keyed import Batch
from ltrp_timm.measure.accuracy import class_ranks
from ltrp_timm.models.ltrp import LTRPModel
from ltrp_timm.runtime.keyed_rng import sample_seed
from ltrp_timm.scoring.transform import select_cached
from ltrp_timm.share.save import model_config, save_pretrained
from ltrp_timm.train.augment import Augmentation, Mixer
from ltrp_timm.train.budget import KeepPlan
from ltrp_timm.train.distill import Distillation
from ltrp_timm.train.pictures import show_images
from ltrp_timm.train.state import digest
from ltrp_timm.train.student import Student
from ltrp_timm.visualize import kept_patches, row, stack_rows
from ltrp_timm.weights.files import save_weights


class ClassifyTask:
    """A model that learns to tell classes apart.

    Args:
        model: pruned, or timm's as it is; on the device.
        plan: how many patches are kept; ignored by a plain model.
        augmentation: labels and mixing follow it.
        distillation: from an unpruned model, or None.
        gate: train the ranker too, see ``Student``.
        channels_last: memory layout of the images.
    """

    name = "finetune"
    metric = "top1"
    higher_is_better = True

    def __init__(
        self,
        model: Any,
        plan: KeepPlan,
        augmentation: Augmentation,
        distillation: Distillation | None = None,
        gate: bool = False,
        channels_last: bool = False,
    ) -> None:
        self.model, self.plan, self.augmentation = model, plan, augmentation
        self.distillation, self.gate = distillation, gate
        self.channels_last = channels_last
        self.pruned = isinstance(model, LTRPModel)
        self.num_graphs = plan.count() if self.pruned else 1
        whole = gate or (distillation is not None and distillation.features > 0)
        self.forward: nn.Module = Student(model, gate) if whole else model
        self.loss_function = augmentation.loss_function().to(next(model.parameters()).device)
        self.mixer = Mixer(augmentation, model.num_classes) if augmentation.mixes else None
        known = distillation is None and not augmentation.bce_loss
        self.chance = math.log(model.num_classes) if known else None
        self.start = digest(model.state_dict())
        self.cached = False  # training images bring the scores of their patches

    def config(self) -> dict[str, Any]:
        """What a continuation must not change."""
        names = (self.model.pretrained_cfg or {}).get("label_names") or ()
        return {
            "start": self.start,
            "num_classes": self.model.num_classes,
            "classes": sample_seed(0, 0, 0, "\n".join(map(str, names))),
            "selection": self.model.selection if self.pruned else None,
            "augmentation": self.augmentation.config(),
            "distill": self.distillation.config() if self.distillation else None,
            "gate": self.gate,
            "index_cache": self.cached,
            **(self.plan.config() if self.pruned else {}),
        }

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean loss of the labels, and of the teacher's answers."""
        images, targets = batch.images, self.checked_targets(batch)
        if self.mixer is not None:
            images, targets = self.mixer(batch, targets)
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if self.pruned:
            self.model.keep_ratio = self.plan.ratio(batch.epoch, batch.update)
        if batch.scores is None:
            out = model(images)
        else:
            out = model(images, keep_indices=select_cached(self.model, batch.scores, images))
        logits, tokens, keep = out if isinstance(out, tuple) else (out, None, None)
        loss: Tensor = self.loss_function(logits, targets)
        if self.distillation is None:
            return loss
        taught = self.distillation.loss(images, logits, tokens, keep)
        return torch.lerp(loss, taught, self.distillation.weight)

    def checked_targets(self, batch: Batch) -> Tensor:
        """The class numbers (B,) of a batch.

        Raises:
            ValueError: it has none, or one that is no class.
        """
        targets, count = batch.targets, self.model.num_classes
        if targets is None:
            raise ValueError("the images have no labels.")
        wrong = targets[batch.real & ((targets < 0) | (targets >= count))]
        if len(wrong):
            raise ValueError(f"a label is {int(wrong[0])}, but there are {count} classes.")
        return targets

    @property
    def budget_names(self) -> list[str]:
        """What the metrics of each keep ratio are called by: "" for the only."""
        several = self.pruned and len(self.plan.ratios) > 1
        return [f"@{ratio:g}" for ratio in self.plan.ratios] if several else [""]

    def budgets(self, model: Any) -> Iterator[str]:
        """Set each keep ratio in turn; gives its name."""
        if not self.pruned:
            yield ""
            return
        before = model.keep_ratio
        for ratio, name in zip(self.plan.ratios, self.budget_names):
            model.keep_ratio = ratio
            yield name
        model.keep_ratio = before

    def measure(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        """Loss and hits of each image; of several keep ratios each, and top1 of all."""
        targets = self.checked_targets(batch).clamp(min=0)
        out: dict[str, Tensor] = {}
        for name in self.budgets(model):
            logits = model(batch.images).float()
            ranks = class_ranks(logits, targets)
            out[f"loss{name}"] = F.cross_entropy(logits, targets, reduction="none")
            out[f"top1{name}"] = (ranks < 1).float()
            if logits.shape[1] > 5:
                out[f"top5{name}"] = (ranks < 5).float()
        if "top1" not in out:
            out["top1"] = torch.stack([out[name] for name in out if "top1@" in name]).mean(0)
        return out

    def save(self, model: Any, folder: Path) -> None:
        """Write the model for ``timm.create_model("local-dir:…")``."""
        if isinstance(model, LTRPModel):
            model.keep_ratio = self.plan.ratios[0]
            save_pretrained(model, folder, overwrite=True)
        else:
            save_weights(folder, model_config(model), model.state_dict(), overwrite=True)

    def draw(self, model: Any, batch: Batch) -> Image.Image:
        """A row for each image: what is kept, and the class that is seen in it."""
        cfg = model.pretrained_cfg or {}
        photos = show_images(batch.images, cfg.get("mean", (0.0,)), cfg.get("std", (1.0,)))
        panels = [[pair] for pair in zip(photos, self.told(self.checked_targets(batch)))]
        for _ in self.budgets(model):
            seen = self.seen_in(model(batch.images))
            kept = model.keep_indices(batch.images) if self.pruned else [None] * len(photos)
            for parts, photo, keep, text in zip(panels, photos, kept, seen):
                title = f"{text}?"
                if keep is not None:
                    photo = kept_patches(photo, keep, model.grid_size(batch.images))
                    title += f" at {model.keep_ratio:g}"
                parts.append((photo, title))
        return stack_rows([row(parts) for parts in panels])

    @property
    def class_names(self) -> list[str]:
        """C names; numbers where the classes have none."""
        names = (self.model.pretrained_cfg or {}).get("label_names")
        return [str(name) for name in names or range(self.model.num_classes)]

    def told(self, targets: Tensor) -> list[str]:
        """The class of each image, by its label."""
        return [self.class_names[number] for number in targets.tolist()]

    def seen_in(self, logits: Tensor) -> list[str]:
        """The class of each image, by the model."""
        return [self.class_names[number] for number in logits.argmax(1).tolist()]
