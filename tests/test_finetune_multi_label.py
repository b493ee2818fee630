"""Fine-tuning on images with several classes: it learns, evaluates alike, refuses."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
from conftest import records_arguments
from tagged_setup import make_tagged
from train_setup import QUIET, distance, weights

from ltrp_timm.commands import main
from ltrp_timm.data.images import split_indices
from ltrp_timm.layers.ml_decoder import MLDecoder
from ltrp_timm.train import Summary, finetune
from ltrp_timm.train.finetune import fit_head, put_head
from ltrp_timm.train.folder import read_log
from ltrp_timm.train.recipe import split_options


@pytest.fixture(scope="module")
def tagged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tagged(tmp_path_factory.mktemp("tagged") / "set")


TUNE: dict[str, Any] = {
    **QUIET,
    "model_kwargs": {"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 8},
    **{"img_size": 48, "multi_label": True, "epochs": 2, "batch_size": 8, "device": "cpu"},
    **{"aa": "none", "reprob": 0.0, "scale": (0.6, 1.0), "drop_path": 0.0, "layer_decay": None},
}
HEAD = {"head": "ml_decoder", "head_args": {"embed_dim": 32, "num_heads": 2, "mlp_dim": 64}}


def tune(tagged: Path, output: Path, **changes: Any) -> Summary:
    """A tiny run of finetune; held-out images are the training ones."""
    paths = {"labels": tagged / "full.json", "val_labels": tagged / "coco.json"}
    return finetune(
        changes.pop("model", "ltrp_vit_tiny"),
        tagged / "images",
        output,
        **{**TUNE, **paths, **changes},
    )


@records_arguments
@pytest.mark.parametrize("head", [{}, HEAD], ids=["linear", "ml_decoder"])
def test_two_epochs_and_evaluate_say_the_same(
    head: dict[str, Any], tagged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    seen = {"seen_classes": tagged / "seen.txt"}
    summary = tune(tagged, run, keep_ratio=[0.75, 0.4], lr=2e-3, ema_decay=0.5, **seen, **head)
    assert summary.steps == 6
    said = capsys.readouterr().out
    assert said.count("24 training images have no class") == 1
    assert "no held-out image has them" not in said
    model = timm.create_model(f"local-dir:{run}", pretrained=True)
    assert model.pretrained_cfg["label_names"] == ["red", "green", "blue", "grey"]
    assert isinstance(model.get_classifier(), MLDecoder) == bool(head)
    flags = ["--data", str(tagged / "images"), "--labels", str(tagged / "labels.csv")]
    flags += ["--multi-label", "--seen-classes", str(tagged / "seen.txt"), "--device", "cpu"]
    flags += ["--keep-ratio", "0.75", "0.4", "--batch-size", "7", "--output", str(out)]
    assert main(["evaluate", f"local-dir:{run}", *flags]) == 0
    results = json.loads((out / "evaluate.json").read_text())["results"]
    last = read_log(run / "log.csv")[-1]
    for result in results:
        for name in ("map", "map_seen", "map_unseen"):
            found = last[f"val_{name}@{result['keep_ratio']:g}"]
            assert 100 * found == pytest.approx(result[name], abs=1e-6), name
    assert last["val_map"] == pytest.approx((results[0]["map"] + results[1]["map"]) / 200)
    assert last["val_map_seen@0.75"] != last["val_map_unseen@0.75"]


@records_arguments
@pytest.mark.parametrize("head", [{}, HEAD], ids=["linear", "ml_decoder"])
def test_it_learns(head: dict[str, Any], tagged: Path, tmp_path: Path) -> None:
    options = {"epochs": 24, "lr": 1e-2, "ema_decay": None, "scale": (1.0, 1.0), "ratio": (1, 1)}
    tune(tagged, tmp_path / "run", **options, **head)
    rows = read_log(tmp_path / "run" / "log.csv")
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    assert rows[-1]["val_map"] > max(0.75, rows[0]["val_map"] + 0.1)


def test_absent_images_are_left_out_and_counted(
    tagged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tagged / "long.csv").write_text(f"{(tagged / 'labels.csv').read_text()}none.png,red\n")
    options = {"labels": tagged / "long.csv", "val_labels": tagged / "long.csv", "epochs": 1}
    with pytest.raises(ValueError, match=r"none\.png \(skip_absent leaves them out\)"):
        tune(tagged, tmp_path / "no", **options)
    tune(tagged, tmp_path / "run", skip_absent=True, **options)
    out = capsys.readouterr().out
    assert "1 labelled training images are not there, left out" in out
    assert "1 labelled held-out images are not there, left out" in out


@records_arguments
def test_a_csv_for_training_and_images_held_out_of_them(
    tagged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (held,) = split_indices(24, 0.05)[1]
    lines = (tagged / "labels.csv").read_text().split("\n")
    lines[1 + held] = f"{held:02d}.png,green;grey"
    (tagged / "own.csv").write_text("\n".join(lines))
    options = {"val_labels": None, "holdout": 0.05, "loss": "bce", "epochs": 1}
    summary = tune(tagged, tmp_path / "run", labels=tagged / "own.csv", **options)
    assert summary.steps == 2  # 23 images in updates of 8
    last = read_log(tmp_path / "run" / "log.csv")[-1]
    assert last["val_loss"] == pytest.approx(np.log(2), abs=0.05)
    assert last["val_map"] == 1.0  # of one image
    said = capsys.readouterr().out
    assert said.count("excluded from the mAP, no held-out image has them: blue, red\n") == 1
    (tagged / "own.csv").write_text("\n".join([*lines[:-2], "23.png,red"]))  # other labels
    with pytest.raises(ValueError, match="data"):
        tune(tagged, tmp_path / "run", labels=tagged / "own.csv", resume="auto", **options)


def test_published_defaults(tagged: Path, tmp_path: Path) -> None:
    given = {"multi_label": True, "labels": "labels.csv"}
    recipe, augmentation, settings = split_options(given)
    assert (settings.epochs, settings.base_lr, settings.layer_decay) == (100, 5e-4, 0.65)
    assert (settings.ema_decay, augmentation.smoothing, recipe.loss) == (0.9997, 0.0, None)
    _, _, other = split_options({**given, "epochs": 3, "ema_decay": None})
    assert (other.epochs, other.ema_decay) == (3, None)
    assert split_options({})[2].epochs == 50
    for model, wanted in (("ltrp_vit_tiny", 0.75), ("vit_tiny_patch16_224", None)):
        tune(tagged, tmp_path / model, model=model, epochs=1)
        found = timm.create_model(f"local-dir:{tmp_path / model}", pretrained=True)
        assert getattr(found, "keep_ratio", None) == wanted


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"multi_label": False, "labels": None}, "val_labels goes with multi_label"),
        (
            {"multi_label": False, "labels": None, "val_labels": None, "skip_absent": True},
            "skip_absent goes with multi_label",
        ),
        (
            {"multi_label": False, "labels": None, "val_labels": None, "head": "ml_decoder"},
            "head g",
        ),
        ({"labels": None}, "multi_label needs labels"),
        ({"labels": "none.json"}, "does not exist"),
        ({"labels": "coco.json"}, "1 class has no image in .*coco.json: yellow"),
        ({"val_labels": "mauve.csv"}, "the held-out images do not fit: 1 of 1 .*: mauve"),
        ({"val_labels": None, "val_data": "images"}, "val_data needs val_labels"),
        ({"seen_classes": "other.txt"}, "other.txt: 1 seen classes are not classes: mauve"),
        ({"num_classes": 7}, "num_classes is 7, but .*full.json has 4 classes"),
        ({"loss": "focal"}, "loss must be one of asymmetric, bce, got 'focal'"),
        ({"head": "mlp"}, "head must be one of ml_decoder, got 'mlp'"),
        ({"head_args": {"embed_dim": 8}}, "head_args go with head"),
        ({"smoothing": 0.1}, "smoothing is for images with one class"),
        ({"mixup": 0.8}, "mixup is for images with one class"),
        ({"distill": "self"}, "does not go with multi_label"),
        ({"input_key": "image"}, "input_key is for named datasets"),
        ({"keep_ratio": 1.5}, "keep_ratio must be in"),
    ],
)
def test_finetune_refuses(
    changes: dict[str, Any], wanted: str, tagged: Path, tmp_path: Path
) -> None:
    (tagged / "other.txt").write_text("mauve\n")
    (tagged / "mauve.csv").write_text("image,labels\n00.png,mauve\n")
    given = {}
    for name, value in changes.items():
        file = isinstance(value, str) and ("." in value or value == "images")
        given[name] = tagged / value if file else value
    with pytest.raises((ValueError, FileNotFoundError), match=wanted):
        tune(tagged, tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_an_ml_decoder_begins_anew_for_other_classes() -> None:
    sizes = {"img_size": 48, "depth": 1, "num_classes": 4, **HEAD}
    model = timm.create_model("ltrp_vit_tiny", **sizes)
    assert fit_head(model, 5, list("abcde"))
    head = model.get_classifier()
    assert isinstance(head, MLDecoder)
    assert head.num_classes == 5
    assert head.layers[0].linear1.weight.std() > 0.01  # not the 2e-5 of a linear head
    assert not put_head(model, "ml_decoder", {"embed_dim": 32})  # it has such a one
    assert model.get_classifier() is head
    assert put_head(model, "ml_decoder", {"embed_dim": 16, "num_heads": 2})
    assert model.get_classifier().config()["embed_dim"] == 16


def test_a_head_needs_a_pruned_model(tagged: Path, tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=48, depth=1)
    given = {"img_size": None, "model_kwargs": None}
    with pytest.raises(TypeError, match="head 'ml_decoder' needs a pruned model"):
        tune(tagged, tmp_path / "run", model=model, **given, **HEAD)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@records_arguments
def test_two_processes_are_one_with_twice_the_batch(tagged: Path, tmp_path: Path) -> None:
    flags = ["finetune", "ltrp_vit_tiny", "--data", str(tagged / "images"), "--multi-label"]
    flags += ["--labels", str(tagged / "full.json"), "--val-labels", str(tagged / "coco.json")]
    flags += ["--seen-classes", str(tagged / "seen.txt"), "--head", "ml_decoder", "--epochs", "1"]
    flags += ["--head-args", "embed_dim=32", "num_heads=2", "mlp_dim=64", "drop=0.0"]
    flags += ["--model-kwargs", "depth=1", "embed_dim=32", "num_heads=2", "patch_size=8"]
    flags += ["--img-size", "48", "--drop-path", "0", "--opt", "sgd", "--lr", "0.01"]
    flags += ["--warmup-epochs", "0", "--device", "cpu", "--num-workers", "0", "--ema-decay", "0"]
    flags += ["--no-tensorboard", "--no-progress"]
    logs = []
    for processes, batch_size in ((2, 5), (1, 10)):  # the last of 24 held-out images alone
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *(launcher if processes > 1 else []), "-m", "ltrp_timm"]
        output = tmp_path / str(processes)
        done = subprocess.run(
            [*command, *flags, "--output", str(output), "--batch-size", str(batch_size)],
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("training images have no class") == 1
        logs.append(read_log(output / "log.csv")[-1])
    assert distance(weights(tmp_path / "2"), weights(tmp_path / "1")) <= 1e-6
    for name in ("loss", "val_loss", "val_map", "val_map_seen", "val_map_unseen"):
        assert logs[0][name] == pytest.approx(logs[1][name], abs=1e-6), name
