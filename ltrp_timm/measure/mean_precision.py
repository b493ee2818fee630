"""The mean average precision over a whole set: every image once, whatever the batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ltrp_timm._text import first_names
from ltrp_timm.data.label_files import read_names
from ltrp_timm.metrics import average_precision
from ltrp_timm.runtime.world import World


@dataclass(frozen=True)
class MeanPrecision:
    """Average precisions over a whole set, in [0, 1].

    Attributes:
        map: mean over the classes that an image of the set has; NaN where there is none.
        seen: mean over those of the seen classes; None without a split.
        unseen: mean over the others; None without a split.
        per_class: of each class that an image has, by name.
        absent: names of the classes that no image has; they count nowhere.
        images: how many there are.
    """

    map: float
    seen: float | None
    unseen: float | None
    per_class: dict[str, float]
    absent: tuple[str, ...]
    images: int

    def row(self) -> dict[str, float]:
        """The means that there are, by name; classes that are all absent have none."""
        means = {"map": self.map, "map_seen": self.seen, "map_unseen": self.unseen}
        return {
            name: value for name, value in means.items() if value is not None and value == value
        }


class PrecisionCounter:
    """Keeps the scores of a set, batch by batch, and judges them together at the end.

    Args:
        class_names: C names, in the order of the logits.
        seen: names of seen classes, for a mean of their own; None for no split.

    Raises:
        ValueError: a name that is no class, or names of all classes.
    """

    def __init__(self, class_names: Sequence[str], seen: Sequence[str] | None = None) -> None:
        self.class_names, self.seen = tuple(class_names), seen
        if seen is not None:
            strangers = [name for name in seen if name not in self.class_names]
            if strangers:
                raise ValueError(
                    f"{len(strangers)} seen classes are no classes: {first_names(strangers)}."
                )
            if set(seen) == set(self.class_names):
                raise ValueError(f"all {len(self.class_names)} classes are seen: nothing to tell.")
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(
        self, logits: Tensor, targets: Tensor, indices: Sequence[int], real: Tensor | None = None
    ) -> None:
        """Keep a batch.

        Args:
            logits: (B, C).
            targets: (B, C), 0 or 1.
            indices: B numbers of the images in the set; one that comes twice, as samplers pad with,
                counts once.
            real: (B,) bool, False for what counts nowhere: unreadable images.
        """
        number = torch.tensor(list(indices), device=logits.device)
        if real is None:
            real = torch.ones_like(number, dtype=torch.bool)
        rows = (number, logits.detach().float(), targets.to(logits.device, torch.uint8))
        self.parts.append(tuple(part[real].cpu() for part in rows))  # type: ignore[arg-type]

    def total(self, world: World | None = None) -> MeanPrecision:
        """Over all processes; each must ask.

        Raises:
            ValueError: not one image was counted, or a score is no number.
        """
        number, logits, targets = self.rows(world)
        if not len(number):
            raise ValueError("no image could be read: there is no average precision of nothing.")
        if bool(logits.isnan().any()):
            raise ValueError("the model gives logits that are no numbers.")
        values = average_precision(logits, targets)
        per_class = {n: v for n, v in zip(self.class_names, values.tolist()) if v == v}
        absent = tuple(name for name in self.class_names if name not in per_class)
        seen = set(self.seen or ())
        unseen = [v for n, v in per_class.items() if n not in seen]
        return MeanPrecision(
            _mean(list(per_class.values())),
            None if self.seen is None else _mean([v for n, v in per_class.items() if n in seen]),
            None if self.seen is None else _mean(unseen),
            per_class,
            absent,
            len(number),
        )

    def rows(self, world: World | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What was kept in all processes, each image once: each process must ask.

        Returns:
            Numbers of the images (N,), ascending, logits (N, C) and targets (N, C) uint8.
        """
        parts = self.parts if world is None else world.gather(self.parts)
        count = len(self.class_names)
        nothing = (
            torch.zeros(0, dtype=torch.int64),
            torch.zeros(0, count),
            torch.zeros(0, count, dtype=torch.uint8),
        )
        numbers, logits, targets = (torch.cat(column) for column in zip(nothing, *parts))
        order = numbers.argsort(stable=True)
        first = torch.ones(len(order), dtype=torch.bool)
        first[1:] = numbers[order][1:] != numbers[order][:-1]
        once = order[first]
        return numbers[once], logits[once], targets[once]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def seen_classes(path: Any, class_names: Sequence[str]) -> tuple[str, ...] | None:
    """Names of a file, checked to be classes; None for no file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it names none, others, or all of them.
    """
    if path is None:
        return None
    names = read_names(path)
    try:
        PrecisionCounter(class_names, names)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return names
