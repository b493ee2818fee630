"""The parts of fine-tuning: budgets, mixing, layer rates, teachers, the gate, compiling."""

import copy
import itertools
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import FAMILIES, awaken, records_arguments
from finetune_setup import PLAIN, load, make_classes, small_vit, tune
from safetensors.torch import save_file
from train_setup import distance, weights

from ltrp_timm import LTRPModel, create_ranker, drop_patches
from ltrp_timm.data.keyed import Batch
from ltrp_timm.runtime.world import World
from ltrp_timm.train.classify import ClassifyTask
from ltrp_timm.train.distill import Distillation, Student, gated, straight_through
from ltrp_timm.train.engine import make_optimizer
from ltrp_timm.train.recipe import Augmentation, KeepPlan
from ltrp_timm.train.settings import Settings

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_classes(tmp_path_factory.mktemp("data") / "photos", 8)


def batch_of(images: torch.Tensor, epoch: int = 0, update: int = 0, first: int = 0) -> Batch:
    sample = {
        "image": images,
        "index": torch.arange(first, first + len(images)),
        "real": torch.ones(len(images), dtype=torch.bool),
        "problems": [""] * len(images),
        "target": torch.arange(len(images)) % 3,
    }
    return Batch(sample, 0, epoch, CPU, update)


def test_one_ratio_of_several_is_drawn_for_each_update() -> None:
    plan = KeepPlan([0.25, 0.5, 1.0], epochs=3, seed=4)
    drawn = [plan.ratio(epoch, update) for epoch in range(3) for update in range(100)]
    for ratio in plan.ratios:
        assert 60 < drawn.count(ratio) < 140
    again = KeepPlan([0.25, 0.5, 1.0], epochs=3, seed=4)
    assert drawn == [again.ratio(epoch, update) for epoch in range(3) for update in range(100)]
    other = KeepPlan([0.25, 0.5, 1.0], epochs=3, seed=5)
    assert drawn != [other.ratio(epoch, update) for epoch in range(3) for update in range(100)]
    assert plan.count() == 3


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_a_schedule_goes_from_all_patches_to_fewer(shape: str) -> None:
    plan = KeepPlan(0.3, shape, 5, epochs=8)
    ratios = [plan.ratio(epoch, epoch % 3) for epoch in range(8)]
    assert ratios[0] == 1.0
    assert ratios[5:] == [0.3] * 3
    assert all(a > b for a, b in itertools.pairwise(ratios[:6]))
    assert plan.count() == 6
    assert plan.ratio(2, 0) == plan.ratio(2, 7)
    assert KeepPlan(0.3, shape, epochs=8).ratio(4, 0) == 0.3  # half of the epochs


def test_what_is_mixed_belongs_to_the_batch() -> None:
    augmentation = Augmentation(mixup=0.8, cutmix=1.0, smoothing=0.1)
    mix = ClassifyTask(small_vit(num_classes=3), KeepPlan(1.0), augmentation).mixed
    images, state = torch.randn(4, 3, 8, 8), (random.getstate(), torch.get_rng_state())
    before = np.random.get_state()[1].copy()
    batch = batch_of(images)
    first, again = mix(batch), mix(batch_of(images))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert torch.allclose(first[1].sum(1), torch.ones(4))
    for other in (batch_of(images, epoch=1), batch_of(images, first=4)):
        assert not torch.equal(mix(other)[0], first[0])
    assert torch.equal(batch.images, images)
    assert random.getstate() == state[0]
    assert torch.equal(torch.get_rng_state(), state[1])
    assert np.array_equal(np.random.get_state()[1], before)


@pytest.mark.parametrize(
    ("augmentation", "loss"),
    [
        (Augmentation(smoothing=0.0), lambda x, t: F.cross_entropy(x, t)),
        (Augmentation(smoothing=0.2), lambda x, t: F.cross_entropy(x, t, label_smoothing=0.2)),
        (
            Augmentation(smoothing=0.0, bce_loss=True),
            lambda x, t: F.binary_cross_entropy_with_logits(x, F.one_hot(t, 3).float()),
        ),
    ],
)
def test_the_loss_is_the_one_that_is_named(augmentation: Augmentation, loss: Any) -> None:
    model = drop_patches(small_vit(), keep_ratio=0.5)
    task = ClassifyTask(model, KeepPlan(0.5), augmentation)
    batch = batch_of(torch.randn(4, 3, 32, 32))
    assert torch.allclose(task.loss(model, batch), loss(model(batch.images), batch.targets))
    known = not augmentation.bce_loss
    assert (task.chance == pytest.approx(math.log(3))) if known else task.chance is None


@pytest.mark.parametrize(
    ("aa", "wrong"),
    [
        ("rand-m9-mstd0.5-inc1", ["foo", "m", "mstd", "m9x", "x1", "tfoo", "t3b", "", "9"]),
        ("rand-m9-n3-p0.5-mmax12-tweights", ["mmax", "t"]),
        ("rand-t3aw", ["m-1"]),
        ("augmix-m5-w4-d2-a1.0-b1", ["foo", "d"]),
        ("original-mstd0.5", ["foo", "mstd", "m9"]),
        ("3a", ["foo"]),
    ],
)
def test_every_part_of_a_policy_must_be_known(aa: str, wrong: list[str]) -> None:
    config = {"input_size": (3, 32, 32), "interpolation": "bicubic", "crop_pct": 1.0}
    config |= {"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_mode": "center"}
    Augmentation(aa=aa).transforms(config)
    for part in wrong:
        with pytest.raises(ValueError, match=f"^aa names no policy .* got '{aa}-{part}'"):
            Augmentation(aa=f"{aa}-{part}").transforms(config)


def test_each_keep_ratio_is_measured() -> None:
    model = drop_patches(awaken(small_vit()).eval(), keep_ratio=0.5)
    task = ClassifyTask(model, KeepPlan([0.25, 1.0]), Augmentation())
    batch = batch_of(torch.randn(6, 3, 32, 32))
    with torch.no_grad():
        found = task.measure(model, batch)
        totals = task.measure_set(World(0, 1, CPU))
        assert model.keep_ratio == 0.5
        for ratio in (0.25, 1.0):
            model.keep_ratio = ratio
            logits = model(batch.images)
            hits = (logits.argmax(1) == batch.targets).double()
            assert totals[f"top1@{ratio:g}"] == hits.mean().item()
            expected = F.cross_entropy(logits, batch.targets, reduction="none")
            assert torch.allclose(found[f"loss@{ratio:g}"], expected, atol=1e-6)
    assert not torch.equal(found["loss@0.25"], found["loss@1"])
    assert totals["top1"] == (totals["top1@0.25"] + totals["top1@1"]) / 2
    assert list(totals) == ["top1@0.25", "top1@1", "top1"]


def test_top_5_counts_five_places() -> None:
    task = ClassifyTask(small_vit(num_classes=10), KeepPlan(1.0), Augmentation())
    batch = batch_of(torch.randn(3, 3, 32, 32))  # of classes 0, 1 and 2
    logits = torch.empty(3, 10)
    for row, rank in enumerate((0, 4, 5)):
        order = [c for c in range(10) if c != row]
        order.insert(rank, row)
        logits[row, order] = -torch.arange(10.0)
    task.measure(lambda images: logits, batch)
    found = task.measure_set(World(0, 1, CPU))
    assert found == {"top1": 1 / 3, "top5": 2 / 3}


def rates(model: Any, **changes: Any) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of each trained parameter."""
    settings = Settings(weight_decay=0.05, layer_decay=0.75, **changes)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for group in make_optimizer(model, 1e-3, settings).param_groups:
        rate = group["lr"] * (group["lr_scale"] if settings.sched != "none" else 1.0)
        for parameter in group["params"]:
            name = names[id(parameter)].removeprefix("backbone.")
            found[name] = (rate, group["weight_decay"])
    return found


@pytest.mark.parametrize("family", ["vit", "eva02", "beit", "deit3"])
def test_layers_learn_at_the_rates_of_the_plain_model(family: str) -> None:
    name, changes, side = FAMILIES[family]
    vit = timm.create_model(name, img_size=side, depth=3, num_classes=7, **changes)
    plain = rates(vit)
    pruned = drop_patches(vit, ranker=create_ranker("conv", width=8, depth=1))
    assert rates(pruned) == plain
    assert len({rate for rate, _ in plain.values()}) == 5  # embedding, three blocks, head
    assert plain["head.weight"] == (1e-3, 0.05)
    assert plain["head.bias"] == (1e-3, 0.0)
    assert plain["patch_embed.proj.weight"][0] == pytest.approx(1e-3 * 0.75**4)
    pruned.ranker.requires_grad_(True)
    together = rates(pruned)
    ranker = {name: together.pop(name)[0] for name in list(together) if name.startswith("ranker.")}
    assert together == plain
    assert set(ranker.values()) == {1e-3}  # of the head: no layer of the backbone lies above it
    alone = rates(vit, sched="none")  # no schedule that would scale them
    assert all(alone[name] == pytest.approx(plain[name]) for name in plain)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_teacher_s_answers(temperature: float) -> None:
    teacher, student = awaken(small_vit()), awaken(small_vit())
    images, logits = torch.randn(2, 3, 32, 32), torch.randn(2, 3)
    distillation = Distillation(teacher, student, temperature=temperature)
    with torch.no_grad():
        wanted = teacher(images)
    p, q = (x.div(temperature).softmax(1) for x in (wanted, logits))
    expected = temperature**2 * (p * (p / q).log()).sum(1).mean()
    assert distillation.loss(images, logits, None, None) == pytest.approx(float(expected), abs=1e-5)
    assert distillation.loss(images, wanted, None, None) == pytest.approx(0.0, abs=1e-6)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_a_pruned_teacher_sees_all_patches_and_its_own_normalisation() -> None:
    teacher = drop_patches(awaken(small_vit()), keep_ratio=0.25)
    student = awaken(small_vit())
    teacher.pretrained_cfg.update(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    distillation = Distillation(teacher, student)
    pixels = torch.rand(2, 3, 32, 32)

    def normalised(cfg: dict[str, Any]) -> torch.Tensor:
        mean, std = (torch.tensor(cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
        return (pixels - mean) / std

    images = normalised(student.pretrained_cfg)
    with torch.no_grad():
        wanted = teacher.backbone(normalised(teacher.pretrained_cfg))
        unbridged = teacher.backbone(images)
    assert distillation.loss(images, wanted, None, None) == pytest.approx(0.0, abs=1e-5)
    assert distillation.loss(images, unbridged, None, None) > 1e-4


def test_tokens_are_compared_where_they_were_kept() -> None:
    vit = awaken(small_vit()).eval()
    model = drop_patches(copy.deepcopy(vit), keep_ratio=0.5).eval()
    images = torch.randn(2, 3, 32, 32)
    distillation = Distillation(copy.deepcopy(vit), model, features=2.0)
    with torch.no_grad():
        whole = vit.forward_features(images)
        logits = vit(images)
        keep = model.keep_indices(images)
        kept = torch.cat(
            [whole[:, :1], whole[:, 1:].gather(1, keep[..., None].expand(-1, -1, 32))], 1
        )
        assert distillation.loss(images, logits, kept, keep) == pytest.approx(0.0, abs=1e-5)
        assert distillation.loss(images, logits, -kept, keep) == pytest.approx(4.0, abs=1e-5)
        moved = distillation.loss(images, logits, kept.roll(1, dims=1), keep)
    assert moved > 1e-2
    distillation.check(images[:1], model)


def test_a_teacher_of_another_kind_is_refused() -> None:
    student = drop_patches(small_vit(), keep_ratio=0.5)
    with pytest.raises(ValueError, match="the teacher has 4 classes, the data has 3"):
        Distillation(small_vit(num_classes=4), student)
    wide = Distillation(small_vit(embed_dim=64), student, features=1.0)
    with pytest.raises(ValueError, match=r"tokens are \[1, 17, 64\], the student's \[1, 17, 32\]"):
        wide.check(torch.zeros(1, 3, 32, 32), student)
    large = Distillation(small_vit(img_size=64), student)
    with pytest.raises(ValueError, match="the teacher takes no images of 32x32"):
        large.check(torch.zeros(1, 3, 32, 32), student)


@records_arguments
def test_distilling_changes_what_is_learned(data: Path, tmp_path: Path) -> None:
    save_file(awaken(small_vit()).state_dict(), tmp_path / "vit.safetensors")
    tune(data, tmp_path / "teacher", checkpoint=tmp_path / "vit.safetensors", keep_ratio=None)
    before = (tmp_path / "teacher" / "model.safetensors").read_bytes()
    options = {"checkpoint": tmp_path / "vit.safetensors", "epochs": 1, "opt": "sgd", **PLAIN}
    tune(data, tmp_path / "alone", **options)
    named = f"local-dir:{tmp_path / 'teacher'}"
    cases = [
        {"distill": "self"},
        {"distill": named},
        {"distill": named, "distill_weight": 0.9},
        {"distill": named, "distill_temperature": 4.0},
        {"distill": named, "distill_features": 1.0},
    ]
    found = [weights(tmp_path / "alone")]
    for number, case in enumerate(cases):
        summary = tune(data, tmp_path / str(number), **options, **case)
        assert summary.metrics["chance"] is None
        found.append(weights(tmp_path / str(number)))
    for number, one in enumerate(found):
        assert all(distance(one, other) > 1e-7 for other in found[:number])
    assert (tmp_path / "teacher" / "model.safetensors").read_bytes() == before
    with pytest.raises(ValueError, match=r"distill.teacher \([0-9a-f]{16} there, None here\)"):
        tune(data, tmp_path / "0", **options, resume="auto")


@pytest.mark.parametrize(
    "family",
    ["vit", "registers", "dinov3", "siglip", "distilled", "beit", "cait", "relpos_cls", "naflex"],
)
def test_the_gate_lets_the_gradient_pass_and_changes_no_value(
    backbone_of: Callable[..., Any], family: str
) -> None:
    vit, images = backbone_of(family)
    ranker = create_ranker("conv", width=8, depth=1, patch_size=16)
    ranker.trained = True
    model = drop_patches(vit, ranker=ranker, keep_ratio=0.4).eval()
    with torch.no_grad():
        expected, keep = model(images), model.keep_indices(images)
    student = Student(model, gate=True)
    ranker.requires_grad_(True)
    logits, _, own = student(images)
    assert torch.equal(own, keep)
    assert torch.allclose(logits, expected, atol=1e-5)
    logits.square().sum().backward()
    assert all(float(p.grad.abs().max()) > 0 for p in ranker.parameters() if p.grad is not None)
    assert any(p.grad is not None for p in ranker.parameters())
    with torch.no_grad():  # the hook is gone
        assert torch.equal(model(images), expected)
    plain = Student(model)(images)
    assert torch.allclose(plain[0], expected, atol=1e-5)


def test_the_gradient_is_that_of_a_token_s_weight() -> None:
    """d loss / d score = p (1 - p) · d loss / d factor, the factor multiplying the token."""
    ranker = create_ranker("conv", width=8, depth=1, patch_size=8)
    model = drop_patches(
        awaken(small_vit()).double().eval(), ranker=ranker.double(), keep_ratio=0.5
    )
    ranker.requires_grad_(True)
    images = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    scores = torch.randn(1, 16, dtype=torch.float64, requires_grad=True)
    model.ranker_scores = lambda *args: scores  # type: ignore[method-assign]
    keep, factors = straight_through(model, images)

    def loss_of(factors: torch.Tensor) -> torch.Tensor:
        with gated(model, factors):
            return model(images, keep_indices=keep).square().sum()

    loss_of(factors).backward()
    assert scores.grad is not None
    kept, step = scores.detach().gather(1, keep), 1e-5
    p = torch.sigmoid(kept - kept.min())
    with torch.no_grad():
        slopes = []
        for place in range(keep.shape[1]):
            moved = torch.eye(keep.shape[1], dtype=torch.float64)[place] * step
            ones = torch.ones_like(factors)
            slopes.append((loss_of(ones + moved) - loss_of(ones - moved)) / (2 * step))
    expected = torch.zeros_like(scores).scatter(1, keep, p * (1 - p) * torch.stack(slopes))
    assert torch.allclose(scores.grad, expected, rtol=1e-4, atol=1e-7)
    assert float(expected.abs().max()) > 1e-3


@records_arguments
def test_a_ranker_learns_through_the_gate(data: Path, tmp_path: Path) -> None:
    def model() -> LTRPModel:
        torch.manual_seed(1)
        ranker = create_ranker("conv", patch_size=8, width=8, depth=1)
        return drop_patches(awaken(small_vit()), ranker=ranker, keep_ratio=0.5)

    options = {"model_kwargs": None, "img_size": None, "layer_decay": None, "epochs": 1}
    with pytest.raises(ValueError, match="the conv ranker has no trained weights"):
        tune(data, tmp_path / "frozen", model(), **options)
    before = {f"ranker.{n}": w.clone() for n, w in model().ranker.state_dict().items()}
    gate = {"train_ranker": True, "gate": "straight-through"}
    tune(data, tmp_path / "run", model(), **options, **gate)
    after = weights(tmp_path / "run")
    assert distance(before, {name: after[name] for name in before}) > 1e-4
    assert load(tmp_path / "run").ranker.trained
    with pytest.raises(ValueError, match="drop compile"):
        tune(data, tmp_path / "new", model(), **options, **gate, compile=True)
    with pytest.raises(ValueError, match="train_ranker needs a pruned model"):
        tune(data, tmp_path / "new", small_vit(), **{**options, "keep_ratio": None}, **gate)


@records_arguments
def test_each_ratio_is_compiled_once(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.utils import counters

    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: original(model, backend="aot_eager"))
    options = {"keep_ratio": [0.25, 0.5, 1.0], "opt": "sgd", **PLAIN}
    tune(data, tmp_path / "eager", **options)
    torch._dynamo.reset()
    counters.clear()
    strict = {"recompile_limit": 1, "fail_on_recompile_limit_hit": True}
    with torch._dynamo.config.patch(**strict):
        tune(data, tmp_path / "compiled", **options, compile=True)
    assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"]
    assert distance(weights(tmp_path / "eager"), weights(tmp_path / "compiled")) < 1e-5
