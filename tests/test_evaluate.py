"""``ltrp-timm evaluate``: accuracy as counted by hand, times of whole batches alone."""

import csv
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image
from processes import run_two
from timm.data import ImageNetInfo, create_transform
from timm.utils import accuracy
from torch import Tensor
from train_setup import make_photos

from ltrp_timm import AdaptiveBudget, create_ranker, drop_patches, save_pretrained
from ltrp_timm.commands import main
from ltrp_timm.commands._console import check_folder
from ltrp_timm.commands.evaluate import Case
from ltrp_timm.data.keyed import Batch
from ltrp_timm.measure import accuracy as measure
from ltrp_timm.measure.accuracy import MIN_ROUNDS, AccuracyCounter, measure_all
from ltrp_timm.models.ltrp import LTRPModel
from ltrp_timm.rankers import DEFAULT_RANKER
from ltrp_timm.runtime.world import World

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
COUNTS = {"cat": 5, "dog": 4, "owl": 2}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labelled set with one file that is no image, and a small saved model of three classes."""
    root = tmp_path_factory.mktemp("evaluate")
    for name, count in COUNTS.items():
        make_photos(root / "set" / "val" / name, count)
    (root / "set" / "val" / "dog" / "bad.png").write_text("text")
    torch.manual_seed(0)
    model = timm.create_model(
        "ltrp", backbone="vit_tiny_patch16_224", img_size=64, depth=2, num_classes=3
    )
    torch.nn.init.normal_(model.backbone.head.weight)
    save_pretrained(model, root / "model")
    return root


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("set", "model"):
        (tmp_path / name).symlink_to(made / name)
    return tmp_path


def evaluate(*more: str, data: str = "set", model: str = "local-dir:model") -> int:
    command = ["evaluate", model, "--data", data, "--batch-size", "4", "--device", "cpu"]
    return main([*command, "--threads", "1", *more])


def read(path: str) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def load() -> LTRPModel:
    model: LTRPModel = timm.create_model("local-dir:model", pretrained=True).eval()
    return model


def batch_of(model: Any) -> tuple[Tensor, Tensor]:
    """All readable images as timm prepares them for the model, and their labels."""
    transform = create_transform(**model.data_config(), is_training=False)
    pairs = [
        (transform(Image.open(path).convert("RGB")), label)
        for label, name in enumerate(COUNTS)
        for path in sorted(Path("set/val", name).glob("0*.png"))
    ]
    return torch.stack([x for x, _ in pairs]), torch.tensor([y for _, y in pairs])


def by_hand(model: Any, ratios: list[float]) -> dict[float, tuple[float, float]]:
    """Top-1 and top-5 in percent as timm's own function has them, over one batch of all."""
    images, labels = batch_of(model)
    out = {}
    with torch.inference_mode():
        for ratio in ratios:
            model.keep_ratio = ratio
            top1, top5 = accuracy(model(images), labels, topk=(1, 5))
            out[ratio] = (float(top1), float(top5))
    return out


def test_accuracy_is_that_of_the_whole_set(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("-o", "out", "--per-image", "--plot") == 2  # bad.png
    out, err = capsys.readouterr()
    assert err.strip() == "ltrp-timm: skipped dog/bad.png: is not an image in a known format."
    assert "unreadable images, excluded: 1" in out
    assert "3 classes, matched in natural order" in out
    rows = read("out/evaluate.csv")
    ratios = [float(row["keep_ratio"]) for row in rows]
    assert ratios == [1.0, 0.7, 0.5, 0.25]
    assert [float(row["num_keep"]) for row in rows] == [16, 11, 8, 4]
    expected = by_hand(load(), ratios)
    for row in rows:
        assert (row["images"], row["unreadable"]) == ("11", "1")
        found = (float(row["top1"]), float(row["top5"]))
        assert found == pytest.approx(expected[float(row["keep_ratio"])], abs=1e-4)
    text = json.loads(Path("out/evaluate.json").read_text())
    assert [row["top1"] for row in text["results"]] == [float(row["top1"]) for row in rows]
    assert (text["ranker"], text["num_classes"], text["precision"]) == (DEFAULT_RANKER, 3, "fp32")
    with Image.open("out/evaluate.png") as picture:
        assert picture.width > 400
    line = r"^(full|pruned) +([\d.]+) +(\d+) +64 +[\d.]+ +100.00 +\S+ +\d"
    kept = [("pruned", "0.7", "11"), ("pruned", "0.5", "8"), ("pruned", "0.25", "4")]
    assert re.findall(line, out, re.M) == [("full", "1", "16"), *kept]
    check_per_image(rows)


def test_a_card_takes_the_accuracies(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("-o", "out", "--smaller-image") == 2
    rows = [row for row in read("out/evaluate.csv") if row["method"] in ("full", "pruned")]
    model = load()
    save_pretrained(model, "again", {"license": "mit"}, evaluation="out")
    card = ModelCard.load("again/README.md")
    results = card.data.eval_results
    found = {each.metric_name: (each.metric_type, each.metric_value) for each in results}
    assert {(each.dataset_name, each.task_type) for each in results} == {
        ("set, validation", "image-classification")
    }
    for row in rows:
        name = f"top-1 at keep_ratio {float(row['keep_ratio']):g}"
        assert found[name] == ("accuracy", pytest.approx(float(row["top1"]), abs=0.006))
        assert f"| {float(row['keep_ratio']):g}" in card.text
    assert len(found) == 2 * len(rows)
    assert not card.data.eval_results[0].verified
    # from the command line
    save = ["save", "local-dir:model", "-o", "third", "--license", "mit"]
    assert main([*save, "--evaluation", "out/evaluate.json"]) == 0
    assert ModelCard.load("third/README.md").data.eval_results == results
    assert main([*save, "--overwrite", "--ranker", "contrast", "--evaluation", "out"]) == 2
    message = "of a model with ranker 'border', this one has 'contrast': evaluate this one."
    assert message in capsys.readouterr().err
    for content, error in (("{}", "is no evaluate.json"), ("text", "is no evaluate.json")):
        Path("wrong.json").write_text(content)
        with pytest.raises(ValueError, match=error):
            save_pretrained(model, "again", overwrite=True, evaluation="wrong.json")
    with pytest.raises(FileNotFoundError):
        save_pretrained(model, "again", overwrite=True, evaluation="absent.json")
    with pytest.raises(ValueError, match="not with a ranker alone"):
        save_pretrained(create_ranker("conv", pretrained=True), "ranker", evaluation="out")


def test_a_card_takes_no_accuracies_of_another_model(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate("-o", "out", "--keep-ratio", "1", "0.5", "--precision", "bf16") == 2  # bad.png
    again: dict[str, Any] = {"directory": "again", "overwrite": True, "evaluation": "out"}
    model = load()
    model.keep_ratio = 0.3
    save_pretrained(model, **again)
    changes: dict[str, Callable[[LTRPModel], Any]] = {
        "weights_digest": lambda net: torch.nn.init.normal_(net.backbone.head.weight),
        "input_size": lambda net: net.set_input_size((96, 96)),
        "selection": lambda net: setattr(net, "selection", "dithered"),
        "budget": lambda net: setattr(net, "budget", AdaptiveBudget("mass", 0.5, 8, 0.5)),
    }
    for name, change in changes.items():
        other = load()
        change(other)
        with pytest.raises(ValueError, match=f"of a model with {name} .*: evaluate this one"):
            save_pretrained(other, **again)
    other = drop_patches(load().restore(), create_ranker("border", img_size=(64, 64)))
    with pytest.raises(ValueError, match="of a model with ranker_hash"):
        save_pretrained(other, **again)
    # a training's checkpoint: the average of its weights is measured and saved
    weights = load().state_dict()
    last = {name: tensor + 1 for name, tensor in weights.items()}
    torch.save({"state_dict": last, "state_dict_ema": weights}, "last.pth.tar")
    torch.save(last, "last.pth")
    assert evaluate("--checkpoint", "last.pth.tar", "--keep-ratio", "1", "-o", "full") == 2
    save = ["save", "local-dir:model", "-o", "again", "--overwrite", "--evaluation", "full"]
    assert main([*save, "--checkpoint", "last.pth.tar", "--selection", "dithered"]) == 0
    assert main([*save, "--checkpoint", "last.pth"]) == 2
    assert "of a model with weights_digest" in capsys.readouterr().err
    old = json.loads(Path("out/evaluate.json").read_text())
    del old["weights_digest"]
    Path("out/evaluate.json").write_text(json.dumps(old))
    with pytest.raises(ValueError, match="does not say which weights were measured: evaluate"):
        save_pretrained(model, **again)


def test_the_smaller_image_is_in_the_table(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--keep-ratio", "1", "0.5", "0.25", "-o", "out", "--per-image", "--plot")
    assert evaluate("--smaller-image", *more) == 2  # bad.png
    out = capsys.readouterr().out
    assert "smaller image: the full model at the size with about as many patches" in out
    rows = read("out/evaluate.csv")
    columns = ("method", "keep_ratio", "num_keep", "img_size")
    assert [tuple(row[column] for column in columns) for row in rows] == [
        ("full", "1.0", "16.0", "64"),
        *(("pruned", "0.5", "8.0", "64"), ("smaller image", "0.5", "9.0", "48")),
        *(("pruned", "0.25", "4.0", "64"), ("smaller image", "0.25", "4.0", "32")),
    ]
    assert all((row["images"], row["unreadable"]) == ("11", "1") for row in rows)
    lines, found = read("out/per_image.csv"), []
    for row in rows:
        if row["method"] == "smaller image":  # timm at that size, with its own pictures
            side = int(row["img_size"])
            model = timm.create_model("local-dir:model", pretrained=True, img_size=side).eval()
            expected = by_hand(model, [1.0])[1.0]
            assert (float(row["top1"]), float(row["top5"])) == pytest.approx(expected, abs=1e-4)
            case = ("smaller image", row["keep_ratio"])
            mine = [line for line in lines if (line["method"], line["keep_ratio"]) == case]
            found.append([line["predicted"] for line in mine])
            assert found[-1] == [str(label) for label in predicted_by(model)]
    assert len(lines) == 5 * 11
    full = [line["predicted"] for line in lines if line["method"] == "full"]
    assert full not in found  # the size does something
    assert evaluate(*more, "--overwrite") == 2  # the others' figures do not change
    without = [row for row in rows if row["method"] != "smaller image"]
    assert [row["top1"] for row in read("out/evaluate.csv")] == [row["top1"] for row in without]


def predicted_by(model: Any) -> list[int]:
    images = batch_of(model)[0]
    with torch.inference_mode():
        found: list[int] = model.restore()(images).argmax(1).tolist()
    return found


@pytest.mark.parametrize(
    ("model", "options", "text"),
    [
        ("cait_xxs24_224", [], "a Cait takes images of one size: timm gives it no set_input_size"),
        ("swin_tiny_patch4_window7_224", [], "cannot drop patches from SwinTransformer"),
        ("resnet10t", [], "cannot drop patches from ResNet"),
        ("local-dir:model", ["--keep-ratio", "1"], "--smaller-image requires a --keep-ratio below"),
    ],
)
def test_no_smaller_image(
    here: Path, capsys: pytest.CaptureFixture[str], model: str, options: list[str], text: str
) -> None:
    assert evaluate("--smaller-image", "--num-classes", "3", *options, model=model) == 2
    err = capsys.readouterr().err
    assert text in err
    assert len(err.splitlines()) == 1


def check_per_image(rows: list[dict[str, str]]) -> None:
    """What is said of each image adds up."""
    lines = read("out/per_image.csv")
    assert len(lines) == 4 * 11
    assert [line["image"] for line in lines[:5]] == ["cat/000.png"] * 4 + ["cat/001.png"]
    ranks = [[line["rank"] for line in lines[place::4]] for place in range(4)]
    assert len({tuple(some) for some in ranks}) > 1  # the keep ratio does something
    for row in rows:
        mine = [line for line in lines if line["keep_ratio"] == row["keep_ratio"]]
        assert len({line["image"] for line in mine}) == 11
        hits = [line["rank"] == "1" for line in mine]
        assert [line["predicted_name"] == line["target_name"] for line in mine] == hits
        assert all(line["image"].startswith(line["target_name"]) for line in mine)
        assert 100 * sum(hits) / 11 == pytest.approx(float(row["top1"]))


def fake_batches(sizes: list[int]) -> list[Batch]:
    def sample(start: int, size: int) -> dict[str, Any]:
        return {
            "image": torch.zeros(size, 3, 2, 2),
            "real": torch.ones(size, dtype=torch.bool),
            "index": torch.arange(start, start + size),
            "target": torch.zeros(size, dtype=torch.int64),
            "problems": [],
        }

    starts = [sum(sizes[:place]) for place in range(len(sizes))]
    return [Batch(sample(*each), 0, -1, CPU) for each in zip(starts, sizes)]


def test_whole_batches_are_timed_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[float, int, bool]] = []
    clock: list[bool] = []

    def timed(fn: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
        clock.append(True)
        result = fn()
        clock.pop()
        return result, float(len(seen))

    def call(ratio: float) -> Callable[[Batch], Tensor]:
        def run(batch: Batch) -> Tensor:
            seen.append((ratio, len(batch), bool(clock)))
            return torch.zeros(len(batch), 2)

        return run

    monkeypatch.setattr(measure, "timed", timed)
    calls = {1.0: call(1.0), 0.5: call(0.5)}
    counters = {ratio: AccuracyCounter() for ratio in calls}
    results = measure_all(calls, fake_batches([4, 4, 3]), ALONE, counters)
    warm, rest = seen[:4], seen[4:]
    assert warm == [(ratio, 4, False) for ratio in (1.0, 0.5) * 2]
    assert [ratio for ratio, _, _ in rest] == [1.0, 0.5] * (3 + MIN_ROUNDS - 2)
    assert all(timed for _, _, timed in rest)
    for result in results.values():
        assert result.batch_size == 4
        assert len(result.timing.seconds) == MIN_ROUNDS
        assert (result.accuracy.images, result.accuracy.means["top1"]) == (11, 1.0)
    assert 9.0 not in results[1.0].timing.seconds  # the third batch is a smaller one
    assert results[1.0].timing.seconds[:3] == (5.0, 7.0, 11.0)


def test_a_case_is_named_without_its_model() -> None:
    assert str(Case("pruned", 0.5, torch.nn.Linear(2, 2), (32, 32))) == "pruned 0.5"


def test_a_model_that_is_no_classifier() -> None:
    calls, counters = {1.0: lambda batch: torch.zeros(4, 2, 3)}, {1.0: AccuracyCounter()}
    with pytest.raises(ValueError, match=r"gives no logits \(B, C\)"):
        measure_all(calls, fake_batches([4]), ALONE, counters)


def test_a_plain_model_is_one_row(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ImageNetInfo("imagenet-1k").label_names()
    for number in (3, 700):
        make_photos(Path("some") / names[number], 2)
    more = ("--img-size", "32", "-o", "out", "--per-image")
    assert evaluate(*more, model="resnet10t", data="some") == 0
    out = capsys.readouterr().out
    assert "resnet10t, a plain model: it cannot drop patches" in out
    assert "2 classes, matched by WordNet id" in out
    assert "998 classes that the data does not have are excluded" in out
    (row,) = read("out/evaluate.csv")
    assert (row["keep_ratio"], row["num_keep"], row["num_classes"]) == ("1.0", "", "2")
    assert {line["predicted"] for line in read("out/per_image.csv")} <= {"3", "700"}
    assert {line["target"] for line in read("out/per_image.csv")} == {"3", "700"}
    everyone = (*more, "--all-classes", "--overwrite")
    assert evaluate(*everyone, model="resnet10t", data="some") == 0
    (row,) = read("out/evaluate.csv")
    assert row["num_classes"] == "1000"
    assert "are excluded" not in capsys.readouterr().out


def test_numbered_folders_are_those_of_imagenet_v2(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (7, 12, 100):
        make_photos(Path("v2") / str(number), 1)
    more = ("--img-size", "32", "-o", "out", "--per-image")
    assert evaluate(*more, model="resnet10t", data="v2") == 0
    assert "3 classes, matched by number" in capsys.readouterr().out
    assert [line["target"] for line in read("out/per_image.csv")] == ["7", "12", "100"]


def test_a_class_map_says_which_class_is_which(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("map.txt").write_text("owl\ndog\ncat\n")
    assert evaluate("--class-map", "map.txt", "--keep-ratio", "1", "-o", "a", "--per-image") == 2
    assert "matched by name" in capsys.readouterr().out
    targets = {line["target_name"]: line["target"] for line in read("a/per_image.csv")}
    assert targets == {"owl": "0", "dog": "1", "cat": "2"}


def test_recorded_names_are_compared(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = load()
    model.pretrained_cfg["label_names"] = ["owl", "cat", "eel"]
    save_pretrained(model, "named")
    assert evaluate(model="local-dir:named") == 2
    err = capsys.readouterr().err
    assert "1 of 3 classes are not among the model's 3: dog; the model's begin with owl, cat" in err
    make_photos(Path("two/cat"), 1)
    make_photos(Path("two/owl"), 2)
    more = ("--keep-ratio", "1", "-o", "out", "--per-image")
    assert evaluate(*more, model="local-dir:named", data="two") == 0
    targets = {line["target_name"]: line["target"] for line in read("out/per_image.csv")}
    assert targets == {"cat": "1", "owl": "0"}


def test_orders_of_a_cache_give_what_the_ranker_gives(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = ["rank", "set", "--split", "validation", "--model", "vit_tiny_patch16_224"]
    rank += ["--img-size", "64", "--num-workers", "0"]
    assert main([*rank, "-o", "exact"]) == 2
    assert main([*rank, "-o", "whole", "--crop-mode", "squash"]) == 2
    assert evaluate("-o", "ranked", "--per-image") == 2
    monkeypatch.setattr(LTRPModel, "ranker_scores", no_ranking)
    for name in ("exact", "whole"):
        assert evaluate("-o", name + "-out", "--per-image", "--index-cache", name) == 2
    every = [read(f"{name}/per_image.csv") for name in ("ranked", "exact-out", "whole-out")]
    assert every[0] == every[1]
    assert every[0] != every[2]  # orders of whole pictures, followed through the crop
    assert json.loads(Path("exact-out/evaluate.json").read_text())["index_cache"] is True
    assert evaluate("--index-cache", "exact", "--selection", "random") == 2


def no_ranking(*_: Any) -> Any:
    raise AssertionError("the ranker must not run")


def test_two_processes_count_every_image_once(here: Path) -> None:
    assert evaluate("-o", "one", "--per-image") == 2
    command = ["evaluate", "local-dir:model", "--data", "set", "--batch-size", "3"]
    more = ["--device", "cpu", "-o", "two", "--per-image", "--num-workers", "0"]
    done = run_two(*command, *more)
    assert done.stdout.count("speed-up") == 2, done.stderr
    assert done.stderr.count("skipped dog/bad.png") == 1
    one, two = read("one/evaluate.csv"), read("two/evaluate.csv")
    for name in ("keep_ratio", "num_keep", "images", "unreadable"):
        assert [row[name] for row in one] == [row[name] for row in two]
    assert read("one/per_image.csv") == read("two/per_image.csv")
    assert [float(row["top1"]) for row in one] == [float(row["top1"]) for row in two]
    assert {row["processes"] for row in two} == {"2"}


def test_an_adaptive_budget_is_the_models_own(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = drop_patches(load().restore(), ranker="pixel_std")
    images = torch.randn(8, 3, 64, 64)
    model.calibrate(images, mean_keep_ratio=0.4)
    save_pretrained(model, "adaptive")
    assert evaluate("-o", "out", model="local-dir:adaptive") == 2
    kept = "keeps 16 of 16 at 1, 6 of 16 at 0.4 (about that on average, as calibrated)"
    assert f"patches     {kept}\n" in capsys.readouterr().out
    rows = read("out/evaluate.csv")
    assert [row["keep_ratio"] for row in rows] == ["1.0", "0.4"]
    assert 0 < float(rows[1]["num_keep"]) < 16
    capsys.readouterr()
    assert evaluate("--keep-ratio", "0.7", model="local-dir:adaptive") == 2
    assert "an adaptive model has its own budget: use --keep-ratio 1 0.4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ([], "top"),
        (["--selection", "dithered"], "dithered"),
        (["--rest", "coarse"], "top, coarse rest with scales 1 2"),
        (["--rest", "coarse", "--scales", "1", "2", "4"], "top, coarse rest with scales 1 2 4"),
    ],
)
def test_it_says_how_patches_are_chosen(
    here: Path, capsys: pytest.CaptureFixture[str], options: list[str], chosen: str
) -> None:
    assert evaluate("--keep-ratio", "0.5", *options) == 2  # bad.png
    found = re.search(r"^selection   (.*)$", capsys.readouterr().out, re.M)
    assert found
    assert found[1] == chosen


def test_nothing_is_overwritten(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    Path("out/per_image.csv").write_text("mine")
    assert evaluate("--keep-ratio", "1", "-o", "out") == 2
    assert Path("out/per_image.csv").read_text() == "mine"
    before = Path("out/evaluate.csv").read_bytes()
    capsys.readouterr()
    assert evaluate("--keep-ratio", "0.5", "-o", "out", "--per-image") == 2
    err = capsys.readouterr().err
    assert "it holds evaluate.csv and evaluate.json and per_image.csv already" in err
    assert Path("out/evaluate.csv").read_bytes() == before
    assert evaluate("--keep-ratio", "0.5", "-o", "out", "--overwrite") == 2
    assert Path("out/evaluate.csv").read_bytes() != before
    check_folder("new/below", ["a"], False)
    assert not Path("new").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--keep-ratio", "0"], r"--keep-ratio: must be in \(0, 1\], got 0"),
        (["--keep-ratio", "1.5"], r"must be in \(0, 1\], got 1\.5"),
        (["--data", "nowhere"], "nowhere does not exist"),
        (["--data", "flat"], "has no folder for each class"),
        (["--data", "broken"], "none of 1 images can be read; a/a.png: "),
        (["--data", "two"], r"there are 2 classes \(a, b\), but the model has 3"),
        (["--data", "hfds/none"], "datasets|cannot be read"),
        (["--ranker", "best"], "--ranker must be one of"),
        (["--ranker-weights", "nowhere"], "nowhere|no weights"),
        (["--index-cache", "nowhere"], "nowhere holds no scores"),
        (["--class-map", "nowhere"], "nowhere"),
        (["--class-map", "empty.txt"], "empty.txt: it names no class"),
        (["--class-map", "pipe.txt"], "pipe.txt does not exist, or is not a file"),
        (["--class-map", "set"], "set does not exist, or is not a file"),
        (["--class-map", "latin.txt"], "latin.txt is not UTF-8 text: save it as UTF-8"),
        (["--class-map", "spaces.txt"], "the model has 3 classes, but names 1"),
        (["--data", ""], "the data set has an empty name"),
        (["--data", "hfds/"], "hfds/ names no data set: write hfds/NAME"),
        (["--data", "wds/x"], "wds/x needs the folder of its archives: --data-root"),
        (["--device", "meta"], "device 'meta' cannot be used"),
        (["--class-map", "short.txt"], "the model has 3 classes, but names 1"),
        (["--checkpoint", "nowhere"], "nowhere does not exist"),
        (["--num-classes", "-1"], "--num-classes: must be a whole number from 0"),
        (["--device", "nope"], "device 'nope' cannot be used"),
        (["--batch-size", "0"], "--batch-size: must be a whole number from 1"),
        (["--plot"], "--plot and --per-image require --output"),
        (["-o", ""], "--output must name a folder"),
        (["-o", "empty.txt"], "--output empty.txt cannot be written: it is not a folder"),
        (["--threads", "9999"], "--threads must be from 1"),
    ],
)
def test_wrong_arguments_are_one_line(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    text: str,
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # no patience with it
    make_photos(Path("flat"), 1)
    make_photos(Path("two/a"), 1)
    make_photos(Path("two/b"), 1)
    for name in ("a", "b", "c"):
        Path("broken", name).mkdir(parents=True)
    Path("broken/a/a.png").write_text("text")
    Path("empty.txt").touch()
    Path("short.txt").write_text("cat")
    Path("spaces.txt").write_text("great white shark")  # once three classes
    Path("latin.txt").write_bytes("chaîne".encode("latin-1"))
    os.mkfifo("pipe.txt")
    command = ["evaluate", "local-dir:model", "--data", "set", "--device", "cpu", "-o", "out"]
    if arguments[0] == "--plot":
        command = command[:-2]
    assert main([*command, *arguments]) == 2
    err = capsys.readouterr().err
    assert re.search(text, err)
    assert len(err.splitlines()) == 1
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("model", "more", "text"),
    [
        ("nope", [], "MODEL 'nope' is unknown"),
        ("resnet10t", ["--keep-ratio", "0.5"], "cannot drop patches from ResNet"),
        ("resnet10t", ["--ranker", "contrast"], "cannot drop patches from ResNet"),
        ("resnet10t", ["--index-cache", "x"], "cannot drop patches from ResNet"),
        ("local-dir:nowhere", [], "MODEL local-dir:nowhere: "),
        ("vit_base_patch16_224.mae", ["--img-size", "32"], "has no classes: it gives features"),
    ],
)
def test_models_that_cannot_be_measured(
    here: Path, capsys: pytest.CaptureFixture[str], model: str, more: list[str], text: str
) -> None:
    assert evaluate(*more, model=model) == 2
    err = capsys.readouterr().err
    assert text in err
    assert len(err.splitlines()) == 1


def test_empty_classes_are_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        make_photos(Path("some") / name, 1)
    Path("some/c").mkdir()
    assert evaluate("--keep-ratio", "1", data="some") == 0
    assert "without any image: c" in capsys.readouterr().out


def test_without_matplotlib_it_says_what_to_type(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert evaluate("-o", "out", "--plot") == 2
    assert "pip install 'ltrp-timm[demo]'" in capsys.readouterr().err
    assert not Path("out").exists()


def test_help_in_timms_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--help"]) == 0
    out = "".join(capsys.readouterr().out.split())
    for word in ("--keep-ratio", "--index-cache", "--class-map", "hfds/", "local-dir:", "torchrun"):
        assert word in out
