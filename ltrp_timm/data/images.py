"""Pictures from all that timm reads, by index; labels see ``labels``."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_dataset

from ltrp_timm._text import one_line
from ltrp_timm.data.photos import MAX_ASPECT, decode_image
from ltrp_timm.runtime.keyed_rng import sample_seed

NAMED = ("hfds", "hfids", "tfds", "torch", "wds")  # prefixes of timm's readers


def open_dataset(
    data: Any,
    root: str | None = None,
    split: str = "train",
    input_key: str | None = None,
    num_samples: int | None = None,
    seed: int = 0,
    training: bool = True,
    target_key: str | None = None,
) -> Any:
    """A dataset of timm's by its name, or one that is given.

    Args:
        data: a folder (subfolders or none), a ``.tar``, ``hfds/…``, ``hfids/…``, ``tfds/…``,
            ``torch/…``, ``wds/…``, or a torch dataset of pictures.
        root: folder of a named dataset.
        split: as timm's ``create_dataset`` takes it.
        input_key: where a named dataset keeps its images.
        num_samples: length of a stream that does not know it.
        seed: of a stream's shuffling.
        training: a stream is shuffled.
        target_key: where a named dataset keeps its labels; None: they are not read.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it holds no image, or timm cannot read it.
        ImportError: the package behind a prefix is missing.
    """
    if not isinstance(data, (str, os.PathLike)):
        return data
    text, named = str(data), check_data(data)
    prefix = text.partition("/")[0].lower()
    extra: dict[str, Any] = {"input_key": input_key} if named and input_key else {}
    if prefix == "hfds" and named:
        extra["target_key"] = target_key or input_key or "image"  # it need not have labels
    if named and num_samples:
        extra["num_samples"] = num_samples
    try:
        return create_dataset(
            text if named else "",
            root=root if named else text,
            split=split,
            is_training=training,
            seed=seed,
            **extra,
        )
    except ImportError as error:
        raise ImportError(
            f"{text} needs a package that is missing ({one_line(error)}): "
            "pip install 'ltrp-timm[train]'"
        ) from error
    except Exception as error:  # timm and what it calls raise anything, AssertionError included
        raise ValueError(f"{text} cannot be read as a dataset: {one_line(error)}") from error


def check_data(data: Any) -> bool:
    """Check that something is there before anything is downloaded for it.

    Returns:
        Whether it is a dataset by name, not a path.

    Raises:
        FileNotFoundError: nothing is there.
    """
    if not isinstance(data, (str, os.PathLike)) or Path(data).exists():
        return False
    if str(data).partition("/")[0].lower() not in NAMED:
        raise FileNotFoundError(f"{data} does not exist.")
    return True


class Images:
    """Pictures of a dataset by index, upright RGB, or one line on what is wrong with one.

    Args:
        dataset: timm's, or any map-style torch dataset whose items are, or begin with, a picture.
        min_side: smaller pictures, and strips, count as unreadable.

    Attributes:
        blank: what stands for the target of an image that cannot be read; None: there are none.
    """

    blank: Any = None

    def __init__(self, dataset: Any, min_side: int = 1) -> None:
        self.dataset, self.min_side = dataset, min_side
        self.reader = getattr(dataset, "reader", None)

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        """What to call an image when something is wrong with it."""
        known = getattr(self.dataset, "filename", None)
        name = known(index) if known is not None else None
        return f"image {index}" if name is None else str(name)  # a table's images may have none

    def read(self, index: int) -> Image.Image:
        """The picture.

        Raises:
            ValueError: one line with its name and the reason.
        """
        return self.read_item(index)[0]

    def read_item(self, index: int) -> tuple[Image.Image, Any]:
        """The picture, and its target as the dataset gives it (None where it gives none).

        Raises:
            ValueError: one line with its name and the reason.
        """
        name = self.name(index)
        picture, target = self._from_reader(index, name) if self.reader else self._item(index, name)
        size, least = f"{picture.width}x{picture.height} pixels", min(picture.size)
        if least < self.min_side:
            raise ValueError(f"{name}: {size}, smaller than a patch of {self.min_side}.")
        if max(picture.size) > MAX_ASPECT * least:
            raise ValueError(f"{name}: {size}, over {MAX_ASPECT} times longer than wide.")
        return picture, target

    def _from_reader(self, index: int, name: str) -> tuple[Image.Image, Any]:
        try:
            file, target = self.reader[index][:2]  # type: ignore[index]
        except Exception as error:
            raise ValueError(f"{name}: {one_line(error)}") from error
        with file:
            picture = decode_image(file, name)
        close_tars(self.reader)
        return picture, target

    def _item(self, index: int, name: str) -> tuple[Image.Image, Any]:
        try:
            item = self.dataset[index]
            picture, target = (*item, None)[:2] if isinstance(item, (tuple, list)) else (item, None)
            if not isinstance(picture, Image.Image):
                raise TypeError(f"expected a PIL image, got {type(picture).__name__}.")
            return picture.convert("RGB"), target
        except Exception as error:
            raise ValueError(f"{name}: {one_line(error)}") from error

    def split(self, share: float) -> tuple[list[int], list[int]]:
        """Training and held-out indices, see ``split_indices``; one image alone is for training."""
        return split_indices(len(self), share if len(self) > 1 else 0.0)

    def fingerprint(self, indices: Sequence[int]) -> dict[str, Any]:
        """What tells these images from others: their number, and names where those are at hand."""
        if not hasattr(self.reader, "samples"):
            return {"images": len(indices)}
        names = "\n".join(self.name(index) for index in indices)
        return {"images": len(indices), "names": sample_seed(0, 0, 0, names)}


def close_tars(reader: Any) -> None:
    """Close what timm's tar reader keeps open: workers would share one position in the file."""
    state = getattr(reader, "tar_state", None)
    states = list(state.values()) if isinstance(state, dict) else [state] if state else []
    while states:
        state = states.pop()
        states += state.children.values()
        if state.tf is not None:
            state.tf.close()
            state.reset()


def split_indices(count: int, holdout: float) -> tuple[list[int], list[int]]:
    """0 … n - 1 as training and held-out indices, ascending; a function of (n, share) alone.

    >>> [len(part) for part in split_indices(10, 0.2)]
    [8, 2]
    """
    held = min(max(1, round(count * holdout)), count - 1) if holdout else 0
    draw = torch.Generator().manual_seed(sample_seed(0, 0, count, "held out"))
    order = torch.randperm(count, generator=draw).tolist()
    return sorted(order[held:]), sorted(order[:held])
