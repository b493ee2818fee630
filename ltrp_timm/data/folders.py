"""Which images there are, and their pixels as a ranker gets them."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ltrp_timm._text import one_line, printable
from ltrp_timm.data.photos import check_aspect, load_image

OVERLAYS = "overlays"  # the folder of the pictures, inside that of the results
SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
    ".avif",
)


def find_images(
    inputs: Sequence[str], leave_out: str | os.PathLike[str]
) -> tuple[Path, list[str], list[str]]:
    """Images below folders, by their suffix, and files as they are named, each once.

    Hidden files and folders are passed over; links to folders are not followed.

    Args:
        inputs: files and folders.
        leave_out: a folder whose files do not count: where the results go.

    Returns:
        The folder that all lie in, their paths relative to it, ascending, and a line for each input
        that does not exist.
    """
    output = os.path.abspath(leave_out)
    ours = {output, os.path.join(output, OVERLAYS)}
    found: set[str] = set()
    roots: list[str] = []
    missing: list[str] = []
    for given in inputs:
        path = os.path.abspath(given)
        if os.path.isdir(path):
            roots.append(path)
            found.update(_walk(path, ours))
        elif os.path.lexists(path):
            roots.append(os.path.dirname(path))
            found.add(path)
        else:
            missing.append(f"{printable(given)}: No such file or directory.")
    root = os.path.commonpath(roots) if roots else os.getcwd()
    return Path(root), sorted(os.path.relpath(path, root) for path in found), missing


def _walk(folder: str, leave_out: set[str]) -> Iterator[str]:
    for place, folders, files in os.walk(folder):
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and os.path.join(place, name) not in leave_out
        ]
        for name in files:
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield os.path.join(place, name)


def fingerprint(root: Path, names: Sequence[str]) -> str:
    """A digest of the names, sizes and times of files: another one where an image changed."""
    digest = hashlib.sha256()
    for name in names:
        try:
            status = os.stat(root / name)
            state = f"{status.st_size} {status.st_mtime_ns}"
        except OSError:  # said when it is read
            state = "unreadable"
        digest.update(f"{name}\0{state}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


class PixelDataset(Dataset[tuple[int, Tensor, str]]):
    """Images by index: (index, pixels (3, H, W) uint8, "") or (index, zeros, why it is none).

    Args:
        root: the folder of ``names``.
        names: relative paths.
        transform: picture -> pixels (3, H, W) uint8, always of one size.
        size: (H, W).
    """

    def __init__(
        self,
        root: Path,
        names: Sequence[str],
        transform: Callable[[Image.Image], Tensor],
        size: tuple[int, int],
    ) -> None:
        self.root, self.names, self.transform, self.size = root, names, transform, size

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[int, Tensor, str]:
        path = self.root / self.names[index]
        try:
            photo = load_image(path)
            try:
                check_aspect(photo)
            except ValueError as error:
                raise ValueError(f"{printable(path)}: {error}") from error
            return index, self.transform(photo), ""
        except ValueError as error:
            return index, torch.zeros(3, *self.size, dtype=torch.uint8), one_line(error)
