"""Images with several classes: their targets, losses, and the mAP over a whole set."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import average_precision_score
from test_label_files import coco, table
from torch import Tensor
from torch.nn import functional as F
from train_setup import make_photos

from ltrp_timm.data.keyed import Batch, KeyedImages, held_out_keys, make_loader
from ltrp_timm.data.multi_label import open_multi_label
from ltrp_timm.losses import multi_label_loss
from ltrp_timm.measure.accuracy import PrecisionCounter, seen_classes
from ltrp_timm.runtime.world import World
from ltrp_timm.train.recipe import crop_transforms

CPU = torch.device("cpu")
_, EVAL = crop_transforms((32, 32), (0.5,) * 3, (0.5,) * 3)
TEXT = "image,labels\n000.png,dog;cat\n001.png,owl\n002.png,\n"


def photos(folder: Path, count: int = 4) -> Path:
    return make_photos(folder / "photos", count)


def test_the_file_gives_the_targets(tmp_path: Path) -> None:
    images = open_multi_label(photos(tmp_path), table(tmp_path, TEXT))
    assert images.class_names == ("cat", "dog", "owl")
    assert len(images) == 3  # the fourth photo is not named
    assert images.unlabelled == 1
    picture, target = images.read_item(0)
    assert picture.size == (48, 40)
    assert target.tolist() == [1.0, 1.0, 0.0]
    assert images.name(1) == "001.png"


def test_the_classes_of_a_model(tmp_path: Path) -> None:
    images = open_multi_label(photos(tmp_path), table(tmp_path, TEXT))
    assert images.match(3) == "in natural order"
    assert images.match(4, {"0": "owl", "1": "eel", "2": "dog", "3": "cat"}) == "by name"
    assert images.class_names == ("owl", "eel", "dog", "cat")
    assert images.targets.int().tolist() == [[0, 0, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert images.blank.tolist() == [0.0] * 4
    other = open_multi_label(tmp_path / "photos", table(tmp_path, TEXT))
    with pytest.raises(ValueError, match="1 of 3 classes are not among the model's 3: owl;"):
        other.match(3, ["cat", "dog", "eel"])
    with pytest.raises(ValueError, match=r"there are 3 classes .* but the model has 5"):
        other.match(5)


def test_what_is_not_there(tmp_path: Path) -> None:
    folder = photos(tmp_path)
    (folder / "001.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 3 labelled images are not in .*: 001\.png"):
        open_multi_label(folder, table(tmp_path, TEXT))
    images = open_multi_label(folder, table(tmp_path, TEXT), allow_empty=True, skip_absent=True)
    assert (images.absent, images.empty, images.unlabelled) == (1, ["owl"], 1)
    assert [images.read_item(index)[1].tolist() for index in range(2)] == [[1, 1, 0], [0, 0, 0]]
    assert images.name(1) == "002.png"
    with pytest.raises(ValueError, match=r"1 class has no image in .*: owl"):
        open_multi_label(folder, table(tmp_path, TEXT), skip_absent=True)
    none = table(tmp_path, "image,labels\nnone.png,cat\n")
    with pytest.raises(ValueError, match=r"1 of 1 labelled images are not in .*none\.png\.$"):
        open_multi_label(folder, none, allow_empty=True, skip_absent=True)
    with pytest.raises(FileNotFoundError, match="none is not a folder"):
        open_multi_label(tmp_path / "none", table(tmp_path, TEXT))
    for name in ("a", "sub/b", "c"):
        (folder / f"{name}.png").parent.mkdir(exist_ok=True)
        (folder / f"{name}.png").write_bytes((folder / "000.png").read_bytes())
    with pytest.raises(ValueError, match=r"1 class has no image in .*json: fire hydrant"):
        open_multi_label(folder, coco(tmp_path))
    assert open_multi_label(folder, coco(tmp_path), allow_empty=True).empty == ["fire hydrant"]


def test_a_bad_image_is_named_and_counts_nowhere(tmp_path: Path) -> None:
    folder = photos(tmp_path)
    (folder / "001.png").write_text("text")
    images = open_multi_label(folder, table(tmp_path, TEXT))
    keyed = KeyedImages(images, range(3), EVAL, 0, (3, 32, 32))
    loader = make_loader(keyed, held_out_keys(3, World(0, 1, CPU)), batch_size=2, device=CPU)
    batches = [Batch(sample, 0, -1, CPU) for sample in loader]
    assert [problem for batch in batches for problem in batch.problems] == [
        "001.png: is not an image in a known format."
    ]
    counter = PrecisionCounter(images.class_names)
    for batch in batches:
        assert batch.targets is not None
        assert batch.targets.shape == (len(batch), 3)
        counter.add(torch.zeros(len(batch), 3), batch.targets, batch.indices, batch.real)
    total = counter.total()
    assert (total.images, total.absent) == (2, ("owl",))


def test_the_labels_belong_to_the_fingerprint(tmp_path: Path) -> None:
    folder = photos(tmp_path)
    prints = []
    for text in (TEXT, TEXT, TEXT.replace("owl", "owl;dog"), TEXT.replace("owl", "eel")):
        images = open_multi_label(folder, table(tmp_path, text))
        prints.append(images.fingerprint(range(3)))
    assert prints[0] == prints[1]
    assert len({str(found) for found in prints}) == 3


def test_losses_by_hand() -> None:
    logits, targets = torch.randn(4, 6), (torch.rand(4, 6) < 0.4).float()
    p = logits.sigmoid()
    q = (1 - p + 0.05).clamp(max=1)  # of negatives, shifted by the clip
    each = -(targets * p.log() + (1 - targets) * (1 - q) ** 4 * q.log())
    found = multi_label_loss("asymmetric")(logits, targets)
    assert found.item() == pytest.approx(each.sum().item() / 4, rel=1e-5)
    bce = F.binary_cross_entropy(p, targets)
    assert multi_label_loss("bce")(logits.half(), targets) == pytest.approx(bce.item(), rel=1e-3)
    easy = torch.full((1, 1), -3.2)  # a negative below the clip costs nothing
    assert multi_label_loss("asymmetric")(easy, torch.zeros(1, 1)).item() == 0.0
    with pytest.raises(ValueError, match="loss must be one of asymmetric, bce, got 'focal'"):
        multi_label_loss("focal")


def judged(logits: Tensor, targets: Tensor, columns: list[int]) -> float:
    values = [average_precision_score(targets[:, c], logits[:, c]) for c in columns]
    return sum(values) / len(values)


NAMES = ("ant", "bee", "cat", "dog", "eel")


def whole_set() -> tuple[Tensor, Tensor]:
    targets = (torch.rand(50, 5) < 0.3).float()
    targets[:, 1] = 0  # absent
    return torch.randn(50, 5), targets


def test_the_whole_set_counts_and_padding_does_not() -> None:
    logits, targets = whole_set()
    counter = PrecisionCounter(NAMES, seen=["dog", "ant"])
    for start in range(0, 50, 8):
        part = slice(start, start + 8)
        counter.add(logits[part], targets[part], range(50)[part])
    counter.add(logits[:4], targets[:4], range(4))  # as a sampler pads
    bad = torch.tensor([False, False])
    counter.add(torch.full((2, 5), float("nan")), torch.ones(2, 5), [50, 51], bad)
    total = counter.total()
    assert (total.images, total.absent) == (50, ("bee",))
    columns = {"map": [0, 2, 3, 4], "map_seen": [0, 3], "map_unseen": [2, 4]}
    expected = {name: judged(logits, targets, some) for name, some in columns.items()}
    assert total.means == pytest.approx(expected, abs=1e-12)
    assert list(total.means) == list(columns)
    assert list(total.per_class) == ["ant", "cat", "dog", "eel"]
    doubled = judged(
        torch.cat([logits, logits[:4]]), torch.cat([targets, targets[:4]]), [0, 2, 3, 4]
    )
    assert abs(doubled - total.means["map"]) > 1e-4  # padding would have shown


def test_means_that_are_not_there() -> None:
    logits, targets = whole_set()
    counter = PrecisionCounter(NAMES, seen=["bee"])
    counter.add(logits, targets, range(50))
    assert list(counter.total().means) == ["map", "map_unseen"]
    plain = PrecisionCounter(NAMES)
    plain.add(logits, targets, range(50))
    assert list(plain.total().means) == ["map"]
    nothing = PrecisionCounter(NAMES)
    nothing.add(logits, torch.zeros(50, 5), range(50))
    assert nothing.total().means == {}
    assert nothing.total().absent == NAMES
    with pytest.raises(ValueError, match="no readable image"):
        PrecisionCounter(NAMES).total()
    broken = PrecisionCounter(NAMES)
    broken.add(logits * float("nan"), targets, range(50))
    with pytest.raises(ValueError, match="NaN logits"):
        broken.total()


def test_seen_classes(tmp_path: Path) -> None:
    path = tmp_path / "seen.txt"
    path.write_text("dog\ncat\n")
    assert seen_classes(path, NAMES) == ("dog", "cat")
    assert seen_classes(None, NAMES) is None
    path.write_text("dog\nyak\n")
    with pytest.raises(ValueError, match=r"seen\.txt: 1 seen classes are not classes: yak"):
        seen_classes(path, NAMES)
    path.write_text("\n".join(NAMES))
    with pytest.raises(ValueError, match="all 5 classes are seen"):
        seen_classes(path, NAMES)


_TWO = """
import sys, torch
from ltrp_timm.measure.accuracy import PrecisionCounter
from ltrp_timm.runtime.world import join_world
logits, targets = torch.load(sys.argv[1], weights_only=True)
with join_world("cpu") as world:
    counter = PrecisionCounter(list("abcde"), seen=["a", "c"])
    mine = list(range(50))[world.rank :: world.size]
    if world.rank == 0:
        mine = mine[:3] + mine + [1]  # some twice, one of the other's, and 50 in all
    counter.add(logits[mine], targets[mine], mine)
    if sys.argv[2] == "empty" and world.rank == 1:
        counter = PrecisionCounter(list("abcde"), seen=["a", "c"])
    total = counter.total(world)
    means = total.means
    sys.stdout.write(f"{total.images} {means['map']:.15f} {means['map_unseen']:.15f}\\n")
"""


@pytest.mark.slow
@pytest.mark.parametrize("case", ["empty", "both"])
def test_two_processes(case: str, tmp_path: Path) -> None:
    logits, targets = whole_set()
    torch.save((logits, targets), tmp_path / "set.pt")
    script = tmp_path / "two.py"
    script.write_text(_TWO)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(
        [sys.executable, *launcher, str(tmp_path / "set.pt"), case],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    if case == "empty":  # one process without any image of its own
        keep = [*range(0, 50, 2), 1]
        logits, targets = logits[keep], targets[keep]
    expected: list[Any] = [len(logits), judged(logits, targets, [0, 2, 3, 4])]
    for line in done.stdout.split("\n")[:2]:
        count, mean, unseen = line.split()
        assert [int(count), float(mean)] == pytest.approx(expected, abs=1e-12)
        assert float(unseen) == pytest.approx(judged(logits, targets, [3, 4]), abs=1e-12)
