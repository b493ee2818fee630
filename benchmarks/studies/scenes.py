"""Images to judge a selection: generated scenes with known objects, crops of real photos.

Objects are real digits of scikit-learn; their ink is known for each pixel. Photos are those that
scikit-image and scikit-learn bring along. Digits and photos have parts: what is measured on one was
trained on another.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

PHOTOS = ("astronaut", "camera", "chelsea", "coffee", "coins", "retina", "rocket")
PHOTOS += ("china", "flower")
# what is trained on, and what is measured on
OLD_PHOTOS = ("camera", "chelsea", "coins", "flower", "retina", "clock", "hubble_deep_field")
OLD_PHOTOS += ("immunohistochemistry", "stereo_motorcycle", "brick", "grass", "gravel", "moon")
NEW_PHOTOS = ("astronaut", "china", "coffee", "rocket")
OLD_DIGITS, NEW_DIGITS = slice(300, None), slice(300)  # of 1797
SIDE = 224


def load_photos(names: Sequence[str] = PHOTOS) -> list[Tensor]:
    """The photos, each (1, 3, H, W), pixels in [0, 1]."""
    from skimage import data
    from sklearn.datasets import load_sample_image

    photos = []
    for name in names:
        of_sklearn = name in ("china", "flower")
        array = load_sample_image(f"{name}.jpg") if of_sklearn else getattr(data, name)()
        array = array[0] if isinstance(array, tuple) else array  # the left one of two
        pixels = torch.from_numpy(array.copy()).float() / 255
        pixels = pixels.unsqueeze(-1).expand(-1, -1, 3) if pixels.dim() == 2 else pixels
        photos.append(pixels.permute(2, 0, 1)[None])
    return photos


def cut(image: Tensor, top: int, left: int, size: int, side: int) -> Tensor:
    """image (1, 3, H, W) -> its square of ``size`` pixels, resized to ``side``."""
    square = image[:, :, top : top + size, left : left + size]
    return F.interpolate(square, (side, side), mode="bicubic", antialias=True).clamp(0, 1)


def load_crops() -> Tensor:
    """Three crops of each photo (B, 3, 224, 224): the middle square and two at the ends."""
    crops = []
    for image in load_photos():
        size = int(0.8 * min(image.shape[-2:]))
        for place in (0.0, 0.5, 1.0):
            top, left = (int(place * (length - size)) for length in image.shape[-2:])
            crops.append(cut(image, top, left, size, SIDE))
    return torch.cat(crops)


def random_crops(names: Sequence[str], count: int, seed: int, side: int) -> Tensor:
    """``count`` squares (B, 3, side, side) of the named photos in turns, 0.3 to 0.9 of a side."""
    generator = torch.Generator().manual_seed(seed)
    photos, crops = load_photos(names), []
    for number in range(count):
        image = photos[number % len(photos)]
        share, *place = torch.rand(3, generator=generator).tolist()
        size = int((0.3 + 0.6 * share) * min(image.shape[-2:]))
        top, left = (int(p * (length - size)) for p, length in zip(place, image.shape[-2:]))
        crops.append(cut(image, top, left, size, side))
    return torch.cat(crops)


def _load_digits(part: slice = slice(None)) -> Tensor:
    from sklearn.datasets import load_digits

    return torch.from_numpy(load_digits().images[part]).float() / 16


def _draw(
    ink: Tensor, digits: Tensor, count: int, sizes: tuple[int, int], generator: torch.Generator
) -> None:
    """Draw ``count`` digits into ink (H, W), their side in pixels in ``sizes``."""
    for _ in range(count):
        size = int(torch.randint(sizes[0], sizes[1] + 1, (), generator=generator))
        top, left = torch.randint(0, ink.shape[-1] - size, (2,), generator=generator).tolist()
        digit = digits[int(torch.randint(len(digits), (), generator=generator))]
        shape = F.interpolate(digit[None, None], (size, size), mode="bilinear")[0, 0]
        spot = ink[top : top + size, left : left + size]
        spot.copy_(torch.maximum(spot, shape))


def _background(count: int, side: int, generator: torch.Generator) -> Tensor:
    """A gradient with low and high frequency noise, (B, 3, side, side)."""
    background = torch.full((count, 3, side, side), 0.5)
    for grid, scale in ((2, 0.15), (8, 0.05), (side, 0.01)):
        noise = torch.randn(count, 3, grid, grid, generator=generator)
        background += scale * F.interpolate(noise, (side, side), mode="bilinear")
    return background


def _paint(
    background: Tensor, ink: Tensor, generator: torch.Generator, choices: int = 1
) -> tuple[Tensor, Tensor]:
    """Ink of one colour an image over the background; and where it is, (B, H, W) of 0 and 1.

    Of several random colours that which differs most from the background's mean is taken.
    """
    colours = torch.rand(len(ink), choices, 3, generator=generator)
    far = (colours - background.mean(dim=(2, 3)).unsqueeze(1)).norm(dim=2).argmax(dim=1)
    colour = colours[torch.arange(len(ink)), far].reshape(-1, 3, 1, 1)
    scenes = torch.lerp(background, colour, ink.unsqueeze(1))
    return scenes.clamp(0, 1), (ink > 0.5).float()


def make_scenes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Busy and nearly empty scenes (B, 3, 224, 224) in [0, 1], and their ink (B, 224, 224)."""
    generator, digits = torch.Generator().manual_seed(seed), _load_digits()
    ink = torch.zeros(count, SIDE, SIDE)
    for image in ink:
        busy = bool(torch.rand((), generator=generator) < 0.5)
        low, high = (8, 13) if busy else (1, 3)
        number = int(torch.randint(low, high, (), generator=generator))
        _draw(image, digits, number, (24, 56), generator)
    return _paint(_background(count, SIDE, generator), ink, generator)


def make_cluttered_scenes(
    count: int, seed: int, side: int, part: slice = OLD_DIGITS
) -> tuple[Tensor, Tensor]:
    """Scenes (B, 3, side, side) of digits among textured blobs, and their ink.

    The blobs, 3 to 6 of noise or of stripes, vary as much as the digits do: the standard deviation
    of a patch does not separate them.
    """
    generator = torch.Generator().manual_seed(seed)
    background = _background(count, side, generator)
    for scene in background:
        for _ in range(int(torch.randint(3, 7, (), generator=generator))):
            _add_blob(scene, generator)
    return draw_on(background, generator, part)


def draw_on(
    background: Tensor, generator: torch.Generator, part: slice = OLD_DIGITS
) -> tuple[Tensor, Tensor]:
    """Background (B, 3, side, side) -> digits of one colour an image on it, and their ink.

    3 to 6 digits fall on a larger canvas, of which the middle is the scene: they may be cut, and
    are as frequent at the border as in the middle. Their colour is the strangest of four.
    """
    digits, side = _load_digits(part), background.shape[-1]
    sizes = (side * 3 // 16, side * 3 // 8)
    margin = sizes[1] // 2
    ink = torch.zeros(len(background), side, side)
    for image in ink:
        while not (image > 0.5).any():
            canvas = torch.zeros(side + 2 * margin, side + 2 * margin)
            number = int(torch.randint(3, 7, (), generator=generator))
            _draw(canvas, digits, number, sizes, generator)
            image.copy_(canvas[margin : margin + side, margin : margin + side])
    return _paint(background, ink, generator, choices=4)


def make_digit_scenes(
    count: int, seed: int, side: int, held_out: bool = False
) -> tuple[Tensor, Tensor]:
    """Scenes (B, 3, side, side) of one white digit among textured blobs; which digit it is (B,).

    The digit is half of the side, its middle up to an eighth of it from that of the scene; held-out
    scenes show other handwriting.
    """
    from sklearn.datasets import load_digits

    generator, digits = torch.Generator().manual_seed(seed), _load_digits()
    labels = torch.from_numpy(load_digits().target)
    own = slice(1200, None) if held_out else slice(0, 1200)
    digits, labels = digits[own], labels[own]
    chosen = torch.randint(len(digits), (count,), generator=generator)
    scenes = 0.3 + 0.5 * (_background(count, side, generator) - 0.5)  # dark paper
    shapes = F.interpolate(digits[chosen].unsqueeze(1), (side // 2, side // 2), mode="bilinear")
    places = torch.randint(side // 8, side * 3 // 8 + 1, (count, 2), generator=generator).tolist()
    for scene, shape, (top, left) in zip(scenes, shapes, places):
        for _ in range(int(torch.randint(3, 6, (), generator=generator))):
            _add_blob(scene, generator)
        spot = scene[:, top : top + side // 2, left : left + side // 2]
        spot.copy_(torch.lerp(spot, torch.ones(()), shape))
    return scenes.clamp(0, 1), labels[chosen]


def _add_blob(scene: Tensor, generator: torch.Generator) -> None:
    """A soft ellipse of texture into scene (3, H, W)."""
    side = scene.shape[-1]
    line = torch.arange(side) / side
    x, y, rx, ry, angle, wave, strength, striped = torch.rand(8, generator=generator).tolist()
    rows, cols = (line - y).unsqueeze(1) / (0.08 + 0.14 * ry), (line - x) / (0.08 + 0.14 * rx)
    mask = torch.sigmoid(8 * (1 - rows.square() - cols.square()))
    tint = 0.15 * torch.randn(3, 1, 1, generator=generator)
    if striped < 0.5:
        texture = torch.randn(3, side, side, generator=generator)
    else:
        direction = line.unsqueeze(1) * math.sin(math.pi * angle) + line * math.cos(math.pi * angle)
        texture = 1.4 * torch.sin(2 * math.pi * side / (3 + 6 * wave) * direction)
    scene += mask * (tint + (0.1 + 0.15 * strength) * texture)
