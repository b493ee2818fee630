"""What label files say: which labels each image has. COCO's annotations, and CSV tables.

They come from others: read as data, checked whole, before any image is opened.
"""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import torch
from timm.utils import natural_key
from torch import Tensor

from ltrp_timm._text import first_names, one_line, printable

KINDS = (".json", ".csv")
SEPARATOR = ";"  # between the labels of a cell
_JOINED = ("label", "labels")  # names of a column that holds labels, not a class
_YES = {"0": False, "1": True}
_T = TypeVar("_T")


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


@dataclass(frozen=True)
class CocoLists:
    """The lists of a file in COCO's format: its own entries, checked to belong together.

    Attributes:
        images: entries with ``id`` and ``file_name``.
        categories: entries with ``id`` and ``name``, in the order of their ids.
        annotations: entries with the ``image_id`` and the ``category_id`` of one of those.
    """

    images: list[dict[str, Any]]
    categories: list[dict[str, Any]]
    annotations: list[dict[str, Any]]


def read_labels(path: Any) -> LabelTable:
    """Read a label file.

    Args:
        path: a ``.json`` with COCO's instance annotations, or a ``.csv``.

    Returns:
        All of it; images in the order of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: one line with the file and what is wrong in it.

    >>> read_labels("annotations/instances_val2014.json").classes[:2]  # doctest: +SKIP
    ('person', 'bicycle')
    """
    file = Path(path)
    if file.suffix.lower() not in KINDS:
        raise ValueError(f"labels must be a file of the kinds {', '.join(KINDS)}, got {file}.")
    return _read(file, _coco_table if file.suffix.lower() == ".json" else _read_csv)


def read_coco(path: Any) -> CocoLists:
    """Read a file in COCO's format.

    Args:
        path: instance annotations, ``.json``.

    Returns:
        All of it that is about images, categories and annotations.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: one line with the file and what is wrong in it.

    >>> len(read_coco("annotations/instances_val2017.json").categories)  # doctest: +SKIP
    80
    """
    return _read(Path(path), _read_coco)


def _read(file: Path, parse: Callable[[str], _T]) -> _T:
    """What a parser makes of a file's text; what it says against it, with the file's name."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist, or is no file.")
    try:
        return parse(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError, csv.Error) as error:  # of decoding, too
        raise ValueError(f"{file}: {one_line(error)}") from error


def read_names(path: Any) -> tuple[str, ...]:
    """Names of classes, one a line; empty lines are passed over.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds none, or one of them twice.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist, or is no file.")
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text: {one_line(error)}") from error
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise ValueError(f"{file} holds no name of a class.")
    _check_once(names, f"{file} names a class twice")
    return tuple(names)


def _check_once(values: Sequence[Any], what: str) -> None:
    """Check that nothing is there twice.

    Raises:
        ValueError: ``what``, with the first such values.
    """
    if len(set(values)) < len(values):
        seen: set[Any] = set()
        twice = [str(value) for value in values if value in seen or seen.add(value)]  # type: ignore[func-returns-value]
        raise ValueError(f"{what}: {first_names(twice)}.")


def _check_names(names: Sequence[str]) -> None:
    if not names:
        raise ValueError("it names no image.")
    _check_once(names, "it names an image twice")
    outside = [
        name for name in names if PurePosixPath(name).is_absolute() or ".." in name.split("/")
    ]
    if outside:
        raise ValueError(f"images must lie below their folder, got {first_names(outside)}.")


# COCO: {"images": [{id, file_name}], "annotations": [{image_id, category_id}], "categories": [...]}


def _read_coco(text: str) -> CocoLists:
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
    known = {image["id"] for image in images}, {category["id"] for category in categories}
    for annotation in annotations:
        if annotation["image_id"] not in known[0]:
            raise ValueError(f"an annotation is of the unknown image {annotation['image_id']!r}.")
        if annotation["category_id"] not in known[1]:
            raise ValueError(f"an annotation is of unknown category {annotation['category_id']!r}.")
    _check_names([image["file_name"] for image in images])
    return CocoLists(images, categories, annotations)


def _coco_table(text: str) -> LabelTable:
    found = _read_coco(text)
    rows = {image["id"]: row for row, image in enumerate(found.images)}
    columns = {category["id"]: column for column, category in enumerate(found.categories)}
    # those of crowds too: a crowd of people shows people
    pairs = [(rows[a["image_id"]], columns[a["category_id"]]) for a in found.annotations]
    files = tuple(image["file_name"] for image in found.images)
    names = tuple(category["name"] for category in found.categories)
    return LabelTable(files, names, _targets(pairs, len(files), len(names)))


def _entries(content: Mapping[str, Any], name: str, keys: Sequence[str]) -> list[Any]:
    """A list of COCO's, each entry with the fields that are needed."""
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


# CSV: image,labels with labels joined by semicolons; or image and a column of 0 and 1 a class


def _read_csv(text: str) -> LabelTable:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows = [(reader.line_num, row) for row in reader if row]
    if not rows:
        raise ValueError("it is empty.")
    header = [name.strip() for name in rows[0][1]]
    if len(header) < 2:
        raise ValueError(f"its header must be image,labels or image,CLASS,…, got {header}.")
    for number, row in rows:
        if len(row) != len(header):
            raise ValueError(f"line {number} has {len(row)} columns, the header {len(header)}.")
        if not row[0].strip():
            raise ValueError(f"line {number} names no image.")
    if len(header) == 2 and header[1].lower() in _JOINED:
        return _joined(rows[1:])
    return _one_hot(header[1:], rows[1:])


def _joined(rows: Sequence[tuple[int, Sequence[str]]]) -> LabelTable:
    cells = [[label.strip() for label in row[1].split(SEPARATOR)] for _, row in rows]
    labels = [[label for label in cell if label] for cell in cells]
    classes = sorted({label for cell in labels for label in cell}, key=natural_key)
    if not classes:
        raise ValueError("not one image has a label.")
    columns = {name: column for column, name in enumerate(classes)}
    pairs = [(row, columns[label]) for row, cell in enumerate(labels) for label in cell]
    return LabelTable(_files(rows), tuple(classes), _targets(pairs, len(rows), len(classes)))


def _one_hot(classes: Sequence[str], rows: Sequence[tuple[int, Sequence[str]]]) -> LabelTable:
    if not all(classes):
        raise ValueError("its header has a column without a name.")
    _check_once(classes, "it names a class twice")
    pairs = []
    for place, (number, row) in enumerate(rows):
        for column, cell in enumerate(row[1:]):
            known = _YES.get(cell.strip())
            if known is None:
                raise ValueError(
                    f"line {number} has {printable(cell)!r} for {printable(classes[column])!r}, "
                    "expected 0 or 1 (or one column, labels)."
                )
            if known:
                pairs.append((place, column))
    return LabelTable(_files(rows), tuple(classes), _targets(pairs, len(rows), len(classes)))


def _files(rows: Sequence[tuple[int, Sequence[str]]]) -> tuple[str, ...]:
    names = tuple(row[0].strip() for _, row in rows)
    _check_names(names)
    return names


def _targets(pairs: Sequence[tuple[int, int]], num_images: int, num_classes: int) -> Tensor:
    targets = torch.zeros(num_images, num_classes, dtype=torch.bool)
    if pairs:
        targets[tuple(torch.tensor(pairs).T)] = True
    return targets
