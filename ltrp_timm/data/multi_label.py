"""Images with several classes each: the files of a folder and the labels of a file."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ltrp_timm._text import first_names
from ltrp_timm.data.images import ImageFiles, Images
from ltrp_timm.data.label_files import LabelTable, read_labels
from ltrp_timm.data.labels import ClassData, listed_names, match_classes, refuse_empty
from ltrp_timm.runtime.keyed_rng import sample_seed


class MultiLabelImages(Images):
    """Pictures of a folder and their classes from a label file.

    Args:
        folder: folder of the images.
        table: labels of the images, see ``read_labels``.
        skip_absent: leave out the images that the folder lacks, in place of an error.

    Attributes:
        absent: number of images that were left out.
        class_names: C names.
        targets: (N, C) bool, whether an image has a class.
        empty: names of classes that no image has.

    Raises:
        FileNotFoundError: The folder does not exist.
        ValueError: The folder lacks images that the table names.
    """

    def __init__(self, folder: Any, table: LabelTable, skip_absent: bool = False) -> None:
        root = Path(folder)
        if not root.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder of images.")
        there = [(root / name).is_file() for name in table.names]
        absent = [name for name, found in zip(table.names, there) if not found]
        if absent and (not skip_absent or not any(there)):
            raise ValueError(
                f"{len(absent)} of {len(table.names)} labelled images are not in {root}: "
                f"{first_names(absent)}{'' if skip_absent else ' (skip_absent leaves them out)'}."
            )
        self.absent = len(absent)
        super().__init__(ImageFiles(root, list(itertools.compress(table.names, there))))
        self.class_names, self.targets = table.classes, table.targets[torch.tensor(there)]
        self.empty = [c for c, full in zip(table.classes, self.targets.any(dim=0)) if not full]

    @property
    def blank(self) -> Tensor:  # type: ignore[override]
        """Target of an image that cannot be read: (C,), no class."""
        return torch.zeros(len(self.class_names))

    @property
    def unlabelled(self) -> int:
        """Number of images without any class."""
        return int((~self.targets.any(dim=1)).sum())

    def read_item(self, index: int) -> tuple[Image.Image, Tensor]:
        """Read a picture and its target (C,) float32: 1 where it has a class."""
        return super().read_item(index)[0], self.targets[index].float()

    def match(self, num_classes: int, label_names: Any = None) -> str:
        """Map targets to the classes of a model, in its order; see ``match_classes``.

        Returns:
            How the classes were matched, for the user.

        Raises:
            ValueError: The file has classes that the model does not have; the error names them.
        """
        known = listed_names(label_names)
        # a class that no image has, and the model does not know, is left out
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
        """Identify these images and their labels."""
        pairs = self.targets[list(indices)].nonzero().tolist()
        text = f"{self.class_names}{pairs}"
        return {**super().fingerprint(indices), "labels": sample_seed(0, 0, 0, text)}


def open_multi_label(
    folder: Any, labels: Any, *, allow_empty: bool = False, skip_absent: bool = False
) -> MultiLabelImages:
    """Open the images of a folder with the labels of a file.

    Args:
        folder: folder of the images; images that the file does not name are ignored.
        labels: ``.json`` with COCO's instance annotations, or ``.csv`` (see ``read_labels``).
        allow_empty: accept classes without any image.
        skip_absent: leave out images that the file names and the folder lacks.

    Raises:
        FileNotFoundError: The folder or the file does not exist.
        ValueError: The file is invalid, names images that are not in the folder, or has classes
            without any image.

    >>> open_multi_label("val2014", "annotations/instances_val2014.json")  # doctest: +SKIP
    """
    images = MultiLabelImages(folder, read_labels(labels), skip_absent)
    if not allow_empty:
        refuse_empty(images.empty, labels)
    return images


class MultiLabelData(ClassData):
    """The training and held-out images of a run, with several classes each.

    Args:
        data: folder of the training images.
        labels: label file of the training images, see ``open_multi_label``.
        val_data: folder of the held-out images (default: ``data``).
        val_labels: label file of the held-out images (default: no held-out images).
        num_classes: C (default: counted from ``labels``).
        skip_absent: leave out images that a file names and its folder lacks, see ``notes``.

    Raises:
        ValueError: See ``open_multi_label``; or ``num_classes`` is not the number of classes, or
            ``val_data`` has no ``val_labels``.
        FileNotFoundError: A folder or a file does not exist.
    """

    def __init__(
        self,
        data: Any,
        labels: Any,
        *,
        val_data: Any = None,
        val_labels: Any = None,
        num_classes: int | None = None,
        skip_absent: bool = False,
    ) -> None:
        if val_data is not None and val_labels is None:
            raise ValueError("val_data needs val_labels, with multi_label.")
        self.streaming, self.notes, self.held_out = False, [], None
        self.skip_absent = skip_absent
        self.train = self._open(data, labels, "training")
        self.class_names = self.train.class_names
        self.num_classes = len(self.class_names)
        if num_classes not in (None, self.num_classes):
            raise ValueError(
                f"num_classes is {num_classes}, but {labels} has {self.num_classes} classes."
            )
        if val_labels is not None:
            folder = data if val_data is None else val_data
            self.held_out = self._open(folder, val_labels, "held-out", allow_empty=True)

    def _open(
        self, folder: Any, labels: Any, what: str, allow_empty: bool = False
    ) -> MultiLabelImages:
        skip = self.skip_absent
        images = open_multi_label(folder, labels, allow_empty=allow_empty, skip_absent=skip)
        if images.absent:
            self.notes.append(f"{images.absent} labelled {what} images are not there, left out")
        if images.unlabelled:
            self.notes.append(f"{images.unlabelled} of {len(images)} {what} images have no class")
        return images
