"""What goes into the loop, and what comes out of it."""

import dataclasses
from pathlib import Path
from typing import Any, Protocol

from PIL import Image
from torch import Tensor, nn

from ltrp_timm.data.keyed import Batch


class Task(Protocol):
    """What a recipe brings.

    Attributes:
        name: of the command.
        model: what is trained, on the device.
        chance: loss of one that knows nothing, or None.
        metric: of ``measure``, that tells the best epoch.
        higher_is_better: which way.
    """

    name: str
    model: Any
    chance: float | None
    metric: str
    higher_is_better: bool

    def config(self) -> dict[str, Any]:
        """What a continuation must not change, as JSON can hold it."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean loss of a batch by ``model``, which may be a wrapper of ``self.model``."""
        ...

    def measure(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Metrics of each image of a held-out batch, (B,)."""
        ...

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write a model for use."""
        ...

    def draw(self, model: nn.Module, batch: Batch) -> Image.Image:
        """A picture of what the model makes of some images."""
        ...


class NonFiniteLossError(RuntimeError):
    """The loss, or a weight, is no finite number: nothing is learned from there on."""


@dataclasses.dataclass
class Progress:
    """Where a run is: ``update`` of ``epoch`` comes next, both from 0."""

    epoch: int = 0
    update: int = 0
    step: int = 0
    loss_sum: float = 0.0
    best: float | None = None
    last_losses: list[float] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Summary:
    """How a run ended.

    Attributes:
        output: folder that the model loads from.
        epochs: epochs done.
        steps: updates done.
        metrics: the last row of the log.
        unreadable: one line for each image that could not be read.
        stopped_by: signal that ended it early, or None.
    """

    output: Path
    epochs: int
    steps: int
    metrics: dict[str, Any]
    unreadable: list[str]
    stopped_by: int | None
