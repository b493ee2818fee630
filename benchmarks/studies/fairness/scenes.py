"""Small scenes of real digits on clutter; which digit each pixel belongs to is known.

The digits are scikit-learn's 8 x 8 ones, enlarged and bent; those of training and test scenes are
of different samples. The clutter is as rough as the digits, in places rougher: on a smooth
background the standard deviation of a patch finds everything, and nothing is tested.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE, PATCH, CLASSES = 64, 8, 10
TRAIN, TEST = slice(300, None), slice(300)  # of the 1797 samples
_CHUNK = 500  # scenes drawn at a time
_DIGITS = (2, 4)  # in a scene, of different classes
_BOX = (15.0, 25.0)  # side in pixels


class Scenes(NamedTuple):
    """Scenes, what is in them and where.

    Attributes:
        images: (B, 3, 64, 64) uint8.
        labels: (B, 10) uint8, 1 where a digit of the class was drawn.
        classes: (B, 64, 64) uint8, 1 + the digit that a pixel is ink of; 0 without ink.
    """

    images: Tensor
    labels: Tensor
    classes: Tensor

    def pixels(self) -> Tensor:
        """The images as float32 in [0, 1]."""
        return self.images.float() / 255

    def batches(self, size: int) -> Iterator["Scenes"]:
        """The scenes in order, ``size`` at a time."""
        for parts in zip(*(tensor.split(size) for tensor in self)):
            yield Scenes(*parts)

    def ink(self) -> Tensor:
        """Pixels of ink of each class in each patch, (B, 10, N) float32."""
        share = [
            F.avg_pool2d((self.classes == number + 1).float().unsqueeze(1), PATCH).flatten(1)
            for number in range(CLASSES)
        ]
        return torch.stack(share, dim=1) * PATCH**2


def make_scenes(count: int, seed: int, part: slice = TRAIN, smooth: bool = False) -> Scenes:
    """Draw scenes.

    Args:
        count: of scenes.
        seed: the same one gives the same scenes.
        part: which samples of scikit-learn's digits.
        smooth: without noise, blobs and strokes: a control, on which simple scores do well.
    """
    from sklearn.datasets import load_digits

    data, generator = load_digits(), torch.Generator().manual_seed(seed)
    shapes = torch.from_numpy(data.images[part]).float() / 16
    numbers = torch.from_numpy(data.target[part])
    sizes = [min(_CHUNK, count - start) for start in range(0, count, _CHUNK)]
    chunks = [_draw(size, shapes, numbers, smooth, generator) for size in sizes]
    return Scenes(*(torch.cat(parts) for parts in zip(*chunks)))


def _draw(
    count: int, shapes: Tensor, numbers: Tensor, smooth: bool, draw: torch.Generator
) -> Scenes:
    scene = _background(count, smooth, draw)
    if not smooth:
        scene = _strokes(_blobs(scene, draw), draw)
    labels = torch.zeros(count, CLASSES, dtype=torch.uint8)
    classes = torch.zeros(count, SIDE, SIDE, dtype=torch.uint8)
    digits = _different_digits(count, numbers, draw)
    how_many = torch.randint(_DIGITS[0], _DIGITS[1] + 1, (count,), generator=draw)
    places = torch.rand(count, 4, generator=draw).argsort(dim=1)
    local = F.avg_pool2d(scene, SIDE // 2)  # what a digit must differ from
    for slot in range(_DIGITS[1]):
        there = how_many > slot
        chosen, place = digits[:, slot], places[:, slot]
        alpha = _placed(shapes[chosen], place, draw) * there.view(-1, 1, 1)
        near = local.flatten(2)[torch.arange(count), :, place]
        colour = _far_colour(near, draw).view(-1, 3, 1, 1)
        scene = torch.lerp(scene, colour, alpha.unsqueeze(1))
        of_class = (numbers[chosen] + 1).to(torch.uint8).view(-1, 1, 1).expand_as(classes)
        classes = torch.where(alpha > 0.5, of_class, classes)
        labels[torch.arange(count), numbers[chosen]] |= there.to(torch.uint8)
    if not smooth:
        scene = scene + 0.02 * torch.randn(scene.shape, generator=draw)
    return Scenes((scene.clamp(0, 1) * 255).round().to(torch.uint8), labels, classes)


def _different_digits(count: int, numbers: Tensor, draw: torch.Generator) -> Tensor:
    """Four samples of four different classes for each scene, (B, 4)."""
    order = torch.rand(count, CLASSES, generator=draw).argsort(dim=1)[:, : _DIGITS[1]]
    chosen = torch.empty_like(order)
    for number in range(CLASSES):
        samples = (numbers == number).nonzero().squeeze(1)
        at = order == number
        picks = torch.randint(len(samples), (int(at.sum()),), generator=draw)
        chosen[at] = samples[picks]
    return chosen


def _uniform(count: int, low: float, high: float, draw: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=draw)


def _placed(shapes: Tensor, place: Tensor, draw: torch.Generator) -> Tensor:
    """Shapes (B, 8, 8), bent, each in its quarter of a scene: (B, 64, 64) in [0, 1]."""
    count = len(shapes)
    size = _uniform(count, *_BOX, draw)
    stretch = torch.exp(_uniform(count, -0.15, 0.15, draw))
    half = torch.stack([size / stretch, size * stretch], dim=1) / 2  # width, height
    quarter = torch.stack([place % 2, place // 2], dim=1) * (SIDE / 2) + SIDE / 4
    jitter = 12 * torch.rand(count, 2, generator=draw) - 6
    centre = torch.minimum(torch.maximum(quarter + jitter, half), SIDE - half)
    angle, shear = _uniform(count, -0.26, 0.26, draw), _uniform(count, -0.2, 0.2, draw)
    cos, sin = angle.cos(), angle.sin()
    turn = torch.stack([cos, -sin, sin, cos], dim=1).view(-1, 2, 2)
    lean = torch.eye(2).repeat(count, 1, 1)
    lean[:, 0, 1] = shear
    # from places of the scene in [-1, 1] to places of the shape
    linear = (turn @ lean) * (SIDE / 2) / half.unsqueeze(2)
    shift = 2 * centre / SIDE - 1
    theta = torch.cat([linear, -linear @ shift.unsqueeze(2)], dim=2)
    grid = F.affine_grid(theta, [count, 1, SIDE, SIDE], align_corners=False)
    return F.grid_sample(shapes.unsqueeze(1), grid, align_corners=False).squeeze(1)


def _far_colour(near: Tensor, draw: torch.Generator) -> Tensor:
    """Of eight random colours the one farthest from ``near`` (B, 3)."""
    colours = torch.rand(len(near), 8, 3, generator=draw)
    far = (colours - near.unsqueeze(1)).norm(dim=2).argmax(dim=1)
    return colours[torch.arange(len(near)), far]


def _noise(count: int, grid: int, scale: float, draw: torch.Generator) -> Tensor:
    noise = scale * torch.randn(count, 3, grid, grid, generator=draw)
    return F.interpolate(noise, (SIDE, SIDE), mode="bicubic", align_corners=False)


def _background(count: int, smooth: bool, draw: torch.Generator) -> Tensor:
    """A colour and a gradient, with noise of low and middle frequency unless smooth."""
    line = torch.linspace(-1, 1, SIDE)
    base = 0.25 + 0.5 * torch.rand(count, 3, 1, 1, generator=draw)
    slope = 0.08 * torch.randn(2, count, 3, 1, 1, generator=draw)
    scene = base + slope[0] * line.view(-1, 1) + slope[1] * line
    if smooth:
        return scene
    return scene + _noise(count, 4, 0.06, draw) + _noise(count, 16, 0.05, draw)


def _blobs(scene: Tensor, draw: torch.Generator) -> Tensor:
    """2 to 4 ellipses of strong noise; half of them have the colour of what is under them."""
    count, line = len(scene), torch.arange(SIDE) + 0.5
    how_many = torch.randint(2, 5, (count,), generator=draw)
    for number in range(4):
        x, y = (_uniform(count, 6, SIDE - 6, draw).view(-1, 1, 1) for _ in range(2))
        rx, ry = (_uniform(count, 4, 9, draw).view(-1, 1, 1) for _ in range(2))
        distance = ((line - x) / rx).square() + ((line.view(-1, 1) - y) / ry).square()
        mask = torch.sigmoid(6 * (1 - distance)) * (how_many > number).view(-1, 1, 1)
        own = (torch.rand(count, generator=draw) < 0.5).view(-1, 1, 1, 1)
        tint = 0.3 * torch.randn(count, 3, 1, 1, generator=draw) * own
        coarse = torch.randn(count, 3, SIDE // 2, SIDE // 2, generator=draw)
        texture = F.interpolate(coarse, (SIDE, SIDE), mode="bilinear", align_corners=False)
        texture = texture + 0.7 * torch.randn(count, 3, SIDE, SIDE, generator=draw)
        strength = _uniform(count, 0.12, 0.3, draw).view(-1, 1, 1, 1)
        scene = scene + mask.unsqueeze(1) * (tint + strength * texture)
    return scene


def _strokes(scene: Tensor, draw: torch.Generator) -> Tensor:
    """1 to 3 straight strokes of any colour."""
    count = len(scene)
    line = torch.arange(SIDE) + 0.5
    places = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)  # (H, W, 2) of x, y
    how_many = torch.randint(1, 4, (count,), generator=draw)
    for number in range(3):
        start = SIDE * torch.rand(count, 1, 1, 2, generator=draw)
        angle, length = _uniform(count, 0, 2 * math.pi, draw), _uniform(count, 8, 24, draw)
        way = (torch.stack([angle.cos(), angle.sin()], dim=1) * length.unsqueeze(1)).view(
            -1, 1, 1, 2
        )
        offset = places - start
        along = ((offset * way).sum(-1) / way.square().sum(-1)).clamp(0, 1)
        distance = (offset - along.unsqueeze(-1) * way).norm(dim=-1)
        width = _uniform(count, 0.6, 1.2, draw).view(-1, 1, 1)
        alpha = torch.sigmoid(4 * (width - distance)) * (how_many > number).view(-1, 1, 1)
        colour = torch.rand(count, 3, 1, 1, generator=draw)
        scene = torch.lerp(scene, colour, alpha.unsqueeze(1))
    return scene
