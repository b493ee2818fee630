"""Results on disk: parts of a few images each, whole or not there, and one file in the end."""

import json
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from ltrp_timm._text import printable
from ltrp_timm.commands._console import CommandError
from ltrp_timm.weights.files import write_atomically, write_text

PART_SIZE = 64  # images
OVERLAYS = "overlays"  # the folder of the pictures, inside that of the results
FORMATS = ("npz", "json")
FINISHED = ("scores.npz", "scores.json")
_Array = npt.NDArray[Any]
_Part = dict[str, _Array]


class Parts:
    """The parts of one run in a hidden folder next to its results.

    A part holds the results of ``PART_SIZE`` images that follow each other in the list of all, so
    that it does not depend on batches, processes or interruptions.

    Args:
        output: the folder of the results.
        count: number of images.
        finished: names of the files that stand for finished results.
    """

    def __init__(
        self,
        output: Path,
        count: int,
        finished: Sequence[str] = FINISHED,
    ) -> None:
        self.output, self.count, self.finished = output, count, finished
        self.folder = output / ".rank-parts"
        self._settings = self.folder / "settings.json"

    def begin(self, settings: Mapping[str, Any], overwrite: bool) -> None:
        """Take up what an interrupted run left, or start anew.

        Args:
            settings: all that results depend on.
            overwrite: forget what is there.

        Raises:
            CommandError: results are there already, or parts made with other settings.
        """
        name = printable(self.output)
        finished = [self.output / name for name in self.finished]
        shown = self.output / OVERLAYS
        if overwrite:
            self.remove()
            for path in finished:
                path.unlink(missing_ok=True)
        there = [path.name for path in finished if path.exists()]
        if there:
            raise CommandError(f"{name} holds {there[0]} already: --overwrite replaces it.")
        if self._settings.is_file():
            self._compare(json.loads(self._settings.read_text(encoding="utf-8")), settings)
            return
        if not overwrite and shown.is_dir() and any(shown.iterdir()):
            raise CommandError(f"{name} holds overlays already: --overwrite replaces them.")
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(settings, indent=2)
        write_text(self._settings, text)

    def _compare(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        now = json.loads(json.dumps(now))
        changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        if changed:
            key = changed[0]
            was, new = before.get(key), now.get(key)
            raise CommandError(
                f"{printable(self.output)} holds an unfinished run with {key} = {was}, now it is "
                f"{new}: --overwrite starts anew."
            )

    def total(self) -> int:
        """Number of parts."""
        return -(-self.count // PART_SIZE)

    def images(self, part: int) -> range:
        """The indices of a part's images."""
        return range(part * PART_SIZE, min((part + 1) * PART_SIZE, self.count))

    def pending(self) -> list[int]:
        """The parts that are not there yet."""
        return [part for part in range(self.total()) if not self._path(part).exists()]

    def write(self, part: int, arrays: Mapping[str, Any]) -> None:
        """Write one part, atomically."""

        def save(path: Path) -> None:
            with path.open("wb") as file:
                np.savez(file, **arrays)

        write_atomically(self._path(part), save)

    def read(self, *keys: str) -> Iterator[_Part]:
        """Some arrays of the parts, in order, one part at a time.

        Raises:
            CommandError: one of them is damaged.
        """
        for part in range(self.total()):
            try:
                with np.load(self._path(part), allow_pickle=False) as file:
                    arrays = {key: file[key] for key in keys}
            except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
                name = printable(self._path(part))
                raise CommandError(f"{name} is damaged: --overwrite starts anew.") from error
            yield arrays

    def merge(self, kind: str, names: Sequence[str], settings: Mapping[str, Any]) -> Path:
        """Write the one file of all results, part by part, and remove the parts.

        Args:
            kind: "npz" or "json".
            names: of all images, by index.
            settings: stand beside the results.

        Returns:
            The file.
        """
        path = self.output / f"scores.{kind}"
        write = _write_npz if kind == "npz" else _write_json
        write_atomically(path, lambda place: write(place, self, names, settings))
        self.remove()
        return path

    def remove(self) -> None:
        """Remove all parts."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, part: int) -> Path:
        return self.folder / f"part-{part:07d}.npz"


def failures(parts: Parts) -> Iterator[str]:
    """A line for each image that could not be read."""
    for part in parts.read("reasons"):
        yield from (str(reason) for reason in part["reasons"])


def _write_npz(path: Path, parts: Parts, names: Sequence[str], settings: Mapping[str, Any]) -> None:
    """An uncompressed npz, its large arrays streamed: only one part is in memory."""
    index = np.concatenate([part["index"] for part in parts.read("index")])
    facts = {key: np.array(settings[key]) for key in settings if settings[key] is not None}
    facts["images"] = np.array([names[i] for i in index], dtype=np.str_)
    with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
        for key, value in facts.items():
            with archive.open(f"{key}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, value, allow_pickle=False)
        for key in ("scores", "keep_indices"):
            with archive.open(f"{key}.npy", "w", force_zip64=True) as file:
                stream(file, (part[key] for part in parts.read(key)), len(index))


def stream(file: IO[bytes], blocks: Iterator[_Array], rows: int) -> None:
    """Blocks (n, C) one below the other as one array (rows, C) in npy format."""
    for number, block in enumerate(blocks):
        if number == 0:
            header = {
                "descr": np.lib.format.dtype_to_descr(block.dtype),
                "fortran_order": False,
                "shape": (rows, block.shape[1]),
            }
            np.lib.format.write_array_header_2_0(file, header)
        file.write(np.ascontiguousarray(block).tobytes())


def _write_json(
    path: Path, parts: Parts, names: Sequence[str], settings: Mapping[str, Any]
) -> None:
    """The settings, then a line for each image; a score that is no number is null."""
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(dict(settings))[:-1] + ', "images": [')
        comma = "\n"
        for part in parts.read("index", "scores", "keep_indices"):
            for i, scores, keep in zip(part["index"], part["scores"], part["keep_indices"]):
                numbers = [float(s) if np.isfinite(s) else None for s in scores]
                line = {"image": names[int(i)], "scores": numbers, "keep_indices": keep.tolist()}
                file.write(comma + json.dumps(line))
                comma = ",\n"
        file.write("\n]}\n")
