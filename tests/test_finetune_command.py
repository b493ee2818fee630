"""``ltrp-timm finetune``: flags, messages, exit codes."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import records_arguments
from finetune_setup import load, make_classes, small_vit

from ltrp_timm import drop_patches, save_pretrained
from ltrp_timm.commands import main
from ltrp_timm.train import Augmentation, Recipe, Settings, finetune

pytestmark = records_arguments
QUICK = ["--num-workers", "0", "--no-tensorboard", "--no-progress", "--epochs", "1"]
TINY = [
    "--img-size",
    "32",
    "--model-kwargs",
    "patch_size=8",
    "embed_dim=32",
    "depth=1",
    "num_heads=2",
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_classes(Path("photos"), 6)
    return tmp_path


def tune(*flags: str, model: str = "vit_tiny_patch16_224") -> int:
    return main(["finetune", model, "--data", "photos", "--output", "run", *QUICK, *TINY, *flags])


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    err = capsys.readouterr().err
    assert err.startswith("ltrp-timm: "), err
    assert len(err.splitlines()) == 1, err
    return err


def test_a_model_of_several_budgets(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("photos/red/00.png").write_text("no image")
    flags = ["--keep-ratio", "0.5", "0.25", "--mixup", "0.8", "--batch-size", "4", "--plot"]
    assert tune(*flags, "--holdout", "0.34") == 0
    out, err = capsys.readouterr()
    assert "border keeps 0.5 0.25 of the patches; 3 updates of 4 images an epoch, 6 images" in out
    assert "val_top1@0.25 " in out
    assert "timm.create_model('local-dir:run', pretrained=True)" in out
    assert err == "ltrp-timm: skipped red/00.png: is not an image in a known format.\n"
    assert load(Path("run")).keep_ratio == 0.5
    assert Path("run/pictures.png").is_file()
    assert tune(*flags) == 2
    out, err = capsys.readouterr()
    assert err.startswith("ltrp-timm: run already holds checkpoint.pt")
    assert out == ""  # nothing is announced that is refused


def test_an_adaptive_model_is_tuned_with_a_named_ranker(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = drop_patches(small_vit(img_size=32, num_classes=3), "pixel_std")
    model.calibrate(torch.rand(6, 3, 32, 32), mean_keep_ratio=0.4)
    save_pretrained(model, "adaptive")
    command = ["finetune", "local-dir:adaptive", "--data", "photos", "--output", "run", *QUICK]
    assert main(command) == 2
    assert "give --ranker pixel_std (in Python, set model.budget = None)" in one_line(capsys)
    assert main([*command, "--ranker", "pixel_std", "--batch-size", "4"]) == 0
    assert (load(Path("run")).budget, load(Path("run")).keep_ratio) == (None, 0.4)


def test_every_flag_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    @functools.wraps(finetune)
    def note(**values: Any) -> Any:
        seen.update(values)
        return type("Summary", (), {"stopped_by": None, "unreadable": [], "epochs": 1, "steps": 1})

    monkeypatch.setattr("ltrp_timm.commands.train.finetune", note)
    plain = ["finetune", "ltrp_vit_base", "--data", "d", "--output", "o"]
    assert main(plain) == 0
    assert seen == {"model": "ltrp_vit_base", "data": "d", "output": "o"}  # the recipe's defaults
    flags = [
        *("--keep-ratio", "0.5", "1", "--ranker", "conv", "--ranker-weights", "r", "--pretrained"),
        *("--model-kwargs", "depth=2", "global_pool=avg", "--scale", "0.5", "1", "--aa", "none"),
        *("--distill", "self", "--distill-weight", "0.3", "--train-ranker"),
        *("--gate", "straight-through", "--grad-checkpointing", "--channels-last", "--bce-loss"),
        *("--layer-decay", "0.65", "--target-key", "fine", "--mixup-mode", "elem"),
        *("--keep-schedule", "cosine", "--keep-schedule-epochs", "7", "--selection", "mixed"),
    ]
    assert main([*plain, *flags]) == 0
    expected = {"keep_ratio": [0.5, 1.0], "ranker": "conv", "ranker_weights": "r"}
    expected |= {"pretrained": True, "model_kwargs": {"depth": 2, "global_pool": "avg"}}
    expected |= {"scale": [0.5, 1.0], "aa": "none", "distill": "self", "distill_weight": 0.3}
    expected |= {"train_ranker": True, "gate": "straight-through", "grad_checkpointing": True}
    expected |= {"channels_last": True, "bce_loss": True, "layer_decay": 0.65}
    expected |= {"target_key": "fine", "mixup_mode": "elem", "keep_schedule": "cosine"}
    expected |= {"keep_schedule_epochs": 7, "selection": "mixed"}
    assert {name: seen[name] for name in expected} == expected


def test_every_option_has_a_flag_and_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "--help"]) == 0
    text = capsys.readouterr().out
    for kind in (Recipe, Augmentation, Settings):
        for field in dataclasses.fields(kind):
            assert "--" + field.name.replace("_", "-") + " " in text.replace("]", " "), field.name
    assert "--epochs N Passes over the training images (default: 50)" in " ".join(text.split())


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--data", "nowhere"], "nowhere does not exist."),
        (["--num-classes", "4"], "num_classes is 4, but photos has 3 classes."),
        (["--keep-ratio", "0"], "argument --keep-ratio: must be in (0, 1], got 0."),
        (["--keep-ratio", "0.5", "1.5"], "argument --keep-ratio: must be in (0, 1], got 1.5."),
        (["--ranker", "conv"], "the conv ranker has no trained weights"),
        (["--ranker", "nonsense"], "--ranker must be one of"),
        (["--selection", "adaptive"], "argument --selection: invalid choice: 'adaptive'"),
        (["--keep-ratio", "0.5", "--train-ranker"], "passes no gradient to the ranker"),
        (["--model-kwargs", "depth"], "expected NAME=VALUE, got 'depth'."),
        (["--opt", "nonsense"], "nonsense"),
        (["--mixup", "0.5", "--batch-size", "3"], "mixing needs an even batch_size, got 3."),
        (["--scale", "0.5"], "argument --scale: expected 2 arguments"),
        (["--checkpoint", "missing.pth"], "missing.pth does not exist."),
    ],
)
def test_what_is_wrong_is_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], flags: list[str], text: str
) -> None:
    assert tune(*flags) == 2
    out, err = capsys.readouterr()
    assert text in err
    assert (out, len(err.splitlines())) == ("", 1)
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("vit_tiny_patch16_225", "did you mean vit_tiny_patch16_224"),
        ("local-dir:missing", "missing"),
        ("swin_tiny_patch4_window7_224", "depth"),
    ],
)
def test_a_model_that_is_none(
    here: Path, capsys: pytest.CaptureFixture[str], model: str, text: str
) -> None:
    assert tune("--keep-ratio", "0.5", model=model) == 2
    assert text in one_line(capsys)
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("flags", "weights"),
    [
        (["--ranker", "conv", "--pretrained"], True),
        (["--ranker", "conv", "--pretrained", "--ranker-weights", "mine"], "mine"),
        (["--ranker", "conv"], None),
        (["--ranker", "contrast", "--pretrained"], None),
        (["--pretrained"], None),
    ],
)
@pytest.mark.parametrize("command", ["finetune", "save"])
def test_pretrained_is_of_the_ranker_too(
    here: Path, command: str, flags: list[str], weights: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def ask(*args: Any, **kwargs: Any) -> None:
        asked.update(kwargs)
        raise RuntimeError("enough")

    monkeypatch.setattr("timm.create_model", ask)
    torch.save({"head.weight": torch.zeros(3, 4)}, "mine.pth")
    if command == "finetune":
        flags = ["--data", "photos", *QUICK, *flags]
    elif "--pretrained" not in flags:
        flags = [*flags, "--checkpoint", "mine.pth"]
    assert main([command, "ltrp_vit_tiny", "--output", "run", *flags]) != 0
    assert asked["pretrained"] is ("--pretrained" in flags)
    assert asked.get("ranker_weights") == weights
