"""Accuracy and mean average precision of a whole set, over any batches and processes; throughput.

Both in one pass: every batch through all models, interleaved.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ltrp_timm._text import first_names
from ltrp_timm.data.keyed import Batch
from ltrp_timm.data.multi_label import read_names
from ltrp_timm.measure.throughput import Timing, timed
from ltrp_timm.metrics import average_precision
from ltrp_timm.runtime import World

TOP_K = (1, 5)
MIN_ROUNDS = 5  # timed rounds; a small set repeats its first batch
_WARM_UP = 2  # untimed calls on the first batch
Case = TypeVar("Case")  # what names a call, such as a keep ratio


@dataclass(frozen=True)
class Accuracy:
    """Shares of a set's readable images, in [0, 1].

    Attributes:
        top1: Images whose class has the highest logit.
        top5: Images whose class is among the five highest.
        images: Number of images.
    """

    top1: float
    top5: float
    images: int

    def percent(self) -> dict[str, float]:
        """Top-1 and top-5 in per cent."""
        return {"top1": 100 * self.top1, "top5": 100 * self.top5}


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
        ValueError: The shapes do not match, or a target is not a class.

    >>> class_ranks(torch.tensor([[0.1, 0.9, 0.5]]), torch.tensor([2]))
    tensor([1])
    """
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        shapes = f"{list(logits.shape)} and {list(targets.shape)}"
        raise ValueError(f"expected logits (B, C) and targets (B,), got {shapes}.")
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
    """Counts hits over batches, and sums them over processes at the end.

    Args:
        classes: Class numbers that compete; None for all.
    """

    def __init__(self, classes: Sequence[int] | None = None) -> None:
        self.classes = classes
        self.hits, self.images = [0] * len(TOP_K), 0

    def add(self, logits: Tensor, targets: Tensor, real: Tensor | None = None) -> Tensor:
        """Count a batch.

        Args:
            logits: (B, C).
            targets: (B,) class numbers.
            real: (B,) bool, False for images that do not count: padding, unreadable ones.

        Returns:
            (B',) ``class_ranks`` of the images that count.
        """
        if real is not None:
            logits, targets = logits[real], targets[real]
        ranks = class_ranks(self.restrict(logits), targets)
        self.images += len(ranks)
        self.hits = [hits + int((ranks < k).sum()) for hits, k in zip(self.hits, TOP_K)]
        return ranks

    def restrict(self, logits: Tensor) -> Tensor:
        """Logits (B, C) with -inf for the classes that do not compete."""
        if self.classes is None:
            return logits
        excluded = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
        excluded[list(self.classes)] = False
        return logits.masked_fill(excluded, -torch.inf)

    def total(self, world: World | None = None) -> Accuracy:
        """Accuracy over all processes, all of which must call this.

        Raises:
            ValueError: No image was counted.
        """
        counts: list[float] = [*self.hits, self.images]
        top1, top5, images = counts if world is None else world.sum(counts)
        if not images:
            raise ValueError("no readable image in the evaluation set; cannot compute accuracy.")
        return Accuracy(top1 / images, top5 / images, int(images))


@dataclass(frozen=True)
class MeanPrecision:
    """Average precisions over a whole set, in [0, 1].

    Attributes:
        map: Mean over the classes that an image of the set has; NaN if there is none.
        seen: Mean over the seen classes; None without a split.
        unseen: Mean over the other classes; None without a split.
        per_class: Average precision by name, for classes that an image has.
        absent: Names of the classes that no image has; they are excluded.
        images: Number of images.
    """

    map: float
    seen: float | None
    unseen: float | None
    per_class: dict[str, float]
    absent: tuple[str, ...]
    images: int

    def row(self) -> dict[str, float]:
        """The means by name; without those over no class."""
        means = {"map": self.map, "map_seen": self.seen, "map_unseen": self.unseen}
        return {
            name: value for name, value in means.items() if value is not None and value == value
        }

    def percent(self) -> dict[str, float]:
        """The means in per cent, by name.

        Raises:
            ValueError: No image has a label.
        """
        if not self.row():
            raise ValueError("no readable image has a label; cannot compute mAP.")
        return {name: 100 * value for name, value in self.row().items()}


class PrecisionCounter:
    """Collects the logits of a set, and computes average precisions at the end.

    Args:
        class_names: C names, in the order of the logits.
        seen: Names of seen classes, which get a mean of their own; None for no split.

    Raises:
        ValueError: A name is not a class, or all classes are named.
    """

    def __init__(self, class_names: Sequence[str], seen: Sequence[str] | None = None) -> None:
        self.class_names, self.seen = tuple(class_names), seen
        unknown = [name for name in seen or () if name not in self.class_names]
        if unknown:
            names = first_names(unknown)
            raise ValueError(f"{len(unknown)} seen classes are not classes: {names}.")
        if seen is not None and set(seen) == set(self.class_names):
            raise ValueError(f"all {len(seen)} classes are seen; none is unseen.")
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(
        self, logits: Tensor, targets: Tensor, indices: Sequence[int], real: Tensor | None = None
    ) -> None:
        """Keep a batch.

        Args:
            logits: (B, C).
            targets: (B, C), 0 or 1.
            indices: B numbers of the images in the set; a repeated image counts once.
            real: (B,) bool, False for unreadable images, which do not count.
        """
        numbers = torch.tensor(list(indices), device=logits.device)
        if real is None:
            real = torch.ones_like(numbers, dtype=torch.bool)
        rows = (numbers, logits.detach().float(), targets.to(logits.device, torch.uint8))
        self.parts.append(tuple(part[real].cpu() for part in rows))  # type: ignore[arg-type]

    def total(self, world: World | None = None) -> MeanPrecision:
        """Average precisions over all processes, all of which must call this.

        Raises:
            ValueError: No image was counted, or a logit is NaN.
        """
        numbers, logits, targets = self.rows(world)
        if not len(numbers):
            raise ValueError("no readable image in the evaluation set; cannot compute mAP.")
        if bool(logits.isnan().any()):
            raise ValueError("the model gives NaN logits; cannot compute mAP.")
        values = average_precision(logits, targets)
        per_class = {n: v for n, v in zip(self.class_names, values.tolist()) if v == v}
        absent = tuple(name for name in self.class_names if name not in per_class)
        seen = unseen = None
        if self.seen is not None:
            seen = _mean([v for n, v in per_class.items() if n in self.seen])
            unseen = _mean([v for n, v in per_class.items() if n not in self.seen])
        mean = _mean(list(per_class.values()))
        return MeanPrecision(mean, seen, unseen, per_class, absent, len(numbers))

    def rows(self, world: World | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What all processes collected, each image once; all processes must call this.

        Returns:
            Numbers of the images (N,), ascending, logits (N, C) and targets (N, C) uint8.
        """
        count = len(self.class_names)
        empty = (torch.zeros(0, dtype=torch.int64), torch.zeros(0, count))
        nothing = (*empty, torch.zeros(0, count, dtype=torch.uint8))
        parts: Any = self.parts if world is None else world.gather(self.parts)
        numbers, logits, targets = (torch.cat(column) for column in zip(nothing, *parts))
        order = numbers.argsort(stable=True)
        first = torch.ones(len(order), dtype=torch.bool)
        first[1:] = numbers[order][1:] != numbers[order][:-1]
        once = order[first]
        return numbers[once], logits[once], targets[once]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def seen_classes(path: Any, class_names: Sequence[str]) -> tuple[str, ...] | None:
    """Read the names of a file, which must be classes; None for no file.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: A name is not a class, or the file names no class or all of them.
    """
    if path is None:
        return None
    names = read_names(path)
    try:
        PrecisionCounter(class_names, names)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return names


@dataclass(frozen=True)
class Measured:
    """One model, such as one at a keep ratio.

    Attributes:
        accuracy: Over the images of all processes.
        timing: Of full batches in this process, without reading images.
        batch_size: Images of a timed batch.
    """

    accuracy: Accuracy | MeanPrecision
    timing: Timing
    batch_size: int

    @property
    def images_per_second(self) -> float:
        """Throughput at the median."""
        return self.timing.items_per_second(self.batch_size)


@dataclass(frozen=True)
class Prediction(Generic[Case]):
    """The result of one call for one image; ``rank`` 0 is a hit."""

    index: int
    case: Case
    target: int
    predicted: int
    rank: int


def measure_all(
    calls: Mapping[Case, Callable[[Batch], Tensor]],
    batches: Iterable[Batch],
    world: World,
    counters: Mapping[Case, Any] | None = None,
) -> tuple[dict[Case, Measured], list[Prediction[Case]]]:
    """Run every batch through every call, interleaved: A B C, A B C, ….

    The clock starts and stops at a synchronisation of the device: ranking and selecting patches are
    timed, reading images and moving them to the device is not. The first calls and a last, smaller
    batch are not timed.

    Args:
        calls: Batch -> logits (B, C), by what names them: a keep ratio, or a model and its ratio.
        batches: With targets.
        world: The processes that share the set.
        counters: An AccuracyCounter or a PrecisionCounter for each call (default: the former).

    Returns:
        Results by call, and the predictions of this process for images with one class.

    Raises:
        ValueError: No image could be read, or a label is not a class of the model.
    """
    if counters is None:
        counters = {case: AccuracyCounter() for case in calls}
    seconds: dict[Case, list[float]] = {case: [] for case in calls}
    predictions: list[Prediction[Case]] = []
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
            predictions += _count(counters[case], logits, batch, case)
    if full is not None:
        for _ in range(MIN_ROUNDS - min(len(rounds) for rounds in seconds.values())):
            for case, call in calls.items():
                seconds[case].append(timed(partial(call, full), world.device)[1])
    # a process without any image takes part in the sums, and has no times
    totals = {case: counter.total(world) for case, counter in counters.items()}
    if full is None:
        return {}, []
    results = {
        case: Measured(totals[case], Timing(str(case), tuple(seconds[case])), len(full))
        for case in calls
    }
    return results, predictions


def _count(counter: Any, logits: Any, batch: Batch, case: Case) -> list[Prediction[Case]]:
    """Count a batch; returns the predictions for images with one class."""
    targets = batch.labels()
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise ValueError("the model gives no logits (B, C): it is not a classifier.")
    if isinstance(counter, PrecisionCounter):
        counter.add(logits, targets, batch.indices, batch.real)
        return []
    ranks = counter.add(logits, targets, batch.real)
    best = torch.nan_to_num(counter.restrict(logits[batch.real]), nan=-torch.inf).argmax(1)
    indices = torch.tensor(batch.indices, device=batch.real.device)[batch.real]
    columns = (indices, targets[batch.real], best, ranks)
    return [
        Prediction(index, case, target, predicted, rank)
        for index, target, predicted, rank in zip(*(column.tolist() for column in columns))
    ]
