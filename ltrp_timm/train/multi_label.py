"""Images with several classes each: their targets, losses, and the mAP over a whole set."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import ImageDataset
from timm.data.readers.reader import Reader
from timm.loss import AsymmetricLossMultiLabel
from torch import Tensor, nn

from ltrp_timm.metrics import average_precision
from ltrp_timm.train.data import Images
from ltrp_timm.train.keys import sample_seed
from ltrp_timm.train.label_files import LabelTable, read_labels, read_names
from ltrp_timm.train.labels import _listed, _some, match_classes
from ltrp_timm.train.world import World

MULTI_LABEL_LOSSES = ("asymmetric", "bce")


class MultiLabelImages(Images):
    """Pictures of a folder and the classes that a label file gives them.

    Args:
        folder: what the names of the file are relative to.
        table: see ``read_labels``.
        min_side: smaller pictures, and strips, count as unreadable.

    Attributes:
        class_names: C names.
        targets: (N, C) bool, whether an image has a class.
        empty: names of classes that no image has.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it lacks images that the table names.
    """

    def __init__(self, folder: Any, table: LabelTable, min_side: int = 1) -> None:
        root = Path(folder)
        if not root.is_dir():
            raise FileNotFoundError(f"{folder} is no folder of images.")
        absent = [name for name in table.names if not (root / name).is_file()]
        if absent:
            raise ValueError(
                f"{len(absent)} of {len(table.names)} labelled images are not in {root}: "
                f"{_some(absent)}."
            )
        reader = _Files([str(root / name) for name in table.names])
        super().__init__(ImageDataset(str(root), reader=reader), min_side)
        self.class_names, self.targets = table.classes, table.targets
        self.empty = [c for c, full in zip(table.classes, table.targets.any(dim=0)) if not full]

    @property
    def blank(self) -> Tensor:  # type: ignore[override]
        """What stands for the target of an image that cannot be read: (C,), no class."""
        return torch.zeros(len(self.class_names))

    @property
    def unlabelled(self) -> int:
        """How many images have none of the classes."""
        return int((~self.targets.any(dim=1)).sum())

    def read_item(self, index: int) -> tuple[Image.Image, Tensor]:
        """The picture, and its target (C,) float32: 1 where it has a class.

        Raises:
            ValueError: one line with its name and the reason.
        """
        return super().read_item(index)[0], self.targets[index].float()

    def match(self, num_classes: int, label_names: Any = None) -> str:
        """From here on, give the classes of a model, in its order; see ``match_classes``.

        Returns:
            How they were found, for the user.

        Raises:
            ValueError: a class of the file is none of the model's; such are named.
        """
        numbers, how = match_classes(self.class_names, num_classes, label_names)
        names = _listed(label_names) or [f"class {number}" for number in range(num_classes)]
        targets = torch.zeros(len(self.targets), num_classes, dtype=torch.bool)
        targets[:, numbers] = self.targets
        for number, name in zip(numbers, self.class_names):
            names[number] = name
        self.class_names, self.targets = tuple(names), targets
        return how

    def fingerprint(self, indices: Sequence[int]) -> dict[str, Any]:
        """What tells these images and labels from others."""
        pairs = self.targets[list(indices)].nonzero().tolist()
        text = f"{self.class_names}{pairs}"
        return {**super().fingerprint(indices), "labels": sample_seed(0, 0, 0, text)}


class _Files(Reader):
    """timm's reader of files that are known; their targets are elsewhere."""

    def __init__(self, paths: Sequence[str]) -> None:
        super().__init__()
        self.samples = list(paths)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return open(self.samples[index], "rb"), index

    def __len__(self) -> int:
        return len(self.samples)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = self.samples[index]
        return Path(path).name if basename else path


def open_multi_label(
    folder: Any, labels: Any, min_side: int = 1, allow_empty: bool = False
) -> MultiLabelImages:
    """Images of a folder with the labels of a file.

    Args:
        folder: of the images; may hold more than the file names.
        labels: ``.json`` with COCO's instance annotations, or ``.csv`` (see ``read_labels``).
        min_side: smaller pictures, and strips, count as unreadable.
        allow_empty: classes without any image are no error.

    Raises:
        FileNotFoundError: there is no such folder or file.
        ValueError: the file is wrong, names images that are not there, or has empty classes.

    >>> open_multi_label("val2014", "annotations/instances_val2014.json")  # doctest: +SKIP
    """
    images = MultiLabelImages(folder, read_labels(labels), min_side)
    if images.empty and not allow_empty:
        noun = "class has" if len(images.empty) == 1 else "classes have"
        raise ValueError(f"{len(images.empty)} {noun} no image in {labels}: {_some(images.empty)}.")
    return images


def multi_label_loss(name: str) -> nn.Module:
    """A loss of logits (B, C) against targets (B, C): a scalar.

    Args:
        name: "asymmetric" (γ⁻ 4, γ⁺ 0, clip 0.05; summed over classes, mean over images) or "bce"
            (binary cross entropy, mean over both).

    Raises:
        ValueError: no such loss.

    >>> multi_label_loss("bce")(torch.zeros(2, 3), torch.ones(2, 3))  # ln 2
    tensor(0.6931)
    """
    if name == "asymmetric":
        return _Asymmetric()
    if name == "bce":
        return _BCE()
    raise ValueError(f"loss must be one of {', '.join(MULTI_LABEL_LOSSES)}, got {name!r}.")


class _Asymmetric(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        # an older timm always sums, and does not know the argument
        known = inspect.signature(AsymmetricLossMultiLabel).parameters
        how = {"reduction": "sum"} if "reduction" in known else {}
        self.loss = AsymmetricLossMultiLabel(gamma_neg=4, gamma_pos=0, clip=0.05, **how)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = self.loss(logits.float(), targets.float())
        return loss / len(logits)


class _BCE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.loss = nn.BCEWithLogitsLoss()

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = self.loss(logits.float(), targets.float())
        return loss


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
                    f"{len(strangers)} seen classes are no classes: {_some(strangers)}."
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
