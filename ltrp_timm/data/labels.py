"""Images with a class each, and how the classes of a folder become those of a model."""

import operator
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import ImageNetInfo, get_img_extensions, infer_imagenet_subset
from timm.utils import natural_key
from torch.utils.data import IterableDataset

from ltrp_timm._text import one_line, printable
from ltrp_timm.data.images import Images, open_dataset, split_indices

_SHOWN = 5  # names in a message


def open_labelled(
    data: Any,
    root: str | None = None,
    split: str = "train",
    input_key: str | None = None,
    target_key: str | None = None,
    min_side: int = 1,
    allow_empty: bool = False,
) -> "LabelledImages":
    """A dataset of pictures with one class each.

    Args:
        data: a folder with a folder for each class, a ``.tar`` of one, ``hfds/…``, ``torch/…``, or
            a torch dataset of (picture, class number).
        root: folder of a named dataset.
        split: timm's; of a folder, its subfolder of that name when there is one.
        input_key: where a named dataset keeps its images.
        target_key: where it keeps its labels; None: "label".
        min_side: smaller pictures, and strips, count as unreadable.
        allow_empty: classes without any image are no error (see ``LabelledImages.empty``).

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it holds no image, has no classes, or one of them is empty.
        ImportError: the package behind a prefix is missing.

    >>> open_labelled("imagenet", split="validation")  # doctest: +SKIP
    """
    dataset = open_dataset(
        data,
        root=root,
        split=split,
        input_key=input_key,
        target_key=target_key or "label",
        training=False,
    )
    if isinstance(dataset, IterableDataset):
        raise ValueError(f"{data} is a stream: its images cannot be counted, and come unlabelled.")
    images = LabelledImages(dataset, min_side)
    if images.empty and not allow_empty:
        noun = "class has" if len(images.empty) == 1 else "classes have"
        raise ValueError(f"{len(images.empty)} {noun} no image in {data}: {some(images.empty)}.")
    return images


class LabelledImages(Images):
    """Pictures and the numbers of their classes.

    Args:
        dataset: timm's, or a map-style torch dataset of (picture, class number).
        min_side: smaller pictures, and strips, count as unreadable.

    Attributes:
        class_names: of all classes, in timm's natural order; () where the dataset names none.
        empty: names of class folders without an image.
        present: class numbers of the model that this set has, once ``match`` was called.

    Raises:
        ValueError: it has no classes, or images outside of their folders.
    """

    blank = -1

    def __init__(self, dataset: Any, min_side: int = 1) -> None:
        super().__init__(dataset, min_side)
        numbers = _class_to_idx(dataset)
        self.empty = _empty_folders(self.reader, set(numbers))
        self.class_names = tuple(sorted([*numbers, *self.empty], key=natural_key))
        if _is_folder(self.reader):
            self._check_folders(numbers)
        else:  # the dataset's own numbers mean something
            self.class_names = tuple(sorted(numbers, key=numbers.__getitem__))
        places = {name: place for place, name in enumerate(self.class_names)}
        self._places = {number: places[name] for name, number in numbers.items()}
        self._numbers = dict(self._places)
        self._names = dict(enumerate(self.class_names))
        self.present: tuple[int, ...] = tuple(range(len(self.class_names)))
        self._check_first_label()

    def _check_folders(self, numbers: Mapping[str, int]) -> None:
        root = printable(getattr(self.reader, "root", None) or "the archive")
        if set(numbers) <= {""}:
            raise ValueError(f"{root} has no folder for each class: its images lie side by side.")
        if "" in numbers:
            raise ValueError(f"{root} has images outside of its class folders.")

    def _check_first_label(self) -> None:
        if not len(self):
            raise ValueError("there are no images.")
        key = getattr(self.reader, "label_key", None)
        if key is not None and not _is_folder(self.reader):
            try:
                file, raw = self.reader[0][:2]  # type: ignore[index]
                file.close()
                operator.index(raw)
            except Exception as error:  # of the reader and what lies under it
                reason = one_line(error)
                raise ValueError(f"the data has no class numbers in {key!r}: {reason}") from error

    def read_item(self, index: int) -> tuple[Image.Image, int]:
        """The picture and the number of its class.

        Raises:
            ValueError: one line with its name and the reason.
        """
        picture, raw = super().read_item(index)
        try:
            number = operator.index(raw)
        except TypeError:
            raise ValueError(f"{self.name(index)}: its label is no class number: {raw!r}") from None
        return picture, self._numbers.get(number, number)

    def class_name(self, number: int) -> str:
        """What a class is called here; its number where this set does not name it."""
        return self._names.get(number, str(number))

    def numbers(self) -> list[int] | None:
        """The class number of each image; None where only reading the images would tell."""
        raw = _listed_targets(self.dataset, self.reader)
        if raw is None or len(raw) != len(self):
            return None
        return [self._numbers.get(int(number), int(number)) for number in raw]

    def split(self, share: float) -> tuple[list[int], list[int]]:
        """Training and held-out indices; the share is held out of each class, never all of one."""
        numbers = self.numbers()
        if numbers is None or not share:
            return super().split(share)
        members: dict[int, list[int]] = {}
        for index, number in enumerate(numbers):
            members.setdefault(number, []).append(index)
        train: list[int] = []
        held: list[int] = []
        for indices in members.values():
            parts = split_indices(len(indices), share if len(indices) > 1 else 0.0)
            for whole, part in zip((train, held), parts):
                whole += [indices[place] for place in part]
        return sorted(train), sorted(held)

    def match(self, num_classes: int, label_names: Any = None) -> str:
        """From here on, give the class numbers of a model; see ``match_classes``.

        Returns:
            How they were found, for the user.

        Raises:
            ValueError: classes of the set and of the model disagree; they are named.
        """
        if not self.class_names:
            return "numbers of the dataset"
        numbers, how = match_classes(self.class_names, num_classes, label_names)
        self._numbers = {raw: numbers[place] for raw, place in self._places.items()}
        self._names = dict(zip(numbers, self.class_names))
        self.present = tuple(sorted(numbers))
        return how


def match_classes(
    names: Sequence[str], num_classes: int, label_names: Any = None
) -> tuple[list[int], str]:
    """Which class of a model each class of a dataset is.

    By name where the model's names are known: those recorded in its configuration, or the WordNet
    ids of ImageNet, told by the number of classes. Else by number where all folders are named so
    (as ImageNet-V2's), else by natural order where there are equally many.

    Args:
        names: of the dataset, in natural order.
        num_classes: of the model.
        label_names: of the model, in their order or by number; None: it recorded none.

    Returns:
        A class number of the model for each name, and how it was found.

    Raises:
        ValueError: they disagree; the names that do are named.

    >>> match_classes(["n01443537", "n01440764"], 1000)
    ([1, 0], 'by WordNet id')
    >>> match_classes(["cat", "dog"], 2)
    ([0, 1], 'in natural order')
    """
    recorded = listed_names(label_names)
    if recorded and len(recorded) != num_classes:
        raise ValueError(f"the model has {num_classes} classes and names {len(recorded)}.")
    synsets = _imagenet_classes(num_classes)
    known = recorded or synsets
    wordnet = bool(known) and known == synsets
    places = {name: number for number, name in enumerate(known)}
    strangers = [name for name in names if name not in places]
    if known and not strangers:
        return [places[name] for name in names], "by WordNet id" if wordnet else "by name"
    if not recorded or wordnet:
        if all(_is_number(name) and int(name) < num_classes for name in names):
            return [int(name) for name in names], "by number"
        if not recorded and len(names) == num_classes == len(strangers):
            return list(range(num_classes)), "in natural order"
    if recorded or (wordnet and len(strangers) < len(names)):
        raise ValueError(
            f"{len(strangers)} of {len(names)} classes are none of the model's {num_classes}: "
            f"{some(strangers)}; the model's begin with {some(known)}."
        )
    raise ValueError(
        f"there are {len(names)} classes ({some(names)}), but the model has {num_classes}."
    )


def listed_names(label_names: Any) -> list[str]:
    """Names by number, from a list or from {number: name}."""
    if isinstance(label_names, Mapping):
        numbered = {int(number): str(name) for number, name in label_names.items()}
        return [numbered[number] for number in sorted(numbered)]
    return [str(name) for name in label_names or ()]


def _imagenet_classes(num_classes: int) -> list[str]:
    subset = infer_imagenet_subset({"num_classes": num_classes})
    if subset is None:
        return []
    names: list[str] = ImageNetInfo(subset).label_names()
    return names if len(names) == num_classes else []


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdecimal()


def some(names: Sequence[str]) -> str:
    """The first of many names, on one line."""
    shown = ", ".join(printable(name) for name in names[:_SHOWN])
    return shown + (", …" if len(names) > _SHOWN else "")


def _class_to_idx(dataset: Any) -> dict[str, int]:
    """Class numbers by name, of timm's readers and of torchvision's datasets."""
    reader = getattr(dataset, "reader", None)
    for place, name in ((reader, "class_to_idx"), (reader, "class_name_to_idx")):
        found = getattr(place, name, None)
        if found is not None:
            return {str(key): int(number) for key, number in found.items()}
    classes = getattr(dataset, "classes", None) or ()
    return {str(name): number for number, name in enumerate(classes)}


def _listed_targets(dataset: Any, reader: Any) -> Sequence[Any] | None:
    """The dataset's own class numbers, of timm's readers and of torchvision's datasets."""
    if hasattr(reader, "targets"):  # of an archive
        return list(reader.targets)
    if hasattr(reader, "samples"):
        return [sample[1] for sample in reader.samples]
    if hasattr(reader, "label_key"):
        return list(reader.dataset[reader.label_key])
    targets = getattr(dataset, "targets", None)
    return None if targets is None else list(targets)


def _is_folder(reader: Any) -> bool:
    """Whether the classes are folders, of a disk or of an archive."""
    return reader is not None and hasattr(reader, "samples")


def _empty_folders(reader: Any, full: set[str]) -> list[str]:
    """Names of the innermost folders without an image; hidden ones are passed over."""
    root = getattr(reader, "root", None)
    if (
        not _is_folder(reader)
        or not isinstance(root, (str, os.PathLike))
        or not Path(root).is_dir()
    ):
        return []
    kinds = get_img_extensions(as_set=True)
    found = set()
    for place, folders, files in os.walk(str(root), followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        images = any(os.path.splitext(name)[1].lower() in kinds for name in files)
        if not folders and not images and place != str(root):
            found.add(os.path.basename(place))
    return sorted(found - full, key=natural_key)
