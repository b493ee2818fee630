"""Follow the places of a picture through crops, flips and the moves of RandAugment.

A place is a point (x, y) in pixels; (0, 0) is the upper left corner of the picture. Each step of a
transform that moves pixels leaves a ``Step``; steps are followed back from the last to the first.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from timm.data import auto_augment
from timm.data import transforms as timm_transforms
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision import transforms

from ltrp_timm.runtime.keyed_rng import restored

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
    """A transform of timm that also returns how it moved the picture.

    It draws the same random numbers as the transform alone, and gives the same picture.

    Args:
        transform: a ``Compose`` of timm's ``create_transform``.

    Raises:
        ValueError: one of its operations cannot be followed.

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
                if one.name in _MOVES and not isinstance(one.aug_fn, _Recorded):
                    one.aug_fn = _Recorded(one.aug_fn, _MOVES[one.name], self._moves)
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


class _Recorded:
    """An operation of RandAugment that records its moves."""

    def __init__(
        self,
        function: Callable[..., Any],
        matrix: Callable[[float, tuple[int, int]], Matrix],
        moves: list[Step],
    ) -> None:
        self.function, self.matrix, self.moves = function, matrix, moves

    def __call__(self, picture: Any, level: float, **kwargs: Any) -> Any:
        self.moves.append(Step(self.matrix(level, picture.size), picture.size))
        return self.function(picture, level, **kwargs)


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
