"""``ltrp-timm train-ranker`` and ``train-teacher``: flags, messages, exit codes."""

import dataclasses
import functools
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import Started
from train_setup import make_photos, run, tiny_teacher

import ltrp_timm
from ltrp_timm.commands import main
from ltrp_timm.metrics import spearman
from ltrp_timm.train import Settings, train_ranker
from ltrp_timm.train.folder import read_log

QUICK = ["--num-workers", "0", "--no-tensorboard", "--no-progress", "--epochs", "1"]
TINY = ["--ranker-args", "width=16", "depth=1", "--mask-ratio", "0.5"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_photos(Path("photos"))
    tiny_teacher().save("teacher")
    return tmp_path


def ranker(*flags: str) -> int:
    return main(["train-ranker", "--data", "photos", "--output", "run", *QUICK, *TINY, *flags])


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    err = capsys.readouterr().err
    assert err.startswith("ltrp-timm: "), err
    assert len(err.splitlines()) == 1, err
    return err


def test_a_teacher_and_then_a_ranker(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["patch_size=8", "embed_dim=32", "depth=1", "num_heads=2"]
    sizes += ["decoder_embed_dim=32", "decoder_depth=1", "decoder_num_heads=2"]
    command = ["train-teacher", "--data", "photos", "--output", "mae", "--img-size", "32"]
    assert main([*command, "--teacher-args", *sizes, *QUICK]) == 0
    assert "create_teacher('mae')" in capsys.readouterr().out
    Path("photos/bad.jpg").write_text("text")
    assert ranker("--teacher", "mae", "--ema-decay", "0.9", "--plot") == 0
    out, err = capsys.readouterr()
    assert "epoch 1/1: step 1, lr " in out
    assert "chance 10.6" in out
    assert "skipped 1 image that could not be read" in out
    assert "1 epoch, 1 step; load it with create_ranker('conv', pretrained='run')" in out
    assert err == "ltrp-timm: skipped bad.jpg: is not an image in a known format.\n"
    assert ltrp_timm.create_ranker("conv", pretrained="run").trained
    assert Path("run/pictures.png").is_file()


def test_a_fast_ranker_from_a_slow_one(here: Path) -> None:
    """What ``conv`` learns is the order of the ViT ranker, and ``ltrp-timm rank`` keeps by it."""
    sizes = ["embed_dim=32", "depth=1", "num_heads=2"]
    slow = ["train-ranker", "--data", "photos", "--output", "slow", "--ranker", "vit_tiny"]
    flags = ["--teacher", "teacher", "--mask-ratio", "0.5", "--lr", "1e-2", "--batch-size", "4"]
    assert main([*slow, "--ranker-args", *sizes, *QUICK, "--epochs", "4", *flags]) == 0
    fast = ["train-ranker", "--data", "photos", "--distill-from", "slow", "--teacher", "none"]
    fast += ["--img-size", "32", "--ranker-args", "patch_size=8", "width=16", "depth=1"]
    for output, epochs, rate in (("start", "1", "1e-12"), ("fast", "16", "1e-2")):
        flags = ["--lr", rate, "--batch-size", "4", "--warmup-epochs", "0"]
        assert main([*fast, "--output", output, *QUICK, "--epochs", epochs, *flags]) == 0

    make_photos(Path("new"), 30)
    for old in Path("photos").glob("*.png"):
        Path("new", old.name).unlink()
    names = ("slow", "start", "fast")
    found = {name: ranked(name, "vit_tiny" if name == "slow" else "conv") for name in names}
    target = torch.from_numpy(found["slow"]["scores"]).flatten(1)
    agreement = {
        name: float(spearman(torch.from_numpy(found[name]["scores"]).flatten(1), target))
        for name in names
    }
    assert agreement["fast"] > 0.5 > agreement["start"] + 0.2
    kept = [found[name]["keep_indices"] for name in ("start", "fast")]
    assert kept[0].shape == kept[1].shape == (10, 8)
    assert (kept[0] != kept[1]).any(axis=1).mean() > 0.9  # of all images


def ranked(weights: str, name: str) -> dict[str, np.ndarray]:
    """What ``ltrp-timm rank`` says with a ranker that was trained here."""
    command = ["rank", "new", "-o", f"of {weights}", "--ranker", name, "--ranker-weights", weights]
    command += [
        "--img-size",
        "32",
        "--patch-size",
        "8",
        "--num-workers",
        "0",
        "--keep-ratio",
        "0.5",
    ]
    assert main([*command, "--device", "cpu"]) == 0
    return {path.stem: np.load(path) for path in Path(f"of {weights}").glob("*.npy")}


def test_every_flag_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    @functools.wraps(train_ranker)
    def note(**values: Any) -> Any:
        seen.update(values)
        return type("Summary", (), {"stopped_by": None, "unreadable": [], "epochs": 1, "steps": 1})

    monkeypatch.setattr("ltrp_timm.commands.train.train_ranker", note)
    plain = ["train-ranker", "--data", "d", "--output", "o"]
    assert main(plain) == 0
    assert seen == {"data": "d", "output": "o"}  # what is not given keeps the function's default
    flags = [
        *("--teacher", "none", "--distill-from", "r", "--distill-weight", "0.3", "--chunk", "5"),
        *("--distill-args", "blocks=2", "checkpoint_path=a.pth", "--crops", "2"),
        *("--recipe", "paper"),
        *("--ranker", "vit_tiny", "--ranker-args", "depth=2", "mean=[0.5]", "x=y"),
        *("--visible-only", "--list-size", "7", "--opt-args", "momentum=0.5", "--resume", "auto"),
        *("--compare", "contrast", "random", "--dry-run"),
        *("--batch-size", "3", "--lr", "1e-3", "--compile", "--precision", "bf16", "--opt", "sgd"),
    ]
    assert main([*plain, *flags]) == 0
    assert seen["ranker_args"] == {"depth": 2, "mean": [0.5], "x": "y"}
    assert seen["opt_args"] == {"momentum": 0.5}
    expected = {"teacher": None, "distill_from": "r", "distill_weight": 0.3, "chunk": 5}
    expected |= {"distill_args": {"blocks": 2, "checkpoint_path": "a.pth"}, "crops": 2}
    expected |= {"recipe": "paper"}
    expected |= {"compare": ["contrast", "random"], "dry_run": True}
    expected |= {"visible_only": True, "list_size": 7, "resume": "auto", "batch_size": 3}
    expected |= {"lr": 1e-3, "compile": True, "precision": "bf16", "opt": "sgd"}
    assert {name: seen[name] for name in expected} == expected


def test_every_setting_has_a_flag_and_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train-ranker", "--help"]) == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(Settings):
        assert "--" + field.name.replace("_", "-") in text
    text = " ".join(text.split())
    assert "--epochs N Passes over the training images (default: 20, 8 without a teacher)" in text
    assert "(default: 0.004 for conv, 0.001 for other rankers)" in text


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--teacher", "missing.pth"], "missing.pth does not exist."),
        (["--teacher", "teacher", "--mask-ratio", "0.95"], "leaves 0 of 16"),
        (["--teacher", "no-such.pth", "--data", "nowhere"], "nowhere does not exist."),  # first
        (["--teacher", "teacher", "--opt", "nonsense"], "nonsense"),
        (["--teacher", "teacher", "--ranker-args", "width"], "expected NAME=VALUE, got 'width'."),
        (["--teacher", "teacher", "--ranker-args", "kernel_size=2"], "kernel_size must be odd"),
        (["--teacher", "teacher", "--epochs", "0"], "epochs must be at least 1, got 0."),
        (["--teacher", "none"], "a ranker needs a teacher, or distill_from"),
        (["--resume", "always"], "'always'"),
    ],
)
def test_what_is_wrong_is_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], flags: list[str], text: str
) -> None:
    assert ranker(*flags) == 2
    assert text in one_line(capsys)
    assert not Path("run").exists()


def test_a_folder_in_the_way(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(Path("photos"), Path("run"), epochs=1)
    assert ranker("--teacher", "teacher") == 2
    assert "run already holds checkpoint.pt" in one_line(capsys)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_from_outside(here: Path, number: signal.Signals) -> None:
    """To the whole group, as Ctrl-C does it: the loader's workers must not die of it."""
    command = ["train-ranker", "--data", "photos", "--output", "run", *TINY]
    command += ["--teacher", "teacher", "--epochs", "5000", "--batch-size", "4"]
    command += ["--num-workers", "1", "--no-tensorboard", "--holdout", "0"]
    process = Started(main, command)
    for _ in range(6000):
        if Path("run/log.csv").exists() or process.poll() is not None:
            break
        time.sleep(0.01)
    os.killpg(process.pid, number)
    code, out, err = process.wait()
    assert code == 128 + number, err
    assert f"stopped by signal {int(number)} in epoch" in out
    assert "Traceback" not in err
    assert len(read_log(Path("run/log.csv"))) >= 1
