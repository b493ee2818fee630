"""The scores of a data set on disk: what ``ltrp-timm rank`` writes and an index cache reads.

A folder holds

- ``scores.npy``: float32 (M, N), one row for each image; a row of NaN is an unreadable image.
- ``keep_indices.npy``: int64 (M, K), if the run chose patches; -1 in the rows of unreadable images.
- ``done.npy``: uint8 (M,), the state of each row: 0 pending, 1 ranked, 2 unreadable.
- ``index.json``: settings of the ranker, names and sizes of the images, reasons of failures.

The arrays are memory maps: several processes write disjoint rows, and a reader loads single rows.
"""

import hashlib
import itertools
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ltrp_timm._text import one_line, printable
from ltrp_timm.data.images import Images
from ltrp_timm.weights.files import ranker_hash, write_atomically, write_text
from ltrp_timm.weights.untrusted import parse_json

INDEX, SCORES, KEEP, DONE = "index.json", "scores.npy", "keep_indices.npy", "done.npy"
OVERLAYS = "overlays"
PENDING, RANKED, FAILED = 0, 1, 2
FLUSH_SECONDS = 1.0  # a run that is killed repeats at most the work of this time
_FORMAT = 1
_EMPTY = {SCORES: float("nan"), KEEP: -1}  # rows of unreadable images
_Array = npt.NDArray[Any]


@dataclass(frozen=True)
class ImageIds:
    """The identity of the images of a data set.

    Attributes:
        names: the path of each image below the folder of the data set, or its number.
        sizes: bytes of each file; -1 without a file.
        times: modification time of each file in nanoseconds; 0 without a file on disk.
        dataset: identity of a data set without names; "" otherwise.
        root: absolute path of the folder of the data set; "" without files on disk.
    """

    names: Sequence[str]
    sizes: Sequence[int]
    times: Sequence[int]
    dataset: str = ""
    root: str = ""

    def digest(self) -> str:
        """A digest that changes with any image."""
        text = json.dumps([self.dataset, *map(list, (self.names, self.sizes, self.times))])
        return hashlib.sha256(text.encode()).hexdigest()


def image_ids(images: Images) -> ImageIds:
    """The identity of each image: name and size of its file, or its number in a data set."""
    count, samples = len(images), getattr(images.reader, "samples", None)
    if samples is not None:
        names = [images.name(index) for index in range(count)]
        sizes, times = zip(*map(_size_and_time, samples)) if count else ((), ())
        on_disk = count and isinstance(samples[0][0], str)
        root = os.path.abspath(samples[0][0]).removesuffix(names[0]) if on_disk else ""
        return ImageIds(names, sizes, times, root=root)
    table: Any = getattr(images.reader, "dataset", None)
    mark = getattr(table, "_fingerprint", None)  # Hugging Face's digest of the table
    identity = f"{mark or type(images.dataset).__name__}, {count} images"
    return ImageIds([str(index) for index in range(count)], [-1] * count, [0] * count, identity)


def _size_and_time(sample: Any) -> tuple[int, int]:
    """Of a file on disk (path, label) or in an archive (entry, …)."""
    place = sample[0]
    if not isinstance(place, (str, os.PathLike)):
        return int(getattr(place, "size", -1)), 0
    try:
        status = os.stat(place)
    except OSError:  # reading the image reports it
        return -1, 0
    return status.st_size, status.st_mtime_ns


def begin(
    folder: Path,
    settings: Mapping[str, Any],
    ids: ImageIds,
    num_patches: int,
    num_keep: int | None,
    overwrite: bool,
) -> None:
    """Prepare a locked folder for a ``ScoreWriter``: continue an unfinished run, or start one.

    ``settings`` are everything that the results depend on. ``num_keep`` None writes no
    ``keep_indices.npy``.

    Raises:
        FileExistsError: the folder holds finished scores, or files of another origin.
        ValueError: it holds an unfinished run with other settings, or a damaged array.
    """
    name = printable(folder)
    settings = {**settings, "images_hash": ids.digest()}
    if overwrite:
        _remove(folder)
    if (folder / INDEX).is_file():
        before = _read_index(folder)
        if before.get("finished"):
            raise FileExistsError(f"{name} already holds scores; use --overwrite to replace them.")
        for key, new in json.loads(json.dumps(settings)).items():
            if before.get(key) != new:
                raise ValueError(
                    f"{name} holds an unfinished run with {key} = {before.get(key)}, this run has "
                    f"{new}; use --overwrite to start again."
                )
    else:
        there = [file for file in (SCORES, KEEP, DONE) if (folder / file).exists()]
        there += [OVERLAYS] if not overwrite and any((folder / OVERLAYS).glob("*")) else []
        if there:
            raise FileExistsError(
                f"{name} already holds {there[0]}; use --overwrite to replace it."
            )
        about = {"dataset": ids.dataset, "images": list(ids.names), "sizes": list(ids.sizes)}
        _write_index(folder, {"format": _FORMAT, "finished": False, **settings, **about})
    count = len(ids.names)
    arrays: list[tuple[str, Any, tuple[int, ...]]] = [(SCORES, np.float32, (count, num_patches))]
    arrays += [(KEEP, np.int64, (count, num_keep))] if num_keep is not None else []
    arrays += [(DONE, np.uint8, (count,))]  # the last one: all are there
    begun = (folder / DONE).is_file()
    for file, kind, shape in arrays:
        (_open if begun else _create)(folder / file, kind, shape)
    if begun:
        done: Any = _writable(folder / DONE)
        done[done == FAILED] = PENDING  # they are tried again
        done.flush()


def _create(path: Path, kind: Any, shape: tuple[int, ...]) -> None:
    """An array of zeros under a new inode, with its space on the disk reserved."""

    def write(place: Path) -> None:
        np.lib.format.open_memmap(place, "w+", kind, shape).flush()
        if hasattr(os, "posix_fallocate"):  # a full disk would kill whoever writes to the map
            with place.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, os.fstat(file.fileno()).st_size))

    write_atomically(path, write)


def _write_index(folder: Path, index: Mapping[str, Any]) -> None:
    write_text(folder / INDEX, json.dumps(index, indent=1) + "\n")


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    index = parse_json(path.read_text(encoding="utf-8", errors="replace"), printable(path))
    if index.get("format") != _FORMAT:
        raise ValueError(f"{printable(path)} is of another version of this library.")
    return index


def _remove(folder: Path) -> None:
    for name in (INDEX, SCORES, KEEP, DONE):
        (folder / name).unlink(missing_ok=True)


class ScoreWriter:
    """Writes rows of scores into a folder; every process of a run has one, for rows of its own.

    Scores reach the disk before their rows are marked as done.
    """

    def __init__(self, folder: Path, keeps: bool = False) -> None:
        self.folder = folder
        names = (SCORES, KEEP) if keeps else (SCORES,)
        self._arrays: dict[str, Any] = {name: _writable(folder / name) for name in names}
        self._done: Any = _writable(folder / DONE)
        self._waiting: list[tuple[int, int]] = []
        self._flushed = time.monotonic()

    def __len__(self) -> int:
        return len(self._done)

    def pending(self, rows: Sequence[int]) -> bool:
        """Whether one of these rows is not done."""
        return bool((self._done[list(rows)] == PENDING).any())

    def write(
        self, rows: Sequence[int], scores: Tensor, keep: Tensor, readable: Sequence[bool]
    ) -> None:
        """Write scores (B, N) and kept patches (B, K); images not ``readable`` get an empty row."""
        good = torch.tensor(readable)
        for name, values in ((SCORES, scores), (KEEP, keep)):
            if name in self._arrays:
                self._arrays[name][list(rows)] = torch.where(good[:, None], values, _EMPTY[name])
        self._waiting += zip(rows, torch.where(good, RANKED, FAILED).tolist())
        if time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self.close()

    def close(self) -> None:
        """Bring what was written to the disk and mark it as done; writing may go on."""
        for array in self._arrays.values():
            array.flush()
        for row, state in self._waiting:
            self._done[row] = state
        self._done.flush()
        self._waiting.clear()
        self._flushed = time.monotonic()

    def finish(self, failures: Mapping[int, str]) -> None:
        """Mark the folder as finished, with the reason for each unreadable image, by row.

        ValueError if no image could be read; the files are removed.
        """
        if len(failures) == len(self):
            _remove(self.folder)
            first = failures[min(failures)]
            raise ValueError(f"no image could be read, nothing was written: {first}")
        index = _read_index(self.folder)
        names = index["images"]
        index["failures"] = {names[row]: failures[row] for row in sorted(failures)}
        _write_index(self.folder, {**index, "finished": True})


def _open(path: Path, kind: Any, shape: tuple[int, ...]) -> _Array:
    """Map an array that is there in full; one mapped for writing would be made longer."""
    reason, array = "", np.empty(0)
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, OverflowError) as error:
        reason = one_line(error).rstrip(".")
    if not reason and (array.shape != shape or array.dtype != kind):
        reason = f"{array.dtype} {list(array.shape)}, expected {np.dtype(kind)} {list(shape)}"
    if reason:
        name = printable(path)
        raise ValueError(f"{name} is damaged: {reason}; rank the images again with --overwrite.")
    return array


def _writable(path: Path) -> _Array:
    return np.lib.format.open_memmap(path, mode="r+")


class IndexCache:
    """Scores of many images, from a folder that ``ltrp-timm rank`` wrote; read row by row.

    ``settings`` are those of the run: ``ranker``, ``ranker_hash``, ``input_size``, ….

    Raises:
        FileNotFoundError: the folder holds no finished scores.
        ValueError: it is damaged.

    >>> cache = IndexCache("scores")  # doctest: +SKIP
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder, name = Path(folder), printable(folder)
        again = f"run `ltrp-timm rank DATA -o {name}`"
        if not (self.folder / INDEX).is_file():
            raise FileNotFoundError(f"{name} holds no scores; {again} first.")
        self.settings = _read_index(self.folder)
        if not self.settings.get("finished"):
            raise FileNotFoundError(f"{name} holds an unfinished run; {again} to finish it.")
        try:
            self._names: list[str] = list(self.settings.pop("images"))
            self._sizes: list[int] = list(self.settings.pop("sizes"))
            h, w = self.settings["grid_size"]
            self.grid_size: tuple[int, int] = (int(h), int(w))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{printable(self.folder / INDEX)} is damaged: {error!r}.") from error
        count = len(self._names)
        self._done = np.array(_open(self.folder / DONE, np.uint8, (count,)))
        self._open_scores()

    def _open_scores(self) -> None:
        shape = (len(self._names), self.grid_size[0] * self.grid_size[1])
        self._scores = _open(self.folder / SCORES, np.float32, shape)

    def __len__(self) -> int:
        return len(self._names)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_scores": None}  # another process maps the file itself

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open_scores()

    def check(self, ranker: Any, input_size: Sequence[int], grid_size: Sequence[int]) -> None:
        """Compare with a model's ranker, image size (H, W) and patch grid (h, w).

        ValueError if the scores are of another ranker or of other patches.
        """
        name, own = printable(self.folder), self.settings
        theirs = str(getattr(ranker, "name", type(ranker).__name__))
        if own.get("ranker") != theirs:
            raise ValueError(
                f"{name} has scores of the {own.get('ranker')} ranker, the model has {theirs}."
            )
        if own.get("ranker_hash") != ranker_hash(ranker):
            raise ValueError(
                f"{name} has scores of another {theirs} ranker; its weights or arguments differ."
            )
        for what, found in (("input_size", input_size), ("grid_size", grid_size)):
            if own.get(what) != list(found):
                raise ValueError(
                    f"{name} has scores for {what} = {own.get(what)}, the model has {list(found)}."
                )

    def rows(self, ids: ImageIds) -> list[int]:
        """The row of each image, -1 if unreadable; their folder may lie below the ranked one.

        ValueError if an image has no scores, or another number of bytes than it had.
        """
        name = printable(self.folder)
        if ids.dataset != self.settings.get("dataset"):
            raise ValueError(f"{name} has scores of another data set.")
        places = {known: row for row, known in enumerate(self._names)}
        # for folder/train: "", "train/", "folder/train/", …
        parts = reversed(Path(ids.root).parts[1:])
        above = itertools.accumulate(parts, lambda path, part: f"{part}{os.sep}{path}", initial="")
        found = [path for path in above if all(path + image in places for image in ids.names)]
        if len(found) > 1:
            root, where = printable(ids.root), " and ".join(printable(p or "./") for p in found)
            raise ValueError(f"{name} has these images in {where}; rank {root} alone.")
        if not found:
            absent = [image for image in ids.names if image not in places]
            raise ValueError(
                f"{name} lacks {len(absent)} of {len(ids.names)} images, such as "
                f"{printable(absent[0])}; rank the folder that has them."
            )
        rows = [places[found[0] + image] for image in ids.names]
        for image, row, size in zip(ids.names, rows, ids.sizes):
            if self._done[row] == RANKED and self._sizes[row] != size:
                raise ValueError(
                    f"{name} has scores of another {printable(image)}: it had {self._sizes[row]} "
                    f"bytes, now it has {size}; rank the images again, or name their split."
                )
        return [row if self._done[row] == RANKED else -1 for row in rows]

    def scores(self, row: int) -> Tensor:
        """The scores (N,) float32 of an image."""
        return torch.from_numpy(np.array(self._scores[row]))
