"""Images by (epoch, place): the same sample from any worker or process, nothing counted twice."""

import random
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finetune_setup import make_classes, tune
from PIL import Image
from timm.data import IterableImageDataset
from torch.utils.data import DataLoader, Dataset
from train_setup import QUIET, make_photos, run, same_bits, weights

from ltrp_timm.data.images import Images, open_dataset, split_indices
from ltrp_timm.data.keyed import HELD_OUT, KeyedImages, KeyedSampler, held_out_keys, make_loader
from ltrp_timm.runtime.keyed_rng import sample_seed, seeded
from ltrp_timm.runtime.world import World, signals_held
from ltrp_timm.train.folder import read_state
from ltrp_timm.train.loop import Trainer
from ltrp_timm.train.recipe import crop_transforms

# on a machine of one core
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
CPU = torch.device("cpu")
TRAIN, EVAL = crop_transforms((32, 32), (0.5,) * 3, (0.5,) * 3)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photos(tmp_path_factory.mktemp("data") / "photos", 11)


def keyed(data: Any, seed: int = 0, **options: Any) -> KeyedImages:
    images = Images(open_dataset(data), **options)
    return KeyedImages(images, range(len(images)), TRAIN, seed, (3, 32, 32))


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: S311


def test_a_seed_has_its_sample_and_purpose() -> None:
    keys = [(0, 0, 0, "a"), (1, 0, 0, "a"), (0, 1, 0, "a"), (0, 0, 1, "a"), (0, 0, 0, "b")]
    assert len({sample_seed(*key) for key in keys}) == len(keys)
    assert sample_seed(0, 1, 2, "patches") == 5785637314744985454  # for ever: runs are taken up


def test_seeded_lends_the_global_generators() -> None:
    for setter in (random.seed, np.random.seed, torch.manual_seed):
        setter(3)
    untouched = draw()
    for setter in (random.seed, np.random.seed, torch.manual_seed):
        setter(3)
    with seeded(7):
        inside = draw()
    assert draw() == untouched
    with seeded(7):
        assert draw() == inside
    with seeded(8):
        assert all(a != b for a, b in zip(draw(), inside))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_sample_does_not_depend_on_who_reads_it(photos: Path, workers: int) -> None:
    dataset = keyed(photos)
    sampler = KeyedSampler(11, 8, World(0, 1, CPU), 0)
    sampler.set_position(2, 0)
    batches = list(
        make_loader(
            dataset, sampler, batch_size=4, device=CPU, num_workers=workers, persistent=True
        )
    )
    random.seed(99)
    for batch in batches:
        for image, index in zip(batch["image"], batch["index"].tolist()):
            assert torch.equal(image, dataset[2, index]["image"])
            assert not torch.equal(image, dataset[3, index]["image"])
    assert not torch.equal(dataset[2, 0]["image"], keyed(photos, seed=1)[2, 0]["image"])


def test_epochs_show_crops_in_turn() -> None:
    sampler, plain = (KeyedSampler(11, 8, World(0, 1, CPU), 0, crops) for crops in (3, None))
    seen = []
    for epoch in range(7):
        for each in (sampler, plain):
            each.set_position(epoch, 2)
        assert [place for _, place in sampler] == [place for _, place in plain]  # in a new order
        assert {key for key, _ in plain} == {epoch}
        assert {key for key, _ in sampler} == {sampler.crop}
        seen.append(sampler.crop)
    assert seen == [0, 1, 2, 0, 1, 2, 0]
    assert plain.crop is None


def test_processes_share_what_one_would_do() -> None:
    def order(rank: int, size: int, start: int = 0) -> list[tuple[int, int]]:
        sampler = KeyedSampler(23, 24 // size - 4 // size, World(rank, size, CPU), 5)
        sampler.set_position(3, start)
        assert len(sampler) == len(list(sampler))
        return list(sampler)

    one, two = order(0, 1), [order(rank, 2) for rank in (0, 1)]
    for step in range(5):  # batches of 4, and twice 2
        shared = two[0][2 * step : 2 * step + 2] + two[1][2 * step : 2 * step + 2]
        assert sorted(shared) == sorted(one[4 * step : 4 * step + 4])
    assert len(set(one)) == 20
    assert order(0, 1, start=8) == one[8:]
    assert {epoch for epoch, _ in one} == {3}


@pytest.mark.parametrize(("count", "size"), [(5, 2), (1, 3), (6, 2)])
def test_held_out_samples_come_once(count: int, size: int) -> None:
    every = [key for rank in range(size) for key in held_out_keys(count, World(rank, size, CPU))]
    assert sorted(every) == [(HELD_OUT, place) for place in range(count)]


def test_the_split_is_of_the_number_alone() -> None:
    train, held = split_indices(100, 0.05)
    assert len(held) == 5
    assert sorted(train + held) == list(range(100))
    assert (train, held) == split_indices(100, 0.05)
    assert split_indices(10, 0.0)[1] == []
    assert len(split_indices(2, 0.9)[0]) == 1


def test_unreadable_images_are_named_and_skipped(photos: Path, tmp_path: Path) -> None:
    folder = make_photos(tmp_path / "photos", 4)
    (folder / "001.png").write_bytes((folder / "001.png").read_bytes()[:300])
    (folder / "002.png").write_text("text")
    Image.new("RGB", (400, 4)).save(folder / "003.png")
    dataset = keyed(folder, min_side=4)
    sample = dataset[0, 1]  # 1, 2 and 3 are bad: 0 stands in
    assert sample["real"]
    assert [line.split(":")[0] for line in sample["problems"].splitlines()] == [
        "001.png",
        "002.png",
        "003.png",
    ]
    assert "400x4 pixels, over 50 times longer than wide" in sample["problems"]
    with seeded(sample_seed(0, 0, 1, "transform")):
        assert torch.equal(sample["image"], TRAIN(dataset.images.read_item(0)[0]))
    held = dataset[HELD_OUT, 1]
    assert not held["real"]
    assert held["image"].shape == (3, 32, 32)


def test_an_unreadable_image_counts_nowhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, held = make_photos(tmp_path / "train", 8), make_photos(tmp_path / "held", 4)
    (train / "003.png").write_text("text")
    clean = run(train, tmp_path / "a", val_data=held)
    (held / "bad.jpg").write_text("text")
    summary = run(train, tmp_path / "b", val_data=held)
    metrics = {name: value for name, value in summary.metrics.items() if name[:4] == "val_"}
    assert metrics == {name: clean.metrics[name] for name in metrics}
    assert summary.metrics["unreadable"] == 2
    err = capsys.readouterr().err.splitlines()
    assert err.count("ltrp-timm: skipped 003.png: is not an image in a known format.") == 2
    assert err.count("ltrp-timm: skipped bad.jpg: is not an image in a known format.") == 1


@pytest.mark.parametrize("what", ["ranker", "classes", "labels"])
def test_images_that_vanish_stop_the_run(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unmounted disk: the black pictures in their place must not be learned."""
    photos = make_classes(tmp_path / "photos", 8)
    names = sorted(str(path.relative_to(photos)) for path in photos.rglob("*.png"))
    rows = [
        f"{name},{name.split('/')[0]};{'odd' if int(name[-5]) % 2 else 'even'}" for name in names
    ]
    (tmp_path / "labels.csv").write_text("\n".join(["image,labels", *rows]))
    original = Trainer.end_epoch

    def vanish(self: Any) -> None:
        original(self)
        shutil.rmtree(photos, ignore_errors=True)

    monkeypatch.setattr(Trainer, "end_epoch", vanish)
    common: dict[str, Any] = {"epochs": 4, "batch_size": 4, "holdout": 0.0}
    text = r"none of 24 training images can be read; .*No such file or directory; .*checkpoint\.pt"
    if what == "labels":
        common |= {"multi_label": True, "labels": tmp_path / "labels.csv"}
    train = run if what == "ranker" else tune
    with pytest.raises(ValueError, match=text):
        train(photos, tmp_path / "run", **common)
    assert read_state(tmp_path / "run" / "checkpoint.pt")["progress"]["epoch"] == 1


def test_held_out_images_that_vanish_stop_the_run(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = make_photos(tmp_path / "held", 4)
    original = Trainer.evaluate

    def vanish(self: Any) -> Any:
        shutil.rmtree(held)
        return original(self)

    monkeypatch.setattr(Trainer, "evaluate", vanish)
    with pytest.raises(
        ValueError, match=r"none of 4 held-out images can be read; 00[0-3]\.png: No"
    ):
        run(photos, tmp_path / "run", val_data=held)


def test_a_bad_image_may_be_the_only_one_held_out(tmp_path: Path) -> None:
    folder = make_photos(tmp_path / "photos", 10)
    (held,) = split_indices(10, 0.1)[1]
    (folder / f"{held:03d}.png").write_text("text")
    metrics = run(folder, tmp_path / "run", epochs=1, holdout=0.1).metrics
    assert not [name for name in metrics if name.startswith("val_")]


def test_a_run_that_can_read_less_than_half_stops(tmp_path: Path) -> None:
    folder = make_photos(tmp_path / "photos", 10)
    for number in range(4, 9):
        (folder / f"{number:03d}.png").write_text("text")
    assert len(run(folder, tmp_path / "half", epochs=1, holdout=0.0).unreadable) == 5
    (folder / "000.png").write_text("text")
    with pytest.raises(
        ValueError, match=r"more than 50% of 10 images cannot be read; 00.*not an image"
    ):
        run(folder, tmp_path / "less", epochs=2, holdout=0.0)


def test_nobody_searches_twice_where_no_image_is_left(tmp_path: Path) -> None:
    folder = make_photos(tmp_path / "photos", 6)
    dataset, tried = keyed(folder), []
    shutil.rmtree(folder)
    read = dataset.images.read_item
    dataset.images.read_item = lambda index: (tried.append(index), read(index))[1]  # type: ignore
    for place, count in ((2, 6), (3, 7), (4, 8)):
        sample = dataset[0, place]
        assert not sample["real"]
        assert sample["problems"] == f"{place:03d}.png: No such file or directory."
        assert len(tried) == count
    make_photos(folder, 6)
    assert dataset[0, 2]["real"]


def tarred(photos: Path, file: Path) -> Path:
    with tarfile.open(file, "w") as tar:
        for photo in sorted(photos.iterdir()):
            tar.add(photo, photo.name)
    return file


class Pictures(Dataset[Any]):
    """A dataset of somebody's own."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.iterdir())

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.open(self.files[index]), 7


def test_folders_tars_and_datasets_are_the_same_images(photos: Path, tmp_path: Path) -> None:
    classes = tmp_path / "classes"
    for number, photo in enumerate(sorted(photos.iterdir())):
        part = classes / f"class{number // 6}"
        part.mkdir(parents=True, exist_ok=True)
        (part / photo.name).write_bytes(photo.read_bytes())
    sources = [photos, classes, tarred(photos, tmp_path / "photos.tar"), Pictures(photos)]
    for number, source in enumerate(sources):
        run(source, tmp_path / str(number), epochs=1)
    for number in range(1, len(sources)):
        assert same_bits(weights(tmp_path / "0"), weights(tmp_path / str(number)))


def test_a_tar_that_was_read_before_serves_workers(photos: Path, tmp_path: Path) -> None:
    tar = tarred(photos, tmp_path / "photos.tar")
    dataset = keyed(tar)
    expected = [dataset[0, place]["image"] for place in range(11)]  # opened here
    sampler = held_out_keys(11, World(0, 1, CPU))
    loader = DataLoader(dataset, sampler=[(0, place) for _, place in sampler], num_workers=2)
    for sample, image in zip(loader, expected):
        assert torch.equal(sample["image"][0], image)


class Reader:
    """A stream, as timm's readers are: each process and worker has its share."""

    def __init__(self, folder: Path) -> None:
        self.files, self.epochs = sorted(folder.iterdir()), []

    def __iter__(self) -> Iterator[Any]:
        for file in self.files:
            yield Image.open(file), 0

    def __len__(self) -> int:
        return len(self.files)

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)


def stream(folder: Path) -> IterableImageDataset:
    return IterableImageDataset(str(folder), reader=Reader(folder))


def test_a_stream_trains_and_resumes_at_an_epoch(photos: Path, tmp_path: Path) -> None:
    data = stream(photos)
    whole = run(data, tmp_path / "whole", epochs=3, val_data=photos, val_split="none")
    assert data.reader.epochs == [0, 1, 2]
    assert whole.steps == 3 * 2
    from ltrp_timm.train import loop

    class StopError(Exception):
        pass

    def stop_in_epoch_1(self: Any, *args: Any) -> Any:
        if self.progress.step == 3:
            raise StopError
        return original(self, *args)

    original = loop.Trainer.train_update
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Trainer, "train_update", stop_in_epoch_1)
        with pytest.raises(StopError):
            run(stream(photos), tmp_path / "cut", epochs=3, checkpoint_steps=1)
    run(stream(photos), tmp_path / "cut", epochs=3, resume="auto")
    assert same_bits(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_a_stream_without_images_or_length(photos: Path, tmp_path: Path) -> None:
    data = stream(photos)
    data.reader.files = data.reader.files[:0]
    with pytest.raises(ValueError, match="a stream of unknown length needs num_samples"):
        run(data, tmp_path / "run")
    with pytest.raises(ValueError, match="the stream gave no batch"):
        run(data, tmp_path / "run", num_samples=8)
    with pytest.raises(ValueError, match="need val_data, or plot=False"):
        run(stream(photos), tmp_path / "other", plot=True)
    with pytest.raises(ValueError, match="val_data must not be a stream"):
        run(photos, tmp_path / "other", val_data=stream(photos))


@pytest.mark.parametrize("name", ["hfds/folder", "wds/shards"])
def test_a_reader_whose_package_is_missing(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delitem(sys.modules, "timm.data.readers.reader_hfds", raising=False)  # or imported
    monkeypatch.setattr("timm.data.readers.reader_wds.wds", None)
    error = ImportError if name.startswith("hfds") else ValueError
    with pytest.raises(error, match=r"pip install|Please install webdataset"):
        run(name, tmp_path / "run", data_root=str(photos), **QUIET)
    assert not (tmp_path / "run").exists()


def test_crops_take_the_share_of_a_picture_that_they_are_told() -> None:
    """A picture whose red is its column: the range of red is the width of the crop."""
    columns = np.linspace(0, 255, 64).astype(np.uint8)
    pixels = np.stack([np.tile(columns, (64, 1)), *[np.zeros((64, 64), np.uint8)] * 2], axis=-1)
    picture = Image.fromarray(pixels)
    shares = {}
    for scale in ((0.04, 0.06), (1.0, 1.0)):
        transform, _ = crop_transforms((32, 32), (0.0,) * 3, (1.0,) * 3, scale)
        reds = [transform(picture)[0] for _ in range(20)]
        shares[scale] = [float(red.max() - red.min()) for red in reds]
    assert max(shares[0.04, 0.06]) < 0.4
    assert min(shares[1.0, 1.0]) > 0.7  # crops are not all square: the width may be cut a little


def test_who_starts_meanwhile_holds_signals_back() -> None:
    with signals_held():
        process = subprocess.Popen(["sleep", "60"])
    try:
        process.terminate()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
    finally:
        process.kill()
        process.wait()


class Masks(Dataset[Any]):
    """Which signals a worker holds back once it works."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, key: Any) -> list[int]:
        return sorted(signal.pthread_sigmask(signal.SIG_BLOCK, []))


def test_nothing_is_held_back_for_good() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    loader = make_loader(Masks(), None, batch_size=1, num_workers=1, device=CPU)  # type: ignore
    assert list(loader) == [[]]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
