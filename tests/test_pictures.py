"""The same pixels whichever way a picture comes: a folder, an archive, a stream, a data set."""

import io
import os
import struct
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data import IterableImageDataset, get_img_extensions, set_img_extensions
from timm.data.readers.img_extensions import IMG_EXTENSIONS
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor
from train_setup import make_photos

from ltrp_timm.data.images import IMAGE_ENDINGS, ImageFiles, Images, find_images, open_dataset
from ltrp_timm.data.keyed import KeyedImages, KeyedStream
from ltrp_timm.data.labels import open_labelled
from ltrp_timm.data.multi_label import open_multi_label
from ltrp_timm.data.photos import load_image
from ltrp_timm.runtime.keyed_rng import HELD_OUT
from ltrp_timm.runtime.world import World

ALONE = World(0, 1, torch.device("cpu"))
SIZE = (48, 32)
Pictures = dict[str, Tensor]


def photo() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(SIZE)


def save_pictures(folder: Path) -> None:
    """One picture of each kind: what a plain ``convert("RGB")`` of it would spoil."""
    folder.mkdir(parents=True)
    turned = Image.Exif()
    turned[0x0112] = 6
    photo().save(folder / "turned.jpg", exif=turned)
    photo().save(folder / "turned_too.png", exif=turned)
    ramp = np.linspace(0, 65535, SIZE[0])[None] * np.ones((SIZE[1], 1))
    Image.fromarray(ramp.astype(np.uint16)).save(folder / "grey16.png")
    for mode in ("RGBA", "LA"):
        clear = photo().convert(mode)
        clear.putalpha(Image.new("L", SIZE, 20))
        clear.save(folder / f"{mode.lower()}.png")
    photo().quantize(4).save(folder / "p.png", transparency=0)
    frames = [Image.new("RGB", SIZE, "blue")]
    photo().save(folder / "moving.png", save_all=True, append_images=frames)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures") / "set"
    save_pictures(root / "a")
    return root


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "a").iterdir())


def of_images(images: Images, folder: Path) -> Pictures:
    assert len(images) == len(names(folder))
    pixels = [pil_to_tensor(images.read_item(index)[0]) for index in range(len(images))]
    return dict(zip(names(folder), pixels))


def of_stream(stream: Any, folder: Path) -> Pictures:
    samples = list(KeyedStream(stream, pil_to_tensor, 0, ALONE))
    assert len(samples) == len(names(folder))
    return dict(zip(names(folder), (sample["image"] for sample in samples)))


def from_files(folder: Path, _: Path) -> Pictures:
    root, found, _missing = find_images([str(folder)])
    images = Images(ImageFiles(root, found))
    transform, count = (lambda picture: pil_to_tensor(picture.resize(SIZE))), len(images)
    whole = KeyedImages(images, range(count), transform, 0, (3, *SIZE[::-1]), dtype=torch.uint8)
    assert [whole[HELD_OUT, index]["problems"] for index in range(count)] == [""] * count
    return of_images(images, folder)


def from_labels(folder: Path, place: Path) -> Pictures:
    rows = [f"{name},{'cat' if number % 2 else 'dog'}" for number, name in enumerate(names(folder))]
    (place / "labels.csv").write_text("\n".join(["image,labels", *rows]))
    return of_images(open_multi_label(folder / "a", place / "labels.csv"), folder)


def from_tar(folder: Path, place: Path) -> Pictures:
    with tarfile.open(place / "set.tar", "w") as tar:
        for name in names(folder):
            tar.add(folder / "a" / name, f"a/{name}")
    return of_images(Images(open_dataset(place / "set.tar")), folder)


def from_wds(folder: Path, place: Path) -> Pictures:
    pytest.importorskip("webdataset")
    with tarfile.open(place / "shard-0.tar", "w") as tar:
        for number, name in enumerate(names(folder)):
            content = (folder / "a" / name).read_bytes()
            for suffix, data in ((Path(name).suffix, content), (".cls", b"0")):
                entry = tarfile.TarInfo(f"{number:03d}{suffix}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    options = {"root": str(place), "split": "shard-0.tar", "training": False}
    stream = open_dataset("wds/any", num_samples=len(names(folder)), **options)
    assert {picture.mode for picture, _ in stream} == {"RGB"}  # whoever reads it
    return of_stream(stream, folder)


@pytest.mark.filterwarnings(
    "ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"
)
def test_a_stream_reads_the_same_endings(tmp_path: Path) -> None:
    names = ("a.jpg", "b.JPEG", "c.webp", "d.bmp", "e.Tiff")
    (tmp_path / "set" / "a").mkdir(parents=True)
    for name in names:
        photo().save(tmp_path / "set" / "a" / name)
    assert list(from_wds(tmp_path / "set", tmp_path)) == list(names)


def as_table(folder: Path, place: Path) -> str:
    datasets = pytest.importorskip("datasets")
    rows = [{"bytes": (folder / "a" / name).read_bytes(), "path": None} for name in names(folder)]
    table = datasets.Dataset.from_dict({"image": rows, "label": [0] * len(rows)})
    (place / "table").mkdir()
    table.cast_column("image", datasets.Image()).to_parquet(place / "table" / "train.parquet")
    return str(place / "table")


def from_hfds(folder: Path, place: Path) -> Pictures:
    data = open_dataset(f"hfds/{as_table(folder, place)}", root=str(place / "cache"))
    return of_images(Images(data), folder)


def from_hfids(folder: Path, place: Path) -> Pictures:
    data, root = f"hfids/{as_table(folder, place)}", str(place / "cache")
    stream = open_dataset(data, root=root, num_samples=len(names(folder)), training=False)
    return of_stream(stream, folder)


class Opened(Dataset[Any]):
    """What many a data set does: opens the file and leaves the rest to its user."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted((folder / "a").iterdir())

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.open(self.files[index]), 7


class OpenedStream:
    """A reader of timm's kind."""

    def __init__(self, folder: Path) -> None:
        self.pictures = Opened(folder)

    def __iter__(self) -> Iterator[Any]:
        return (self.pictures[index] for index in range(len(self.pictures)))


def from_image_folder(folder: Path, _: Path) -> Pictures:
    given = ImageFolder(str(folder))
    before = given.loader
    pictures = of_images(Images(given), folder)
    assert given.loader is before  # the user's own data set stays as it is
    return pictures


SOURCES: dict[str, Callable[[Path, Path], Pictures]] = {
    "folder": lambda folder, _: of_images(Images(open_dataset(folder / "a")), folder),
    "files": from_files,
    "labels": from_labels,
    "tar": from_tar,
    "wds": from_wds,
    "hfds": from_hfds,
    "hfids": from_hfids,
    "torch": lambda folder, _: of_images(
        Images(open_dataset("torch/folder", root=str(folder))), folder
    ),
    "torchvision": from_image_folder,
    "subset": lambda folder, _: of_images(
        Images(Subset(ImageFolder(str(folder)), range(len(names(folder))))), folder
    ),
    "opened": lambda folder, _: of_images(Images(Opened(folder)), folder),
    "stream": lambda folder, _: of_stream(
        IterableImageDataset(str(folder), reader=OpenedStream(folder)), folder
    ),
}


@pytest.mark.filterwarnings(  # webdataset leaves its shards open
    "ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"
)
@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_same_pixels(source: str, folder: Path, tmp_path: Path) -> None:
    pictures = SOURCES[source](folder, tmp_path)
    for name, found in pictures.items():
        expected = pil_to_tensor(load_image(folder / "a" / name))
        assert torch.equal(found, expected), name


def test_the_pixels_are_those_of_the_picture(folder: Path) -> None:
    read = {name: np.asarray(load_image(folder / "a" / name)).astype(int) for name in names(folder)}
    original = np.asarray(photo()).astype(int)
    assert np.abs(np.rot90(original, -1) - read["turned.jpg"]).max() < 40  # JPEG is lossy
    assert (np.rot90(original, -1) == read["turned_too.png"]).all()
    assert (read["grey16.png"][0, :, 0] == np.linspace(0, 255, SIZE[0]).round()).mean() > 0.9
    for name in ("rgba.png", "la.png"):  # nearly invisible: nearly white
        assert read[name].min() >= 255 - 20
    assert (read["p.png"] == 255).all(axis=-1).any()
    assert (read["moving.png"] == original).all()


@pytest.mark.parametrize("name", ["turned.jpg", "turned_too.png", "grey16.png", "rgba.png"])
def test_a_path_bytes_a_file_and_an_image_are_the_same(folder: Path, name: str) -> None:
    path = folder / "a" / name
    expected = load_image(path).tobytes()
    assert load_image(path.read_bytes()).tobytes() == expected
    with path.open("rb") as file:
        assert load_image(file).tobytes() == expected
        assert not file.closed
    with Image.open(path) as image:
        assert load_image(image).tobytes() == expected
        untouched = image.size, image.mode, image.getexif().get(0x0112)
        assert load_image(image).tobytes() == expected  # the first call left it as it was
        assert untouched == (image.size, image.mode, image.getexif().get(0x0112))
    assert load_image(load_image(path)).tobytes() == expected


def test_arrays() -> None:
    original = np.asarray(photo())
    assert (np.asarray(load_image(original)) == original).all()
    clear = np.dstack([original, np.zeros(original.shape[:2], np.uint8)])
    assert (np.asarray(load_image(clear)) == 255).all()
    grey = original[..., 0]
    for values in (grey, grey[..., None], grey.astype(np.uint16) * 257, grey / 255.0):
        assert (np.asarray(load_image(values)) == grey[..., None]).all()


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (np.zeros((2, 3, 4, 5), np.uint8), "the picture: "),
        (torch.zeros(3, 4, 4), "the picture: expected a PIL image, an array or a file, got Tensor"),
        (b"", "the picture: is not an image in a known format."),
    ],
)
def test_what_is_no_picture(source: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        load_image(source)
    with pytest.raises(ValueError, match="image 0: "):
        Images([(source, 1)]).read_item(0)


def test_damaged_exif_still_turns_once(tmp_path: Path) -> None:
    """PIL turns the picture, then fails to rewrite the block; nobody may turn it again."""
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "maker"
    photo().save(tmp_path / "a.jpg", exif=exif)
    data = (tmp_path / "a.jpg").read_bytes()
    place = data.index(b"Exif\0\0") + 6 + 10  # the first entry: its tag comes first
    assert data[place : place + 2] == b"\x01\x0f"
    damaged = data[: place + 1] + b"\0" + data[place + 2 :]  # text becomes the image's width
    with Image.open(io.BytesIO(damaged)) as image, pytest.raises(struct.error):
        ImageOps.exif_transpose(image)
    once = load_image(damaged)
    assert once.size == SIZE[::-1]
    assert load_image(once).tobytes() == once.tobytes()


def test_a_pipe_is_not_opened(tmp_path: Path) -> None:
    """Opening one waits for ever: it is an unreadable image wherever images are read."""
    folder = make_photos(tmp_path / "set" / "a", 1).parent
    os.mkfifo(folder / "a" / "pipe.png")
    for source in (
        ImageFolder(str(folder)),
        open_dataset(folder),
        ImageFiles(folder, ["a/000.png", "a/pipe.png"]),
    ):
        with pytest.raises(ValueError, match=r"pipe\.png: is not a regular file\.$"):
            Images(source).read_item(1)


def test_folders_archives_and_rank_look_for_the_same_endings(tmp_path: Path) -> None:
    set_img_extensions(IMG_EXTENSIONS)  # what another test left would hide what this one leaves
    folder, before = tmp_path / "set", get_img_extensions()
    for name in ("web", "phone"):
        (folder / name).mkdir(parents=True)
    expected = {f"web/{number}{ending}" for number, ending in enumerate(IMAGE_ENDINGS)}
    expected |= {"phone/a.HEIC.WEBP", "phone/b.TIFF"}
    for name in (*expected, "web/.hidden.webp", "web/notes.txt", "web/webp"):
        (folder / name).touch()
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        tar.add(folder, "set")
    assert set(find_images([str(folder)])[1]) == expected
    for data in (folder, tmp_path / "set.tar"):
        images = open_labelled(data)
        found = {images.name(index).removeprefix("set/") for index in range(len(images))}
        assert found == expected, data
        assert (images.class_names, images.empty) == (("phone", "web"), [])
        assert images.numbers() == [0] * 2 + [1] * len(IMAGE_ENDINGS)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"Found 0 images .*\.webp"):
        open_dataset(tmp_path / "none")
    with ThreadPoolExecutor(2) as threads:
        assert [len(found) for found in threads.map(open_dataset, [folder] * 60)] == [13] * 60
    assert get_img_extensions() == before


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    folder = make_photos(tmp_path / "set", 1)
    (folder / "empty.png").write_bytes(b"")
    images = Images(open_dataset(folder))
    with pytest.raises(ValueError, match=r"^empty\.png: is empty \(0 bytes\)\.$"):
        images.read_item(1)
    blank = KeyedImages(images, [1], pil_to_tensor, 0, (3, 40, 48), dtype=torch.uint8)[HELD_OUT, 0]
    assert (blank["image"].shape, blank["image"].dtype) == ((3, 40, 48), torch.uint8)
    assert blank["problems"] == "empty.png: is empty (0 bytes)."
