"""Training a ranker: it learns, every option does what it says, bad input is refused in time."""

import itertools
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torchvision.datasets import ImageFolder
from train_setup import QUIET, TINY, distance, make_photos, run, same_bits, tiny_teacher, weights

import ltrp_timm
from ltrp_timm.data.sources import Sources
from ltrp_timm.metrics import ndcg, spearman
from ltrp_timm.runtime.world import World
from ltrp_timm.train import NonFiniteLossError, train_ranker
from ltrp_timm.train.folder import read_log
from ltrp_timm.train.ranker import LOSSES
from ltrp_timm.train.recipe import crop_transforms
from ltrp_timm.train.targets import Targets

CPU = torch.device("cpu")
SMALL = {
    **QUIET,
    "teacher": None,
    "distill_from": "contrast",
    "img_size": 32,
    "ranker_args": {"width": 16, "depth": 1, "patch_size": 8},
}
VIT = {"embed_dim": 32, "depth": 1, "num_heads": 2}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photos(tmp_path_factory.mktemp("data") / "photos")


def test_it_learns_and_the_folder_loads(photos: Path, tmp_path: Path) -> None:
    summary = run(photos, tmp_path / "run", epochs=12, holdout=0.2)
    rows = read_log(tmp_path / "run" / "log.csv")
    assert [row["epoch"] for row in rows] == list(range(1, 13))
    assert rows[0]["chance"] == pytest.approx(math.log(math.factorial(8)), abs=1e-4)
    assert rows[-1]["val_loss"] < rows[-1]["chance"] - 1.0 < rows[0]["loss"]
    assert rows[-1]["val_spearman"] > 0.5
    assert summary.steps == 12 * 4
    assert summary.metrics == rows[-1]
    ranker = ltrp_timm.create_ranker("conv", pretrained=tmp_path / "run")
    assert ranker.trained
    assert ranker.patch_size == (8, 8)  # the teacher's
    best = max(rows, key=lambda row: row["val_spearman"])
    assert (tmp_path / "run" / "best" / "model.safetensors").is_file()
    assert best["val_spearman"] >= rows[-1]["val_spearman"]


def test_the_held_out_metric_is_that_of_the_saved_ranker(photos: Path, tmp_path: Path) -> None:
    held = make_photos(tmp_path / "held", 5)
    names = ["contrast", "random"]
    summary = run(photos, tmp_path / "run", val_data=held, batch_size=2, compare=names)
    run(photos, tmp_path / "plain", val_data=held, batch_size=2)
    assert same_bits(*(weights(tmp_path / name) for name in ("run", "plain")))
    from ltrp_timm.data.images import Images, open_dataset
    from ltrp_timm.data.keyed import HELD_OUT, Batch, KeyedImages
    from ltrp_timm.train.recipe import crop_transforms
    from ltrp_timm.train.targets import Targets

    targets = Targets(tiny_teacher(), mask_ratio=0.5, scoring={}, device=torch.device("cpu"))
    _, transform = crop_transforms((32, 32), targets.mean, targets.std)
    images = KeyedImages(Images(open_dataset(held)), range(5), transform, 0, (3, 32, 32))
    sample = torch.utils.data.default_collate([images[HELD_OUT, place] for place in range(5)])
    batch = Batch(sample, 0, HELD_OUT, torch.device("cpu"))
    lists = targets.draw(batch)
    ranker = ltrp_timm.create_ranker("conv", pretrained=tmp_path / "run").eval()
    others = {f"_{name}": ltrp_timm.create_ranker(name, patch_size=8) for name in names}
    for name, judged in {"": ranker, **others}.items():
        with torch.no_grad():
            scores = judged(batch.images).flatten(1).gather(1, lists.indices)
        for metric, of in (("spearman", spearman), ("ndcg", ndcg)):
            expected = of(scores, lists.scores[0][1]).item()
            assert summary.metrics[f"val_{metric}{name}"] == pytest.approx(expected, abs=1e-6)
    assert len({summary.metrics[f"val_spearman{name}"] for name in ("", *others)}) == 3


def test_a_dry_run_says_what_would_be_done(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def rehearse(**changes: Any) -> str:
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        options = {"epochs": 3, "holdout": 0.2, "resume": "auto", "dry_run": True, **changes}
        run(photos, tmp_path / "run", **options)
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
        return capsys.readouterr().out.replace(str(tmp_path), "")

    settings = "epochs, 4 updates of 4 images an epoch, 4 images held out, learning rate 0.01, "
    settings += "fp32, 1 process on cpu\n"
    assert rehearse() == f"/run: new\n3 {settings}"
    run(photos, tmp_path / "run", epochs=3, holdout=0.2)
    capsys.readouterr()
    assert rehearse() == f"/run: finished\n3 {settings}"
    with pytest.raises(ValueError, match=r"of another configuration: .*seed \(0 there, 1 here\)"):
        rehearse(seed=1)
    with pytest.raises(FileExistsError, match="resume='auto' continues it"):
        rehearse(resume="never")


@pytest.mark.parametrize("visible_only", [False, True])
def test_a_vit_ranker_learns(photos: Path, tmp_path: Path, visible_only: bool) -> None:
    options = {"ranker": "vit_tiny", "ranker_args": VIT, "visible_only": visible_only}
    run(photos, tmp_path / "run", epochs=10, holdout=0.2, **options)
    rows = read_log(tmp_path / "run" / "log.csv")
    assert rows[-1]["loss"] < rows[0]["chance"]
    ranker = ltrp_timm.create_ranker("vit_tiny", pretrained=tmp_path / "run")
    assert ranker.img_size == (32, 32)


def test_visible_only_shows_the_ranker_less(photos: Path, tmp_path: Path) -> None:
    options = {"ranker": "vit_tiny", "ranker_args": VIT, "epochs": 1}
    for visible_only in (False, True):
        run(photos, tmp_path / str(visible_only), visible_only=visible_only, **options)
    assert distance(*(weights(tmp_path / name) for name in ("False", "True"))) > 1e-4


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss(photos: Path, tmp_path: Path, loss: str) -> None:
    summary = run(photos, tmp_path / "run", loss=loss, epochs=1, list_size=6)
    assert math.isfinite(summary.metrics["loss"])
    assert (summary.metrics["chance"] is None) == (loss in ("pointwise_mse", "lambda_rank"))


def test_batches_are_accumulated(photos: Path, tmp_path: Path) -> None:
    for name, options in (
        ("whole", {"batch_size": 8}),
        ("parts", {"batch_size": 4, "accumulate": 2}),
        ("half", {"batch_size": 4}),
    ):
        run(photos, tmp_path / name, epochs=1, opt="sgd", **options)
    found = {name: weights(tmp_path / name) for name in ("whole", "parts", "half")}
    assert distance(found["whole"], found["parts"]) < 1e-6
    assert distance(found["whole"], found["half"]) > 1e-4


@pytest.mark.parametrize(
    "change",
    [
        {"clip_grad": 1e-3, "opt": "sgd"},
        {"ema_decay": 0.9},
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"sched": "none"},
        {"opt": "lamb"},
        {"opt_args": {"betas": [0.5, 0.5]}},
        {"seed": 1},
        {"list_size": 3},
        {"removal": "decoder"},
        {"aggregate": "max"},
        {"weight_decay": 0.9},
    ],
    ids=str,
)
def test_an_option_changes_the_weights(photos: Path, tmp_path: Path, change: Any) -> None:
    plain = {"opt": change["opt"]} if "clip_grad" in change else {}
    run(photos, tmp_path / "plain", epochs=1, **plain)
    summary = run(photos, tmp_path / "changed", epochs=1, **change)
    assert math.isfinite(summary.metrics["loss"])
    assert distance(weights(tmp_path / "plain"), weights(tmp_path / "changed")) > 1e-6


def test_compiling_changes_nothing(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def compile_quickly(model: Any) -> Any:
        calls.append(model)
        return original(model, backend="aot_eager")

    original = torch.compile
    monkeypatch.setattr(torch, "compile", compile_quickly)
    run(photos, tmp_path / "eager", epochs=1, opt="sgd")
    run(photos, tmp_path / "compiled", epochs=1, opt="sgd", compile=True)
    assert len(calls) == 1
    assert distance(weights(tmp_path / "eager"), weights(tmp_path / "compiled")) < 1e-5


def test_a_recipe_sets_what_is_not_given(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def plan(**options: Any) -> str:
        options = {**SMALL, "batch_size": 4, "dry_run": True, **options}
        train_ranker(photos, tmp_path / "run", **options)
        return capsys.readouterr().out

    assert "8 epochs, 4 updates" in plan()
    mae = {"teacher": tiny_teacher(), "distill_from": None, "img_size": None, "mask_ratio": 0.5}
    assert "20 epochs, 4 updates" in plan(**mae, ranker_args={})
    assert "learning rate 0.0005," in plan()  # 4e-3 · √(4 / 256)
    assert "learning rate 0.001," in plan(accumulate=4)
    vit = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    assert "learning rate 0.000125," in plan(ranker="vit_tiny", ranker_args=vit)
    assert "400 epochs, 4 updates" in plan(recipe="paper")
    assert "learning rate 2.34e-06," in plan(recipe="paper")  # 1.5e-4 · 4 / 256
    assert "3 epochs, " in plan(recipe="paper", epochs=3)
    assert "learning rate 0.01," in plan(recipe="paper", base_lr=0.64)


def test_a_timm_model_is_the_teacher(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module, or its name in timm; the ranker learns how its features change."""
    made = []

    def create(name: str, pretrained: bool = False, **given: Any) -> Any:
        made.append((name, pretrained))
        return create_model(name, depth=1, **given)

    create_model = timm.create_model
    vit = create_model("vit_tiny_patch16_224", depth=1, img_size=64, num_classes=3)
    before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    options = {**QUIET, "epochs": 1, "list_size": 3, "mask_ratio": 0.5}
    options["ranker_args"] = {"width": 16, "depth": 1}
    train_ranker(photos, tmp_path / "module", teacher=vit, **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in vit.state_dict().items())
    assert ltrp_timm.create_ranker("conv", pretrained=tmp_path / "module").patch_size == (16, 16)
    cells = {**options, "removal": "coarse", "list_size": 2}
    train_ranker(photos, tmp_path / "cells", teacher=vit, **cells)
    assert ltrp_timm.create_ranker("conv", pretrained=tmp_path / "cells").patch_size == (32, 32)
    mae = tiny_teacher()
    train_ranker(photos, tmp_path / "mae", teacher=mae, **cells)
    assert ltrp_timm.create_ranker("conv", pretrained=tmp_path / "mae").patch_size == (16, 16)
    monkeypatch.setattr(timm, "create_model", create)
    name = "vit_tiny_patch16_224"
    train_ranker(photos, tmp_path / "name", teacher=name, img_size=64, **options)
    assert made == [(name, True)]
    with pytest.raises(ValueError, match=r"img_size is 32, the teacher takes \(64, 64\)"):
        train_ranker(photos, tmp_path / "size", teacher=vit, img_size=32, **options)


def test_the_rate_follows_the_batch_and_the_schedule(photos: Path, tmp_path: Path) -> None:
    run(photos, tmp_path / "run", lr=None, epochs=10, recipe="paper")
    rows = read_log(tmp_path / "run" / "log.csv")
    peak = 1.5e-4 * 4 / 256
    rates = [row["lr"] for row in rows]
    assert max(rates) == pytest.approx(peak, rel=0.1)  # 1 epoch of warm-up, then a cosine
    assert rates[0] < peak
    assert rates[-1] < 0.01 * peak


def test_distilling_in_place_of_a_teacher(photos: Path, tmp_path: Path) -> None:
    options = {"teacher": None, "distill_from": "contrast", "img_size": 32}
    args = {"width": 16, "depth": 1, "patch_size": 8}
    summary = run(photos, tmp_path / "run", epochs=20, holdout=0.2, ranker_args=args, **options)
    assert summary.metrics["chance"] == pytest.approx(math.lgamma(17), abs=1e-3)  # all 16 patches
    assert summary.metrics["val_spearman"] > 0.25


class Counting(nn.Module):
    """Ranks by brightness, and counts the images that it sees."""

    seen = 0

    def forward(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return functional.avg_pool2d(images.mean(1), 8)


def test_scores_that_are_not_finite_stop_the_run(photos: Path, tmp_path: Path) -> None:
    teacher = tiny_teacher()
    torch.nn.init.constant_(teacher.norm.weight, math.nan)
    with pytest.raises(ValueError, match="the teacher's scores are not finite"):
        run(photos, tmp_path / "run", teacher=teacher)
    assert not (tmp_path / "run").exists()

    class Nowhere(Counting):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images) * math.nan

    with pytest.raises(NonFiniteLossError, match="the loss is nan"):
        run(photos, tmp_path / "run", **{**SMALL, "distill_from": Nowhere()})


def test_the_maps_of_a_crop_are_computed_once(photos: Path, tmp_path: Path) -> None:
    """16 images to train on and 4 to measure with, for 6 epochs."""
    for name, options, seen in (
        ("two", {"crops": 2}, 2 * 16 + 4),
        ("short", {}, 4 * 16 + 4),
        ("paper", {"recipe": "paper"}, 6 * 16 + 4),
        ("both", {"teacher": tiny_teacher(), "img_size": None}, 6 * 16 + 4),
    ):
        counting = Counting()
        options = {**SMALL, "distill_from": counting, "epochs": 6, "holdout": 0.2, **options}
        run(photos, tmp_path / name, **options)
        assert counting.seen == seen, name


def test_kept_maps_are_those_of_the_images(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**SMALL, "distill_from": "gradient", "epochs": 4, "crops": 2, "holdout": 0.2}
    kept = run(photos, tmp_path / "kept", **options)
    monkeypatch.setattr(Targets, "_maps", lambda self, batch: self.score_map(batch.images))
    again = run(photos, tmp_path / "again", **options)
    assert distance(weights(tmp_path / "kept"), weights(tmp_path / "again")) < 1e-4
    assert kept.metrics["val_loss"] == pytest.approx(again.metrics["val_loss"], abs=1e-3)
    fresh = run(photos, tmp_path / "fresh", **{**options, "crops": 4})
    assert distance(weights(tmp_path / "kept"), weights(tmp_path / "fresh")) > 1e-3
    assert math.isfinite(fresh.metrics["loss"])


def test_a_picture_that_cannot_be_read_has_no_map(photos: Path, tmp_path: Path) -> None:
    """The next picture stands in for it; when it is there again, its own scores are used."""

    class Flaky(ImageFolder):
        broken = True

        def __getitem__(self, index: int) -> Any:
            if index == 3 and self.broken:
                raise OSError("gone")
            return super().__getitem__(index)

    counting = Counting()
    data = Flaky(photos.parent, loader=Image.open)
    targets = Targets(
        None,
        distill_from=counting,
        img_size=32,
        patch_size=8,
        mask_ratio=0.5,
        scoring={},
        device=CPU,
    )
    train, evaluation = crop_transforms((32, 32), targets.mean, targets.std)
    sources = Sources(
        *(data, None, World(0, 1, CPU)),
        **{"train_transform": train, "eval_transform": evaluation, "img_size": (32, 32)},
        **{"batch_size": 20, "crops": 1},
    )
    for broken in (True, False, False):
        data.broken = broken
        (batch,) = sources.training_batches(0, 0)
        lists = targets.draw(batch)
        wanted = functional.avg_pool2d(batch.images.mean(1), 8).flatten(1)
        assert torch.allclose(lists.scores[0][1], wanted.gather(1, lists.indices), atol=1e-6)
    assert counting.seen == 2 * 20


def test_a_run_goes_on_exactly_with_kept_maps(photos: Path, tmp_path: Path) -> None:
    args = {"backbone": "vit_tiny_patch16_224", "blocks": 1, "img_size": 32, "patch_size": 8, **VIT}
    torch.manual_seed(0)
    teacher = ltrp_timm.create_ranker("feature_contrast", **args)
    options = {**SMALL, "distill_from": teacher, "sched": "none", "crops": 2, "holdout": 0.2}
    run(photos, tmp_path / "whole", **options, epochs=4)
    run(photos, tmp_path / "parts", **options, epochs=1)
    run(photos, tmp_path / "parts", **options, epochs=4, resume="auto")
    assert same_bits(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    with pytest.raises(ValueError, match=r"data.crops \(2 there, 3 here\)"):
        run(photos, tmp_path / "parts", **{**options, "crops": 3}, epochs=4, resume="auto")
    other = ltrp_timm.create_ranker("contrast", patch_size=8)
    with pytest.raises(ValueError, match=r"distill_from \(\['feature_contrast"):
        run(photos, tmp_path / "parts", **{**options, "distill_from": other}, resume="auto")


def test_distilling_from_any_ranker(photos: Path, tmp_path: Path) -> None:
    """Names with published weights or with those of a file, arguments, modules, folders."""
    name = "vit_tiny_patch16_224"
    vit = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    torch.manual_seed(0)
    net = timm.create_model(name, img_size=64, **vit)  # positions and head of another size
    save_file(net.state_dict(), tmp_path / "vit.safetensors")
    given = {"backbone": name, "checkpoint_path": str(tmp_path / "vit.safetensors"), "img_size": 32}
    torch.manual_seed(1)
    module = ltrp_timm.create_ranker("feature_contrast", blocks=1, **given, **vit)
    found = {}
    for key, source, args in (
        ("file", "feature_contrast", {"blocks": 1, **given, **vit}),
        ("module", module, None),
        ("two blocks", "feature_contrast", {"blocks": 2, **given, **vit}),
        ("attention", "attention", {**given, **vit}),
        ("border", "border", None),
        ("small border", "border", {"img_size": 24}),
        ("conv", "conv", None),  # its weights are part of the package
    ):
        options = {**SMALL, "distill_from": source, "distill_args": args, "epochs": 1}
        run(photos, tmp_path / key, **options)
        found[key] = weights(tmp_path / key)
    assert same_bits(found["file"], found["module"])
    keys = [key for key in found if key != "module"]
    assert all(distance(found[a], found[b]) > 1e-5 for a, b in itertools.combinations(keys, 2))


def test_the_defaults_learn_from_a_ranker(tmp_path: Path) -> None:
    """On 200 pictures; at the published rate hardly anything is learned in as many epochs."""
    data = make_photos(tmp_path / "photos", 200)
    options = {**QUIET, "teacher": None, "distill_from": "border", "img_size": 32, "holdout": 0.2}
    options["ranker_args"] = {"patch_size": 8}
    found = train_ranker(data, tmp_path / "short", **options).metrics
    slow = train_ranker(data, tmp_path / "paper", recipe="paper", epochs=8, **options).metrics
    gains = [row["chance"] - row["val_loss"] for row in (found, slow)]
    assert found["val_spearman"] > 0.5
    assert gains[0] > 5 * gains[1]


def test_distilling_beside_a_teacher_and_going_on_from_a_ranker(
    photos: Path, tmp_path: Path
) -> None:
    run(photos, tmp_path / "slow", ranker="vit_tiny", ranker_args=VIT, epochs=1)
    run(photos, tmp_path / "plain", epochs=1)
    for weight in (0.5, 0.01):
        distill = {"distill_from": tmp_path / "slow", "distill_weight": weight}
        run(photos, tmp_path / f"both{weight}", epochs=1, opt="sgd", **distill)
    run(photos, tmp_path / "alone", epochs=1, opt="sgd")
    near, far = (
        distance(weights(tmp_path / "alone"), weights(tmp_path / f"both{weight}"))
        for weight in (0.01, 0.5)
    )
    assert 0 < near < far
    run(photos, tmp_path / "on", epochs=1, init_from=tmp_path / "plain", lr=1e-12, sched="none")
    assert distance(weights(tmp_path / "plain"), weights(tmp_path / "on")) < 1e-6


def test_another_grid_is_bridged(photos: Path, tmp_path: Path) -> None:
    args = {"width": 16, "depth": 1, "patch_size": 4}
    summary = run(photos, tmp_path / "run", ranker_args=args, epochs=8, holdout=0.2)
    assert summary.metrics["loss"] < summary.metrics["chance"] - 0.5


def test_pictures_and_curves(photos: Path, tmp_path: Path) -> None:
    run(photos, tmp_path / "run", plot=True)
    for name, least in (("pictures.png", 600), ("curves.png", 1000)):
        with Image.open(tmp_path / "run" / name) as picture:
            assert picture.width > least
            assert len(np.unique(np.asarray(picture.convert("L")))) > 20


def test_tensorboard_gets_events(photos: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    run(photos, tmp_path / "run", epochs=1, tensorboard=True)
    assert [name for name in os.listdir(tmp_path / "run") if "tfevents" in name]


def test_global_random_numbers_are_left_alone(photos: Path, tmp_path: Path) -> None:
    teacher = tiny_teacher()
    torch.manual_seed(5)
    np.random.seed(5)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(5)
    np.random.seed(5)
    run(photos, tmp_path / "run", epochs=1, teacher=teacher)
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])


def test_the_ranker_changes_what_is_kept(photos: Path, tmp_path: Path) -> None:
    import timm

    run(photos, tmp_path / "run", epochs=4)
    keeps = []
    for source in (None, tmp_path / "run"):
        vit = timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, num_classes=0
        )
        ranker = ltrp_timm.create_ranker("conv", patch_size=8) if source is None else "conv"
        with pytest.warns(UserWarning, match="no trained weights") if source is None else _quiet():
            model = ltrp_timm.drop_patches(
                vit, ranker=ranker, ranker_weights=source, keep_ratio=0.5
            )
            torch.manual_seed(0)
            keeps.append(model.keep_indices(torch.randn(4, 3, 32, 32)))
    assert not torch.equal(*keeps)


def _quiet() -> Any:
    import contextlib

    return contextlib.nullcontext()


def damaged(folder: Path) -> Path:
    folder.mkdir()
    (folder / "a.png").write_text("no image")
    (folder / "b.jpg").touch()
    return folder


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"data": "missing"}, FileNotFoundError, "missing does not exist"),
        ({"data": "empty"}, ValueError, "empty cannot be read as a data set: Found 0 images"),
        ({"data": "damaged"}, ValueError, r"none of \d images can be read; a.png: is not an image"),
        ({"data": "small"}, ValueError, "4x4 pixels, smaller than a patch of 8"),
        ({"batch_size": 30}, ValueError, "needs more than the 19 training images"),
        ({"accumulate": 20}, ValueError, "19 training images are too few for 1 processes"),
        ({"mask_ratio": 0.9}, ValueError, "mask_ratio = 0.9 leaves 1 of 16 patches visible"),
        ({"mask_ratio": 1.5}, ValueError, r"mask_ratio must be in \(0, 1\), got 1.5"),
        ({"list_size": 1}, ValueError, "list_size must be at least 2, got 1"),
        ({"teacher": None}, ValueError, "a ranker needs a teacher, or distill_from"),
        ({"teacher": "no/such.pth"}, FileNotFoundError, "no/such.pth does not exist"),
        ({"img_size": 64}, ValueError, r"img_size is 64, the teacher takes \(32, 32\)"),
        ({"ranker": "contrast", "ranker_args": {}}, ValueError, "contrast ranker has no weights"),
        ({"ranker": "nonsense"}, ValueError, "ranker must be one of"),
        ({"ranker_args": {"nonsense": 1}}, TypeError, "nonsense"),
        ({"visible_only": True}, ValueError, "visible_only is for rankers that can leave"),
        ({"loss": "nonsense"}, ValueError, "loss must be one of list_mle"),
        ({"removal": "nonsense"}, ValueError, "removal must be one of"),
        ({"metric": "nonsense"}, ValueError, "metric must be one of"),
        (
            {"init_from": "missing"},
            FileNotFoundError,
            "missing does not exist",
        ),
        ({"distill_from": "vit_tiny"}, ValueError, "vit_tiny ranker must be trained"),
        (
            {"distill_from": Counting(), "distill_args": {"block": 1}},
            ValueError,
            "distill_args go with a ranker's name or folder",
        ),
        ({"distill_from": "border", "distill_args": {"nonsense": 1}}, TypeError, "nonsense"),
        ({"distill_args": {"block": 1}}, ValueError, "distill_args need distill_from"),
        ({"recipe": "nonsense"}, ValueError, "recipe must be one of short, paper, got 'nonsense'"),
        ({"crops": 0}, ValueError, "crops must be at least 1, got 0"),
        ({"lr_base_scale": "cubic"}, ValueError, "lr_base_scale must be one of linear, sqrt"),
        ({"distill_from": "contrast", "distill_weight": 1.0}, ValueError, "distill_weight must"),
        ({"epochs": 0}, ValueError, "epochs must be at least 1, got 0"),
        ({"lr": -1.0}, ValueError, "lr must be above 0, got -1.0"),
        ({"lr": math.nan}, ValueError, "lr must be above 0, got nan"),
        ({"holdout": 1.0}, ValueError, r"holdout must be in \[0, 1\), got 1.0"),
        ({"ema_decay": 1.0}, ValueError, "ema_decay must be in"),
        ({"precision": "fp8"}, ValueError, "precision must be one of fp32, bf16, fp16"),
        ({"resume": "always"}, ValueError, "resume must be one of never, auto"),
        ({"opt": "nonsense"}, ValueError, "nonsense"),
        ({"sched": "nonsense"}, ValueError, "nonsense"),
        ({"device": "nonsense"}, ValueError, "device 'nonsense' cannot be used"),
        ({"nonsense": 1}, TypeError, "no such argument: nonsense; settings are epochs"),
        ({"val_data": "missing"}, FileNotFoundError, "missing does not exist"),
        ({"compare": ["vit_tiny"]}, ValueError, "the vit_tiny ranker must be trained"),
    ],
    ids=str,
)
def test_bad_input_is_refused_before_anything_is_written(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    error: type[Exception],
    text: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("small").mkdir()
    damaged(Path("damaged"))
    Image.new("RGB", (4, 4)).save("small/a.png")
    options = {"data": photos, **change}
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=text) as caught:
        run(options.pop("data"), Path("run"), **options)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_ranker_of_another_name_is_no_beginning(photos: Path, tmp_path: Path) -> None:
    run(photos, tmp_path / "conv", epochs=1)
    with pytest.raises(ValueError, match="holds a 'conv' ranker, not 'vit_tiny'"):
        run(photos, tmp_path / "run", ranker="vit_tiny", init_from=tmp_path / "conv")
    args = {**VIT, "patch_size": 16}
    with pytest.raises(ValueError, match="visible_only needs one grid"):
        run(photos, tmp_path / "run", ranker="vit_tiny", ranker_args=args, visible_only=True)


def test_nothing_is_overwritten(photos: Path, tmp_path: Path) -> None:
    run(photos, tmp_path / "run", epochs=1)
    before = weights(tmp_path / "run")
    with pytest.raises(FileExistsError, match="resume='auto' continues it"):
        run(photos, tmp_path / "run", epochs=1, seed=1)
    assert same_bits(before, weights(tmp_path / "run"))
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="is not a folder"):
        run(photos, tmp_path / "file", epochs=1)
    other = tmp_path / "other"
    ltrp_timm.create_ranker("conv").save(other)
    with pytest.raises(FileExistsError, match=r"already holds config.json and model.safetensors"):
        train_ranker(photos, other, teacher=tiny_teacher(), **{**TINY, **QUIET, "resume": "auto"})
