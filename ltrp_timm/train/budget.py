"""How many patches are kept, update by update: one share, one of a list, or from all to fewer."""

import math
from collections.abc import Sequence
from typing import Any

from ltrp_timm.runtime.keyed_rng import sample_seed
from ltrp_timm.selection import check_keep_ratio

SCHEDULES = ("linear", "cosine")


def check_keep_ratios(keep_ratio: float | Sequence[float]) -> list[float]:
    """One share of patches, or several, as a list.

    Raises:
        ValueError: none, one out of its range, or twice the same.
    """
    ratios = list(keep_ratio) if isinstance(keep_ratio, Sequence) else [keep_ratio]
    if not ratios:
        raise ValueError("keep_ratio must be a number, or several, got none.")
    ratios = [check_keep_ratio(ratio) for ratio in ratios]
    if len(set(ratios)) < len(ratios):
        raise ValueError(f"keep_ratio names one share twice: {ratios}.")
    return ratios


class KeepPlan:
    """The keep ratio of each update, a function of (seed, epoch, update).

    Args:
        keep_ratio: a share of patches in (0, 1], or several: one of them is drawn for each update.
        schedule: "linear" or "cosine": begin with all patches and reach ``keep_ratio`` in steps,
            one ratio an epoch; None for no such way.
        schedule_epochs: epochs until it is reached; None for half of all, at least 1.
        epochs: of the run.
        seed: of what is drawn.

    Raises:
        ValueError: a ratio out of its range, twice the same, or a schedule to several.

    >>> plan = KeepPlan(0.5, "linear", 4, epochs=8)
    >>> [plan.ratio(epoch, 0) for epoch in range(6)]
    [1.0, 0.875, 0.75, 0.625, 0.5, 0.5]
    """

    def __init__(
        self,
        keep_ratio: float | Sequence[float],
        schedule: str | None = None,
        schedule_epochs: int | None = None,
        *,
        epochs: int = 1,
        seed: int = 0,
    ) -> None:
        self.ratios = check_keep_ratios(keep_ratio)
        if schedule is None and schedule_epochs is not None:
            raise ValueError("keep_schedule_epochs goes with keep_schedule.")
        if schedule is not None:
            self._check_schedule(schedule, schedule_epochs, epochs)
        self.schedule, self.seed = schedule, seed
        self.length = schedule_epochs or max(1, epochs // 2)
        self.epochs = epochs

    def _check_schedule(self, schedule: str, length: int | None, epochs: int) -> None:
        if schedule not in SCHEDULES:
            names = ", ".join(SCHEDULES)
            raise ValueError(f"keep_schedule must be one of {names}, got {schedule!r}.")
        if len(self.ratios) > 1:
            raise ValueError(f"keep_schedule leads to one keep_ratio, got {self.ratios}.")
        if length is not None and not 1 <= length <= epochs:
            raise ValueError(f"keep_schedule_epochs must be from 1 to {epochs}, got {length}.")

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
        """How many ratios there are in a run: each of them is a compiled graph."""
        if self.schedule is None:
            return len(self.ratios)
        return len({self.ratio(epoch, 0) for epoch in range(self.epochs)})

    def config(self) -> dict[str, Any]:
        """What a continuation must not change."""
        length = None if self.schedule is None else self.length
        return {"keep_ratio": self.ratios, "schedule": self.schedule, "schedule_epochs": length}
