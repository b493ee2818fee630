"""Where each place of a transformed picture was before: crops, flips and what RandAugment moves.

A place is a point (x, y) in pixels, (0, 0) the upper left corner of the picture. Each step of a
transform that moves pixels leaves a ``Step``; steps are followed back from the last to the first.
"""

import contextlib
import copy
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from timm.data import auto_augment
from timm.data import transforms as timm_transforms
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torchvision import transforms

Matrix = tuple[float, float, float, float, float, float]
_Points = npt.NDArray[np.float64]

# they change colours, or what holds them, and move nothing
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


@dataclass(frozen=True)
class Step:
    """One step back.

    Attributes:
        matrix: (a, b, c, d, e, f): what stands at (x, y) now was at (ax + by + c, dx + ey + f).
        size: (width, height) of the picture before.
    """

    matrix: Matrix
    size: tuple[int, int]


def trace(steps: Sequence[Step], points: _Points) -> _Points:
    """Where points (M, 2) of the last picture were in the first; NaN where they show none of it.

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
    """A transform of timm's that also says how it moved the picture.

    Random numbers are drawn as without: the picture is the same.

    Args:
        transform: a ``Compose`` of timm's ``create_transform``.

    Raises:
        ValueError: it has a step whose way cannot be followed, which is named.

    >>> from timm.data import create_transform
    >>> follow = FollowedTransform(create_transform(64))
    >>> follow(Image.new("RGB", (80, 96)))[0].shape
    torch.Size([3, 64, 64])
    """

    def __init__(self, transform: Any) -> None:
        # ours: the operations of RandAugment get to note what they move
        self.operations = copy.deepcopy(getattr(transform, "transforms", [transform]))
        self._moves: list[Step] = []
        for operation in self.operations:
            self._prepare(operation)

    def _prepare(self, operation: Any) -> None:
        if isinstance(operation, (auto_augment.RandAugment, auto_augment.AutoAugment)):
            groups = getattr(operation, "policy", None) or [operation.ops]
            for one in [one for group in groups for one in group]:
                if one.name in _MOVES and not isinstance(one.aug_fn, _Noted):
                    one.aug_fn = _Noted(one.aug_fn, _MOVES[one.name], self._moves)
        elif isinstance(operation, transforms.RandomApply):
            for inner in operation.transforms:
                if not isinstance(inner, _STILL):
                    raise _unknown(inner)
        elif not isinstance(operation, (*_STILL, *_SCALING, *_CENTRAL, *_FLIPS, _CROP)):
            raise _unknown(operation)

    def __call__(self, picture: Image.Image) -> tuple[Tensor, list[Step]]:
        """The transformed picture, and its way."""
        steps: list[Step] = []
        current: Any = picture
        for operation in self.operations:
            before = current.size if isinstance(current, Image.Image) else (0, 0)
            if isinstance(operation, _CROP):
                with _drawn_again():
                    box = operation.get_params(current, operation.scale, operation.ratio)
            elif isinstance(operation, _FLIPS):
                with _drawn_again():
                    matrix = _flip(operation, before)
            current = operation(current)
            after = current.size if isinstance(current, Image.Image) else (0, 0)
            if isinstance(operation, _CROP):
                top, left, height, width = box
                steps.append(Step(_scaling((width, height), after, left, top), before))
            elif isinstance(operation, _FLIPS):
                steps.append(Step(matrix, before))
            elif isinstance(operation, _SCALING):
                steps.append(Step(_scaling(before, after), before))
            elif isinstance(operation, _CENTRAL):
                left, top = (_margin(a, b) for a, b in zip(before, after))
                steps.append(Step((1.0, 0.0, left, 0.0, 1.0, top), before))
            steps += self._moves
            self._moves.clear()
        return current, steps


_CROP = timm_transforms.RandomResizedCropAndInterpolation


def _unknown(operation: Any) -> ValueError:
    return ValueError(
        f"an index cache cannot follow {type(operation).__name__}: take crops, flips, colours and "
        "RandAugment, or no cache."
    )


@contextlib.contextmanager
def _drawn_again() -> Iterator[None]:
    """What is drawn here is drawn once more by what follows."""
    python, numpy, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_state)


def _flip(operation: Any, size: tuple[int, int]) -> Matrix:
    """Tried on a picture of 2x2: white only in the upper left."""
    probe = Image.new("L", (2, 2))
    probe.putpixel((0, 0), 255)
    turned = operation(probe)
    mirrored = turned.getpixel((1, 0)) == 255 or turned.getpixel((1, 1)) == 255
    upside = turned.getpixel((0, 1)) == 255 or turned.getpixel((1, 1)) == 255
    x = (-1.0, float(size[0])) if mirrored else (1.0, 0.0)
    y = (-1.0, float(size[1])) if upside else (1.0, 0.0)
    return (x[0], 0.0, x[1], 0.0, y[0], y[1])


def _scaling(
    before: tuple[int, int], after: tuple[int, int], left: float = 0.0, top: float = 0.0
) -> Matrix:
    return (before[0] / after[0], 0.0, left, 0.0, before[1] / after[1], top)


def _margin(before: int, after: int) -> float:
    """Pixels that a central crop takes away in front; negative for padding."""
    return float(round((before - after) / 2.0) if before >= after else -((after - before) // 2))


class _Noted:
    """An operation of RandAugment that leaves a note of what it has moved."""

    def __init__(
        self,
        function: Callable[..., Any],
        matrix: Callable[[float, tuple[int, int]], Matrix],
        notes: list[Step],
    ) -> None:
        self.function, self.matrix, self.notes = function, matrix, notes

    def __call__(self, picture: Any, level: float, **kwargs: Any) -> Any:
        self.notes.append(Step(self.matrix(level, picture.size), picture.size))
        return self.function(picture, level, **kwargs)


def _rotation(degrees: float, size: tuple[int, int]) -> Matrix:
    """About the middle, as PIL turns pictures."""
    angle, x, y = -math.radians(degrees), size[0] / 2.0, size[1] / 2.0
    cos, sin = math.cos(angle), math.sin(angle)
    return (cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y)


def _shear_x(factor: float, size: tuple[int, int]) -> Matrix:
    return (1.0, factor, 0.0, 0.0, 1.0, 0.0)


def _shear_y(factor: float, size: tuple[int, int]) -> Matrix:
    return (1.0, 0.0, 0.0, factor, 1.0, 0.0)


def _shift_x(pixels: float, size: tuple[int, int]) -> Matrix:
    return (1.0, 0.0, pixels, 0.0, 1.0, 0.0)


def _shift_y(pixels: float, size: tuple[int, int]) -> Matrix:
    return (1.0, 0.0, 0.0, 0.0, 1.0, pixels)


def _shift_x_rel(share: float, size: tuple[int, int]) -> Matrix:
    return _shift_x(share * size[0], size)


def _shift_y_rel(share: float, size: tuple[int, int]) -> Matrix:
    return _shift_y(share * size[1], size)


# operations of timm's AutoAugment and RandAugment that move pixels
_MOVES: dict[str, Callable[[float, tuple[int, int]], Matrix]] = {
    "Rotate": _rotation,
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateX": _shift_x,
    "TranslateY": _shift_y,
    "TranslateXRel": _shift_x_rel,
    "TranslateYRel": _shift_y_rel,
}
