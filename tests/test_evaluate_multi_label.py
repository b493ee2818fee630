"""Evaluating on images with several classes: the mAP of the whole set, and refusals."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from sklearn.metrics import average_precision_score
from tagged_setup import COLOURS, NAMES, make_tagged

from ltrp_timm import save_pretrained
from ltrp_timm.commands import main


@pytest.fixture(scope="module")
def tagged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tagged(tmp_path_factory.mktemp("tagged") / "set")


TINY: dict[str, Any] = {"img_size": 48, "depth": 1, "embed_dim": 32, "num_heads": 2}


def saved_model(folder: Path, names: tuple[str, ...], **changes: Any) -> str:
    torch.manual_seed(0)
    model = timm.create_model("ltrp_vit_tiny", num_classes=len(names), **TINY, **changes)
    for parameter in model.get_classifier().parameters():
        torch.nn.init.normal_(parameter)
    model.pretrained_cfg.update(num_classes=len(names), label_names=list(names))
    return f"local-dir:{save_pretrained(model, folder)}"


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_evaluate_reports_the_map_of_the_whole_set(
    tagged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = saved_model(tmp_path / "model", NAMES)
    flags = ["--data", str(tagged / "images"), "--multi-label", "--batch-size", "5", "--per-image"]
    flags += ["--seen-classes", str(tagged / "seen.txt"), "--keep-ratio", "1", "0.5", "--plot"]
    out = tmp_path / "out"
    command = ["evaluate", model, *flags, "--labels", str(tagged / "coco.json")]
    assert main([*command, "--device", "cpu", "--output", str(out)]) == 0
    said = capsys.readouterr().out
    assert "mAP      mAP seen    mAP unseen" in said
    assert "classes without any image, excluded (1): yellow" in said
    results = json.loads((out / "evaluate.json").read_text())["results"]
    per_class = {row["class"]: row for row in read_csv(out / "per_class.csv")}
    lines = read_csv(out / "per_image.csv")
    assert len(lines) == 2 * 24
    assert [row["seen"] for row in per_class.values()] == ["1", "0", "1", "0", "0"]
    assert per_class["yellow"]["ap@1"] == ""
    found = []
    for result, ratio in zip(results, ("1.0", "0.5")):
        rows = [line for line in lines if line["keep_ratio"] == ratio]
        values = {}
        for name in COLOURS:
            has = [name in row["labels"].split(";") for row in rows]
            values[name] = average_precision_score(has, [float(row[f"p({name})"]) for row in rows])
            assert 100 * values[name] == pytest.approx(
                float(per_class[name][f"ap@{float(ratio):g}"])
            )
        assert result["map"] == pytest.approx(100 * np.mean(list(values.values())))
        assert result["map_seen"] == pytest.approx(50 * (values["red"] + values["blue"]))
        assert result["map_unseen"] == pytest.approx(50 * (values["green"] + values["grey"]))
        found.append(result["map"])
    assert abs(found[0] - found[1]) > 0.1
    assert (out / "evaluate.png").stat().st_size > 1000


def test_evaluate_finds_the_classes_of_a_csv_by_their_names(tagged: Path, tmp_path: Path) -> None:
    shuffled = ("grey", "yellow", "blue", "green", "red")
    maps = []
    for labels in ("coco.json", "labels.csv"):
        out = tmp_path / labels
        model = saved_model(tmp_path / f"model {labels}", shuffled)
        flags = ["--data", str(tagged / "images"), "--labels", str(tagged / labels)]
        flags += ["--multi-label", "--keep-ratio", "0.5", "--device", "cpu", "--output", str(out)]
        assert main(["evaluate", model, *flags]) == 0
        maps.append(json.loads((out / "evaluate.json").read_text())["results"][0]["map"])
    assert maps[0] == pytest.approx(maps[1])


def test_cached_orders_give_the_same_map(tagged: Path, tmp_path: Path) -> None:
    model, cache = saved_model(tmp_path / "model", NAMES), str(tmp_path / "cache")
    images = str(tagged / "images")
    assert main(["rank", images, "-o", cache, "--model", model, "--device", "cpu"]) == 0
    flags = ["--data", images, "--labels", str(tagged / "coco.json"), "--multi-label"]
    command = ["evaluate", model, *flags, "--keep-ratio", "1", "0.5", "--device", "cpu"]
    maps = []
    for name, more in (("ranked", []), ("cached", ["--index-cache", cache])):
        assert main([*command, "--output", str(tmp_path / name), *more]) == 0
        results = json.loads((tmp_path / name / "evaluate.json").read_text())["results"]
        maps.append([result["map"] for result in results])
    assert maps[0] == pytest.approx(maps[1])
    assert abs(maps[0][0] - maps[0][1]) > 0.1


def test_labelled_images_that_are_absent_are_left_out_if_asked(
    tagged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, lines = saved_model(tmp_path / "model", NAMES), (tagged / "labels.csv").read_text()
    (tagged / "long.csv").write_text(f"{lines}none.png,red\n")
    command = ["evaluate", model, "--multi-label", "--data", str(tagged / "images")]
    command += ["--labels", str(tagged / "long.csv"), "--device", "cpu", "--keep-ratio", "0.5"]
    assert main(command) == 2
    assert "1 of 25 labelled images are not in" in capsys.readouterr().err
    assert main([*command, "--skip-absent"]) == 0
    out = capsys.readouterr().out
    assert "24 images, " in out
    assert "1 labelled images are not there, left out" in out


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        (["--labels", "coco.json"], "--labels requires --multi-label"),
        (["--seen-classes", "seen.txt"], "--seen-classes requires --multi-label"),
        (["--skip-absent"], "--skip-absent requires --multi-label"),
        (["--multi-label"], "--multi-label requires --labels FILE"),
        (["--multi-label", "--labels", "none.csv"], "none.csv does not exist"),
        (
            ["--multi-label", "--labels", "coco.json", "--all-classes"],
            "--all-classes excludes --multi-label",
        ),
        (
            ["--multi-label", "--labels", "coco.json", "--seen-classes", "other.txt"],
            "other.txt: 1 seen classes are not classes: mauve",
        ),
        (["--multi-label", "--labels", "more.csv"], "1 of 1 labelled images are not in"),
        (["--multi-label", "--labels", "mauve.csv"], "1 of 1 classes are not among the model's"),
        (["--multi-label", "--labels", "bare.csv"], "no readable image has a label"),
    ],
)
def test_evaluate_refuses(
    flags: list[str],
    wanted: str,
    tagged: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tagged / "other.txt").write_text("mauve\n")
    (tagged / "more.csv").write_text("image,labels\nnone.png,red\n")
    (tagged / "mauve.csv").write_text("image,labels\n00.png,mauve\n")
    (tagged / "bare.csv").write_text("image,red,blue\n00.png,0,0\n")
    model = saved_model(tmp_path / "model", NAMES)
    flags = [str(tagged / flag) if "." in flag else flag for flag in flags]
    command = ["evaluate", model, "--data", str(tagged / "images"), *flags, "--keep-ratio", "0.5"]
    assert main([*command, "--device", "cpu", "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert wanted in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
