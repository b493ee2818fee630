"""Fine-tuning: it learns, its folder loads, every option does what it says."""

import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import records_arguments
from finetune_setup import NAMES, PLAIN, TINY, load, make_classes, small_vit, tune
from PIL import Image
from safetensors.torch import save_file
from train_setup import distance, same_bits, weights

import ltrp_timm
from ltrp_timm import LTRPModel
from ltrp_timm.data.labels import open_labelled
from ltrp_timm.runtime.keyed_rng import seeded
from ltrp_timm.train import finetune
from ltrp_timm.train.finetune import HEAD_STD
from ltrp_timm.train.folder import read_log
from ltrp_timm.train.recipe import split_options

pytestmark = records_arguments


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training images, and beside them held-out ones."""
    folder = tmp_path_factory.mktemp("data")
    make_classes(folder / "train")
    make_classes(folder / "val", 3)
    return folder


def accuracy(model: Any, folder: Path) -> float:
    """Share of the images of a folder whose class a model names, by timm's own transform."""
    transform = timm.data.create_transform(**model.data_config(), is_training=False)
    images = open_labelled(folder)
    items = [images.read_item(index) for index in range(len(images))]
    with torch.no_grad():
        logits = model(torch.stack([transform(picture) for picture, _ in items]))
    return float((logits.argmax(1) == torch.tensor([number for _, number in items])).float().mean())


def test_it_learns_and_the_folder_loads(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = tune(data, tmp_path / "run", epochs=8, layer_decay=None, **PLAIN)
    rows = read_log(tmp_path / "run" / "log.csv")
    assert summary.steps == 8 * 5
    assert summary.metrics == rows[-1]
    assert rows[0]["chance"] == pytest.approx(math.log(3), abs=1e-4)
    assert rows[-1]["loss"] < 0.7 < rows[0]["loss"]
    assert rows[-1]["val_top1"] > 0.8
    model = load(tmp_path / "run")
    assert isinstance(model, LTRPModel)
    assert (model.num_classes, model.keep_ratio, model.ranker.name) == (3, 0.5, "border")
    assert tuple(model.pretrained_cfg["label_names"]) == NAMES
    assert accuracy(model, data / "val") == pytest.approx(rows[-1]["val_top1"], abs=1e-6)
    best = load(tmp_path / "run" / "best")
    assert accuracy(best, data / "val") == pytest.approx(max(row["val_top1"] for row in rows))
    out = capsys.readouterr().out
    assert "held-out images are those of" in out
    assert "weights: random: this trains from the start" in out
    assert "head: a new one, for 3 classes" in out
    assert "border keeps 0.5 of the patches; 5 updates of 6 images an epoch, 9 images" in out


def test_a_plain_model_is_trained_as_it_is(data: Path, tmp_path: Path) -> None:
    tune(data, tmp_path / "plain", keep_ratio=None)
    tune(data, tmp_path / "whole", keep_ratio=1.0)
    tune(data, tmp_path / "pruned", keep_ratio=1.0, ranker="contrast")
    tune(data, tmp_path / "fewer", keep_ratio=0.5)
    plain = weights(tmp_path / "plain")
    assert same_bits(plain, weights(tmp_path / "whole"))
    whole, fewer = (
        {name.removeprefix("backbone."): w for name, w in weights(tmp_path / folder).items()}
        for folder in ("pruned", "fewer")
    )
    assert same_bits(plain, whole)  # all patches: the same run behind the front-end
    assert distance(plain, fewer) > 1e-3
    model = load(tmp_path / "plain")
    assert type(model).__name__ == "VisionTransformer"
    assert tuple(model.pretrained_cfg["label_names"]) == NAMES
    log = read_log(tmp_path / "plain" / "log.csv")
    assert accuracy(ltrp_timm.drop_patches(model, keep_ratio=1.0), data / "val") == pytest.approx(
        log[-1]["val_top1"], abs=1e-6
    )


def test_the_published_defaults() -> None:
    recipe, augmentation, settings = split_options({})
    assert (settings.epochs, settings.base_lr, settings.min_lr) == (50, 1e-3, 1e-6)
    assert (settings.weight_decay, settings.layer_decay) == (0.05, 0.75)
    assert (settings.opt, dict(settings.opt_args or {})) == ("adamw", {"betas": (0.9, 0.999)})
    assert (settings.sched, settings.warmup_epochs) == ("cosine", None)  # a tenth: 5 of 50
    assert (recipe.drop_path, recipe.train_ranker) == (0.1, False)
    assert (augmentation.aa, augmentation.reprob) == ("rand-m9-mstd0.5-inc1", 0.25)
    assert (augmentation.smoothing, augmentation.mixup, augmentation.cutmix) == (0.1, 0.0, 0.0)
    assert HEAD_STD == 2e-5
    assert split_options({"opt": "sgd"})[2].opt_args is None


@pytest.mark.parametrize(
    "change",
    [
        {"aa": "none"},
        {"reprob": 1.0},
        {"smoothing": 0.0},
        {"drop_path": 0.5},
        {"mixup": 0.8},
        {"cutmix": 1.0},
        {"mixup": 0.8, "cutmix": 1.0, "mixup_mode": "elem"},
        {"bce_loss": True},
        {"hflip": 0.0},
        {"scale": (0.9, 1.0)},
        {"aa": "none", "color_jitter": 0.4},
        {"layer_decay": None},
        {"layer_decay": 0.2},
        {"ema_decay": 0.9},
        {"accumulate": 2},
        {"precision": "bf16"},
        {"keep_ratio": 0.25},
        {"keep_ratio": [0.25, 1.0]},
        {"keep_schedule": "linear"},
        {"selection": "random"},
        {"ranker": "gradient"},
        {"seed": 1},
    ],
    ids=str,
)
def test_an_option_changes_the_weights(
    data: Path, tmp_path: Path, base: dict[str, Any], change: dict[str, Any]
) -> None:
    summary = tune(data, tmp_path / "changed", **change)
    assert math.isfinite(summary.metrics["loss"])
    assert distance(base, weights(tmp_path / "changed")) > 1e-6


@pytest.fixture(scope="module")
def base(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("base") / "run"
    tune(data, folder)
    return weights(folder)


@pytest.mark.parametrize("change", [{"grad_checkpointing": True}, {"channels_last": True}], ids=str)
def test_what_saves_memory_changes_nothing(
    data: Path, tmp_path: Path, base: dict[str, Any], change: dict[str, Any]
) -> None:
    tune(data, tmp_path / "changed", **change)
    assert distance(base, weights(tmp_path / "changed")) < 1e-5


def test_mixing_ends_when_it_is_told_to(data: Path, tmp_path: Path) -> None:
    mixed = {"mixup": 0.8, "smoothing": 0.1, "epochs": 1}
    tune(data, tmp_path / "plain", epochs=1)
    tune(data, tmp_path / "mixed", **mixed)
    tune(data, tmp_path / "off", **mixed, mixup_off_epoch=1)  # epochs count from 0
    assert same_bits(weights(tmp_path / "mixed"), weights(tmp_path / "off"))
    tune(data, tmp_path / "two", **{**mixed, "epochs": 2})
    tune(data, tmp_path / "one", **{**mixed, "epochs": 2}, mixup_off_epoch=1)
    assert distance(weights(tmp_path / "two"), weights(tmp_path / "one")) > 1e-6


def test_the_head_stays_where_it_fits(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tune(data, tmp_path / "first", **PLAIN)
    still = {"model_kwargs": None, "img_size": None, "lr": 1e-12, "sched": "none", "epochs": 1}
    source = f"local-dir:{tmp_path / 'first'}"
    tune(data, tmp_path / "again", source, **still)
    assert "head: that of the weights, for 3 classes" in capsys.readouterr().out
    assert distance(weights(tmp_path / "first"), weights(tmp_path / "again")) < 1e-6
    other = make_classes(tmp_path / "other", 6, ("blue", "green", "yellow"))
    more = make_classes(tmp_path / "more", 6, ("a", "b", "c", "d"))
    for folder, count in ((other, 3), (more, 4)):
        tune(folder, tmp_path / f"on_{folder.name}", source, **still)
        assert f"head: a new one, for {count} classes" in capsys.readouterr().out
        found = weights(tmp_path / f"on_{folder.name}")
        head = found["backbone.head.weight"]
        assert head.shape == (count, 32)
        assert 0.5 * HEAD_STD < float(head.std()) < 2 * HEAD_STD
        assert not found["backbone.head.bias"].abs().max() > 1e-9
        body = [
            {n: w for n, w in f.items() if "head" not in n}
            for f in (found, weights(tmp_path / "first"))
        ]
        assert distance(*body) < 1e-6


@pytest.mark.parametrize("whole", [False, True])
def test_it_begins_with_a_checkpoint(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], whole: bool
) -> None:
    vit = small_vit()
    state = vit.state_dict()
    if whole:
        state = {f"backbone.{name}": value for name, value in state.items()}
    save_file(state, tmp_path / "vit.safetensors")
    still = {"checkpoint": tmp_path / "vit.safetensors", "lr": 1e-12, "sched": "none", "epochs": 1}
    tune(data, tmp_path / "run", **still)
    out = capsys.readouterr().out
    assert f"weights: read from {tmp_path / 'vit.safetensors'}" in out
    assert "head: that of the weights, for 3 classes" in out
    found = {n.removeprefix("backbone."): w for n, w in weights(tmp_path / "run").items()}
    assert distance(found, vit.state_dict()) < 1e-6
    if not whole:
        tune(data, tmp_path / "plain", **still, keep_ratio=None)
        assert distance(weights(tmp_path / "plain"), vit.state_dict()) < 1e-6
        save_file({n: w for n, w in state.items() if "head" not in n}, tmp_path / "vit.safetensors")
        tune(data, tmp_path / "bare", **still)
        assert "head: a new one, for 3 classes" in capsys.readouterr().out


def test_a_module_is_trained_in_place(data: Path, tmp_path: Path) -> None:
    vit = small_vit()
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    options = {
        name: value for name, value in TINY.items() if name not in ("img_size", "model_kwargs")
    }
    finetune(vit, data, tmp_path / "run", **options)
    assert distance(before, vit.state_dict()) > 1e-3
    found = {n.removeprefix("backbone."): w for n, w in weights(tmp_path / "run").items()}
    assert distance(found, vit.state_dict()) == 0.0


def test_a_registered_model_and_its_own_numbers(data: Path, tmp_path: Path) -> None:
    tune(
        data,
        tmp_path / "run",
        "ltrp_deit3_small",
        img_size=48,
        epochs=1,
        keep_ratio=None,
        model_kwargs={"embed_dim": 32, "depth": 1, "num_heads": 2},
    )
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["architecture"] == "ltrp_deit3_small"
    assert config["model_args"]["keep_ratio"] == 0.5
    assert config["model_args"]["drop_path_rate"] == 0.1
    assert load(tmp_path / "run").backbone.patch_embed.img_size == (48, 48)


def test_images_are_normalised_as_the_backbone_wants() -> None:
    from ltrp_timm.train.finetune import image_config
    from ltrp_timm.train.recipe import Augmentation

    config = image_config(timm.create_model("vit_base_patch16_clip_224", depth=1, img_size=64))
    assert config["input_size"] == (3, 64, 64)
    train, measure = Augmentation(aa="none", reprob=0.0).transforms(config)
    grey = Image.new("RGB", (80, 70), (99, 99, 99))
    expected = (99 / 255 - torch.tensor(config["mean"])) / torch.tensor(config["std"])
    for transform in (train, measure):
        assert torch.allclose(transform(grey).mean((1, 2)), expected, atol=1e-3)
    assert config["mean"] != timm.data.IMAGENET_DEFAULT_MEAN


@pytest.mark.parametrize("aa", ["rand-m10-inc1", "original", "v0r", "augmix-m10"])
def test_no_policy_leaves_a_picture_without_bits(aa: str) -> None:
    from ltrp_timm.train.finetune import image_config
    from ltrp_timm.train.recipe import Augmentation

    train, _ = Augmentation(aa=aa, reprob=0.0).transforms(image_config(small_vit()))
    pickle.loads(pickle.dumps(train))  # noqa: S301  # it goes to the loader's workers
    picture = Image.effect_mandelbrot((40, 40), (-2, -1, 1, 1), 50).convert("RGB")
    for seed in range(60):
        with seeded(seed):
            assert train(picture).shape == (3, 32, 32)


def test_a_split_holds_out_of_each_class(tmp_path: Path) -> None:
    folder = make_classes(tmp_path / "photos", 6)
    for number in range(1, 6):
        (folder / "red" / f"{number:02d}.png").unlink()
    summary = tune(folder, tmp_path / "run", epochs=1, holdout=0.1, batch_size=5)
    assert summary.steps == 2  # 6 - 1, 6 - 1 and the only red one are left to train on
    from ltrp_timm.data.labels import open_class_data

    data = open_class_data(folder)
    train, held = data.train.split(0.1)
    numbers = data.train.numbers()
    assert numbers is not None
    assert [numbers[index] for index in held] == [0, 1]
    assert sorted(train + held) == list(range(13))


def test_pictures_and_curves(data: Path, tmp_path: Path) -> None:
    tune(data, tmp_path / "run", plot=True, keep_ratio=[0.5, 0.25])
    for name, least in (("pictures.png", 600), ("curves.png", 900)):
        with Image.open(tmp_path / "run" / name) as picture:
            assert picture.width > least
            assert len(np.unique(np.asarray(picture.convert("L")))) > 20


def test_unreadable_images_are_counted_and_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_classes(tmp_path / "photos", 6)
    (folder / "red" / "03.png").write_text("no image")
    held = make_classes(tmp_path / "held", 2)
    (held / "green" / "00.png").write_bytes((held / "green" / "01.png").read_bytes()[:200])
    summary = tune(folder, tmp_path / "run", epochs=1, val_data=held)
    assert len(summary.unreadable) == summary.metrics["unreadable"] == 2
    err = capsys.readouterr().err
    assert "skipped red/03.png: is not an image in a known format." in err
    assert err.count("green/00.png") == 1


def test_the_order_of_classes_without_names_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_classes(tmp_path / "photos", 4, ("1", "2", "10"))
    tune(folder, tmp_path / "run", small_vit(), epochs=1, img_size=None, model_kwargs=None)
    order = "in natural order (1, 2, 10), not in torchvision's (1, 10, 2)"
    assert (
        f"weights name no classes; those of the data are taken {order}\n" in capsys.readouterr().out
    )


def test_held_out_classes_are_found_by_name(tmp_path: Path) -> None:
    folder = make_classes(tmp_path / "photos", 10)
    some = make_classes(tmp_path / "some", 4, ("green", "red"))  # 0 and 1 there, 1 and 2 here
    options = {"epochs": 8, "layer_decay": None, **PLAIN}
    summary = tune(folder, tmp_path / "run", val_data=some, **options)
    assert summary.metrics["val_top1"] > 0.8
    with pytest.raises(ValueError, match=r"held-out images do not fit: 1 of 3 classes.*pink"):
        tune(
            folder,
            tmp_path / "no",
            val_data=make_classes(tmp_path / "h", 2, ("blue", "pink", "red")),
        )


class Pairs(torch.utils.data.Dataset[Any]):
    """A torch dataset of pictures and numbers, without names."""

    def __init__(self, wrong: int = 0) -> None:
        self.wrong = wrong

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.new("RGB", (32, 32), (20 * index, 90, 0)), index % 3 + self.wrong


def test_a_dataset_of_torch(tmp_path: Path) -> None:
    assert tune(Pairs(), tmp_path / "run", num_classes=3, epochs=1).steps == 1
    with pytest.raises(ValueError, match="Pairs does not name its classes: num_classes must be"):
        tune(Pairs(), tmp_path / "new")
    with pytest.raises(ValueError, match="a label is 3, but there are 3 classes"):
        tune(Pairs(wrong=1), tmp_path / "new", num_classes=3)


class Stream(torch.utils.data.IterableDataset[Any]):
    """The same, from beginning to end."""

    def __iter__(self) -> Any:
        pairs = Pairs()
        return (pairs[index] for index in range(len(pairs)))


def test_a_stream_with_labels(tmp_path: Path) -> None:
    options = {"num_classes": 3, "num_samples": 12, "holdout": 0.0}
    tune(Stream(), tmp_path / "run", **options)
    summary = tune(Stream(), tmp_path / "again", **options, val_data=Pairs())
    assert summary.steps == 4
    assert same_bits(weights(tmp_path / "run"), weights(tmp_path / "again"))
    assert "val_top1" in summary.metrics
    with pytest.raises(ValueError, match="Stream does not name its classes"):
        tune(Stream(), tmp_path / "new", num_samples=12)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"data": "missing"}, FileNotFoundError, "missing does not exist"),
        ({"data": 3}, TypeError, "data must be a path, a name or a torch data set, got int"),
        ({"num_classes": 5}, ValueError, r"num_classes is 5, but .* has 3 classes"),
        ({"data": "hollow"}, ValueError, r"1 class has no image in .*hollow.*: void"),
        ({"data": "flat"}, ValueError, "has no folder for each class"),
        ({"data": "lonely"}, ValueError, "has one class; training needs at least two"),
        ({"data": "damaged"}, ValueError, "none of 4 images can be read"),
        ({"keep_ratio": 0.0}, ValueError, r"keep_ratio must be in \(0, 1\], got 0.0"),
        ({"keep_ratio": [0.5, 1.5]}, ValueError, r"keep_ratio must be in \(0, 1\], got 1.5"),
        ({"keep_ratio": [0.5, 0.5]}, ValueError, "keep_ratio names one share twice"),
        ({"keep_ratio": []}, ValueError, "keep_ratio must be a number, or several, got none"),
        ({"keep_schedule": "steep"}, ValueError, "keep_schedule must be one of linear, cosine"),
        ({"keep_ratio": [0.5, 1.0], "keep_schedule": "linear"}, ValueError, "leads to one"),
        ({"keep_ratio": None, "keep_schedule": "linear"}, ValueError, "leads to a keep_ratio"),
        ({"keep_schedule_epochs": 1}, ValueError, "keep_schedule_epochs goes with"),
        (
            {"keep_schedule": "linear", "keep_schedule_epochs": 3},
            ValueError,
            "keep_schedule_epochs must be from 1 to 2, got 3",
        ),
        ({"ranker": "conv"}, ValueError, "the conv ranker has no trained weights"),
        ({"ranker": "nonsense"}, ValueError, "ranker must be one of"),
        ({"selection": "adaptive"}, ValueError, "on a trained model"),
        ({"train_ranker": True}, ValueError, "passes no gradient to the ranker"),
        ({"gate": "straight-through"}, ValueError, "gate goes with train_ranker"),
        ({"gate": "soft"}, ValueError, "gate must be one of straight-through, got 'soft'"),
        (
            {"train_ranker": True, "gate": "straight-through"},
            ValueError,
            "train_ranker: the border ranker has no weights",
        ),
        ({"model": "nonsense"}, ValueError, "model 'nonsense' is unknown"),
        (
            {"model": "swin_tiny_patch4_window7_224", "model_kwargs": None},
            TypeError,
            "attends inside fixed windows",
        ),
        ({"model_kwargs": {"nonsense": 1}}, TypeError, "nonsense"),
        ({"pretrained": True, "checkpoint": "x.pth"}, ValueError, "not both"),
        ({"checkpoint": "x.pth"}, FileNotFoundError, "x.pth does not exist"),
        ({"batch_size": 5, "mixup": 0.5}, ValueError, "mixing needs an even batch_size, got 5"),
        ({"aa": "nonsense"}, ValueError, "aa names no policy of timm's"),
        ({"reprob": 1.5}, ValueError, r"reprob must be in \[0, 1\], got 1.5"),
        ({"smoothing": 1.0}, ValueError, r"smoothing must be in \[0, 1\)"),
        ({"scale": (0.5, 0.1)}, ValueError, "scale must be two numbers"),
        ({"remode": "black"}, ValueError, "remode must be one of const, rand, pixel"),
        ({"mixup": -1.0}, ValueError, "mixup must be at least 0"),
        ({"layer_decay": 0.0}, ValueError, r"layer_decay must be in \(0, 1\], got 0.0"),
        ({"drop_path": 1.0}, ValueError, r"drop_path must be in \[0, 1\), got 1.0"),
        ({"num_classes": 1}, ValueError, "num_classes must be at least 2, got 1"),
        ({"distill": "self"}, ValueError, "whose head is new here and knows nothing"),
        ({"distill_features": 1.0}, ValueError, "distill_features goes with distill"),
        ({"distill": "self", "distill_weight": 0.0}, ValueError, "distill_weight must be in"),
        ({"nonsense": 1}, TypeError, "no such argument: nonsense; settings are"),
    ],
    ids=str,
)
def test_bad_input_is_refused_before_anything_is_written(
    data: Path, tmp_path: Path, change: dict[str, Any], error: type[Exception], text: str
) -> None:
    options: dict[str, Any] = {"data": data, **change}
    if options["data"] in ("hollow", "flat", "lonely", "damaged"):
        options["data"] = spoilt(tmp_path, options["data"])
    with pytest.raises(error, match=text):
        tune(options.pop("data"), tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def spoilt(folder: Path, kind: str) -> Path:
    """A folder with one thing wrong."""
    names = ("blue",) if kind == "lonely" else NAMES
    root = make_classes(folder / kind, 2, names)
    if kind == "hollow":
        (root / "void").mkdir()
    if kind == "flat":
        root = root / "blue"
    if kind == "damaged":
        (root / "red" / "00.png").unlink()
        (root / "red" / "01.png").unlink()
        (root / "red").rmdir()
        for path in root.rglob("*.png"):
            path.write_text("no image")
    return root


def test_a_folder_in_the_way(data: Path, tmp_path: Path) -> None:
    tune(data, tmp_path / "run", epochs=1)
    before = (tmp_path / "run" / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match=r"run already holds checkpoint.pt"):
        tune(data, tmp_path / "run")
    with pytest.raises(ValueError, match=r"another configuration: keep_ratio"):
        tune(data, tmp_path / "run", epochs=1, keep_ratio=0.25, resume="auto")
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == before


def test_the_frozen_ranker_stays(data: Path, tmp_path: Path) -> None:
    ranker = ltrp_timm.create_ranker("conv", patch_size=8, width=8, depth=1)
    ranker.trained = True
    model = ltrp_timm.drop_patches(small_vit(), ranker=ranker, keep_ratio=0.5)
    before = {name: value.clone() for name, value in ranker.state_dict().items()}
    tune(data, tmp_path / "run", model, img_size=None, model_kwargs=None)
    assert same_bits(before, dict(ranker.state_dict()))
    found = weights(tmp_path / "run")
    assert all(torch.equal(found[f"ranker.{name}"], value) for name, value in before.items())
