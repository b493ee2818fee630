"""Scores of an index cache in place of a ranker: read with an image, moved as the image is.

A place is a point (x, y) in pixels; (0, 0) is the upper left corner of the picture. Each step of a
transform that moves pixels leaves a ``Step``; steps are followed back from the last to the first.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import auto_augment, create_transform
from timm.data import transforms as timm_transforms
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision import transforms

from ltrp_timm._text import printable
from ltrp_timm.data.images import Images
from ltrp_timm.data.keyed import Transform
from ltrp_timm.models.ltrp import LTRPModel
from ltrp_timm.runtime.keyed_rng import restored
from ltrp_timm.scoring.store import IndexCache, image_ids
from ltrp_timm.selection.registry import SELECTIONS
from ltrp_timm.selection.rules import best_first
from ltrp_timm.weights.files import PathLike

Matrix = tuple[float, float, float, float, float, float]
_Points = npt.NDArray[np.float64]

# these change colours or types and move nothing
_STILL = (
    transforms.ColorJitter,
    transforms.RandomGrayscale,
    transforms.GaussianBlur,
    transforms.ToTensor,
    transforms.PILToTensor,
    transforms.Normalize,
    timm_transforms.ToNumpy,
    timm_transforms.ToTensor,
    timm_transforms.MaybeToTensor,
    timm_transforms.MaybePILToTensor,
    RandomErasing,
)
_SCALING = (transforms.Resize, timm_transforms.ResizeKeepRatio)
_CENTRAL = (transforms.CenterCrop, timm_transforms.CenterCropOrPad)
_FLIPS = (transforms.RandomHorizontalFlip, transforms.RandomVerticalFlip)
_CROP = timm_transforms.RandomResizedCropAndInterpolation
_VIEW = ("input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std")


@dataclass(frozen=True)
class Step:
    """One step back.

    Attributes:
        matrix: (a, b, c, d, e, f): the place (x, y) was (ax + by + c, dx + ey + f) before.
        size: (width, height) of the picture before.
    """

    matrix: Matrix
    size: tuple[int, int]


def trace(steps: Sequence[Step], points: _Points) -> _Points:
    """Points (M, 2) of the last picture -> their places in the first; NaN outside of it.

    >>> trace([Step((-1.0, 0.0, 8.0, 0.0, 1.0, 0.0), (8, 8))], np.array([[1.0, 2.0]])).tolist()
    [[7.0, 2.0]]
    """
    out = points.astype(np.float64)
    for step in reversed(steps):
        a, b, c, d, e, f = step.matrix
        x, y = out[:, 0], out[:, 1]
        out = np.stack([a * x + b * y + c, d * x + e * y + f], axis=1)
        inside = (out >= 0.0) & (out <= np.array(step.size))
        out[~inside.all(axis=1)] = np.nan
    return out


class FollowedTransform:
    """A ``Compose`` of timm's ``create_transform`` that also returns how it moved the picture.

    It draws the same random numbers as the transform alone, and gives the same picture. ValueError
    if one of its operations cannot be followed.

    >>> from timm.data import create_transform
    >>> follow = FollowedTransform(create_transform(64))
    >>> follow(Image.new("RGB", (80, 96)))[0].shape
    torch.Size([3, 64, 64])
    """

    def __init__(self, transform: Any) -> None:
        # a copy: the operations of RandAugment are changed to record their moves
        self.operations = copy.deepcopy(getattr(transform, "transforms", [transform]))
        self._moves: list[Step] = []
        for operation in self.operations:
            self._prepare(operation)

    def _prepare(self, operation: Any) -> None:
        if isinstance(operation, (auto_augment.RandAugment, auto_augment.AutoAugment)):
            groups = getattr(operation, "policy", None) or [operation.ops]
            for one in [one for group in groups for one in group]:
                if one.name in _MOVES and not isinstance(one.aug_fn, partial):
                    one.aug_fn = partial(_record, self._moves, one.name, one.aug_fn)
        elif isinstance(operation, transforms.RandomApply):
            for inner in operation.transforms:
                if not isinstance(inner, _STILL):
                    raise _unknown(inner)
        elif not isinstance(operation, (*_STILL, *_MOVING)):
            raise _unknown(operation)

    def __call__(self, picture: Image.Image) -> tuple[Tensor, list[Step]]:
        """The transformed picture, and its steps."""
        steps: list[Step] = []
        current: Any = picture
        for operation in self.operations:
            find = next((f for kinds, f in _MOVING.items() if isinstance(operation, kinds)), None)
            if find is None:
                current = operation(current)
            else:
                before = current.size
                current, matrix = find(operation, current)
                steps.append(Step(matrix, before))
            steps += self._moves
            self._moves.clear()
        return current, steps


def _unknown(operation: Any) -> ValueError:
    return ValueError(
        f"an index cache cannot follow {type(operation).__name__}, only crops, flips, colours and "
        "RandAugment."
    )


def _crop(operation: Any, picture: Image.Image) -> tuple[Image.Image, Matrix]:
    with restored():  # the operation itself draws the same numbers
        top, left, height, width = operation.get_params(picture, operation.scale, operation.ratio)
    out = operation(picture)
    return out, _scaling((width, height), out.size, left, top)


def _flip(operation: Any, picture: Image.Image) -> tuple[Image.Image, Matrix]:
    """The place of a white pixel shows what happens to the picture."""
    probe = Image.new("L", (2, 2))
    probe.putpixel((0, 0), 255)
    with restored():  # the operation itself draws the same numbers
        box = operation(probe).getbbox()
    (width, height), (left, top) = picture.size, box[:2]
    x = (-1.0, 0.0, float(width)) if left else (1.0, 0.0, 0.0)
    y = (0.0, -1.0, float(height)) if top else (0.0, 1.0, 0.0)
    return operation(picture), (*x, *y)


def _scale(operation: Any, picture: Image.Image) -> tuple[Image.Image, Matrix]:
    out = operation(picture)
    return out, _scaling(picture.size, out.size)


def _centre(operation: Any, picture: Image.Image) -> tuple[Image.Image, Matrix]:
    out = operation(picture)
    left, top = (_margin(a, b) for a, b in zip(picture.size, out.size))
    return out, (1.0, 0.0, left, 0.0, 1.0, top)


_MOVING = {_CROP: _crop, _FLIPS: _flip, _SCALING: _scale, _CENTRAL: _centre}


def _scaling(
    before: tuple[int, int], after: tuple[int, int], left: float = 0.0, top: float = 0.0
) -> Matrix:
    return (before[0] / after[0], 0.0, left, 0.0, before[1] / after[1], top)


def _margin(before: int, after: int) -> float:
    """Pixels that a central crop removes on the left or top; negative for padding."""
    return float(round((before - after) / 2.0) if before >= after else -((after - before) // 2))


def _record(
    moves: list[Step], name: str, operation: Any, picture: Any, level: float, **kwargs: Any
) -> Any:
    """Call an operation of RandAugment, and record how it moves the picture."""
    moves.append(Step(_MOVES[name](level, picture.size), picture.size))
    return operation(picture, level, **kwargs)


def _rotation(degrees: float, size: tuple[int, int]) -> Matrix:
    """About the centre, as PIL rotates."""
    angle, x, y = -math.radians(degrees), size[0] / 2.0, size[1] / 2.0
    cos, sin = math.cos(angle), math.sin(angle)
    return (cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y)


# operations of timm's AutoAugment and RandAugment that move pixels
_MOVES: dict[str, Callable[[float, tuple[int, int]], Matrix]] = {
    "Rotate": _rotation,
    "ShearX": lambda factor, _: (1.0, factor, 0.0, 0.0, 1.0, 0.0),
    "ShearY": lambda factor, _: (1.0, 0.0, 0.0, factor, 1.0, 0.0),
    "TranslateX": lambda pixels, _: (1.0, 0.0, pixels, 0.0, 1.0, 0.0),
    "TranslateY": lambda pixels, _: (1.0, 0.0, 0.0, 0.0, 1.0, pixels),
    "TranslateXRel": lambda share, size: (1.0, 0.0, share * size[0], 0.0, 1.0, 0.0),
    "TranslateYRel": lambda share, size: (1.0, 0.0, 0.0, 0.0, 1.0, share * size[1]),
}


class CachedTransform:
    """A transform that also gives the scores of an image's patches, from an index cache.

    If it is the transform that the cache was made with, these are the cached scores, and the model
    keeps what it keeps with its ranker. Any other transform shows another part of the picture and
    needs a cache of whole pictures (``--crop-mode squash``). The score of a patch is then the
    negative rank of what its centre shows, interpolated between the centres of cached patches and
    followed through crops, flips, and the rotations, shears and shifts of RandAugment. A patch
    whose centre shows nothing of the picture comes last. The order is close to the ranker's own
    order of the crop, not equal to it.

    Args:
        folder: that ``ltrp-timm rank`` has written.
        model: an LTRPModel; its ranker need not run any more.
        images: the data set.
        transform: of timm's ``create_transform``.

    Attributes:
        exact: whether the scores are the cached ones.
        blank: zeros (N,), for an image without scores.

    Raises:
        FileNotFoundError: the folder holds no finished scores.
        ValueError: the scores are of another ranker, size or data set; the model does not rank, or
            its selection uses no scores; the images are a stream; the transform cannot be followed.

    >>> transform = CachedTransform("scores", model, images, transform)  # doctest: +SKIP
    """

    def __init__(self, folder: PathLike, model: Any, images: Any, transform: Transform) -> None:
        if not isinstance(model, LTRPModel):
            raise ValueError("an index cache needs a pruned model: give a ranker or a keep_ratio.")
        if not isinstance(images, Images):
            raise ValueError(f"an index cache needs images by number, {images} is a stream.")
        if not SELECTIONS[model.selection].reads_scores:
            raise ValueError(
                f"selection {model.selection!r} uses no scores: leave the index "
                "cache out, or take another selection."
            )
        if model.budget is not None:
            raise ValueError("an adaptive budget ranks images; use it without an index cache.")
        self.cache, self.transform = IndexCache(folder), transform
        cache = self.cache
        cache.check(model.ranker, model.data_config()["input_size"][-2:], model.patch_grid)
        self.rows = cache.rows(image_ids(images))
        own = cache.settings
        config = {name: own[name] for name in _VIEW}
        config["input_size"] = (3, *own["input_size"])
        self.exact = _view(transform) == _view(create_transform(**config, is_training=False))
        self.follow: FollowedTransform | None = None
        if not self.exact:
            if own["crop_mode"] != "squash" or own["crop_pct"] != 1.0:
                raise ValueError(
                    f"{printable(cache.folder)} has scores of images cropped for evaluation; other "
                    "crops need scores of whole images: ltrp-timm rank --crop-mode squash."
                )
            self.follow = FollowedTransform(transform)
        self.blank = torch.zeros(cache.grid_size[0] * cache.grid_size[1])
        sides, patch, grid = (
            np.array(own[n][::-1]) for n in ("input_size", "patch_size", "grid_size")
        )
        self._covered = sides / (patch * grid)  # sides of the picture, in those of the grid
        x, y = np.meshgrid(*((np.arange(n) + 0.5) * side for n, side in zip(grid, patch)))
        self._centres = np.stack([x.ravel(), y.ravel()], axis=1)

    def __call__(self, picture: Image.Image) -> Tensor:
        """The transformed picture alone."""
        return self.transform(picture)

    def check(self, index: int, name: str) -> None:
        """Raise ValueError for an image that was unreadable when the cache was made."""
        if self.rows[index] < 0:
            raise ValueError(f"{name}: the index cache has no scores of this image.")

    def with_scores(self, picture: Image.Image, index: int) -> tuple[Tensor, Tensor]:
        """The transformed picture (3, H, W), and scores (N,) float32 of its patches."""
        if self.follow is None:
            return self.transform(picture), self.cache.scores(self.rows[index])
        image, steps = self.follow(picture)
        ranks = best_first(self.cache.scores(self.rows[index])[None]).argsort(dim=1)
        return image, self._sampled(ranks, steps, picture.size)

    def _sampled(self, ranks: Tensor, steps: Sequence[Step], size: tuple[int, int]) -> Tensor:
        """Ranks (1, N) -> negative ranks (N,) at the centres of the transformed patches."""
        h, w = self.cache.grid_size
        places = torch.from_numpy(trace(steps, self._centres) * self._covered / size)
        at = (places * 2.0 - 1.0).nan_to_num().view(1, 1, h * w, 2)
        grid = ranks.view(1, 1, h, w).double()
        sampled = F.grid_sample(grid, at, padding_mode="border", align_corners=False).flatten()
        return -torch.where(places[:, 0].isnan(), float(h * w), sampled).float()


def _view(transform: Any) -> list[str]:
    """The steps that choose what a picture shows, as text; normalisation does not count."""
    steps = (repr(step) for step in getattr(transform, "transforms", [transform]))
    return [text for text in steps if not text.startswith(("Normalize", "MaybeToTensor"))]
