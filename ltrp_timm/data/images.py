"""Pictures by index from every kind of data set; ``labels`` adds the classes."""

import contextlib
import copy
import itertools
import os
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import add_img_extensions, create_dataset, get_img_extensions, set_img_extensions
from torch.utils.data import Subset
from torchvision.datasets.folder import default_loader

from ltrp_timm._text import one_line, printable
from ltrp_timm.data.photos import check_aspect, load_image
from ltrp_timm.runtime.keyed_rng import sample_seed
from ltrp_timm.weights.files import PathLike

CLASS_NUMBERS = ("class_to_idx", "class_name_to_idx")  # of timm's readers
NAMED = ("hfds", "hfids", "tfds", "torch", "wds")  # prefixes of timm's readers
_SPLITS = (
    ("train", "training"),
    ("validation", "val", "valid", "eval", "evaluation"),
    ("test", "testing"),
)
_SYSTEM = "@eaDir|@__thumb|__MACOSX|#recycle|\\$RECYCLE.BIN|lost\\+found|System Volume Information"
_HIDDEN = re.compile(rf"(^|[\\/])(\.[^.\\/]|({_SYSTEM})([\\/]|$))")
IMAGE_ENDINGS = (  # in any case
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".avif"),
)
_LOCK = threading.Lock()  # timm's list of endings is global


def open_dataset(
    data: Any,
    *,
    root: PathLike | None = None,
    split: str = "train",
    input_key: str | None = None,
    target_key: str | None = None,
    num_samples: int | None = None,
    seed: int = 0,
    training: bool = True,
) -> Any:
    """Open a data set by its name in timm; a data set that is given comes back as it is.

    ``load_image`` sees the orientation, bit depth and transparency of every image; only ``tfds/``
    drops them when it decodes. Hidden files and folders, and those of file systems such as
    ``@eaDir``, are skipped in folders and archives; so are files with an ending that is neither in
    ``IMAGE_ENDINGS`` nor known to timm.

    ``data`` is a folder (with or without subfolders), a ``.tar``, ``hfds/…``, ``hfids/…``,
    ``tfds/…``, ``torch/…``, ``wds/…``, or a torch data set of pictures. The other arguments are
    those of timm's ``create_dataset``; for a folder, ``split`` is as in ``split_folder``. Without
    ``target_key``, labels are not read. In ``training`` a stream is shuffled.

    Raises:
        FileNotFoundError: ``data`` does not exist.
        ValueError: The data set holds no image, or timm cannot read it.
        TypeError: ``data`` is none of these.
        ImportError: The package behind a prefix is not installed.
    """
    if not isinstance(data, (str, os.PathLike)):
        if not hasattr(data, "__len__") and not hasattr(data, "__iter__"):
            got = type(data).__name__
            raise TypeError(f"data must be a path, a name or a torch data set, got {got}.")
        return data
    text, named = str(data), check_data(data)
    prefix = text.partition("/")[0].lower()
    folder = None if named else split_folder(text, split)
    if named and prefix == "wds":
        if root is None:
            raise ValueError(f"{text} needs the folder of its archives: --data-root (root).")
        input_key = input_key or ";".join(ending[1:] for ending in IMAGE_ENDINGS)
    extra: dict[str, Any] = {"input_key": input_key} if named and input_key else {}
    if prefix == "hfds" and named:
        extra["target_key"] = target_key or input_key or "image"  # it need not have labels
    if named and num_samples:
        extra["num_samples"] = num_samples
    try:
        with _image_endings():
            dataset = create_dataset(
                text if named else "",
                root=root if named else folder,
                split=split,
                search_split=named,
                is_training=training,
                seed=seed,
                input_img_mode="",  # no conversion: load_image converts
                **extra,
            )
        if hasattr(dataset, "reader"):  # one of timm's
            dataset.transform = load_image
            _skip_hidden(dataset.reader, "" if named else str(folder))
        return dataset
    except ImportError as error:
        raise ImportError(
            f"{text} needs a package that is not installed ({one_line(error)}): "
            "pip install 'ltrp-timm[train]'"
        ) from error
    except Exception as error:  # timm and what it calls raise anything, AssertionError included
        raise ValueError(f"{text} cannot be read as a data set: {one_line(error)}") from error


@contextlib.contextmanager
def _image_endings() -> Iterator[None]:
    """Let timm's readers, which look for endings while they are made, know IMAGE_ENDINGS too."""
    with _LOCK:
        known = get_img_extensions()
        try:
            add_img_extensions(IMAGE_ENDINGS)
            yield
        finally:
            set_img_extensions(known)


def split_folder(root: str, split: str) -> str:
    """The subfolder of a split, under any of its usual names in any case; ``root`` without one.

    ValueError if several subfolders could be meant.
    """
    if not os.path.isdir(root):
        return root
    wanted = split.split("[")[0]
    names = next((names for names in _SPLITS if wanted.lower() in names), (wanted.lower(),))
    found = [entry.name for entry in os.scandir(root) if entry.is_dir()]
    found = sorted(name for name in found if name.lower() in names)
    if wanted in found:
        found = [wanted]
    if len(found) > 1:
        raise ValueError(f"{root} has {' and '.join(found)}: name the one to use as split.")
    return os.path.join(root, *found)


def is_hidden(path: str) -> bool:
    """Whether a path leads through hidden files or folders, or those of a file system."""
    return _HIDDEN.search(path) is not None


def _skip_hidden(reader: Any, root: str) -> None:
    """Leave out the images of timm's readers of folders and archives that ``is_hidden``."""
    samples = getattr(reader, "samples", ())
    places = (sample[0] for sample in samples)
    seen = [not is_hidden(p[len(root) :] if isinstance(p, str) else p.path) for p in places]
    if all(seen):
        return
    for name in ("samples", "targets"):  # an archive has both
        if hasattr(reader, name):
            setattr(reader, name, list(itertools.compress(getattr(reader, name), seen)))
    labels = getattr(reader, "targets", None) or [sample[1] for sample in reader.samples]
    used = set(map(int, labels))
    for name in CLASS_NUMBERS:
        if hasattr(reader, name):
            known = getattr(reader, name).items()
            setattr(reader, name, {key: number for key, number in known if number in used})


def check_data(data: Any) -> bool:
    """Check that a data set exists; returns whether it is the name of one, not a path.

    Raises:
        FileNotFoundError: ``data`` does not exist.
        ValueError: ``data`` is empty, or names no data set after its prefix.
    """
    if data == "":  # a path would make it the current folder
        raise ValueError("the data set has an empty name.")
    if not isinstance(data, (str, os.PathLike)) or Path(data).exists():
        return False
    prefix, _, name = str(data).partition("/")
    if prefix.lower() not in NAMED:
        raise FileNotFoundError(f"{data} does not exist.")
    if not name:
        raise ValueError(f"{data} names no data set: write {prefix}/NAME.")
    return True


class Images:
    """Pictures by index, as ``load_image`` reads them, of timm's or any map-style torch data set.

    Its items are, or begin with, a picture. One with a side shorter than ``min_side`` pixels counts
    as unreadable, as strips do. ``blank`` is the target of such an image, None without targets.
    """

    blank: Any = None

    def __init__(self, dataset: Any, min_side: int = 1) -> None:
        self.dataset, self.min_side = _undecoded(dataset), min_side
        self.reader = getattr(dataset, "reader", None)

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        """Name of an image in messages."""
        known = getattr(self.dataset, "filename", None)
        name = known(index) if known is not None else None
        return f"image {index}" if name is None else str(name)  # a table's images may have none

    def read_item(self, index: int) -> tuple[Image.Image, Any]:
        """Read a picture and its target, or None; ValueError, with the name, if it fails."""
        name = self.name(index)
        try:
            source, target = self._item(index)
        except Exception as error:  # of the data set and what lies under it
            raise ValueError(f"{printable(name)}: {one_line(error)}") from error
        try:
            picture = load_image(source, name)
        finally:
            if hasattr(source, "read"):  # a file
                source.close()
            close_tars(self.reader)
        try:
            if min(picture.size) < self.min_side:
                size = f"{picture.width}x{picture.height} pixels"
                raise ValueError(f"{size}, smaller than a patch of {self.min_side}.")
            check_aspect(picture)
        except ValueError as error:
            raise ValueError(f"{printable(name)}: {error}") from error
        return picture, target

    def _item(self, index: int) -> tuple[Any, Any]:
        """What ``load_image`` takes, and the target."""
        samples = getattr(self.reader, "samples", None)
        if samples is not None and isinstance(samples[index][0], str):  # files on the disk
            return samples[index][0], samples[index][1]
        item = self.dataset[index] if self.reader is None else self.reader[index]
        return (*item, None)[:2] if isinstance(item, (tuple, list)) else (item, None)

    def split(self, share: float) -> tuple[list[int], list[int]]:
        """Training and held-out indices, see ``split_indices``."""
        return split_indices(len(self), share)

    def fingerprint(self, indices: Sequence[int]) -> dict[str, Any]:
        """Identify these images: their number, and their names if they are files."""
        if not hasattr(self.reader, "samples"):
            return {"images": len(indices)}
        names = "\n".join(self.name(index) for index in indices)
        return {"images": len(indices), "names": sample_seed(0, 0, 0, names)}


def _undecoded(dataset: Any) -> Any:
    """Let a torchvision data set of files read them with ``load_image``; the given one stays."""
    if isinstance(dataset, Subset):
        inner = _undecoded(dataset.dataset)
        return dataset if inner is dataset.dataset else Subset(inner, dataset.indices)
    if getattr(dataset, "loader", None) is not default_loader:
        return dataset
    dataset = copy.copy(dataset)
    dataset.loader = load_image
    return dataset


class ImageFiles:
    """A data set of files, by their paths relative to a folder, for ``Images``."""

    def __init__(self, root: str | os.PathLike[str], names: Sequence[str]) -> None:
        self.reader, self.names = self, names
        self.samples = [(os.path.join(root, name), place) for place, name in enumerate(names)]

    def __len__(self) -> int:
        return len(self.samples)

    def filename(self, index: int) -> str:
        """Path of a file relative to the folder."""
        return self.names[index]


def find_images(
    inputs: Sequence[str], leave_out: Sequence[str | os.PathLike[str]] = ()
) -> tuple[Path, list[str], list[str]]:
    """Find images below folders, by ``IMAGE_ENDINGS``, and files by their name, each once.

    What ``is_hidden`` is skipped, and so are the folders ``leave_out``; links to folders are not
    followed.

    Returns:
        The folder that holds them all, their paths relative to it in ascending order, and one line
        for each input that does not exist.
    """
    skipped = {os.path.abspath(folder) for folder in leave_out}
    found: set[str] = set()
    roots: list[str] = []
    missing: list[str] = []
    for given in inputs:
        path = os.path.abspath(given)
        if os.path.isdir(path):
            roots.append(path)
            found.update(_walk(path, skipped))
        elif os.path.lexists(path):
            roots.append(os.path.dirname(path))
            found.add(path)
        else:
            missing.append(f"{printable(given)}: No such file or directory.")
    root = os.path.commonpath(roots) if roots else os.getcwd()
    return Path(root), sorted(os.path.relpath(path, root) for path in found), missing


def _walk(folder: str, skipped: set[str]) -> Iterator[str]:
    for place, folders, files in os.walk(folder):
        folders[:] = [
            name
            for name in folders
            if not is_hidden(name) and os.path.join(place, name) not in skipped
        ]
        for name in files:
            if os.path.splitext(name)[1].lower() in IMAGE_ENDINGS and not is_hidden(name):
                yield os.path.join(place, name)


def close_tars(reader: Any) -> None:
    """Close what timm's tar reader keeps open: workers would share one position in the file."""
    state = getattr(reader, "tar_state", None)
    states = list(state.values()) if isinstance(state, dict) else [state] if state else []
    while states:
        state = states.pop()
        states += state.children.values()
        if state.tf is not None:
            state.tf.close()
            state.reset()


def split_indices(count: int, holdout: float) -> tuple[list[int], list[int]]:
    """Split 0 … n - 1 into training and held-out indices, ascending; depends on (n, share) only.

    A single one is for training.

    >>> [len(part) for part in split_indices(10, 0.2)]
    [8, 2]
    """
    held = min(max(1, round(count * holdout)), count - 1) if holdout else 0
    draw = torch.Generator().manual_seed(sample_seed(0, 0, count, "held out"))
    order = torch.randperm(count, generator=draw).tolist()
    return sorted(order[held:]), sorted(order[:held])
