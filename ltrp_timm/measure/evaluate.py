"""Accuracy and throughput in one pass: each batch through all keep ratios in turns."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ltrp_timm.data.keyed import Batch
from ltrp_timm.measure.accuracy import Accuracy, AccuracyCounter
from ltrp_timm.measure.mean_precision import MeanPrecision, PrecisionCounter
from ltrp_timm.measure.throughput import Timing, timed
from ltrp_timm.runtime.world import World

MIN_ROUNDS = 5  # of timing; a set of fewer batches has its last full one run again
_WARM_UP = 2  # calls each on the first batch, not timed


@dataclass(frozen=True)
class Measured:
    """One model at one keep ratio.

    Attributes:
        accuracy: over the images of all processes.
        timing: of whole batches, the model alone, in this process.
        batch_size: of what was timed.
    """

    accuracy: Accuracy | MeanPrecision
    timing: Timing
    batch_size: int

    @property
    def images_per_second(self) -> float:
        """At the median."""
        return self.timing.items_per_second(self.batch_size)


@dataclass(frozen=True)
class Prediction:
    """What became of one image at one keep ratio; ``rank`` 0 is a hit."""

    index: int
    keep_ratio: float
    target: int
    predicted: int
    rank: int


def measure_all(
    calls: Mapping[float, Callable[[Batch], Tensor]],
    batches: Iterable[Batch],
    world: World,
    classes: Sequence[int] | None = None,
    on_batch: Callable[[Batch], None] = lambda batch: None,
    keep_predictions: bool = False,
    counters: Mapping[float, Any] | None = None,
) -> tuple[dict[float, Measured], list[Prediction]]:
    """Run every batch through every call, in turns: A B C, A B C, ….

    A clock runs while a call does, from one synchronisation of the device to the next: reading
    images and bringing them to the device is not in it, ranking and selecting patches is. The first
    calls and a last, smaller batch are not timed.

    Args:
        calls: batch -> logits (B, C), by keep ratio.
        batches: with targets.
        world: who shares the set.
        classes: see ``AccuracyCounter``.
        on_batch: called with each batch, before it runs.
        keep_predictions: also return what became of each image; of images with one class.
        counters: a ``PrecisionCounter`` for each call, for images with several classes.

    Returns:
        Results by keep ratio, and the predictions of this process.

    Raises:
        ValueError: no image could be read, or a label is no class of the model.
    """
    if counters is None:
        counters = {ratio: AccuracyCounter(classes) for ratio in calls}
    seconds: dict[float, list[float]] = {ratio: [] for ratio in calls}
    predictions: list[Prediction] = []
    full: Batch | None = None
    for batch in batches:
        on_batch(batch)
        if full is None:
            full = batch
            for call in list(calls.values()) * _WARM_UP:
                call(batch)
        for ratio, call in calls.items():
            logits, took = timed(partial(call, batch), world.device)
            if len(batch) == len(full):
                seconds[ratio].append(took)
            ranks = _count(counters[ratio], logits, batch)
            if keep_predictions:
                predictions += _predictions(counters[ratio], logits, batch, ratio, ranks)
    if full is not None:
        for _ in range(MIN_ROUNDS - min(len(rounds) for rounds in seconds.values())):
            for ratio, call in calls.items():
                seconds[ratio].append(timed(partial(call, full), world.device)[1])
    # a process without any image takes part in the sums, and has no times
    totals = {ratio: counter.total(world) for ratio, counter in counters.items()}
    if full is None:
        return {}, []
    size = len(full)
    results = {
        ratio: Measured(totals[ratio], Timing(f"{ratio:g}", tuple(seconds[ratio])), size)
        for ratio in calls
    }
    return results, predictions


def _count(counter: Any, logits: Any, batch: Batch) -> Tensor:
    """Count a batch; returns the ranks of the right classes, where images have one."""
    if batch.targets is None:
        raise ValueError("the images have no labels.")
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise ValueError("the model gives no logits (B, C): it is no classifier.")
    if isinstance(counter, PrecisionCounter):
        counter.add(logits, batch.targets, batch.indices, batch.real)
        return torch.empty(0)
    ranks: Tensor = counter.add(logits, batch.targets, batch.real)
    return ranks


def _predictions(
    counter: AccuracyCounter, logits: Tensor, batch: Batch, ratio: float, ranks: Tensor
) -> list[Prediction]:
    real = batch.real.tolist()
    indices = [index for index, good in zip(batch.indices, real) if good]
    targets: Any = batch.targets
    best = torch.nan_to_num(counter.restrict(logits[batch.real]), nan=-torch.inf).argmax(1)
    rows = zip(indices, targets[batch.real].tolist(), best.tolist(), ranks.tolist())
    return [Prediction(index, ratio, target, top, rank) for index, target, top, rank in rows]
