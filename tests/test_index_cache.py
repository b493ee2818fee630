"""Orders read from a cache are those of the ranker, and move with what a transform moves."""

import importlib
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import AugmentOp, AutoAugment, RandAugment
from torch import nn
from torchvision import transforms
from train_setup import distance, make_photos, weights

from ltrp_timm import drop_patches
from ltrp_timm.commands import main
from ltrp_timm.data.images import Images, open_dataset
from ltrp_timm.data.keyed import HELD_OUT, Batch, HeldOutSampler, KeyedImages, make_loader
from ltrp_timm.metrics import spearman
from ltrp_timm.models.ltrp import LTRPModel
from ltrp_timm.rankers.base import Ranker
from ltrp_timm.runtime.keyed_rng import seeded
from ltrp_timm.runtime.world import World
from ltrp_timm.scoring import FollowedTransform, IndexCache, parts, ranks_of, trace
from ltrp_timm.scoring import cache as cache_command
from ltrp_timm.scoring import run as command
from ltrp_timm.scoring.transform import CachedTransform, open_cache, select_cached
from ltrp_timm.train.finetune import finetune

NAME = "vit_tiny_patch16_224"
SMALL = ("--model", NAME, "--img-size", "64", "--workers", "0")
CPU = torch.device("cpu")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nine photos in two folders, one file that is none, and parts of four images."""
    monkeypatch.chdir(tmp_path)
    for module in (parts, command, cache_command):
        monkeypatch.setattr(module, "PART_SIZE", 4)
    make_photos(Path("set/cat"), 5)
    make_photos(Path("set/dog"), 4)
    Path("set/dog/bad.png").write_text("text")
    return tmp_path


def rank(folder: str, *more: str) -> int:
    return main(["rank", "set", "--cache", folder, *SMALL, *more])


def make_model(**options: Any) -> Any:
    torch.manual_seed(0)
    vit = timm.create_model(NAME, img_size=64, depth=1, num_classes=5)
    torch.nn.init.normal_(vit.head.weight)
    return drop_patches(vit.eval(), keep_ratio=0.5, **options)


def eval_transform(model: Any) -> Any:
    return create_transform(**model.data_config(), is_training=False)


def whole_batch(transform: Any, images: Images) -> Batch:
    keyed = KeyedImages(images, range(len(images)), transform, 0, (3, 64, 64))
    sampler = HeldOutSampler(len(images), World(0, 1, CPU))
    (sample,) = make_loader(keyed, sampler, batch_size=len(images), device=CPU)
    return Batch(sample, 0, HELD_OUT, CPU)


def where_it_is(height: int = 61, width: int = 83) -> Image.Image:
    """A picture whose red is its x and whose green is its y; blue marks that there is a picture."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 2 + 20, y * 3 + 20, np.full_like(x, 255)], -1)
    return Image.fromarray(pixels.astype(np.uint8))


def moving(*names: str, kind: Any = RandAugment) -> Any:
    hparams = {"img_mean": (0, 0, 0), "translate_const": 14, "interpolation": 2}
    ops = [AugmentOp(name, 1.0, 8, hparams) for name in names]
    augment = AutoAugment([ops]) if kind is AutoAugment else RandAugment(ops, len(names))
    base = create_transform(48, is_training=True, scale=(0.3, 1.0), color_jitter=None).transforms
    return transforms.Compose([*base[:2], augment, *base[2:]])


TRANSFORMS: dict[str, Callable[[], Any]] = {
    "crop and flips": lambda: create_transform(
        48, is_training=True, vflip=0.5, color_jitter=None, interpolation="random"
    ),
    "evaluation": lambda: create_transform(48, crop_pct=0.8),
    "not square": lambda: create_transform((48, 32), crop_pct=0.9),
    "squash": lambda: create_transform(48, crop_mode="squash", crop_pct=0.9),
    "border": lambda: create_transform(48, crop_mode="border", crop_pct=1.0),
    "no augmentation": lambda: create_transform(48, is_training=True, no_aug=True),
    "turned": lambda: moving("Rotate"),
    "sheared": lambda: moving("ShearX", "ShearY", "ShearX"),
    "shifted": lambda: moving("TranslateX", "TranslateY"),
    "relatively": lambda: moving("TranslateXRel", "TranslateYRel", kind=AutoAugment),
    "everything": lambda: moving("Rotate", "ShearX", "TranslateYRel", "Rotate"),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_places_are_where_the_picture_says(name: str) -> None:
    transform, picture = TRANSFORMS[name](), where_it_is()
    follow, hidden, worst = FollowedTransform(transform), 0, 0.0
    unmoved: list[float] = []
    for seed in range(12):
        with seeded(seed):
            expected = transform(picture)
        with seeded(seed):
            image, steps = follow(picture)
        assert torch.equal(image, expected)  # as without being followed
        mean, std = (
            torch.tensor(v).view(3, 1, 1)
            for v in (timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD)
        )
        pixels = ((image * std + mean) * 255).permute(1, 2, 0).numpy()
        h, w = image.shape[1:]
        y, x = np.mgrid[4 : h - 4 : 5, 4 : w - 4 : 5]
        middles = np.stack([x.ravel() + 0.5, y.ravel() + 0.5], 1)
        found = trace(steps, middles)
        colours = pixels[y.ravel(), x.ravel()]
        filled = (colours[:, 2] < 5) | (abs(colours[:, 2] - 103.5) < 1)  # black, or the mean colour
        inside = (colours[:, 2] > 250) & ~np.isnan(found[:, 0])
        assert np.isnan(found[filled, 0]).all()
        hidden += int(filled.sum())
        shown = (colours[inside, :2] - 20) / (2, 3) + 0.5
        worst = max(worst, float(np.abs(found[inside] - shown).max()))
        straight = middles[inside] * (83 / w, 61 / h)
        unmoved.append(float(np.abs(straight - shown).max()))
    assert worst < (2.6 if name == "everything" else 1.6)  # pixels: PIL cuts colours off each time
    if name != "squash":
        assert max(unmoved) > 5  # where it would be had nothing moved it
    if name in ("turned", "sheared", "shifted", "relatively", "everything", "border"):
        assert hidden > 0


def test_a_central_crop_starts_at_the_pixel_that_torchvision_takes() -> None:
    follow = FollowedTransform(transforms.Compose([transforms.CenterCrop(4)]))
    wide = Image.fromarray(np.arange(7, dtype=np.uint8)[None].repeat(7, 0))  # 7 - 4 is odd
    cropped, steps = follow(wide)
    first = int(np.asarray(cropped)[0, 0])
    assert trace(steps, np.array([[0.5, 0.5]])).tolist() == [[first + 0.5, first + 0.5]]
    assert first == 2


def test_what_cannot_be_followed_is_named() -> None:
    for unknown in (
        create_transform(48, is_training=True, auto_augment="augmix-m5-w4-d2"),
        transforms.Compose([transforms.RandomPerspective()]),
        transforms.Compose([transforms.RandomApply([transforms.RandomRotation(9)])]),
    ):
        with pytest.raises(
            ValueError, match=r"an index cache cannot follow (AugMix|RandomP|RandomR)"
        ):
            FollowedTransform(unknown)
    FollowedTransform(
        create_transform(
            48,
            is_training=True,
            re_prob=0.5,
            grayscale_prob=0.5,
            gaussian_blur_prob=0.5,
            color_jitter_prob=0.5,
            auto_augment="rand-m9-mstd0.5-inc1",
        )
    )


def test_ranks_are_places_in_the_order() -> None:
    scores = torch.tensor([[0.5, float("nan"), 0.5, 2.0]])
    assert ranks_of(scores).tolist() == [[1, 3, 2, 0]]


@pytest.mark.parametrize("selection", ["top", "mixed", "stratified"])
def test_the_cache_chooses_what_the_ranker_chooses(here: Path, selection: str) -> None:
    assert rank("orders") == 2  # bad.png
    model = make_model(ranker="contrast", selection=selection)
    cache = open_cache("orders", model)
    assert (len(cache), cache._ranks.dtype, cache._ranks.shape) == (9, np.uint8, (9, 16))
    assert isinstance(cache._ranks, np.memmap)
    images = Images(open_dataset("set"))
    transform = CachedTransform(cache, images, eval_transform(model))
    assert transform.exact
    batch = whole_batch(transform, images)
    assert batch.scores is not None
    assert batch.real.tolist() == [True] * 9 + [False]
    for ratio in (0.25, 0.5, 0.8):
        model.keep_ratio = ratio
        found = select_cached(model, batch.scores[:9], batch.images[:9])
        assert torch.equal(found, model.keep_indices(batch.images[:9]))
    turned = select_cached(model, -batch.scores[:9], batch.images[:9])
    assert not torch.equal(found, turned)


class Brightness(Ranker, nn.Module):
    """Scores that a crop does not change: the mean of a patch."""

    name = "brightness"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(x.mean(1, keepdim=True), 16).squeeze(1)


def write_by_hand(folder: Path, ranker: Any, images: Images, model: Any) -> None:
    """A cache of whole pictures by any ranker."""
    from ltrp_timm.scoring import finish_cache, ranker_hash
    from ltrp_timm.scoring.ids import image_ids

    config = {**model.data_config(), "crop_mode": "squash", "crop_pct": 1.0}
    transform = create_transform(**config, is_training=False)
    pictures = torch.stack([transform(images.read(i)) for i in range(len(images))])
    ranks = ranks_of(ranker(pictures).flatten(1)).numpy().astype(np.uint8)
    settings = {
        "ranker": ranker.name,
        "ranker_hash": ranker_hash(ranker),
        "input_size": [64, 64],
        "grid_size": [4, 4],
        "patch_size": [16, 16],
        **{k: config[k] for k in ("interpolation", "crop_pct", "crop_mode", "mean", "std")},
    }

    def write(path: Path) -> None:
        with path.open("wb") as file:
            np.save(file, ranks)

    folder.mkdir()
    finish_cache(folder, settings, image_ids(images), list(range(len(images))), write)


def test_scores_follow_the_crops_of_training(here: Path) -> None:
    draw = np.random.default_rng(0)
    for number in range(8):  # smooth pictures: another crop of them has the same bright places
        coarse = draw.integers(0, 255, (3, 3, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((120, 90), Image.Resampling.BICUBIC)
        Path("smooth").mkdir(exist_ok=True)
        picture.save(f"smooth/{number}.png")
    images, ranker = Images(open_dataset("smooth")), Brightness()
    model = make_model(ranker=ranker)
    write_by_hand(here / "orders", ranker, images, model)
    cache = open_cache("orders", model)
    training = create_transform(
        64, is_training=True, scale=(0.2, 0.8), vflip=0.5, auto_augment="rand-m5-n1-mstd0.5",
        re_prob=0.0,
    )  # fmt: skip
    dull = [op for op in training.transforms[3].ops if op.name in ("Rotate", "ShearX", "ShearY")]
    training.transforms[3].ops = dull
    transform = CachedTransform(cache, images, training)
    assert not transform.exact
    agreement, unmoved = [], []
    for seed in range(40):
        index = seed % len(images)
        with seeded(seed):
            image, scores = transform.with_scores(images.read(index), index)
        with seeded(seed):
            assert torch.equal(image, training(images.read(index)))
        own = ranker(image[None]).flatten(1)
        agreement.append(float(spearman(scores[None], own)))
        whole = -torch.from_numpy(cache.ranks(index).astype(np.float32))
        unmoved.append(float(spearman(whole[None], own)))
    assert np.median(agreement) > 0.8
    assert np.median(unmoved) < 0.5


def test_a_whole_picture_is_exact_and_out_of_the_picture_comes_last(here: Path) -> None:
    assert rank("orders", "--crop-mode", "squash") == 2
    model = make_model(ranker="contrast")
    cache, images = open_cache("orders", model), Images(open_dataset("set"))
    config = {**model.data_config(), "crop_mode": "squash", "crop_pct": 1.0}
    assert CachedTransform(cache, images, create_transform(**config)).exact
    border = create_transform(**{**config, "crop_mode": "border"})
    transform = CachedTransform(cache, images, border)  # 48x40 pixels: bars above and below
    picture = Image.new("RGB", (48, 12))
    picture.save("set/cat/000.png")
    _, scores = transform.with_scores(picture, 0)
    assert (scores.view(4, 4)[[0, 3]] == -16).all()
    assert (scores.view(4, 4)[1:3] > -16).all()


def test_crops_need_a_cache_of_whole_pictures(here: Path) -> None:
    assert rank("orders") == 2
    cache, images = IndexCache("orders"), Images(open_dataset("set"))
    with pytest.raises(ValueError, match=r"orders of the images as they are evaluated.*squash"):
        CachedTransform(cache, images, create_transform(64, is_training=True))
    with pytest.raises(ValueError, match="as they are evaluated"):
        CachedTransform(cache, images, create_transform(64, crop_pct=0.5))


def test_a_cache_that_does_not_fit_is_refused(here: Path) -> None:
    assert rank("orders") == 2
    with pytest.raises(ValueError, match="orders of the contrast ranker, the model has pixel_std"):
        open_cache("orders", make_model(ranker="pixel_std"))
    other = make_model(ranker="contrast", ranker_args={"parts": {"std": 1.0}})
    with pytest.raises(ValueError, match="another contrast ranker: its weights or arguments"):
        open_cache("orders", other)
    large = drop_patches(timm.create_model(NAME, img_size=96, depth=1))
    with pytest.raises(ValueError, match=r"input_size = \[64, 64\], the model has \[96, 96\]"):
        open_cache("orders", large)
    for selection in ("random", "adaptive"):
        with pytest.raises(ValueError, match=f"does not go with selection {selection}"):
            open_cache("orders", make_model(selection=selection))
    cache = IndexCache("orders")
    make_photos(Path("set/owl"), 1)
    with pytest.raises(ValueError, match=r"lacks 1 of 11 images, such as owl/000\.png"):
        CachedTransform(cache, Images(open_dataset("set")), eval_transform(make_model()))
    (here / "set/owl/000.png").unlink()
    Image.new("RGB", (50, 40)).save("set/cat/001.png")
    with pytest.raises(ValueError, match=r"an order of another cat/001\.png: \d+ bytes then"):
        CachedTransform(cache, Images(open_dataset("set")), eval_transform(make_model()))
    pairs = [(Image.new("RGB", (50, 40)), 0)]
    with pytest.raises(ValueError, match="orders of another dataset"):
        CachedTransform(cache, Images(pairs), eval_transform(make_model()))


def test_an_image_without_an_order_counts_as_unreadable(here: Path) -> None:
    assert rank("orders") == 2
    Image.new("RGB", (50, 40)).save("set/dog/bad.png")  # it can be read by now
    model, images = make_model(), Images(open_dataset("set"))
    transform = CachedTransform(open_cache("orders", model), images, eval_transform(model))
    batch = whole_batch(transform, images)
    assert batch.real.tolist() == [True] * 9 + [False]
    assert batch.problems == ["dog/bad.png: the index cache has no order of it."]


def test_damage_is_noticed(here: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"orders holds no finished index cache: ltrp-timm"):
        IndexCache("orders")
    assert rank("orders") == 2
    ranks = np.load("orders/ranks.npy")
    ranks[3, 0] = ranks[3, 1]
    np.save("orders/ranks.npy", ranks)
    cache = IndexCache("orders")
    cache.ranks(2)
    with pytest.raises(ValueError, match=r"row 3 of orders/ranks\.npy is damaged"):
        cache.ranks(3)
    np.save("orders/ranks.npy", ranks[:5])
    with pytest.raises(ValueError, match=r"ranks\.npy is damaged: uint8 \[5, 16\] in place of"):
        IndexCache("orders")
    Path("orders/ranks.npy").write_bytes(b"")
    with pytest.raises(ValueError, match="is damaged"):
        IndexCache("orders")
    Path("orders/cache.json").write_text("{}")
    with pytest.raises(ValueError, match="of another version"):
        IndexCache("orders")


def test_another_process_maps_the_file_itself(here: Path) -> None:
    assert rank("orders") == 2
    cache = IndexCache("orders")
    text = pickle.dumps(cache)
    assert isinstance(pickle.loads(text)._ranks, np.memmap)  # noqa: S301
    assert np.array_equal(pickle.loads(text).ranks(4), cache.ranks(4))  # noqa: S301


def test_many_patches_take_two_bytes(here: Path) -> None:
    assert main(["rank", "set", "--cache", "fine", "--img-size", "68", "--patch-size", "4",
                 "--workers", "0"]) == 2  # fmt: skip
    cache = IndexCache("fine")
    assert (cache._ranks.dtype, cache._ranks.shape) == (np.uint16, (9, 289))
    assert sorted(cache.ranks(0)) == list(range(289))


def content(folder: str) -> tuple[bytes, bytes]:
    return (Path(folder) / "ranks.npy").read_bytes(), (Path(folder) / "cache.json").read_bytes()


def test_an_interrupted_cache_goes_on(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert rank("whole") == 2
    write = parts.Parts.write

    def second_fails(self: Any, part: int, arrays: Any) -> None:
        if part == 1:
            raise KeyboardInterrupt
        write(self, part, arrays)

    monkeypatch.setattr(parts.Parts, "write", second_fails)
    assert rank("orders", "--batch-size", "4") == 130
    with pytest.raises(FileNotFoundError, match="no finished index cache"):
        IndexCache("orders")
    monkeypatch.setattr(parts.Parts, "write", write)
    capsys.readouterr()
    assert rank("orders", "--ranker", "pixel_std") == 2
    assert "unfinished run with ranker = contrast, now it is pixel_std" in capsys.readouterr().err
    assert rank("orders") == 2
    assert content("orders") == content("whole")
    assert {path.name for path in Path("orders").iterdir()} == {"ranks.npy", "cache.json"}
    before = content("orders")
    assert rank("orders") == 2
    assert "orders holds ranks.npy already: --overwrite replaces it" in capsys.readouterr().err
    assert content("orders") == before
    assert rank("orders", "--crop-mode", "squash", "--overwrite") == 2
    assert content("orders") != before


def test_two_processes_write_what_one_writes(here: Path) -> None:
    rank("one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node=2", "-m", "ltrp_timm", "rank", "set", "--cache", "two",
               *SMALL, "--batch-size", "3"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert "ranked 9 images, 1 failed: two" in done.stdout, done.stderr
    assert content("two") == content("one")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["set"], "one of --output DIR and --cache DIR"),
        (["set", "-o", "a", "--cache", "b"], "one of --output DIR and --cache DIR"),
        (["set", "cat.png", "--cache", "b"], "--cache is of one data set, got 2"),
        (["set", "--cache", ""], "--cache must name a folder"),
        (["set", "--cache", "b", "--keep-ratio", "0.5"], "--keep-ratio goes without --cache"),
        (["set", "--cache", "b", "--no-overlays"], "--no-overlays goes without --cache"),
        (["set", "-o", "b", "--crop-mode", "squash"], "--crop-mode goes with --cache"),
        (["nowhere", "--cache", "b"], "nowhere does not exist"),
        (["set", "--cache", "b", "--ranker", "random"], "the random ranker looks at nothing"),
        (["set", "--cache", "b", "--ranker", "conv"], "conv ranker is not trained"),
        (["set", "--cache", "b", "--img-size", "2048", "--patch-size", "4"], "up to 65536 patches"),
        (["text", "--cache", "b"], "no image could be read"),
        (["set", "--cache", "mine"], "mine holds ranks.npy already"),
    ],
)
def test_wrong_arguments_are_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    Path("text").mkdir()
    Path("text/a.png").write_text("text")
    Path("mine").mkdir()
    Path("mine/ranks.npy").write_text("something else")
    assert main(["rank", *arguments, "--workers", "0"]) == 2
    err = capsys.readouterr().err
    assert text in err.splitlines()[-1]
    assert not Path("b/cache.json").exists()
    assert Path("mine/ranks.npy").read_text() == "something else"


TUNE: dict[str, Any] = {
    "num_workers": 0,
    "tensorboard": False,
    "progress": False,
    "epochs": 1,
    "batch_size": 4,
    "base_lr": 0.1,
    "warmup_epochs": 0,
    "drop_path": 0.0,
    "holdout": 0.0,
    "img_size": 64,
    "model_kwargs": {"depth": 1},
    "keep_ratio": 0.5,
    "device": "cpu",
}
# a whole square picture, as in the cache
PLAIN = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0), "hflip": 0.0, "aa": "none", "reprob": 0.0}


def tune(output: str, data: str = "square", **changes: Any) -> dict[str, torch.Tensor]:
    finetune(NAME, data, output, **{**TUNE, **changes})
    return weights(Path(output))


@pytest.fixture
def square(here: Path) -> Path:
    """Square photos of two classes, and orders of them."""
    for number, path in enumerate(sorted(Path("set").rglob("0*.png"))):
        place = Path("square", path.parent.name)
        place.mkdir(parents=True, exist_ok=True)
        Image.open(path).crop((number, 0, number + 40, 40)).save(place / path.name)
    arguments = ["rank", "square", "--cache", "orders", *SMALL, "--crop-mode", "squash"]
    assert main(arguments) == 0
    return here


def test_training_by_cached_orders_is_training_by_the_ranker(
    square: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranked = tune("ranked", **PLAIN)
    ranks = np.load("orders/ranks.npy")
    with monkeypatch.context() as patch:
        patch.setattr(LTRPModel, "_rank", lambda *_: pytest.fail("the ranker must not run"))
        module = importlib.import_module("ltrp_timm.train.finetune")
        patch.setattr(module, "check_network", lambda net: None)  # runs it once
        cached = tune("cached", **PLAIN, index_cache="orders")
        np.save("orders/ranks.npy", 15 - ranks)  # the worst patches first
        other = tune("other", **PLAIN, index_cache="orders")
        np.save("orders/ranks.npy", ranks)
        tune("augmented", index_cache="orders")  # RandAugment, crops, flips
    assert distance(cached, ranked) <= 1e-6
    assert distance(other, ranked) > 1e-3


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"mixup": 0.8}, "orders of single images: mixup and cutmix 0"),
        ({"keep_ratio": None}, "an index cache goes with a pruned model"),
        ({"index_cache": "nowhere"}, "nowhere holds no finished index cache"),
        ({"img_size": 96}, r"input_size = \[64, 64\], the model has \[96, 96\]"),
        ({"ranker": "pixel_std"}, "orders of the contrast ranker, the model has pixel_std"),
        ({"data": "set"}, "an order of another|lacks"),
        ({"aa": "augmix-m5-w4-d2"}, "an index cache cannot follow AugMixAugment"),
        ({"distill": "self", "distill_features": 1.0}, "goes without gate and distill_features"),
    ],
)
def test_training_that_cannot_go_by_a_cache(
    square: Path, changes: dict[str, Any], text: str
) -> None:
    Path("set/dog/bad.png").unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=text):
        tune("run", **{"index_cache": "orders", **changes})
    assert not Path("run").exists()
