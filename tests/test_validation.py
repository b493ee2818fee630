"""Accuracy over whole sets, against counting by hand and timm's own; classes against folders."""

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo
from timm.utils import accuracy
from torch.utils.data import TensorDataset
from train_setup import make_photos

from ltrp_timm.data.images import open_dataset
from ltrp_timm.data.keyed import Batch, KeyedImages, KeyedStream, held_out_keys, make_loader
from ltrp_timm.data.labels import LabelledImages, match_classes, open_class_data, open_labelled
from ltrp_timm.measure.accuracy import AccuracyCounter, class_ranks, measure_all
from ltrp_timm.runtime.world import World
from ltrp_timm.train.recipe import crop_transforms

CPU = torch.device("cpu")
_, EVAL = crop_transforms((32, 32), (0.5,) * 3, (0.5,) * 3)
WORDNET = ImageNetInfo("imagenet-1k").label_names()


def make_classes(folder: Path, **counts: int) -> Path:
    for name, count in counts.items():
        make_photos(folder / name, count)
    return folder


def batches(images: LabelledImages, size: int, world: World | None = None) -> list[Batch]:
    world = world or World(0, 1, CPU)
    keyed = KeyedImages(images, range(len(images)), EVAL, 0, (3, 32, 32))
    loader = make_loader(keyed, held_out_keys(len(images), world), batch_size=size, device=CPU)
    return [Batch(sample, 0, -1, CPU) for sample in loader]


class TwoProcesses(World):
    """Adds what the other process has counted."""

    def __init__(self, other: AccuracyCounter) -> None:
        super().__init__(0, 2, CPU)
        self.other = other

    def gather(self, values: Any) -> list[Any]:
        return [*values, *self.other.parts]


def test_ranks_are_those_of_timm_and_of_counting() -> None:
    logits, targets = torch.randn(64, 12), torch.randint(12, (64,))
    counter = AccuracyCounter()
    for i in range(0, 64, 7):
        counter.add(logits[i : i + 7], targets[i : i + 7], range(64)[i : i + 7])
    order = logits.argsort(1, descending=True)
    numbers, right, best, ranks = counter.rows()
    assert numbers.tolist() == list(range(64))
    assert right.equal(targets)
    assert best.equal(order[:, 0])
    assert ranks.tolist() == [order[i].tolist().index(int(targets[i])) for i in range(64)]
    top1, top5 = accuracy(logits, targets, topk=(1, 5))
    assert counter.total().percent() == pytest.approx({"top1": float(top1), "top5": float(top5)})
    assert 0 < top1 < top5 < 100


def test_equal_and_broken_logits_are_no_gift() -> None:
    targets = torch.tensor([0, 1, 2])
    assert class_ranks(torch.zeros(3, 3), targets).tolist() == [0, 1, 2]
    nan = float("nan")
    assert class_ranks(torch.full((3, 3), nan), targets).tolist() == [3, 3, 3]
    assert class_ranks(torch.tensor([[nan, 1.0, 0.0]]), torch.tensor([1])).tolist() == [0]


def test_padding_counts_nowhere_and_processes_are_summed() -> None:
    logits, targets = torch.eye(4), torch.tensor([0, 1, 0, 3])
    counter, other = AccuracyCounter(), AccuracyCounter()
    counter.add(logits, targets, range(4), torch.tensor([True, True, True, False]))
    other.add(logits[2:], targets[2:], [2, 4])  # the first is there already, as a sampler pads
    alone = counter.total()
    assert (alone.means["top1"], alone.images) == (2 / 3, 3)
    assert counter.total(TwoProcesses(other)).means["top1"] == 3 / 4
    with pytest.raises(ValueError, match="no readable image"):
        AccuracyCounter().total()


def test_classes_that_are_not_in_the_set_do_not_compete() -> None:
    logits, targets = torch.tensor([[9.0, 1.0, 2.0]]), torch.tensor([2])
    every, some = AccuracyCounter(), AccuracyCounter([1, 2])
    for counter, (predicted, rank) in ((every, (0, 1)), (some, (2, 0))):
        counter.add(logits, targets, [0])
        assert [int(column) for column in counter.rows()] == [0, 2, predicted, rank]


def test_labels_out_of_range_are_said() -> None:
    with pytest.raises(ValueError, match="a label is 7, but the model has 3 classes"):
        class_ranks(torch.zeros(2, 3), torch.tensor([1, 7]))


def test_the_folder_gives_the_labels_each_image_once(tmp_path: Path) -> None:
    folder = make_classes(tmp_path / "set", cat=3, dog=2, owl=1)
    (folder / "dog" / "bad.png").write_text("text")
    images = open_labelled(folder)
    assert images.class_names == ("cat", "dog", "owl")
    found = batches(images, 2)
    targets = torch.cat([b.targets for b in found if b.targets is not None])
    real = torch.cat([b.real for b in found])
    assert targets[real].tolist() == [0, 0, 0, 1, 1, 2]
    assert targets[~real].tolist() == [-1]

    def accuracy_of_cat(found: list[Batch], world: World) -> Any:
        always_cat = torch.tensor([[1.0, 0.0, 0.0]])
        calls, counters = {1.0: lambda b: always_cat.expand(len(b), -1)}, {1.0: AccuracyCounter()}
        return measure_all(calls, found, world, counters)[1.0].accuracy

    one = accuracy_of_cat(found, World(0, 1, CPU))
    assert (one.means, one.images) == ({"top1": 3 / 6, "top5": 1.0}, 6)
    second = AccuracyCounter()
    for batch in batches(images, 2, World(1, 2, CPU)):
        assert batch.targets is not None
        logits = torch.eye(3)[:1].expand(len(batch), -1)
        second.add(logits, batch.targets, batch.indices, batch.real)
    half = batches(images, 2, World(0, 2, CPU))
    both = accuracy_of_cat(half, TwoProcesses(second))
    assert both == one


def test_a_training_image_that_stands_in_brings_its_own_label(tmp_path: Path) -> None:
    folder = make_classes(tmp_path / "set", cat=1, dog=1)
    (folder / "cat" / "000.png").write_text("text")
    keyed = KeyedImages(open_labelled(folder), range(2), EVAL, 0, (3, 32, 32))
    assert keyed[0, 0]["target"] == 1
    assert keyed[0, 0]["real"]


def test_a_stream_has_labels_if_asked() -> None:
    stream = [(Image.new("RGB", (40, 40)), 5)]
    (plain,) = KeyedStream(stream, EVAL, 0, World(0, 1, CPU))
    (labelled,) = KeyedStream(stream, EVAL, 0, World(0, 1, CPU), labelled=True)
    assert "target" not in plain
    assert labelled["target"] == 5


def test_an_archive_and_a_torch_dataset_have_labels_too(tmp_path: Path) -> None:
    folder = make_classes(tmp_path / "set", cat=1, dog=2)
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        tar.add(folder, arcname=".")
    images = open_labelled(tmp_path / "set.tar")
    assert images.class_names == ("cat", "dog")
    assert [images.read_item(i)[1] for i in range(3)] == [0, 1, 1]
    pairs = [(Image.new("RGB", (40, 40)), 3), (Image.new("RGB", (40, 40)), 0)]
    given = open_labelled(pairs)
    assert [given.read_item(i)[1] for i in range(2)] == [3, 0]
    assert given.match(10) == "numbers of the data set"
    unlabelled = open_labelled(TensorDataset(torch.zeros(2, 3, 4, 4)))
    with pytest.raises(ValueError, match="image 0"):
        unlabelled.read_item(0)


def test_folders_that_are_no_classes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no folder for each class"):
        open_labelled(make_photos(tmp_path / "flat", 2))
    mixed = make_classes(make_photos(tmp_path / "mixed", 1), cat=1)
    with pytest.raises(ValueError, match="has images outside of its class folders"):
        open_labelled(mixed)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        open_labelled(tmp_path / "nowhere")


def test_empty_classes_are_named_and_keep_their_number(tmp_path: Path) -> None:
    folder = make_classes(tmp_path / "set", ant=1, cat=1)
    for name in ("bee", "dog", ".hidden"):
        (folder / name).mkdir()
    (folder / "bee" / "notes.txt").write_text("text")
    with pytest.raises(ValueError, match=r"2 classes have no image in .*: bee, dog"):
        open_labelled(folder)
    images = open_labelled(folder, allow_empty=True)
    assert images.empty == ["bee", "dog"]
    assert images.match(4) == "in natural order"
    assert [images.read_item(i)[1] for i in range(2)] == [0, 2]
    assert images.present == (0, 1, 2, 3)


def test_wordnet_folders_find_their_classes(tmp_path: Path) -> None:
    names = [WORDNET[7], WORDNET[999], WORDNET[400]]  # as ImageNet-R's: some of the thousand
    images = open_labelled(make_classes(tmp_path / "set", **dict.fromkeys(names, 1)))
    assert images.match(1000) == "by WordNet id"
    assert images.present == (7, 400, 999)
    assert sorted(images.read_item(i)[1] for i in range(3)) == [7, 400, 999]
    with pytest.raises(ValueError, match=r"there are 3 classes .* the model has 10"):
        images.match(10)
    images.match(3, [WORDNET[400], WORDNET[999], WORDNET[7]])
    assert sorted(images.read_item(i)[1] for i in range(3)) == [0, 1, 2]


def test_numbered_folders_are_class_numbers() -> None:
    every = sorted((str(i) for i in range(1000)), key=int)
    assert match_classes(every, 1000) == (list(range(1000)), "by number")
    assert match_classes(["7", "12", "100"], 1000) == ([7, 12, 100], "by number")
    assert match_classes(["7", "12"], 1000, WORDNET) == ([7, 12], "by number")
    assert match_classes(["1", "2"], 2) == ([0, 1], "in natural order")
    assert match_classes(["0", "2"], 3) == ([0, 2], "by number")
    with pytest.raises(
        ValueError, match=r"\(1, 2\) may be numbered from 0 or from 1; list the names"
    ):
        match_classes(["1", "2"], 3)
    assert match_classes(["1", "2"], 3, ["1", "2", "3"]) == ([0, 1], "by name")


def test_the_order_of_classes_is_said() -> None:
    assert match_classes(["a", "b"], 2)[1] == "in natural order"
    text = "in natural order (a, B, b2, b10), not in torchvision's (B, a, b10, b2)"
    assert match_classes(["a", "B", "b2", "b10"], 4) == ([0, 1, 2, 3], text)
    given = match_classes(["B", "a", "b10", "b2"], 4)  # as torchvision numbers its folders
    assert given == ([0, 1, 2, 3], "in the order of the data set (B, a, b10, b2)")


@pytest.mark.parametrize("archive", [False, True])
def test_hidden_and_system_folders_are_no_classes(tmp_path: Path, archive: bool) -> None:
    folder = make_classes(tmp_path / ".set", cat=2, dog=1)
    junk = {
        "@eaDir": 1,
        ".ipynb_checkpoints": 1,
        "cat/@eaDir": 1,
        "dog/.thumbs": 1,
        "__MACOSX/cat": 1,
    }
    make_classes(folder, **junk)
    (folder / "dog" / "._000.png").write_bytes(b"\0\5\x16\7")
    (folder / "#recycle").mkdir()
    data = folder
    if archive:
        data = tmp_path / "set.tar"
        with tarfile.open(data, "w") as tar:
            tar.add(folder, arcname=".")
    images = open_labelled(data)
    assert images.class_names == ("cat", "dog")
    assert [images.read_item(index)[1] for index in range(len(images))] == [0, 0, 1]
    assert images.numbers() == [0, 0, 1]
    assert len(open_dataset(data)) == 3


@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.parametrize(
    ("classes", "text"),
    [
        (
            {"seg_train/cat": 1, "seg_train/dog": 1, "seg_test/cat": 1},
            "has the class cat at two places, seg_test/cat and seg_train/cat; give a folder",
        ),
        ({"cat": 1, "dog": 1, "dog/puppy": 1}, "different depths, such as in cat and dog/puppy"),
        ({"animals/cat": 1, "car": 1}, "different depths, such as in car and animals/cat"),
    ],
)
def test_a_class_is_one_folder_at_the_depth_of_all(
    archive: bool, classes: dict[str, int], text: str, tmp_path: Path
) -> None:
    data = make_classes(tmp_path / "set", **classes)
    if archive:
        data = tmp_path / "set.tar"
        with tarfile.open(data, "w") as tar:
            tar.add(tmp_path / "set", arcname=".")
    with pytest.raises(ValueError, match=text):
        open_labelled(data)


def test_a_folder_within_a_class_is_no_empty_class(tmp_path: Path) -> None:
    folder = make_classes(tmp_path / "set", ant=1, cat=1)
    (folder / "ant" / "drafts").mkdir()
    (folder / "bee" / "drafts").mkdir(parents=True)
    images = open_labelled(folder, allow_empty=True)
    assert (images.class_names, images.empty) == (("ant", "bee", "cat"), ["bee"])


@pytest.mark.parametrize("names", [("training", "validation"), ("Train", "VAL"), ("train", "Eval")])
def test_splits_by_their_usual_names(names: tuple[str, str], tmp_path: Path) -> None:
    train, held = names
    folder = make_classes(tmp_path / "set", **{f"{train}/a": 2, f"{train}/b": 1, f"{held}/a": 1})
    make_classes(folder / held, b=3)
    data = open_class_data(folder)
    assert (len(data.train), len(data.held_out)) == (3, 4)
    assert data.notes == [f"held-out images are those of {folder} itself"]
    assert len(open_labelled(folder, split="valid")) == 4
    (folder / train).rename(folder / "TRAIN")
    (folder / "Training").mkdir()
    with pytest.raises(ValueError, match="has TRAIN and Training: name the one to use as split"):
        open_class_data(folder)
    assert len(open_class_data(folder, split="TRAIN").train) == 3


def test_recorded_names_decide() -> None:
    assert match_classes(["cat", "dog"], 3, ["dog", "owl", "cat"]) == ([2, 0], "by name")
    assert match_classes(["cat"], 2, {"1": "cat", "0": "dog"}) == ([1], "by name")
    with pytest.raises(ValueError, match="1 of 2 classes are not among the model's 2: eel; the"):
        match_classes(["cat", "eel"], 2, ["cat", "dog"])
    with pytest.raises(ValueError, match="2 of 2 classes are not among"):
        match_classes(["0", "1"], 2, ["cat", "dog"])
    with pytest.raises(ValueError, match="has 3 classes, but names 2"):
        match_classes(["cat"], 3, ["cat", "dog"])
    with pytest.raises(ValueError, match=r"there are 2 classes \(a, b\), but the model has 3"):
        match_classes(["a", "b"], 3)
    with pytest.raises(ValueError, match="1 of 2 classes are not among the model's 1000: old"):
        match_classes([WORDNET[0], "old"], 1000)


class Table:
    """A reader as timm's of Hugging Face's datasets: images without names, labels by a key."""

    label_key = "label"

    def __init__(self, labels: list[Any]) -> None:
        self.labels, self.class_to_idx = labels, {"cat": 0, "dog": 1}

    def __getitem__(self, index: int) -> Any:
        file = io.BytesIO()
        Image.new("RGB", (40, 40)).save(file, "PNG")
        return io.BytesIO(file.getvalue()[: 40 if index == 1 else None]), self.labels[index]


class TableData:
    def __init__(self, labels: list[Any]) -> None:
        self.reader = Table(labels)

    def __len__(self) -> int:
        return len(self.reader.labels)

    def filename(self, index: int) -> None:
        return None


def test_images_of_a_table_go_by_their_number() -> None:
    images = open_labelled(TableData([1, 0, 0]))
    assert images.class_names == ("cat", "dog")
    assert images.read_item(0)[1] == 1
    assert [images.name(index) for index in (0, 2)] == ["image 0", "image 2"]
    with pytest.raises(ValueError, match="image 1: "):
        images.read_item(1)
    with pytest.raises(ValueError, match="the data has no class numbers in 'label': "):
        open_labelled(TableData(["cat"]))
