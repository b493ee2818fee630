"""Images with one class each, and which class of a model each class of a data set is."""

import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.utils import natural_key
from torch.utils.data import IterableDataset

from ltrp_timm._text import first_names, one_line, printable
from ltrp_timm.data.images import (
    CLASS_NUMBERS,
    Images,
    is_hidden,
    open_dataset,
    split_folder,
    split_indices,
)

_STREAMS = ("hfids", "tfds", "wds")


@dataclass(frozen=True)
class ClassData:
    """The training and held-out images of a run.

    Attributes:
        train: images to train on, or a stream, which does not name its classes.
        held_out: images to measure with, or None.
        class_names: C names in their order; () if the data does not name its classes.
        num_classes: C.
        notes: lines for the user.
    """

    train: Any
    held_out: Any
    class_names: tuple[str, ...]
    num_classes: int
    notes: Sequence[str]

    def match(self, label_names: Any) -> None:
        """Map class numbers to those of a model with these names; ValueError if they disagree."""
        sets = {"": self.train, "the held-out images do not fit: ": self.held_out}
        for where, images in sets.items():
            indexed = isinstance(images, Images)  # a stream is not
            try:
                if indexed:
                    images.match(self.num_classes, label_names)
            except ValueError as error:
                raise ValueError(f"{where}{error}") from error


def open_class_data(
    data: Any,
    *,
    split: str = "train",
    val_data: Any = None,
    val_split: str = "validation",
    num_classes: int | None = None,
    **named: Any,
) -> ClassData:
    """Open training and held-out images with one class each; a stream names no classes.

    Without ``val_data``, held-out images are those of ``data``, if it is a folder that has some
    beside its training images. ``named`` are ``root``, ``input_key`` and ``target_key`` of
    ``open_labelled``.

    ValueError if a class has no image, or ``num_classes`` is not the number of classes.
    """
    notes: list[str] = []
    train = data if is_stream(data) else open_labelled(data, split=split, **named)
    names = getattr(train, "class_names", ())
    count = count_classes(data, len(names), num_classes)
    if count < 2:
        raise ValueError(f"{_title(data)} has one class; training needs at least two.")
    if val_data is None and _has_held_out(data, split):
        val_data = data
        notes.append(f"held-out images are those of {data} itself")
    held_out = None
    if val_data is not None:
        held_out = open_labelled(val_data, split=val_split, allow_empty=True, **named)
    return ClassData(train, held_out, names, count, notes)


def is_stream(data: Any) -> bool:
    """Whether a data set can only be read from beginning to end."""
    if isinstance(data, IterableDataset):
        return True
    if not isinstance(data, (str, os.PathLike)):
        return False
    return str(data).partition("/")[0].lower() in _STREAMS and not Path(data).exists()


def _has_held_out(data: Any, split: str) -> bool:
    """Whether a folder has a subfolder of held-out images beside that of training images."""
    if not isinstance(data, (str, os.PathLike)):
        return False
    return all(split_folder(str(data), name) != str(data) for name in (split, "validation"))


def count_classes(data: Any, found: int, given: int | None) -> int:
    """The number of classes found, else given; ValueError if it is neither, or they differ."""
    if not found and given is None:
        raise ValueError(f"{_title(data)} does not name its classes: num_classes must be given.")
    if found and given not in (None, found):
        raise ValueError(f"num_classes is {given}, but {_title(data)} has {found} classes.")
    return found or given or 0


def _title(data: Any) -> str:
    return str(data) if isinstance(data, (str, os.PathLike)) else type(data).__name__


def open_labelled(
    data: Any, *, target_key: str | None = None, allow_empty: bool = False, **named: Any
) -> "LabelledImages":
    """Open a data set of pictures with one class each.

    Args:
        data: a folder with a folder for each class, a ``.tar`` of one, ``hfds/…``, ``torch/…``, or
            a torch data set of (picture, class number).
        target_key: field of a named data set that holds the labels (default: "label").
        allow_empty: accept classes without any image (see ``LabelledImages.empty``).
        **named: ``root``, ``split`` and ``input_key`` of ``open_dataset``; for a folder, ``split``
            is its subfolder of that name if there is one.

    Raises:
        FileNotFoundError: ``data`` does not exist.
        ValueError: The data set is a stream, has no image or no classes, a class has no image, or
            the folders of classes lie at several places.
        ImportError: The package behind a prefix is not installed.

    >>> open_labelled("imagenet", split="validation")  # doctest: +SKIP
    """
    dataset = open_dataset(data, target_key=target_key or "label", training=False, **named)
    if isinstance(dataset, IterableDataset):
        raise ValueError(f"{data} is a stream: its images cannot be counted and have no labels.")
    images = LabelledImages(dataset)
    if not allow_empty:
        refuse_empty(images.empty, data)
    return images


def refuse_empty(classes: Sequence[str], source: Any) -> None:
    """Raise ValueError, naming their source, if there are classes without an image."""
    if classes:
        noun = "class has" if len(classes) == 1 else "classes have"
        raise ValueError(f"{len(classes)} {noun} no image in {source}: {first_names(classes)}.")


class LabelledImages(Images):
    """Pictures and the numbers of their classes, of a data set with class numbers; see ``Images``.

    Attributes:
        class_names: names of all classes, in timm's natural order; () if the data set names none.
        empty: names of class folders without an image.
        present: class numbers of the model that this set has; ``match`` sets them.

    Raises:
        ValueError: The data set has no images or no classes, or has images outside of its class
            folders.
    """

    blank = -1

    def __init__(self, dataset: Any) -> None:
        super().__init__(dataset)
        numbers = _class_to_idx(dataset)
        self.empty: list[str] = []
        if hasattr(self.reader, "samples"):  # the classes are folders, on disk or in an archive
            self.empty = self._check_folders(set(numbers))
            self.class_names = tuple(sorted([*numbers, *self.empty], key=natural_key))
        else:  # the data set's own numbers have a meaning
            self.class_names = tuple(sorted(numbers, key=numbers.__getitem__))
        self._names = dict(enumerate(self.class_names))
        places = {name: place for place, name in self._names.items()}
        self._places = {number: places[name] for name, number in numbers.items()}
        self._numbers = dict(self._places)
        self.present: tuple[int, ...] = tuple(self._names)
        self._check_first_label()

    def _check_folders(self, names: set[str]) -> list[str]:
        """Check that each class is one folder, all at one depth; returns those without an image."""
        root = getattr(self.reader, "root", None) or "the archive"
        name = printable(root)
        folders = sorted(_folders(self.reader), key=natural_key)
        if names <= {""}:
            raise ValueError(f"{name} has no folder for each class: all images are in one folder.")
        if "" in names:
            raise ValueError(f"{name} has images outside of its class folders.")
        deep, flat = (pick(folders, key=lambda path: path.count("/")) for pick in (max, min))
        depth = deep.count("/")
        if flat.count("/") != depth:
            raise ValueError(
                f"{name} has images at different depths, such as in {printable(flat)} and "
                f"{printable(deep)}; all class folders must lie at one depth."
            )
        places: dict[str, str] = {}
        for folder in folders:
            other = places.setdefault(os.path.basename(folder), folder)
            if other != folder:
                raise ValueError(
                    f"{name} has the class {printable(os.path.basename(folder))} at two places, "
                    f"{printable(other)} and {printable(folder)}; give a folder that has it once."
                )
        if not os.path.isdir(root):
            return []
        every = (p for p in Path(root).glob("/".join(["*"] * (depth + 1))) if p.is_dir())
        empty = {p.name for p in every if not is_hidden(str(p.relative_to(root)))} - names
        return sorted(empty, key=natural_key)

    def _check_first_label(self) -> None:
        if not len(self):
            raise ValueError("there are no images.")
        key = getattr(self.reader, "label_key", None)
        if key is not None and not hasattr(self.reader, "samples"):
            try:
                file, label = self.reader[0][:2]  # type: ignore[index]
                file.close()
                operator.index(label)
            except Exception as error:  # of the reader and what lies under it
                reason = one_line(error)
                raise ValueError(f"the data has no class numbers in {key!r}: {reason}") from error

    def read_item(self, index: int) -> tuple[Image.Image, int]:
        """Read a picture and the number of its class; ValueError, with its name, if it fails."""
        picture, label = super().read_item(index)
        try:
            number = operator.index(label)
        except TypeError:
            name = printable(self.name(index))
            raise ValueError(f"{name}: its label is not a class number: {label!r}") from None
        return picture, self._numbers.get(number, number)

    def class_name(self, number: int) -> str:
        """Name of a class; its number if this set does not name it."""
        return self._names.get(number, str(number))

    def numbers(self) -> list[int] | None:
        """Class number of each image; None if that needs reading the images."""
        labels = _listed_targets(self.dataset, self.reader)
        if labels is None or len(labels) != len(self):
            return None
        return [self._numbers.get(int(label), int(label)) for label in labels]

    def split(self, share: float) -> tuple[list[int], list[int]]:
        """Training and held-out indices; a share of each class is held out, never all of one."""
        numbers = self.numbers()
        if numbers is None or not share:
            return super().split(share)
        members: dict[int, list[int]] = {}
        for index, number in enumerate(numbers):
            members.setdefault(number, []).append(index)
        train: list[int] = []
        held: list[int] = []
        for indices in members.values():
            for whole, part in zip((train, held), split_indices(len(indices), share)):
                whole += [indices[place] for place in part]
        return sorted(train), sorted(held)

    def match(self, num_classes: int, label_names: Any = None) -> str:
        """Map class numbers to those of a model, and say how; errors as of ``match_classes``."""
        if not self.class_names:
            return "numbers of the data set"
        numbers, how = match_classes(self.class_names, num_classes, label_names)
        self._numbers = {label: numbers[place] for label, place in self._places.items()}
        self._names = dict(zip(numbers, self.class_names))
        self.present = tuple(sorted(numbers))
        return how


def match_classes(
    names: Sequence[str], num_classes: int, label_names: Any = None
) -> tuple[list[int], str]:
    """Find the class of a model for each class of a data set.

    Classes match by name if the names of the model are known: from its configuration, or the
    WordNet ids of ImageNet, inferred from the number of classes. Otherwise they match by number if
    all names are numbers (as ImageNet-V2's), or in their order if there are equally many.

    Args:
        names: names of the data set's classes, in its order.
        num_classes: number of the model's classes.
        label_names: names of the model's classes, in their order or by number; None if unknown.

    Returns:
        A class number of the model for each name, and how it was found.

    Raises:
        ValueError: The classes disagree; the error names those that do.

    >>> match_classes(["n01443537", "n01440764"], 1000)
    ([1, 0], 'by WordNet id')
    >>> match_classes(["cat", "dog"], 2)
    ([0, 1], 'in natural order')
    """
    recorded = listed_names(label_names)
    if recorded and len(recorded) != num_classes:
        raise ValueError(f"the model has {num_classes} classes, but names {len(recorded)}.")
    synsets = _imagenet_classes(num_classes)
    known = recorded or synsets
    wordnet = bool(known) and known == synsets
    places = {name: number for number, name in enumerate(known)}
    unknown = [name for name in names if name not in places]
    if known and not unknown:
        return [places[name] for name in names], "by WordNet id" if wordnet else "by name"
    if not recorded or wordnet:
        digits = all(name.isascii() and name.isdecimal() for name in names)
        if digits and all(int(name) < num_classes for name in names):
            numbers = [int(name) for name in names]
            if not known and 0 not in numbers:
                raise ValueError(
                    f"the classes ({first_names(names)}) may be numbered from 0 or from 1; list "
                    f"the names of the model's {num_classes} classes in a file (--class-map)."
                )
            return numbers, "by number"
        if not recorded and len(names) == num_classes == len(unknown):
            return list(range(num_classes)), order_of(names)
    if recorded or (wordnet and len(unknown) < len(names)):
        raise ValueError(
            f"{len(unknown)} of {len(names)} classes are not among the model's {num_classes}: "
            f"{first_names(unknown)}; the model's begin with {first_names(known)}."
        )
    raise ValueError(
        f"there are {len(names)} classes ({first_names(names)}), but the model has {num_classes}."
    )


def order_of(names: Sequence[str]) -> str:
    """Say in which order names of classes are: timm sorts folders another way than torchvision.

    >>> order_of(["1", "2", "10"])
    "in natural order (1, 2, 10), not in torchvision's (1, 10, 2)"
    """
    natural, plain = sorted(names, key=natural_key), sorted(names)
    if list(names) != natural:
        return f"in the order of the data set ({first_names(names)})"
    if natural == plain:
        return "in natural order"
    shown, other = first_names(natural), first_names(plain)
    return f"in natural order ({shown}), not in torchvision's ({other})"


def listed_names(label_names: Any) -> list[str]:
    """Names in the order of their numbers, from a list or from {number: name}."""
    if isinstance(label_names, Mapping):
        numbered = {int(number): str(name) for number, name in label_names.items()}
        return [numbered[number] for number in sorted(numbered)]
    return [str(name) for name in label_names or ()]


def _imagenet_classes(num_classes: int) -> list[str]:
    subset = infer_imagenet_subset({"num_classes": num_classes})
    return [] if subset is None else ImageNetInfo(subset).label_names()


def _class_to_idx(dataset: Any) -> dict[str, int]:
    """Class numbers by name, from timm's readers and torchvision's data sets."""
    reader = getattr(dataset, "reader", None)
    for name in CLASS_NUMBERS:
        if getattr(reader, name, None) is not None:
            return {str(key): int(number) for key, number in getattr(reader, name).items()}
    classes = getattr(dataset, "classes", None) or ()
    return {str(name): number for number, name in enumerate(classes)}


def _listed_targets(dataset: Any, reader: Any) -> Sequence[Any] | None:
    """Class numbers of all images, from timm's readers and torchvision's data sets."""
    if hasattr(reader, "targets"):  # of an archive
        return list(reader.targets)
    if hasattr(reader, "samples"):
        return [sample[1] for sample in reader.samples]
    if hasattr(reader, "label_key"):
        return list(reader.dataset[reader.label_key])
    targets = getattr(dataset, "targets", None)
    return None if targets is None else list(targets)


def _folders(reader: Any) -> set[str]:
    """Folders of images below the root; an archive in an archive is a folder too."""
    if len(reader.samples) and isinstance(reader.samples[0][0], str):
        found = {os.path.dirname(sample[0]) for sample in reader.samples}
        return {Path(os.path.relpath(folder, reader.root)).as_posix() for folder in found}
    inner = ((part.path, child and child.path) for part, _, child in reader.samples)
    parts = {(os.path.dirname(path), child or "") for path, child in inner}
    return {os.path.normpath(os.path.join(os.path.splitext(c)[0], path)) for path, c in parts}
