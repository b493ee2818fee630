"""Fine-tuning that is broken off goes on exactly: mixing, ratios and averages included."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import records_arguments
from finetune_setup import make_classes, small_vit, tune
from train_setup import same_bits, weights

from ltrp_timm.train import NonFiniteLossError
from ltrp_timm.train.folder import read_state
from ltrp_timm.train.loop import Trainer

# on a machine of one core
pytestmark = [
    records_arguments,
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
]
LONG = {
    "epochs": 3,
    "ema_decay": 0.9,
    "keep_ratio": [0.25, 0.5, 1.0],
    "mixup": 0.8,
    "cutmix": 1.0,
    "drop_path": 0.3,
    "accumulate": 2,
    "batch_size": 4,
    "clip_grad": 1.0,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_classes(folder / "train", 12)
    make_classes(folder / "val", 2)
    return folder


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 3 epochs of 4 updates that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert tune(data, folder, **LONG).steps == 12
    return folder


class CrashError(Exception):
    pass


def state(folder: Path) -> dict[str, Any]:
    return read_state(folder / "checkpoint.pt")


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """A tree by paths."""
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, (list, tuple)):
        parts = dict(enumerate(value)).items()
    else:
        return {name: value}
    return {k: v for key, part in parts for k, v in flat(part, f"{name}/{key}").items()}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    a, b = flat(a), flat(b)
    return a.keys() == b.keys() and all(
        torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key]
        for key in a
    )


@pytest.mark.parametrize(("step", "every", "workers"), [(2, 1, 2), (5, 3, 0), (9, None, 0)])
def test_a_run_that_broke_off_goes_on_exactly(
    data: Path, tmp_path: Path, whole: Path, step: int, every: int | None, workers: int
) -> None:
    folder = tmp_path / "run"

    def crash(self: Any, *args: Any) -> Any:
        if self.progress.step == step:
            raise CrashError
        return original(self, *args)

    original = Trainer.train_update
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_update", crash)
        with pytest.raises(CrashError):
            tune(data, folder, checkpoint_steps=every, **LONG)
    assert not same(state(folder), state(whole))
    options = {**LONG, "num_workers": workers}
    tune(data, folder, resume="auto", checkpoint_steps=every, **options)
    assert same(state(folder), state(whole))
    assert same_bits(weights(folder), weights(whole))
    assert same_bits(weights(folder / "best"), weights(whole / "best"))


def test_batches_may_be_cut_up_otherwise_where_nothing_is_mixed(data: Path, tmp_path: Path) -> None:
    """Also what is drawn for an update, the keep ratio, stays the same."""
    options = {**LONG, "mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0, "opt": "sgd", "epochs": 1}
    tune(data, tmp_path / "parts", **options)
    tune(data, tmp_path / "whole", **{**options, "accumulate": 1, "batch_size": 8})
    parts, whole = weights(tmp_path / "parts"), weights(tmp_path / "whole")
    assert max(float((parts[name] - whole[name]).abs().max()) for name in parts) < 1e-5


def test_a_schedule_goes_on_too(data: Path, tmp_path: Path) -> None:
    options = {"keep_schedule": "cosine", "keep_schedule_epochs": 2, "epochs": 3}

    def stop(self: Any, *args: Any) -> Any:
        if self.progress.step == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args)

    tune(data, tmp_path / "whole", **options)
    original = Trainer.train_update
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_update", stop)
        assert tune(data, tmp_path / "cut", **options).stopped_by == signal.SIGTERM
    assert state(tmp_path / "cut")["progress"]["step"] == 9
    tune(data, tmp_path / "cut", resume="auto", **options)
    assert same_bits(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_other_weights_are_another_configuration(data: Path, tmp_path: Path) -> None:
    options = {"model_kwargs": None, "img_size": None, "epochs": 1}
    tune(data, tmp_path / "run", small_vit(), **options)
    vit = small_vit()
    with torch.no_grad():
        vit.cls_token += 1
    with pytest.raises(ValueError, match=r"start \([0-9a-f]{16} there, [0-9a-f]{16} here\)"):
        tune(data, tmp_path / "run", vit, resume="auto", **options)
    tune(data, tmp_path / "run", small_vit(), resume="auto", **options)  # finished


def test_a_loss_that_is_not_finite_ends_the_run(data: Path, tmp_path: Path) -> None:
    def poison(self: Any, *args: Any) -> Any:
        if self.progress.step == 2:
            with torch.no_grad():
                self.engine.model.backbone.head.bias.fill_(float("nan"))
        return original(self, *args)

    original = Trainer.train_update
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_update", poison)
        with pytest.raises(NonFiniteLossError, match="the loss is nan at step 3"):
            tune(data, tmp_path / "run", checkpoint_steps=1)
    assert state(tmp_path / "run")["progress"]["step"] == 2
