"""Accuracy and mean average precision of a whole set, over any batches and processes; throughput.

Both in one pass: every batch through all models, interleaved.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ltrp_timm._text import first_names
from ltrp_timm.data.keyed import Batch
from ltrp_timm.data.multi_label import read_names
from ltrp_timm.measure.throughput import Timing, timed
from ltrp_timm.metrics import average_precision
from ltrp_timm.runtime.world import World

MIN_ROUNDS = 5  # timed rounds; a small set repeats its first batch
_WARM_UP = 2  # untimed calls on the first batch


@dataclass(frozen=True)
class Accuracy:
    """Accuracies over a whole set.

    Attributes:
        means: In [0, 1]. "top1" and "top5" are shares of the images. "map" is the mean average
            precision over the classes that an image of the set has, "map_seen" and "map_unseen" are
            those of a split; a mean over no class is left out.
        images: Number of readable images.
        per_class: Average precision by name, for classes that an image has.
        absent: Names of the classes that no image has; they are excluded.
    """

    means: dict[str, float]
    images: int
    per_class: dict[str, float] = field(default_factory=dict)
    absent: tuple[str, ...] = ()

    def percent(self) -> dict[str, float]:
        """The means in per cent; ValueError if no image has a label."""
        if not self.means:
            raise ValueError("no readable image has a label; cannot compute mAP.")
        return {name: 100 * value for name, value in self.means.items()}


def class_ranks(logits: Tensor, targets: Tensor) -> Tensor:
    """Number of classes ahead of the right one; 0 is a hit.

    Of equal logits the lower class number is ahead, so that a constant model gains nothing from
    ties. A target whose logit is NaN comes last.

    Args:
        logits: (B, C).
        targets: (B,) class numbers.

    Returns:
        (B,) int64 in 0 … C.

    Raises:
        ValueError: A target is not a class.

    >>> class_ranks(torch.tensor([[0.1, 0.9, 0.5]]), torch.tensor([2]))
    tensor([1])
    """
    num_classes = logits.shape[1]
    wrong = targets[(targets < 0) | (targets >= num_classes)]
    if len(wrong):
        raise ValueError(f"a label is {int(wrong[0])}, but the model has {num_classes} classes.")
    values = torch.nan_to_num(logits.float(), nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    own = values.gather(1, targets.unsqueeze(1))
    numbers = torch.arange(num_classes, device=logits.device)
    earlier = (values == own) & (numbers < targets.unsqueeze(1))
    ranks = ((values > own) | earlier).sum(1)
    lost = logits.gather(1, targets.unsqueeze(1)).squeeze(1).isnan()
    return torch.where(lost, torch.full_like(ranks, num_classes), ranks)


class AccuracyCounter:
    """Collects the predictions of a set over batches, and counts those of all processes at the end.

    Args:
        classes: Class numbers that compete; None for all.
    """

    what = "accuracy"

    def __init__(self, classes: Sequence[int] | None = None) -> None:
        self.classes = classes
        self.parts: list[tuple[Tensor, ...]] = []

    def add(
        self, logits: Tensor, targets: Tensor, indices: Sequence[int], real: Tensor | None = None
    ) -> None:
        """Keep a batch.

        Args:
            logits: (B, C).
            targets: (B,) class numbers; with several classes (B, C), 0 or 1.
            indices: B numbers of the images in the set; a repeated image counts once.
            real: (B,) bool, False for unreadable images, which do not count.
        """
        columns = (torch.tensor(list(indices)), logits.detach(), targets.to(logits.device))
        numbers, logits, targets = (c if real is None else c[real.to(c.device)] for c in columns)
        self.parts.append((numbers, *(part.cpu() for part in self.columns(logits, targets))))

    def columns(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Targets, predicted classes and ``class_ranks``, each (B,)."""
        if self.classes is not None:
            excluded = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
            excluded[list(self.classes)] = False
            logits = logits.masked_fill(excluded, -torch.inf)
        best = torch.nan_to_num(logits, nan=-torch.inf).argmax(1)
        return targets, best, class_ranks(logits, targets)

    def rows(self, world: World | None = None) -> list[Tensor]:
        """What all processes collected, each image once; all of them must call this.

        Returns:
            Numbers of the images (N,), ascending, and their ``columns``.

        Raises:
            ValueError: There is no image.
        """
        parts = self.parts if world is None else world.gather(self.parts)
        if not any(len(part[0]) for part in parts):
            text = "no readable image in the evaluation set; cannot compute"
            raise ValueError(f"{text} {self.what}.")
        columns = [torch.cat(column) for column in zip(*parts)]
        once = torch.from_numpy(np.unique(columns[0].numpy(), return_index=True)[1])
        return [column[once] for column in columns]

    def total(self, world: World | None = None) -> Accuracy:
        """The result over all processes, all of which must call this; errors as of ``rows``."""
        *_, ranks = self.rows(world)
        hits = {f"top{k}": int((ranks < k).sum()) / len(ranks) for k in (1, 5)}
        return Accuracy(hits, len(ranks))


class PrecisionCounter(AccuracyCounter):
    """Collects the logits of a set of several classes per image; average precisions at the end.

    Args:
        class_names: C names, in the order of the logits.
        seen: Names of seen classes, which get a mean of their own; None for no split.
    """

    what = "mAP"

    def __init__(self, class_names: Sequence[str], seen: Sequence[str] | None = None) -> None:
        super().__init__()
        self.class_names, self.seen = tuple(class_names), seen

    def columns(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """Logits (B, C) float32 and targets (B, C) uint8."""
        return logits.float(), targets.to(torch.uint8)

    def total(self, world: World | None = None) -> Accuracy:
        """See ``AccuracyCounter``; ValueError also if a logit is NaN."""
        numbers, logits, targets = self.rows(world)
        if bool(logits.isnan().any()):
            raise ValueError("the model gives NaN logits; cannot compute mAP.")
        values = average_precision(logits, targets)
        found = {name: v for name, v in zip(self.class_names, values.tolist()) if v == v}
        groups = {"map": list(found.values())}
        if self.seen is not None:
            groups["map_seen"] = [v for name, v in found.items() if name in self.seen]
            groups["map_unseen"] = [v for name, v in found.items() if name not in self.seen]
        means = {name: sum(group) / len(group) for name, group in groups.items() if group}
        absent = tuple(name for name in self.class_names if name not in found)
        return Accuracy(means, len(numbers), found, absent)


def seen_classes(path: Any, class_names: Sequence[str]) -> tuple[str, ...] | None:
    """Read the names of a file, which must be classes; None for no file.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: A name is not a class, or the file names no class or all of them.
    """
    if path is None:
        return None
    names = read_names(path)
    unknown = [name for name in names if name not in class_names]
    if unknown:
        count = len(unknown)
        raise ValueError(f"{path}: {count} seen classes are not classes: {first_names(unknown)}.")
    if set(names) == set(class_names):
        raise ValueError(f"{path}: all {len(names)} classes are seen; none is unseen.")
    return names


@dataclass(frozen=True)
class Measured:
    """One model, such as one at a keep ratio.

    Attributes:
        accuracy: Over the images of all processes.
        timing: Of full batches in this process, without reading images.
        batch_size: Images of a timed batch.
    """

    accuracy: Accuracy
    timing: Timing
    batch_size: int


def measure_all(
    calls: Mapping[Any, Callable[[Batch], Tensor]],
    batches: Iterable[Batch],
    world: World,
    counters: Mapping[Any, AccuracyCounter],
) -> dict[Any, Measured]:
    """Run every batch through every call, interleaved: A B C, A B C, ….

    The clock starts and stops at a synchronisation of the device: ranking and selecting patches are
    timed, reading images and moving them to the device is not. The first calls and a last, smaller
    batch are not timed.

    Args:
        calls: Batch -> logits (B, C), by what names them: a keep ratio, or a model and its ratio.
        batches: With targets.
        world: The processes that share the set.
        counters: An AccuracyCounter or a PrecisionCounter for each call.

    Returns:
        Results by call; none in a process without images.

    Raises:
        ValueError: No image could be read, or a label is not a class of the model.
    """
    seconds: dict[Any, list[float]] = {case: [] for case in calls}
    full: Batch | None = None
    for batch in batches:
        if full is None:
            full = batch
            for call in list(calls.values()) * _WARM_UP:
                call(batch)
        for case, call in calls.items():
            logits, took = timed(partial(call, batch), world.device)
            if len(batch) == len(full):
                seconds[case].append(took)
            if not isinstance(logits, Tensor) or logits.dim() != 2:
                raise ValueError("the model gives no logits (B, C): it is not a classifier.")
            counters[case].add(logits, batch.targets, batch.indices, batch.real)
    if full is not None:
        for _ in range(MIN_ROUNDS - min(len(rounds) for rounds in seconds.values())):
            for case, call in calls.items():
                seconds[case].append(timed(partial(call, full), world.device)[1])
    # a process without any image takes part in the sums, and has no times
    totals = {case: counter.total(world) for case, counter in counters.items()}
    if full is None:
        return {}
    return {
        case: Measured(totals[case], Timing(str(case), tuple(seconds[case])), len(full))
        for case in calls
    }
