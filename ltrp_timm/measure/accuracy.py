"""Accuracy over a whole set: every image once, whatever the batches and the processes."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ltrp_timm.data.keyed import Batch
from ltrp_timm.runtime.world import World

TOP_K = (1, 5)


@dataclass(frozen=True)
class Accuracy:
    """Shares of a set's readable images, in [0, 1].

    Attributes:
        top1: whose class has the highest logit.
        top5: whose class is among the five highest.
        images: how many there are.
    """

    top1: float
    top5: float
    images: int


def class_ranks(logits: Tensor, targets: Tensor) -> Tensor:
    """How many classes come before the right one; 0 is a hit.

    Of equal logits the lower class number comes first, so that a model that gives one value for all
    gets no gift; a target whose logit is no number comes last.

    Args:
        logits: (B, C).
        targets: (B,) class numbers.

    Returns:
        (B,) int64 in 0 … C.

    Raises:
        ValueError: the shapes do not fit, or a target is no class.

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
    """Counts hits over batches; sums them over processes at the end.

    Args:
        classes: the class numbers that count, as where a set has some of the model's classes alone;
            None: all.
    """

    def __init__(self, classes: Sequence[int] | None = None) -> None:
        self.classes = classes
        self.hits, self.images = [0] * len(TOP_K), 0

    def add(self, logits: Tensor, targets: Tensor, real: Tensor | None = None) -> Tensor:
        """Count a batch.

        Args:
            logits: (B, C).
            targets: (B,) class numbers.
            real: (B,) bool, False for what counts nowhere: padding, unreadable images.

        Returns:
            (B',) ranks of the right class of the images that count, see ``class_ranks``.
        """
        if real is not None:
            logits, targets = logits[real], targets[real]
        ranks = class_ranks(self.restrict(logits), targets)
        self.images += len(ranks)
        self.hits = [hits + int((ranks < k).sum()) for hits, k in zip(self.hits, TOP_K)]
        return ranks

    def restrict(self, logits: Tensor) -> Tensor:
        """logits (B, C) with -inf for the classes that do not count."""
        if self.classes is None:
            return logits
        left_out = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
        left_out[list(self.classes)] = False
        return logits.masked_fill(left_out, -torch.inf)

    def total(self, world: World | None = None) -> Accuracy:
        """Over all processes; each must ask.

        Raises:
            ValueError: not one image was counted.
        """
        counts: list[float] = [*self.hits, self.images]
        top1, top5, images = counts if world is None else world.sum(counts)
        if not images:
            raise ValueError("no image could be read: there is no accuracy of nothing.")
        return Accuracy(top1 / images, top5 / images, int(images))


def measure_accuracy(
    model: Callable[[Tensor], Tensor],
    batches: Iterable[Batch],
    world: World | None = None,
    classes: Sequence[int] | None = None,
) -> Accuracy:
    """Accuracy of a model over labelled batches; eval mode and autocast are the caller's business.

    Args:
        model: images (B, 3, H, W) -> logits (B, C).
        batches: with targets; unreadable images count nowhere.
        world: who shares the set; None: this process has all of it.
        classes: see ``AccuracyCounter``.

    Raises:
        ValueError: no image could be read, or a label is no class of the model.
    """
    counter = AccuracyCounter(classes)
    with torch.no_grad():
        for batch in batches:
            if batch.targets is None:
                raise ValueError("the images have no labels.")
            counter.add(model(batch.images), batch.targets, batch.real)
    return counter.total(world)
