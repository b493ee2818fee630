"""The files of an index cache.

``ranks.npy`` has a row for each image: the place of every patch in the order of its scores, 0 the
best, as uint8 or uint16 on the patch grid; it is read through a memory map. ``cache.json`` comes
last and says what they are of: ranker, images, and how these were cut into patches.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ltrp_timm._text import printable
from ltrp_timm.selection import best_first
from ltrp_timm.weights.files import write_atomically, write_text
from ltrp_timm.weights.untrusted import parse_json

RANKS_NAME, CACHE_NAME = "ranks.npy", "cache.json"
_FORMAT = 1
_Array = npt.NDArray[Any]


@dataclass(frozen=True)
class ImageIds:
    """What tells the images of a set from others.

    Attributes:
        names: one for each image: its path below the set's folder, or its number.
        sizes: bytes of each file, -1 where there is none.
        dataset: what else identifies the set, where its images have no names; or "".
    """

    names: Sequence[str]
    sizes: Sequence[int]
    dataset: str = ""


def ranker_hash(ranker: Any) -> str:
    """A digest of what a ranker computes: its kind, its arguments, its weights."""
    digest = hashlib.sha256(json.dumps([ranker.name, ranker.config()], sort_keys=True).encode())
    for name, tensor in sorted(ranker.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def rank_type(num_patches: int) -> Any:
    """The smallest numpy type for places 0 … N - 1.

    Raises:
        ValueError: there are more patches than 16 bits can number.
    """
    if num_patches > 2**16:
        raise ValueError(f"an index cache holds up to {2**16} patches, got {num_patches}.")
    return np.dtype(np.uint8 if num_patches <= 2**8 else np.uint16)


def ranks_of(scores: Tensor) -> Tensor:
    """Scores (B, N) -> the place of each patch in their order (B, N) int64, 0 the best.

    Ties and NaN are as in every selection: the lower index first, NaN last.

    >>> ranks_of(torch.tensor([[0.1, 0.9, 0.5]]))
    tensor([[2, 0, 1]])
    """
    return best_first(scores).argsort(dim=1)


def finish_cache(
    folder: Path,
    settings: Mapping[str, Any],
    ids: ImageIds,
    rows: Sequence[int],
    write_ranks: Callable[[Path], Any],
) -> None:
    """Write both files, each in one atomic step.

    Args:
        folder: of the cache.
        settings: what the ranks are of.
        ids: of all images.
        rows: numbers of the images that have a row, in their order; the others could not be read.
        write_ranks: fills a file with the array (rows, N) in npy format.
    """
    write_atomically(folder / RANKS_NAME, write_ranks)
    there = set(rows)
    content = {
        "format": _FORMAT,
        **settings,
        "dataset": ids.dataset,
        "images": [ids.names[row] for row in rows],
        "sizes": [ids.sizes[row] for row in rows],
        "failed": [name for number, name in enumerate(ids.names) if number not in there],
    }
    text = json.dumps(content)
    write_text(folder / CACHE_NAME, text)


class IndexCache:
    """Orders of patches of many images, read from the disk as they are asked for.

    Args:
        folder: that ``ltrp-timm rank --cache`` has written.

    Attributes:
        settings: what they are of: ``ranker``, ``ranker_hash``, ``input_size``, ``grid_size``, ….

    Raises:
        FileNotFoundError: it holds no finished cache.
        ValueError: it is damaged.

    >>> cache = IndexCache("orders")  # doctest: +SKIP
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder, name = Path(folder), printable(folder)
        if not (self.folder / CACHE_NAME).is_file():
            raise FileNotFoundError(
                f"{name} holds no finished index cache: ltrp-timm rank DATA --cache {name} makes "
                "or finishes one."
            )
        text = (self.folder / CACHE_NAME).read_text(encoding="utf-8", errors="replace")
        self.settings = parse_json(text, name)
        if self.settings.get("format") != _FORMAT:
            raise ValueError(f"{name} is an index cache of another version of this library.")
        self._names: list[str] = self.settings.pop("images")
        self._sizes: list[int] = self.settings.pop("sizes")
        self._failed = set(self.settings.pop("failed"))
        h, w = self.settings["grid_size"]
        self.grid_size: tuple[int, int] = (h, w)
        self._ranks = self._open()

    def _open(self) -> _Array:
        path = self.folder / RANKS_NAME
        try:
            ranks: _Array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{printable(path)} is damaged: {error}.") from error
        shape = (len(self._names), self.grid_size[0] * self.grid_size[1])
        if ranks.shape != shape or ranks.dtype != rank_type(shape[1]):
            found = f"{ranks.dtype} {list(ranks.shape)}"
            raise ValueError(f"{printable(path)} is damaged: {found} in place of {list(shape)}.")
        return ranks

    def __len__(self) -> int:
        return len(self._names)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ranks": None}  # another process maps the file itself

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._ranks = self._open()

    def check(self, ranker: Any, input_size: Sequence[int], grid_size: Sequence[int]) -> None:
        """Compare with what would be computed.

        Args:
            ranker: of the model.
            input_size: (H, W) of its images.
            grid_size: (h, w) of its patches.

        Raises:
            ValueError: these are orders by another ranker, or of other patches.
        """
        name, own = printable(self.folder), self.settings
        theirs = str(getattr(ranker, "name", type(ranker).__name__))
        if own["ranker"] != theirs:
            raise ValueError(
                f"{name} has orders of the {own['ranker']} ranker, the model has {theirs}."
            )
        if own["ranker_hash"] != ranker_hash(ranker):
            raise ValueError(
                f"{name} has orders of another {theirs} ranker: its weights or arguments differ."
            )
        for what, found in (("input_size", input_size), ("grid_size", grid_size)):
            if list(own[what]) != list(found):
                raise ValueError(
                    f"{name} has orders for {what} = {list(own[what])}, the model has "
                    f"{list(found)}."
                )

    def rows(self, ids: ImageIds) -> list[int]:
        """The row of each image; -1 for those that could not be read when it was made.

        Raises:
            ValueError: it lacks some of the images, or they have changed since.
        """
        name = printable(self.folder)
        if ids.dataset != self.settings["dataset"]:
            raise ValueError(f"{name} has orders of another dataset.")
        places = {known: row for row, known in enumerate(self._names)}
        absent = [n for n in ids.names if n not in places and n not in self._failed]
        if absent:
            raise ValueError(
                f"{name} lacks {len(absent)} of {len(ids.names)} images, such as "
                f"{printable(absent[0])}."
            )
        rows = [places.get(image, -1) for image in ids.names]
        for image, row, size in zip(ids.names, rows, ids.sizes):
            if row >= 0 and self._sizes[row] != size:
                raise ValueError(
                    f"{name} has an order of another {printable(image)}: {self._sizes[row]} "
                    f"bytes then, {size} now."
                )
        return rows

    def ranks(self, row: int) -> _Array:
        """The places (N,) of an image's patches in their order, 0 the best.

        Raises:
            ValueError: the row is damaged.
        """
        ranks: _Array = np.array(self._ranks[row])
        count = len(ranks)
        if int(ranks.sum(dtype=np.int64)) != count * (count - 1) // 2 or ranks.max() >= count:
            raise ValueError(f"row {row} of {printable(self.folder / RANKS_NAME)} is damaged.")
        return ranks
