"""Updates by hand: the rate of each one, and the average of the weights."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from train_setup import make_photos, run

from ltrp_timm.runtime.world import World
from ltrp_timm.train.engine import Engine
from ltrp_timm.train.folder import LOG_NAME, Log
from ltrp_timm.train.settings import Settings


def make_engine(settings: Settings, lr: float, updates_per_epoch: int) -> Engine:
    model, world = nn.Linear(1, 1, bias=False), World(0, 1, torch.device("cpu"))
    with torch.no_grad():
        model.weight.fill_(0.0)
    task = SimpleNamespace(model=model, forward=model, num_graphs=1)
    return Engine(task, settings, world, lr, updates_per_epoch)


def update(engine: Engine, step: int) -> None:
    engine.model.weight.grad = torch.ones(1, 1)
    engine.update(step)


@pytest.mark.parametrize(("warmup_epochs", "updates"), [(None, 4), (0.5, 2), (0.0, 0)])
def test_the_rate_rises_over_a_tenth_of_the_epochs_by_default(
    warmup_epochs: float | None, updates: int
) -> None:
    engine = make_engine(Settings(epochs=10, warmup_epochs=warmup_epochs), 4.0, 4)
    for done in range(40):
        cosine = 2.0 * (1.0 + math.cos(math.pi * (done - updates) / (40 - updates)))
        expected = 4.0 * done / updates if done < updates else cosine
        assert engine.rate == pytest.approx(expected), done
        update(engine, done + 1)


def test_the_published_rate_of_fine_tuning() -> None:
    """MAE's schedule: a linear warm-up of 5 epochs, then a cosine over the 45 that are left."""
    engine = make_engine(Settings(epochs=50, warmup_epochs=5, min_lr=1e-6), 1e-3, 4)
    rates = []
    for step in range(200):
        rates.append(engine.rate / 1e-3)
        update(engine, step + 1)
    assert rates[10] == pytest.approx(0.5)
    assert rates[20] == pytest.approx(1.0)
    assert rates[81] == pytest.approx(0.7427, abs=5e-5)  # epoch 20.25
    assert rates[199] < 2e-3


@pytest.mark.parametrize("sched", ["cosine", "tanh", "step", "multistep", "poly"])
def test_every_schedule_starts_at_the_peak_after_the_warm_up(sched: str) -> None:
    engine = make_engine(Settings(epochs=7, sched=sched), 1.0, 3)  # 2.1 updates of warm-up
    rates = []
    for step in range(21):
        rates.append(engine.rate)
        update(engine, step + 1)
    assert rates[:3] == pytest.approx([0.0, 1 / 2.1, 2 / 2.1])
    assert max(rates) == pytest.approx(rates[3]) == pytest.approx(1.0, abs=0.02)
    assert min(rates[3:]) > 0.0


def test_a_run_of_one_update_learns() -> None:
    engine = make_engine(Settings(epochs=1), 1.0, updates_per_epoch=1)
    update(engine, 1)
    assert engine.model.weight.item() != 0.0


def test_schedules_that_a_run_cannot_follow_are_refused() -> None:
    with pytest.raises(ValueError, match=r"warmup_epochs must be below epochs = 5, got 5\."):
        Settings(epochs=5, warmup_epochs=5)
    with pytest.raises(ValueError, match=r"sched='plateau' follows a metric.* resume exactly"):
        Settings(sched="plateau")


def test_the_average_starts_at_the_weights_of_the_first_update() -> None:
    plain: dict[str, Any] = {
        "opt": "momentum",
        "opt_args": {"momentum": 0.0},
        "sched": "none",
        "weight_decay": 0.0,
    }
    engine = make_engine(Settings(ema_decay=0.75, **plain), 1.0, updates_per_epoch=4)
    average, found = -1.0, []
    for step in range(1, 5):
        update(engine, step)
        found += [parameter.item() for parameter in engine.trained_model.parameters()]
    weights = [-1.0, -2.0, -3.0, -4.0]  # lr 1, gradient 1
    for t, (weight, value) in enumerate(zip(weights, found, strict=True)):
        decay = min(0.75, t / (10 + t))
        average = decay * average + (1 - decay) * weight
        assert value == pytest.approx(average)
    assert engine.ema is not None
    assert engine.ema.get_decay(31) == 0.75  # from 30 updates on


def test_the_average_of_a_short_run_has_learned() -> None:
    engine = make_engine(Settings(ema_decay=0.9997, sched="none"), 0.1, updates_per_epoch=44)
    for step in range(1, 45):
        update(engine, step)
    (averaged,) = engine.trained_model.parameters()
    assert (averaged / engine.model.weight).item() == pytest.approx(0.9, abs=0.05)


def test_a_log_is_written_as_it_was_read(tmp_path: Path) -> None:
    text = "epoch,step,lr,loss,val_top1\n1,4,1e-05,2.0,\n"
    (tmp_path / LOG_NAME).write_text(text)
    log = Log(tmp_path, 1, 4, Settings(tensorboard=False, progress=False), {})
    log.start_epoch(2, 2, 4, 0)
    log.end_epoch({"epoch": 2, "step": 8, "lr": 0.0, "loss": 1.5, "val_top1": None}, 2)
    assert (tmp_path / LOG_NAME).read_text() == text + "2,8,0.0,1.5,\n"


class Tracker:
    """What trackio and wandb have in common."""

    def __init__(self) -> None:
        self.started: list[dict[str, Any]] = []
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.ended = 0

    def init(self, **options: Any) -> None:
        self.started.append(options)

    def log(self, values: dict[str, float], step: int) -> None:
        self.rows.append((step, values))

    def finish(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_run_reports_to_a_tracker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    tracker = Tracker()
    monkeypatch.setitem(sys.modules, name, tracker)
    monkeypatch.setenv(f"{name.upper()}_PROJECT", "garden")
    photos = make_photos(tmp_path / "photos")
    summary = run(photos, tmp_path / "first", report_to=name, holdout=0.2)
    (started,) = tracker.started
    assert (started["project"], started["name"]) == ("garden", "first")
    assert (started["config"]["epochs"], started["config"]["images_per_update"]) == (2, 4)
    updates = [(step, row) for step, row in tracker.rows if "train/loss" in row]
    assert [step for step, _ in updates] == list(range(1, summary.steps + 1))
    epochs = [(step, row) for step, row in tracker.rows if "epoch/loss" in row]
    assert [step for step, _ in epochs] == [summary.steps // 2, summary.steps]
    assert epochs[-1][1]["epoch/loss"] == summary.metrics["loss"]
    assert tracker.ended == 1
    # a continuation may report elsewhere
    run(photos, tmp_path / "first", resume="auto", holdout=0.2)
    assert tracker.ended == 1


def test_a_tracker_that_is_missing_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    photos = make_photos(tmp_path / "photos", 8)
    with pytest.raises(ImportError, match="report_to='wandb' needs wandb: pip install wandb"):
        run(photos, tmp_path / "out", report_to="wandb")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="report_to must be one of trackio, wandb, got 'mlflow'"):
        run(photos, tmp_path / "out", report_to="mlflow")
