"""Fine-tuning on images with several classes each: their data, and the task."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ltrp_timm._text import say
from ltrp_timm.data.classes import ClassData
from ltrp_timm.data.keyed import Batch
from ltrp_timm.data.labels import some
from ltrp_timm.data.multi_label import MultiLabelImages, multi_label_loss, open_multi_label
from ltrp_timm.measure.mean_precision import PrecisionCounter, seen_classes
from ltrp_timm.runtime.world import World
from ltrp_timm.train.classify import ClassifyTask
from ltrp_timm.train.recipe import Recipe
from ltrp_timm.train.settings import Settings

_SHOWN = 3  # classes in a title


class MultiLabelData(ClassData):
    """The images of a run and their classes, of label files.

    Args:
        data: folder of the training images.
        settings: ``val_data`` is the folder of the held-out ones; that of the training images when
            there are ``val_labels`` alone.
        recipe: names the label files.

    Attributes:
        seen: names of seen classes, or None.

    Raises:
        ValueError: a label file is wrong, names images that are not there, or has empty classes;
            one number of classes here and another there; flags that do not go together.
        FileNotFoundError: a folder or a file is not there.
    """

    def __init__(self, data: Any, settings: Settings, recipe: Recipe) -> None:
        _check_settings(settings, recipe)
        self.settings, self.streaming = settings, False
        self.says: list[str] = []
        self.train: MultiLabelImages = self._labelled(data, recipe.labels, "training")
        self.class_names = self.train.class_names
        self.num_classes = len(self.class_names)
        if recipe.num_classes not in (None, self.num_classes):
            raise ValueError(
                f"num_classes is {recipe.num_classes}, but {recipe.labels} has "
                f"{self.num_classes} classes."
            )
        self.seen = seen_classes(recipe.seen_classes, self.class_names)
        self.held_out: Any = None
        if recipe.val_labels is not None:
            folder = data if settings.val_data is None else settings.val_data
            self.held_out = self._labelled(folder, recipe.val_labels, "held-out", allow_empty=True)

    def _labelled(
        self, folder: Any, labels: Any, what: str, allow_empty: bool = False
    ) -> MultiLabelImages:
        images = open_multi_label(folder, labels, allow_empty=allow_empty)
        if images.unlabelled:
            self.says.append(f"{images.unlabelled} of {len(images)} {what} images have no class")
        return images


def _check_settings(settings: Settings, recipe: Recipe) -> None:
    for name in ("data_root", "input_key", "target_key", "num_samples"):
        if getattr(settings, name) is not None:
            raise ValueError(f"{name} is for named datasets: no multi_label.")
    if settings.val_data is not None and recipe.val_labels is None:
        raise ValueError("val_data needs val_labels, with multi_label.")


class MultiLabelTask(ClassifyTask):
    """A model that learns which classes an image has.

    Args:
        loss: see ``multi_label_loss``.
        seen: names of seen classes, for a mean of their own; or None.
        *args: see ``ClassifyTask``.
        **kwargs: likewise.
    """

    metric = "map"

    def __init__(
        self, *args: Any, loss: str = "asymmetric", seen: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.loss_name, self.loss_function, self.chance = loss, multi_label_loss(loss), None
        self.seen = seen
        self.counters: dict[str, PrecisionCounter] = {}
        self.absent: tuple[str, ...] = ()

    def config(self) -> dict[str, Any]:
        """What a continuation must not change."""
        return {**super().config(), "loss": self.loss_name}

    def checked_targets(self, batch: Batch) -> Tensor:
        """The targets (B, C) of a batch.

        Raises:
            ValueError: it has none.
        """
        if batch.targets is None:
            raise ValueError("the images have no labels.")
        return batch.targets

    def measure(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        """The loss of each image, at each keep ratio; scores are kept for ``judge``."""
        targets, out = self.checked_targets(batch), {}
        for name in self.budgets(model):
            logits = model(batch.images).float()
            self._counter(name).add(logits, targets, batch.indices, batch.real)
            pairs = zip(logits.split(1), targets.split(1))
            out[f"loss{name}"] = torch.stack([self.loss_function(*pair) for pair in pairs])
        return out

    def _counter(self, name: str) -> PrecisionCounter:
        if name not in self.counters:
            self.counters[name] = PrecisionCounter(self.class_names, self.seen)
        return self.counters[name]

    def judge(self, world: World) -> dict[str, float]:
        """The mAP of what was measured, over all processes, at each keep ratio; and their mean."""
        out: dict[str, float] = {}
        for name in self.budget_names:
            found = self._counter(name).total(world)
            out |= {f"{mean}{name}": value for mean, value in found.row().items()}
            if world.main and found.absent != self.absent:  # once: the images stay the same
                say(f"count nowhere, no held-out image has them: {some(found.absent)}")
            self.absent = found.absent
        self.counters = {}
        each = [value for mean, value in out.items() if mean.startswith("map@")]
        return {**out, "map": sum(each) / len(each)} if each else out

    def told(self, targets: Tensor) -> list[str]:
        """The classes of each image, by its labels."""
        return [self._listed(row) for row in targets > 0]

    def seen_in(self, logits: Tensor) -> list[str]:
        """The likeliest classes of each image that are likelier than not, by the model."""
        return [self._listed(row > 0, row) for row in logits]

    def _listed(self, has: Tensor, by: Tensor | None = None) -> str:
        numbers = has.nonzero().flatten().tolist()
        if by is not None:
            numbers.sort(key=lambda number: -float(by[number]))
        shown = ", ".join(self.class_names[number] for number in numbers[:_SHOWN])
        return (shown + (", …" if len(numbers) > _SHOWN else "")) or "none"
