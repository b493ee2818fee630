"""Images with several classes each: their targets, and losses on those."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from PIL import Image
from timm.loss import AsymmetricLossMultiLabel
from torch import Tensor, nn

from ltrp_timm.data.images import ImageFiles, Images
from ltrp_timm.data.label_files import LabelTable, read_labels
from ltrp_timm.data.labels import listed_names, match_classes, some
from ltrp_timm.runtime.keyed_rng import sample_seed

MultiLabelLoss = Literal["asymmetric", "bce"]
MULTI_LABEL_LOSSES: tuple[str, ...] = get_args(MultiLabelLoss)


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
                f"{some(absent)}."
            )
        super().__init__(ImageFiles(root, table.names), min_side)
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
        known = listed_names(label_names)
        # a name that no image has, and the model does not know, says nothing
        own = [c for c in self.class_names if not known or c in known or c not in self.empty]
        numbers, how = match_classes(own, num_classes, known)
        names = known or [f"class {number}" for number in range(num_classes)]
        targets = torch.zeros(len(self.targets), num_classes, dtype=torch.bool)
        targets[:, numbers] = self.targets[:, [self.class_names.index(name) for name in own]]
        for number, name in zip(numbers, own):
            names[number] = name
        self.class_names, self.targets = tuple(names), targets
        return how

    def fingerprint(self, indices: Sequence[int]) -> dict[str, Any]:
        """What tells these images and labels from others."""
        pairs = self.targets[list(indices)].nonzero().tolist()
        text = f"{self.class_names}{pairs}"
        return {**super().fingerprint(indices), "labels": sample_seed(0, 0, 0, text)}


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
        raise ValueError(f"{len(images.empty)} {noun} no image in {labels}: {some(images.empty)}.")
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
