"""Two processes, as torchrun starts them, do what one does with twice the batch."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import records_arguments
from finetune_setup import make_classes
from processes import Done, run_command, run_two
from torch import Tensor
from train_setup import distance, make_photos, tiny_teacher, weights

from ltrp_timm.train.folder import read_log

# they shift all scores alike, so that their gradient is 0; AdamW makes steps of its rounding noise
SHIFTS = ("head.bias", "norm.bias")
COMMON = [
    *("--ranker-args", "width=16", "depth=1", "--mask-ratio", "0.5", "--epochs", "1"),
    *("--lr", "0.01", "--warmup-epochs", "0", "--device", "cpu", "--num-workers", "0"),
    *("--no-tensorboard", "--no-progress", "--ema-decay", "0.5"),
]


def train(
    folder: Path, processes: int, *flags: str, check: bool = True, script: Path | None = None
) -> str:
    arguments = ["train-ranker", *COMMON]
    return launch(arguments, folder, processes, *flags, check=check, script=script)


def launch(
    arguments: list[str],
    folder: Path,
    processes: int,
    *flags: str,
    check: bool = True,
    script: Path | None = None,
) -> str:
    command = [*arguments, "--output", str(folder), *flags]
    if processes == 1:
        done = run_command(*command)
    elif script is None:
        done = run_two(*command)
    else:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        line = [sys.executable, *launcher, str(script), *command]
        ran = subprocess.run(line, capture_output=True, text=True, check=False, timeout=300)
        done = Done(ran.returncode, ran.stdout, ran.stderr)
    assert not check or done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_photos(folder / "photos", 23)  # 5 updates of 4, 3 images are left over
    make_photos(folder / "held", 5)  # 3 for one process, 2 for the other
    (folder / "held" / "bad.png").write_text("text")
    tiny_teacher().save(folder / "teacher")
    return folder


def without_shifts(folder: Path) -> dict[str, Tensor]:
    return {name: value for name, value in weights(folder).items() if name not in SHIFTS}


def test_two_processes_are_one_with_twice_the_batch(folder: Path) -> None:
    data = ["--data", str(folder / "photos"), "--val-data", str(folder / "held")]
    data += ["--teacher", str(folder / "teacher")]
    train(folder / "two", 2, *data, "--batch-size", "2")
    train(folder / "one", 1, *data, "--batch-size", "4")
    train(folder / "half", 1, *data, "--batch-size", "2")
    two, one, half = (without_shifts(folder / name) for name in ("two", "one", "half"))
    assert distance(two, one) <= 1e-4  # sums in another order, over five updates
    assert distance(half, one) > 1e-3
    rows = [read_log(folder / name / "log.csv")[-1] for name in ("two", "one")]
    assert rows[0]["step"] == rows[1]["step"] == 5
    for name in ("loss", "val_loss", "val_spearman", "val_ndcg"):  # each held-out image once
        assert rows[0][name] == pytest.approx(rows[1][name], abs=1e-4), name
    assert [row["unreadable"] for row in rows] == [1, 1]


@pytest.mark.slow
def test_accumulating_in_two_processes(folder: Path) -> None:
    data = ["--data", str(folder / "photos"), "--teacher", str(folder / "teacher")]
    data += ["--holdout", "0"]
    train(folder / "parts", 2, *data, "--batch-size", "1", "--accumulate", "2", "--opt", "sgd")
    train(folder / "whole", 1, *data, "--batch-size", "4", "--opt", "sgd")
    assert distance(weights(folder / "parts"), weights(folder / "whole")) <= 1e-6


LATE = """
import os, time
from pathlib import Path
from ltrp_timm.commands import main
from ltrp_timm.train.loop import Trainer

begin = Trainer.start

def late(self):
    for _ in range(30 * int(os.environ["RANK"])):  # until the other one has gone ahead, or 3 s
        if self.checkpoint.exists():
            break
        time.sleep(0.1)
    begin(self)

Trainer.start = late
raise SystemExit(main())
"""


@pytest.mark.slow
def test_a_process_that_comes_late_starts_with_the_others(folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "late.py"
    script.write_text(LATE)
    data = ["--data", str(folder / "photos"), "--teacher", str(folder / "teacher")]
    data += ["--holdout", "0", "--batch-size", "2"]
    train(folder / "late", 2, *data, script=script)
    assert read_log(folder / "late" / "log.csv")[-1]["step"] == 5


def test_what_is_wrong_is_said_once_and_nothing_waits(folder: Path) -> None:
    data = ["--data", str(folder / "photos"), "--teacher", str(folder / "teacher")]
    (folder / "taken").mkdir()
    (folder / "taken" / "config.json").touch()
    out = train(folder / "taken", 2, *data, check=False)  # known to the first process alone
    assert out.count("taken already holds config.json; choose another") == 1
    make_photos(folder / "single", 1)
    out = train(folder / "new", 2, "--data", str(folder / "single"), *data[2:], check=False)
    assert out.count("1 training images are too few for 2 processes") == 1
    assert not (folder / "new").exists()


def finetune(folder: Path, processes: int, *flags: str) -> str:
    """Two processes draw other drop paths and mix other pairs than one does: both are off."""
    common = ["--img-size", "32", "--epochs", "2", "--warmup-epochs", "0", "--device", "cpu"]
    common += ["--model-kwargs", "patch_size=8", "embed_dim=32", "depth=2", "num_heads=2"]
    common += ["--keep-ratio", "0.25", "0.5", "1", "--drop-path", "0", "--ema-decay", "0.5"]
    common += ["--lr", "0.01", "--num-workers", "0", "--no-tensorboard", "--no-progress"]
    return launch(["finetune", "vit_tiny_patch16_224", *common], folder, processes, *flags)


@records_arguments
def test_fine_tuning_in_two_processes(folder: Path) -> None:
    make_classes(folder / "classes", 7)  # 21: 3 updates of 6, 3 images are left over
    make_classes(folder / "held_classes", 1)  # 2 for one process, 1 for the other
    data = ["--data", str(folder / "classes"), "--val-data", str(folder / "held_classes")]
    finetune(folder / "tune_two", 2, *data, "--batch-size", "3", "--opt", "sgd")
    finetune(folder / "tune_one", 1, *data, "--batch-size", "6", "--opt", "sgd")
    finetune(folder / "tune_half", 1, *data, "--batch-size", "3", "--opt", "sgd")
    two, one, half = (weights(folder / f"tune_{name}") for name in ("two", "one", "half"))
    assert distance(two, one) <= 1e-5
    assert distance(half, one) > 1e-3
    rows = [read_log(folder / f"tune_{name}" / "log.csv")[-1] for name in ("two", "one")]
    assert rows[0]["step"] == rows[1]["step"] == 6
    for name in ("loss", "val_loss@0.25", "val_top1", "val_loss@1"):
        assert rows[0][name] == pytest.approx(rows[1][name], abs=1e-5), name
