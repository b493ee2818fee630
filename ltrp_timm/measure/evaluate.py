"""Accuracy and throughput in one pass: every batch through all models, interleaved."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ltrp_timm.data.keyed import Batch
from ltrp_timm.measure.accuracy import Accuracy, AccuracyCounter, MeanPrecision, PrecisionCounter
from ltrp_timm.measure.throughput import Timing, timed
from ltrp_timm.runtime.world import World

MIN_ROUNDS = 5  # timed rounds; a small set repeats its first batch
_WARM_UP = 2  # untimed calls on the first batch
Case = TypeVar("Case")  # what names a call, such as a keep ratio


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
    if batch.targets is None:
        raise ValueError("the images have no labels.")
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise ValueError("the model gives no logits (B, C): it is not a classifier.")
    if isinstance(counter, PrecisionCounter):
        counter.add(logits, batch.targets, batch.indices, batch.real)
        return []
    ranks = counter.add(logits, batch.targets, batch.real)
    best = torch.nan_to_num(counter.restrict(logits[batch.real]), nan=-torch.inf).argmax(1)
    indices = torch.tensor(batch.indices, device=batch.real.device)[batch.real]
    columns = (indices, batch.targets[batch.real], best, ranks)
    return [
        Prediction(index, case, target, predicted, rank)
        for index, target, predicted, rank in zip(*(column.tolist() for column in columns))
    ]
