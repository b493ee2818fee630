"""Objects on photos, whole scenes and photos of objects; where each object is, is known."""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ltrp_timm.data.photos import load_image
from studies.quality.material import Material, halves

_AREA = (0.05, 0.35)  # share of the picture that an object covers


class Pictures(NamedTuple):
    """A set of square pictures.

    Attributes:
        images: (B, 3, S, S) uint8.
        masks: (B, S, S) uint8, 255 where an object is.
        labels: (B, classes) bool; empty rows without a class.
        objects: (B,) int64, number of the first object; -1 without.
    """

    images: Tensor
    masks: Tensor
    labels: Tensor
    objects: Tensor


@lru_cache(maxsize=64)
def _photo(path: Path) -> Image.Image:
    """A photo, its shorter side at most 900 pixels."""
    image = load_image(path)
    scale = 900 / min(image.size)
    if scale < 1:
        image = image.resize([round(length * scale) for length in image.size], Image.BICUBIC)
    return image


def _square(path: Path, share: float, draw: np.random.Generator) -> Image.Image:
    """A random square of a photo, its side a share of the photo's shorter one."""
    photo = _photo(path)
    side = int(min(photo.size) * share)
    left, top = (int(draw.integers(length - side + 1)) for length in photo.size)
    return photo.crop((left, top, left + side, top + side))


@lru_cache(maxsize=256)
def _cut_out(path: Path) -> Image.Image:
    """An object, cropped to what its alpha channel shows."""
    with Image.open(path) as file:
        image = file.convert("RGBA")
    box = image.getchannel("A").point(lambda value: 255 if value > 20 else 0).getbbox()
    if box is None:
        raise SystemExit(f"{path} is transparent everywhere: it shows no object")
    return image.crop(box)


def _paste(
    scene: Image.Image, mask: Image.Image, path: Path, share: float, draw: np.random.Generator
):
    cut = _cut_out(path)
    opaque = np.asarray(cut.getchannel("A")).mean() / 255
    side = scene.width
    scale = (share * side**2 / (opaque * cut.width * cut.height)) ** 0.5
    scale = min(scale, (side - 6) / max(cut.size))
    cut = cut.resize([max(4, round(length * scale)) for length in cut.size], Image.BICUBIC)
    place = tuple(int(draw.integers(side - length + 1)) for length in cut.size)
    scene.paste(cut, place, cut)
    mask.paste(255, place, cut.getchannel("A"))


def composites(
    material: Material, test: bool, count: int, seed: int, size: int, many: bool = False
) -> Pictures:
    """Objects on random squares of backgrounds; those of training and test are others.

    Args:
        material: objects and backgrounds.
        test: the half of them for test, in place of the half for training.
        count: of pictures; objects take turns.
        seed: the same one gives the same pictures.
        size: side in pixels.
        many: two or three smaller objects in a picture, in place of one.
    """
    draw = np.random.default_rng(seed)
    kinds = sorted({kind for _, kind in material.objects})
    objects = sorted(enumerate(material.objects), key=lambda one: (one[1][1], one[0]))
    objects, backgrounds = halves(objects)[test], halves(material.backgrounds)[test]
    images, masks, numbers = [], [], []
    labels = torch.zeros(count, len(kinds), dtype=torch.bool)
    for index in range(count):
        scene = _square(backgrounds[draw.integers(len(backgrounds))], draw.uniform(0.5, 1), draw)
        scene = scene.resize((size, size), Image.BICUBIC)
        mask = Image.new("L", (size, size))
        chosen = [objects[index % len(objects)]]
        if many:
            more = draw.choice(len(objects), draw.integers(1, 3), replace=False)
            chosen += [objects[place] for place in more]
        for _, (path, kind) in chosen:
            share = draw.uniform(*_AREA) / (2 if many else 1)
            _paste(scene, mask, path, share, draw)
            labels[index, kinds.index(kind)] = True
        images.append(np.asarray(scene))
        masks.append(np.asarray(mask))
        numbers.append(chosen[0][0])
    return _stacked(images, masks, labels, numbers)


def scenes(material: Material, count: int, seed: int, size: int) -> Pictures:
    """Random squares of whole photos, all of them in turns."""
    draw = np.random.default_rng(seed)
    paths = [*material.backgrounds, *(path for path, _ in material.photos)]
    crops = [_square(paths[i % len(paths)], draw.uniform(0.6, 1), draw) for i in range(count)]
    images = [np.asarray(crop.resize((size, size), Image.LANCZOS)) for crop in crops]
    return _stacked(images, [np.zeros((size, size), np.uint8)] * count, None, [-1] * count)


def object_photos(material: Material, size: int) -> Pictures:
    """The middle squares of photos whose objects have boxes."""
    images, masks = [], []
    for path, boxes in material.photos:
        if boxes:
            photo = _photo(path)
            side = min(photo.size)
            left, top = ((length - side) // 2 for length in photo.size)
            square = photo.crop((left, top, left + side, top + side))
            images.append(np.asarray(square.resize((size, size), Image.BICUBIC)))
            mask = np.zeros((size, size), np.uint8)
            for box in boxes:
                x0, y0, x1, y1 = (round(share * size) for share in box)
                mask[y0:y1, x0:x1] = 255
            masks.append(mask)
    return _stacked(images, masks, None, [-1] * len(images))


def _stacked(images: list, masks: list, labels: Tensor | None, numbers: list[int]) -> Pictures:
    return Pictures(
        torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2),
        torch.from_numpy(np.stack(masks)),
        torch.zeros(len(images), 0, dtype=torch.bool) if labels is None else labels,
        torch.tensor(numbers),
    )
