"""Training and held-out images with a class each, checked before anything is built."""

import os
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset

from ltrp_timm.data.images import NAMED
from ltrp_timm.data.labels import LabelledImages, open_labelled
from ltrp_timm.train.settings import Settings

_STREAMS = ("hfids", "tfds", "wds")
_HELD_OUT = ("validation", "val", "valid")


class ClassData:
    """The images of a run and their classes.

    Args:
        data: see ``open_labelled``; or a stream of timm's (``wds/…``), whose classes are not known.
        settings: which parts of it.
        num_classes: C; None: as many as the data has.

    Attributes:
        train: images to train on, or the name of a stream.
        held_out: those to measure with, or None.
        class_names: C names in their order; () where the data names none.
        num_classes: C.
        says: what the user should know.

    Raises:
        ValueError: an empty class, one number of classes here and another there, held-out classes
            that training does not have.
        FileNotFoundError: the data is not there.
    """

    def __init__(self, data: Any, settings: Settings, num_classes: int | None = None) -> None:
        self.settings = settings
        self.says: list[str] = []
        self.streaming = is_stream(data)
        self.train: Any = data if self.streaming else self._open(data, settings.split)
        self.class_names = () if self.streaming else self.train.class_names
        self.num_classes = self._count(data, num_classes)
        source = settings.val_data
        if source is None and _has_held_out(data, settings.split):
            source = data
            self.says.append(f"held-out images are those of {data} itself")
        self.held_out: LabelledImages | None = None
        if source is not None:
            self.held_out = self._open(source, settings.val_split, allow_empty=True)

    def _open(self, data: Any, split: str, allow_empty: bool = False) -> LabelledImages:
        s = self.settings
        return open_labelled(
            data, s.data_root, split, s.input_key, s.target_key, allow_empty=allow_empty
        )

    def _count(self, data: Any, num_classes: int | None) -> int:
        found = len(self.class_names)
        if not found and num_classes is None:
            raise ValueError(
                f"{_title(data)} does not tell its classes: num_classes must be given."
            )
        if found and num_classes not in (None, found):
            raise ValueError(
                f"num_classes is {num_classes}, but {_title(data)} has {found} classes."
            )
        count = found or num_classes or 0
        if count < 2:
            raise ValueError(f"{_title(data)} has one class: there is nothing to tell apart.")
        return count

    def match(self, label_names: Any) -> None:
        """From here on, give the class numbers of a model with these names.

        Raises:
            ValueError: held-out classes that training does not have; they are named.
        """
        if not self.streaming:
            self.train.match(self.num_classes, label_names)
        if self.held_out is None:
            return
        try:
            self.held_out.match(self.num_classes, label_names)
        except ValueError as error:
            raise ValueError(f"the held-out images do not fit: {error}") from error


def is_stream(data: Any) -> bool:
    """Whether it is read from beginning to end."""
    if isinstance(data, IterableDataset):
        return True
    if not isinstance(data, (str, os.PathLike)):
        return False
    prefix = str(data).partition("/")[0].lower()
    return prefix in _STREAMS and prefix in NAMED and not Path(data).exists()


def _has_held_out(data: Any, split: str) -> bool:
    """Whether a folder has, beside its training images, a subfolder of held-out ones."""
    if not isinstance(data, (str, os.PathLike)) or not (Path(data) / split).is_dir():
        return False
    return any((Path(data) / name).is_dir() for name in _HELD_OUT)


def _title(data: Any) -> str:
    return str(data) if isinstance(data, (str, os.PathLike)) else type(data).__name__
