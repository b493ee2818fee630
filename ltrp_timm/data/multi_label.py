"""Images with several classes each: the files of a folder, and the labels of a file.

Label files (COCO's annotations, and CSV tables) come from others: they are read as data and checked
whole before any image is opened.
"""

import csv
import io
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import torch
from PIL import Image
from timm.utils import natural_key
from torch import Tensor

from ltrp_timm._text import first_names, one_line, printable
from ltrp_timm.data.images import IMAGE_ENDINGS, ImageFiles, Images
from ltrp_timm.data.labels import (
    ClassData,
    count_classes,
    listed_names,
    match_classes,
    refuse_empty,
)
from ltrp_timm.runtime.keyed_rng import sample_seed

SEPARATOR = ";"  # between the labels of a cell
_JOINED = ("label", "labels")  # names of a column that holds labels, not a class
_OTHER_SEPARATORS = re.compile(r"[,|\t]")  # "cat|dog" is no class
_T = TypeVar("_T")
_Entries = list[dict[str, Any]]


@dataclass(frozen=True)
class LabelTable:
    """Labels of images.

    Attributes:
        names: N files, relative to the folder of the images.
        classes: C names.
        targets: (N, C) bool.
    """

    names: tuple[str, ...]
    classes: tuple[str, ...]
    targets: Tensor


def read_labels(path: Any) -> LabelTable:
    """Read a label file; images stay in the order of the file.

    Args:
        path: a ``.json`` file with COCO's instance annotations, or a ``.csv`` file: image,labels
            with labels joined by semicolons; or image and a column of 0 and 1 for each class.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is invalid; one line with its name and the reason.

    >>> read_labels("annotations/instances_val2014.json").classes[:2]  # doctest: +SKIP
    ('person', 'bicycle')
    """
    parsers = {".json": _coco_table, ".csv": _read_csv}
    file = Path(path)
    if file.suffix.lower() not in parsers:
        raise ValueError(f"labels must be a {' or '.join(parsers)} file, got {file}.")
    return _read(file, parsers[file.suffix.lower()])


def read_coco(path: Any) -> tuple[_Entries, _Entries, _Entries]:
    """Read the images, categories (in the order of their ids) and annotations of COCO's ``.json``.

    The lists refer to each other: ``image_id``, ``category_id``. Errors are as of ``read_labels``.
    """
    return _read(Path(path), _read_coco)


def read_names(path: Any) -> tuple[str, ...]:
    """Read names of classes, one per line; empty lines are skipped.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file names no class, or one of them twice.
    """

    def parse(text: str) -> tuple[str, ...]:
        names = [line.strip() for line in text.splitlines() if line.strip()]
        if not names:
            raise ValueError("it names no class.")
        _check_once(names, "it names a class twice")
        return tuple(names)

    return _read(Path(path), parse)


def _read(file: Path, parse: Callable[[str], _T]) -> _T:
    """Parse the text of a file; errors carry the file's name."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist, or is not a file.")
    try:
        return parse(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: save it as UTF-8.") from error
    except (ValueError, RecursionError, csv.Error) as error:
        raise ValueError(f"{file}: {one_line(error)}") from error


def _check_once(values: Sequence[Any], problem: str) -> None:
    """Raise ValueError, with the first such values, if one comes twice."""
    twice = [str(value) for value, count in Counter(values).items() if count > 1]
    if twice:
        raise ValueError(f"{problem}: {first_names(twice)}.")


def _check_names(names: Sequence[str]) -> tuple[str, ...]:
    if not names:
        raise ValueError("it names no image.")
    paths = {name: PurePosixPath(name) for name in names}
    _check_once([str(paths[name]) for name in names], "it names an image twice")  # ./a is a
    outside = [name for name, path in paths.items() if path.is_absolute() or ".." in path.parts]
    if outside:
        raise ValueError(f"images must lie below their folder, got {first_names(outside)}.")
    return tuple(names)


# COCO: {"images": [{id, file_name}], "annotations": [{image_id, category_id}], "categories": [...]}


def _read_coco(text: str) -> tuple[_Entries, _Entries, _Entries]:
    content = json.loads(text)
    lists = content if isinstance(content, dict) else {}
    images = _entries(lists, "images", ("id", "file_name"))
    categories = _entries(lists, "categories", ("id", "name"))
    annotations = _entries(lists, "annotations", ("image_id", "category_id"))
    if not categories:
        raise ValueError("it has no categories.")
    _check_once([image["id"] for image in images], "it has an image id twice")
    _check_once([category["id"] for category in categories], "it has a category id twice")
    _check_once([category["name"] for category in categories], "it names a category twice")
    categories.sort(key=lambda category: natural_key(str(category["id"])))  # the ids have gaps
    for what, known in (("image", images), ("category", categories)):
        ids = {entry["id"] for entry in known}
        for annotation in annotations:
            if annotation[f"{what}_id"] not in ids:
                number = annotation[f"{what}_id"]
                raise ValueError(f"an annotation refers to the unknown {what} {number!r}.")
    _check_names([image["file_name"] for image in images])
    return images, categories, annotations


def _entries(content: Mapping[str, Any], name: str, keys: Sequence[str]) -> list[Any]:
    """A list of COCO's; each entry has the fields that are needed."""
    found = content.get(name)
    if not isinstance(found, list):
        raise ValueError(f"expected COCO's annotations, but there is no list {name!r}.")
    for number, entry in enumerate(found):
        for key in keys:
            if not isinstance(entry, dict) or key not in entry:
                raise ValueError(f"entry {number} of {name!r} has no {key!r}.")
            kinds = (str,) if key in ("file_name", "name") else (int, str)
            if not isinstance(entry[key], kinds) or entry[key] == "":
                raise ValueError(f"entry {number} of {name!r} has {key!r} = {entry[key]!r}.")
    return list(found)


def _coco_table(text: str) -> LabelTable:
    images, categories, annotations = _read_coco(text)
    names = {category["id"]: category["name"] for category in categories}
    labels: dict[Any, list[str]] = {image["id"]: [] for image in images}
    for annotation in annotations:  # crowds too: a crowd of people shows people
        labels[annotation["image_id"]].append(names[annotation["category_id"]])
    files = [image["file_name"] for image in images]
    return _table(files, labels.values(), list(names.values()))


# CSV: image,labels with labels joined by semicolons; or image and a column of 0 and 1 per class


def _read_csv(text: str) -> LabelTable:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    lines = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
    if not lines:
        raise ValueError("it is empty.")
    header, rows = lines[0][1], lines[1:]
    if len(header) < 2:
        raise ValueError(f"its header must be image,labels or image,CLASS,…, got {header}.")
    _check_header(header, [row[0] for _, row in rows])
    places: dict[PurePosixPath, int] = {}
    for number, row in lines:
        if len(row) != len(header):
            raise ValueError(f"line {number} has {len(row)} columns, the header {len(header)}.")
        if not row[0]:
            raise ValueError(f"line {number} names no image.")
        first = places.setdefault(PurePosixPath(row[0]), number)
        if first != number:
            raise ValueError(f"line {number} names an image twice: {row[0]}, as line {first}.")
    files, classes = [row[0] for _, row in rows], header[1:]
    if len(classes) == 1 and classes[0].lower() in _JOINED:
        for number, row in rows:
            if _OTHER_SEPARATORS.search(row[1]):
                raise ValueError(
                    f"line {number} has the labels {printable(row[1])!r}: join labels by "
                    f"{SEPARATOR!r}, or give each class a column of 0 and 1."
                )
        labels = [[part.strip() for part in row[1].split(SEPARATOR)] for _, row in rows]
        labels = [[label for label in parts if label] for parts in labels]
        classes = sorted({label for parts in labels for label in parts}, key=natural_key)
        if not classes:
            raise ValueError("no image has a label.")
        return _table(files, labels, classes)
    if not all(classes):
        raise ValueError("its header has a column without a name.")
    _check_once(classes, "it names a class twice")
    for number, row in rows:
        for name, cell in zip(classes, row[1:]):
            if cell not in ("0", "1"):
                raise ValueError(
                    f"line {number} has {printable(cell)!r} for {printable(name)!r}, "
                    "expected 0 or 1 (or one column, labels)."
                )
    labels = [[name for name, cell in zip(classes, row[1:]) if cell == "1"] for _, row in rows]
    return _table(files, labels, classes)


def _check_header(header: Sequence[str], files: Sequence[str]) -> None:
    """Check that the first line is no image: it would be lost, and its cells become classes."""
    first, *endings = (PurePosixPath(file.lower()).suffix for file in (header[0], *files))
    if (first and first in (*IMAGE_ENDINGS, *endings)) or set(header[1:]) <= {"0", "1"}:
        raise ValueError(
            f"line 1 must be a header, image,labels or image,CLASS,…, got {','.join(header)}."
        )


def _table(
    files: Sequence[str], labels: Iterable[Sequence[str]], classes: Sequence[str]
) -> LabelTable:
    """A table from the labels of each file."""
    columns = {name: column for column, name in enumerate(classes)}
    targets = torch.zeros(len(files), len(classes), dtype=torch.bool)
    for row, found in enumerate(labels):
        targets[row, [columns[label] for label in found]] = True
    return LabelTable(_check_names(files), tuple(classes), targets)


class MultiLabelImages(Images):
    """Pictures of a folder and their classes from a label file, see ``open_multi_label``.

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
        """Map targets to the classes of a model, and say how; errors as of ``match_classes``."""
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
        folder: images that the file does not name are ignored.
        labels: see ``read_labels``.
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


def open_multi_label_data(
    data: Any,
    labels: Any,
    *,
    val_data: Any = None,
    val_labels: Any = None,
    num_classes: int | None = None,
    skip_absent: bool = False,
) -> ClassData:
    """Open training and held-out images with several classes each; errors as of each set.

    Label files are as in ``open_multi_label``. Held-out images are those that ``val_labels`` names
    in ``val_data``, or in ``data`` without one.
    """
    if val_data is not None and val_labels is None:
        raise ValueError("val_data needs val_labels, with multi_label.")
    train = open_multi_label(data, labels, skip_absent=skip_absent)
    count = count_classes(labels, len(train.class_names), num_classes)
    sets = {"training": train}
    if val_labels is not None:
        folder = data if val_data is None else val_data
        sets["held-out"] = open_multi_label(
            folder, val_labels, allow_empty=True, skip_absent=skip_absent
        )
    notes = []
    for what, images in sets.items():
        if images.absent:
            notes.append(f"{images.absent} labelled {what} images are not there, left out")
        if images.unlabelled:
            notes.append(f"{images.unlabelled} of {len(images)} {what} images have no class")
    return ClassData(train, sets.get("held-out"), train.class_names, count, notes)
