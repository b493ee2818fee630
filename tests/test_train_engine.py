"""Updates by hand: the rate of each one, and the average of the weights."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from ltrp_timm.runtime.world import World
from ltrp_timm.train.engine import Engine
from ltrp_timm.train.settings import Settings


def make_engine(settings: Settings, lr: float, updates_per_epoch: int) -> Engine:
    model, world = nn.Linear(1, 1, bias=False), World(0, 1, torch.device("cpu"))
    with torch.no_grad():
        model.weight.fill_(0.0)
    return Engine(model, model, settings, world, lr=lr, updates_per_epoch=updates_per_epoch)


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
    for weight, value in zip(weights, found, strict=True):
        average = 0.75 * average + 0.25 * weight
        assert value == pytest.approx(average)
