"""The annotated objects of images in COCO's format: how much of each lies in which patch."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image
from torch import Tensor
from torch.utils.data import Dataset

from ltrp_timm._text import one_line, printable
from ltrp_timm.data.photos import check_aspect, load_image

Mask = NDArray[np.uint8]
Transform = Callable[[Image.Image], Tensor]
_SMALLEST = 6  # numbers: a polygon has three corners


@dataclass(frozen=True)
class AnnotatedImage:
    """An image and its objects.

    Attributes:
        name: of its file, relative to the folder of the images.
        size: (height, width) by the annotations, or None.
        objects: of each, the number of its category and its segmentation as COCO writes it.
    """

    name: str
    size: tuple[int, int] | None
    objects: list[tuple[int, Any]]


@dataclass(frozen=True)
class Annotated:
    """What is to be measured.

    Attributes:
        categories: C names.
        images: those that show an object.
        crowds: regions of crowds that were left out.
        boxes: objects that were left out as they have a box at most, no segmentation.
    """

    categories: tuple[str, ...]
    images: list[AnnotatedImage]
    crowds: int
    boxes: int


def find_objects(lists: tuple[Any, Any, Any], with_crowds: bool = False) -> Annotated:
    """Sort annotations by their images, and check their segmentations.

    Args:
        lists: images, categories and annotations of the file.
        with_crowds: take a crowd's region for an object.

    Raises:
        ValueError: A segmentation is neither polygons nor an uncompressed RLE, or none exists.
    """
    entries, categories, annotations = lists
    columns = {category["id"]: column for column, category in enumerate(categories)}
    objects: dict[Any, list[tuple[int, Any]]] = {image["id"]: [] for image in entries}
    crowds = boxes = 0
    for number, annotation in enumerate(annotations):
        segmentation = annotation.get("segmentation")
        if annotation.get("iscrowd") and not with_crowds:
            crowds += 1
        elif not segmentation:
            boxes += 1
        else:
            try:
                check_segmentation(segmentation)
            except ValueError as error:
                name = annotation.get("id", f"number {number}")
                raise ValueError(f"annotation {name} has {error}") from error
            column = columns[annotation["category_id"]]
            objects[annotation["image_id"]].append((column, segmentation))
    images = [
        AnnotatedImage(image["file_name"], _size_of(image), objects[image["id"]])
        for image in entries
        if objects[image["id"]]
    ]
    if not images:
        raise ValueError(
            f"no object has a segmentation ({crowds} crowds and {boxes} without are left out)."
        )
    return Annotated(tuple(c["name"] for c in categories), images, crowds, boxes)


def _size_of(image: Mapping[str, Any]) -> tuple[int, int] | None:
    size = image.get("height"), image.get("width")
    return size if all(isinstance(side, int) for side in size) else None  # type: ignore[return-value]


def check_segmentation(segmentation: Any) -> None:
    """Check that a segmentation can be drawn.

    Raises:
        ValueError: the rest of a sentence on what it has instead.
    """
    if isinstance(segmentation, dict):
        counts, size = segmentation.get("counts"), segmentation.get("size")
        if isinstance(counts, (str, bytes)):
            raise ValueError("a compressed RLE: expected polygons, or counts as a list of numbers.")
        if not _are_whole(counts) or not _are_whole(size) or len(size) != 2:  # type: ignore[arg-type]
            raise ValueError("an RLE without lists of whole numbers, counts and size.")
        if sum(counts) != size[0] * size[1]:  # type: ignore[arg-type,index]
            raise ValueError(f"an RLE whose counts do not add up to its size {size}.")
        return
    for corners in segmentation if isinstance(segmentation, list) else [segmentation]:
        if not isinstance(corners, list) or not all(
            isinstance(value, (int, float)) and math.isfinite(value) for value in corners
        ):
            raise ValueError("a segmentation that is no list of polygons [x, y, x, y, …].")
        if len(corners) < _SMALLEST or len(corners) % 2:
            raise ValueError(f"a polygon of {len(corners)} numbers.")


def _are_whole(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(v, int) and v >= 0 for v in values)


def draw_mask(segmentation: Any, size: tuple[int, int]) -> Mask:
    """A segmentation as a mask (height, width): 255 at pixels whose middle lies in it, else 0.

    Raises:
        ValueError: an RLE is of another size.
    """
    if isinstance(segmentation, dict):
        if tuple(segmentation["size"]) != size:
            raise ValueError(
                f"an RLE is of size {segmentation['size']}, the image of {list(size)}."
            )
        return decode_rle(segmentation["counts"], size)
    from skimage.draw import polygon

    mask = np.zeros(size, dtype=np.uint8)
    for corners in segmentation:
        x, y = np.asarray(corners, dtype=np.float64).reshape(-1, 2).T - 0.5
        mask[polygon(y, x, size)] = 255  # several parts are one object
    return mask


def decode_rle(counts: Sequence[int], size: tuple[int, int]) -> Mask:
    """Uncompressed RLE -> mask (height, width) of 0 and 255.

    ``counts`` are lengths of runs, in turns outside and inside, down the columns.

    >>> decode_rle([1, 2, 1], (2, 2)).tolist()
    [[0, 255], [255, 0]]
    """
    values = np.arange(len(counts)) % 2 * 255
    runs = np.repeat(values.astype(np.uint8), counts)
    return np.ascontiguousarray(runs.reshape(size[1], size[0]).T)


def patch_areas(mask: Tensor, grid_size: tuple[int, int], patch_size: tuple[int, int]) -> Tensor:
    """Mask (H, W) uint8 -> area in each patch (N,) float32; pixels outside the grid are lost."""
    (h, w), (rows, cols) = grid_size, patch_size
    grid = torch.zeros(h * rows, w * cols)
    part = mask[: h * rows, : w * cols]
    grid[: part.shape[0], : part.shape[1]] = part
    return grid.reshape(h, rows, w, cols).sum(dim=(1, 3)).flatten() / 255


class Batch(NamedTuple):
    """Images that could be read, and the objects that can be seen in them.

    Attributes:
        pixels: (B, 3, H, W) uint8.
        row: (M,) int64, which of the B images an object is in.
        image: (M,) int64, the number of that image.
        category: (M,) int64.
        areas: (M, N) float32, in pixels of the transformed image, by patch.
        hidden: objects of which the transformed images show nothing.
        reasons: a line for each image that could not be read.
    """

    pixels: Tensor
    row: Tensor
    image: Tensor
    category: Tensor
    areas: Tensor
    hidden: int
    reasons: list[str]


class ObjectDataset(Dataset[tuple[int, Tensor, Tensor, Tensor, str]]):
    """Annotated images by index: (index, pixels, categories (M,), areas (M, N), why it is none).

    Args:
        root: folder of the images.
        images: what they show.
        transform: picture -> pixels (C, H, W) uint8, always of one size.
        of_masks: the same, for masks.
        grid_size: (h, w) in patches.
        patch_size: (height, width) in pixels.
    """

    def __init__(
        self,
        root: Path,
        images: Sequence[AnnotatedImage],
        transform: Transform,
        of_masks: Transform,
        grid_size: tuple[int, int],
        patch_size: tuple[int, int],
    ) -> None:
        self.root, self.images = root, images
        self.transform, self.of_masks = transform, of_masks
        self.grid_size, self.patch_size = grid_size, patch_size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, Tensor, Tensor, Tensor, str]:
        image = self.images[index]
        path = self.root / image.name
        try:
            photo = load_image(path)
        except ValueError as error:  # it names the file
            return self._none(index, one_line(error))
        try:
            check_aspect(photo)
            size = photo.height, photo.width
            if image.size not in (None, size):
                raise ValueError(f"is of size {size}, its annotations of {image.size}.")
            if is_turned(path):
                raise ValueError("is turned by its EXIF data: its objects may be drawn either way.")
            areas = torch.stack([self._areas(mask, size) for _, mask in image.objects])
        except ValueError as error:
            return self._none(index, f"{printable(path)}: {one_line(error)}")
        categories = torch.tensor([category for category, _ in image.objects])
        return index, self.transform(photo), categories, areas, ""

    def _areas(self, segmentation: Any, size: tuple[int, int]) -> Tensor:
        mask = self.of_masks(Image.fromarray(draw_mask(segmentation, size)))
        return patch_areas(mask[0], self.grid_size, self.patch_size)

    def _none(self, index: int, reason: str) -> tuple[int, Tensor, Tensor, Tensor, str]:
        nothing = torch.zeros(0)
        return index, nothing, nothing, nothing, reason


def is_turned(path: Path) -> bool:
    """Whether a file's EXIF orientation turns or flips the picture that it stores."""
    with Image.open(path) as image:
        return 1 < image.getexif().get(ExifTags.Base.Orientation, 1) <= 8


def collate(items: Sequence[tuple[int, Tensor, Tensor, Tensor, str]]) -> Batch:
    """Items of an ``ObjectDataset`` -> a batch."""
    good = [item for item in items if not item[4]]
    reasons = [item[4] for item in items if item[4]]
    if not good:
        empty = torch.zeros(0)
        return Batch(empty, empty, empty, empty, empty, 0, reasons)
    counts = torch.tensor([len(item[2]) for item in good])
    areas = torch.cat([item[3] for item in good])
    seen = areas.sum(dim=1) > 0
    row = torch.arange(len(good)).repeat_interleave(counts)
    image = torch.tensor([item[0] for item in good])[row]
    category = torch.cat([item[2] for item in good])
    return Batch(
        torch.stack([item[1] for item in good]),
        row[seen],
        image[seen],
        category[seen],
        areas[seen],
        int((~seen).sum()),
        reasons,
    )
