"""Scores read from a cache are those of the ranker, and move with what a transform moves."""

import importlib
import json
import pickle
import subprocess
import sys
import tarfile
import tracemalloc
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

from ltrp_timm import AdaptiveBudget, drop_patches
from ltrp_timm.commands import main
from ltrp_timm.data.images import Images, open_dataset
from ltrp_timm.data.keyed import HELD_OUT, Batch, KeyedImages, held_out_keys, make_loader
from ltrp_timm.metrics import spearman
from ltrp_timm.models.ltrp import LTRPModel
from ltrp_timm.rankers.base import Ranker
from ltrp_timm.runtime.keyed_rng import seeded
from ltrp_timm.runtime.world import World
from ltrp_timm.scoring import CachedTransform, IndexCache
from ltrp_timm.scoring.run import rank_images
from ltrp_timm.scoring.store import ImageIds, ScoreWriter, begin, image_ids
from ltrp_timm.scoring.transform import FollowedTransform, trace
from ltrp_timm.train.finetune import finetune
from ltrp_timm.weights.files import ranker_hash

NAME = "vit_tiny_patch16_224"
SMALL = ("--model", NAME, "--img-size", "64", "--num-workers", "0", "--batch-size", "4")
CPU = torch.device("cpu")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nine photos in two folders, and one file that is none."""
    monkeypatch.chdir(tmp_path)
    make_photos(Path("set/cat"), 5)
    make_photos(Path("set/dog"), 4)
    Path("set/dog/bad.png").write_text("text")
    return tmp_path


def rank(folder: str, *more: str) -> int:
    return main(["rank", "set", "-o", folder, *SMALL, *more])


def make_model(**options: Any) -> Any:
    torch.manual_seed(0)
    vit = timm.create_model(NAME, img_size=64, depth=1, num_classes=5)
    torch.nn.init.normal_(vit.head.weight)
    return drop_patches(vit.eval(), keep_ratio=0.5, **options)


def eval_transform(model: Any) -> Any:
    return create_transform(**model.data_config(), is_training=False)


def whole_batch(transform: Any, images: Images) -> Batch:
    keyed = KeyedImages(images, range(len(images)), transform, 0, (3, 64, 64))
    sampler = held_out_keys(len(images), World(0, 1, CPU))
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
    known = FollowedTransform(
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
    again = pickle.loads(pickle.dumps(known))  # noqa: S301  # as a spawned worker gets it
    for seed in range(5):
        found = []
        for each in (known, again):
            with seeded(seed):
                found.append(each(Image.new("RGB", (60, 50), "red")))
        assert torch.equal(found[0][0], found[1][0])
        assert found[0][1] == found[1][1]


@pytest.mark.parametrize("selection", ["top", "mixed", "stratified", "dithered"])
def test_the_cache_chooses_what_the_ranker_chooses(here: Path, selection: str) -> None:
    assert rank("orders") == 2  # bad.png
    model = make_model(ranker="border", selection=selection)
    images = Images(open_dataset("set"))
    transform = CachedTransform("orders", model, images, eval_transform(model))
    assert transform.exact
    cache = transform.cache
    assert (len(cache), cache._scores.dtype, cache._scores.shape) == (10, np.float32, (10, 16))
    assert isinstance(cache._scores, np.memmap)
    batch = whole_batch(transform, images)
    assert batch.scores is not None
    assert batch.real.tolist() == [True] * 9 + [False]
    for ratio in (0.25, 0.5, 0.8):
        model.keep_ratio = ratio
        found = model.select(batch.scores[:9], batch.images[:9])
        assert torch.equal(found, model.keep_indices(batch.images[:9]))
    turned = model.select(-batch.scores[:9], batch.images[:9])
    assert not torch.equal(found, turned)


class Brightness(Ranker, nn.Module):
    """Scores that a crop does not change: the mean of a patch."""

    name = "brightness"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(x.mean(1, keepdim=True), 16).squeeze(1)


def write_by_hand(folder: Path, ranker: Any, images: Images, model: Any) -> None:
    """A cache of whole pictures by any ranker."""
    config = {**model.data_config(), "crop_mode": "squash", "crop_pct": 1.0}
    transform = create_transform(**config, is_training=False)
    pictures = torch.stack([transform(images.read_item(i)[0]) for i in range(len(images))])
    scores = ranker(pictures).flatten(1)
    settings = {
        "ranker": ranker.name,
        "ranker_hash": ranker_hash(ranker),
        "input_size": [64, 64],
        "grid_size": [4, 4],
        "patch_size": [16, 16],
        **{k: config[k] for k in ("interpolation", "crop_pct", "crop_mode", "mean", "std")},
    }

    folder.mkdir()
    begin(folder, settings, image_ids(images), 16, None, overwrite=False)
    writer, rows = ScoreWriter(folder), list(range(len(images)))
    writer.write(rows, scores, torch.zeros(len(rows), 1), [True] * len(rows))
    writer.close()
    writer.finish({})


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
    training = create_transform(
        64, is_training=True, scale=(0.2, 0.8), vflip=0.5, auto_augment="rand-m5-n1-mstd0.5",
        re_prob=0.0,
    )  # fmt: skip
    dull = [op for op in training.transforms[3].ops if op.name in ("Rotate", "ShearX", "ShearY")]
    training.transforms[3].ops = dull
    transform = CachedTransform("orders", model, images, training)
    assert not transform.exact
    agreement, unmoved = [], []
    for seed in range(40):
        index = seed % len(images)
        with seeded(seed):
            image, scores = transform.with_scores(images.read_item(index)[0], index)
        with seeded(seed):
            assert torch.equal(image, training(images.read_item(index)[0]))
        own = ranker(image[None]).flatten(1)
        agreement.append(float(spearman(scores[None], own)))
        whole = transform.cache.scores(transform.rows[index])
        unmoved.append(float(spearman(whole[None], own)))
    assert np.median(agreement) > 0.8
    assert np.median(unmoved) < 0.5


def test_a_whole_picture_is_exact_and_out_of_the_picture_comes_last(here: Path) -> None:
    assert rank("orders", "--crop-mode", "squash") == 2
    model = make_model(ranker="border")
    images = Images(open_dataset("set"))
    config = {**model.data_config(), "crop_mode": "squash", "crop_pct": 1.0}
    assert CachedTransform("orders", model, images, create_transform(**config)).exact
    border = create_transform(**{**config, "crop_mode": "border"})
    transform = CachedTransform(
        "orders", model, images, border
    )  # 48x40 pixels: bars above and below
    picture = Image.new("RGB", (48, 12))
    picture.save("set/cat/000.png")
    _, scores = transform.with_scores(picture, 0)
    assert (scores.view(4, 4)[[0, 3]] == -16).all()
    assert (scores.view(4, 4)[1:3] > -16).all()


def test_crops_need_a_cache_of_whole_pictures(here: Path) -> None:
    assert rank("orders") == 2
    images = Images(open_dataset("set"))
    with pytest.raises(ValueError, match=r"scores of images cropped for evaluation.*squash"):
        CachedTransform("orders", make_model(), images, create_transform(64, is_training=True))
    with pytest.raises(ValueError, match="cropped for evaluation"):
        CachedTransform("orders", make_model(), images, create_transform(64, crop_pct=0.5))


def open_cache(model: Any) -> Any:
    transform = eval_transform(model)
    return CachedTransform("orders", model, Images(open_dataset("set")), transform)


def test_a_cache_that_does_not_fit_is_refused(here: Path) -> None:
    assert rank("orders") == 2
    with pytest.raises(ValueError, match="scores of the border ranker, the model has pixel_std"):
        open_cache(make_model(ranker="pixel_std"))
    other = make_model(ranker="border", ranker_args={"img_size": 32})
    with pytest.raises(ValueError, match="another border ranker; its weights or arguments"):
        open_cache(other)
    large = drop_patches(timm.create_model(NAME, img_size=96, depth=1))
    with pytest.raises(ValueError, match=r"input_size = \[64, 64\], the model has \[96, 96\]"):
        open_cache(large)
    with pytest.raises(ValueError, match=r"selection 'random' .* index cache"):
        open_cache(make_model(selection="random"))
    model = make_model()
    model.budget = AdaptiveBudget("mass", 0.5, 4, 0.5)
    with pytest.raises(ValueError, match="adaptive budget ranks images"):
        open_cache(model)
    with pytest.raises(ValueError, match="an index cache needs a pruned model"):
        CachedTransform("orders", timm.create_model(NAME, depth=1), None, None)
    make_photos(Path("set/owl"), 1)
    with pytest.raises(ValueError, match=r"lacks 1 of 11 images, such as owl/000\.png"):
        open_cache(make_model())
    (here / "set/owl/000.png").unlink()
    Image.new("RGB", (50, 40)).save("set/cat/001.png")
    with pytest.raises(ValueError, match=r"scores of another cat/001\.png: it had \d+ bytes"):
        open_cache(make_model())
    pairs = [(Image.new("RGB", (50, 40)), 0)]
    with pytest.raises(ValueError, match="scores of another data set"):
        CachedTransform("orders", make_model(), Images(pairs), eval_transform(make_model()))


def test_an_image_without_scores_counts_as_unreadable(here: Path) -> None:
    assert rank("orders") == 2
    Image.new("RGB", (50, 40)).save("set/dog/bad.png")  # it can be read by now
    model, images = make_model(), Images(open_dataset("set"))
    transform = CachedTransform("orders", model, images, eval_transform(model))
    batch = whole_batch(transform, images)
    assert batch.real.tolist() == [True] * 9 + [False]
    assert batch.problems == ["dog/bad.png: the index cache has no scores of this image."]


def test_damage_is_noticed(here: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"orders holds no scores; run `ltrp-timm rank"):
        IndexCache("orders")
    assert rank("orders") == 2
    files = {path: path.read_bytes() for path in Path("orders").glob("*.*")}
    scores = np.load("orders/scores.npy")

    def refused(text: str) -> None:
        with pytest.raises(ValueError, match=text):
            IndexCache("orders")
        for path, content in files.items():
            path.write_bytes(content)

    np.save("orders/scores.npy", scores[:5])
    refused(r"scores\.npy is damaged: float32 \[5, 16\], expected float32 \[10, 16\]")
    np.save("orders/scores.npy", scores.astype(np.float64))
    refused(r"scores\.npy is damaged: float64 \[10, 16\], expected float32")
    for name in ("scores.npy", "done.npy"):
        for content in (b"", b"text", files[Path("orders", name)][:-3]):
            Path("orders", name).write_bytes(content)
            refused(rf"orders/{name} is damaged")
        Path("orders", name).unlink()
        refused(rf"orders/{name} is damaged: .*No such file")
    np.save("orders/done.npy", np.zeros(9, np.uint8))
    refused(r"done\.npy is damaged: uint8 \[9\], expected uint8 \[10\]")
    index = json.loads(Path("orders/index.json").read_text())
    for name in ("images", "sizes", "grid_size"):
        changed = {key: value for key, value in index.items() if key != name}
        Path("orders/index.json").write_text(json.dumps(changed))
        refused(r"orders/index\.json is damaged")
    for content in ("{}", '{"format": 7}'):
        Path("orders/index.json").write_text(content)
        refused("of another version")
    Path("orders/index.json").write_text("[")
    refused("index.json is not JSON")
    IndexCache("orders")  # as it was


def test_another_process_maps_the_file_itself(here: Path) -> None:
    assert rank("orders") == 2
    cache = IndexCache("orders")
    text = pickle.dumps(cache)
    assert len(text) < 4096
    assert isinstance(pickle.loads(text)._scores, np.memmap)  # noqa: S301
    assert torch.equal(pickle.loads(text).scores(4), cache.scores(4))  # noqa: S301


def test_one_row_is_read_at_a_time(here: Path) -> None:
    """256 MB of scores: what is not asked for is not read."""
    Path("large").mkdir()
    count, n = 4096, 128 * 128
    settings = {"grid_size": [128, 128]}
    ids = ImageIds([str(i) for i in range(count)], [-1] * count, [0] * count, "numbers")
    begin(Path("large"), settings, ids, n, None, overwrite=False)
    writer = ScoreWriter(Path("large"))
    rows = [7, 4000]
    scores = torch.stack([torch.arange(n), -torch.arange(n)]).float()
    writer.write(rows, scores, torch.zeros(2, 1), [True, True])
    writer.close()
    writer.finish({})
    tracemalloc.start()
    cache = IndexCache("large")
    found = torch.stack([cache.scores(row) for row in cache.rows(ids) if row >= 0])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert torch.equal(found, scores)
    assert peak < 4e6


def content(folder: str) -> list[bytes]:
    return [(Path(folder) / name).read_bytes() for name in ("scores.npy", "done.npy", "index.json")]


def test_an_interrupted_cache_goes_on(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert rank("whole") == 2
    write = ScoreWriter.write

    def second_fails(self: Any, rows: Any, *arguments: Any) -> None:
        if 4 in rows:
            raise KeyboardInterrupt
        write(self, rows, *arguments)

    monkeypatch.setattr(ScoreWriter, "write", second_fails)
    assert rank("orders") == 130
    with pytest.raises(FileNotFoundError, match="orders holds an unfinished run; run `ltrp-timm"):
        IndexCache("orders")
    monkeypatch.setattr(ScoreWriter, "write", write)
    capsys.readouterr()
    assert rank("orders", "--ranker", "pixel_std") == 2
    assert "unfinished run with ranker = border, this run has pixel_" in capsys.readouterr().err
    assert rank("orders") == 2
    assert content("orders") == content("whole")
    before = content("orders")
    assert rank("orders") == 2
    assert "orders already holds scores; use --overwrite to replace" in capsys.readouterr().err
    assert content("orders") == before
    assert rank("orders", "--crop-mode", "squash", "--overwrite") == 2
    assert content("orders") != before


@pytest.mark.slow
def test_two_processes_write_what_one_writes(here: Path) -> None:
    rank("one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node=2", "-m", "ltrp_timm", "rank", "set", "-o", "two",
               *SMALL]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert "ranked 9 images, 1 failed: two" in done.stdout, done.stderr
    assert content("two") == content("one")


def test_a_split_and_an_archive_are_data_sets(here: Path) -> None:
    """Names are those that train and evaluate look for."""
    Path("parts").mkdir()
    Path("set").rename("parts/val")
    with tarfile.open("set.tar", "w") as archive:
        archive.add("parts/val", "set")
    for data, more in (("parts", ["--split", "validation"]), ("parts/val", []), ("set.tar", [])):
        folder = Path(data).name.replace(".", "-") + "-scores"
        assert main(["rank", data, "-o", folder, *SMALL, *more]) == 2
        images = Images(open_dataset(data, split="validation"))
        assert IndexCache(folder).rows(image_ids(images))[:9] == list(range(9))


def test_scores_of_a_folder_serve_the_splits_below_it(here: Path) -> None:
    def rows(data: str, scores: str = "scores", **split: str) -> list[int]:
        return IndexCache(scores).rows(image_ids(Images(open_dataset(data, **split))))

    make_photos(Path("parts/train/cat"), 3)  # as val has them
    Path("set").rename("parts/val")
    assert main(["rank", "parts", "-o", "scores", *SMALL]) == 2
    assert rows("parts", split="train") == [0, 1, 2]
    assert rows("parts", split="val") == rows("parts/val") == [*range(3, 12), -1]
    assert rows("parts/val/dog") == [*range(8, 12), -1]
    assert main(["rank", "parts/train", "parts/val/cat", "-o", "two-scores", *SMALL]) == 0
    assert rows("parts", "two-scores") == [0, 1, 2]
    Path("parts").rename("moved")
    assert rows("moved", split="train") == [0, 1, 2]
    Path("moved/val").rename("moved/test")
    with pytest.raises(ValueError, match=r"lacks 10 of 10 images, such as cat/000\.png; rank "):
        rows("moved", split="test")
    Path("moved/test/cat").rename("moved/cat")
    Path("moved/test").rename("moved/val")
    make_photos(Path("moved/val/cat"), 1)
    assert main(["rank", "moved", "-o", "scores", *SMALL, "--overwrite"]) == 2
    assert rows("moved/val") == rows("moved", split="val")  # cat/000.png alone lies above, too
    with pytest.raises(ValueError, match=r"has these images in cat/ and val/cat/; rank .* alone"):
        rows("moved/val/cat")
    for folder in ("cats", "cats/cats"):
        make_photos(Path(folder), 2)
    assert main(["rank", "cats", "-o", "scores", *SMALL, "--overwrite"]) == 0
    assert rows("cats") == [0, 1, 2, 3]


@pytest.mark.parametrize("data", [Path("set/cat"), [Path("set/cat"), "set/dog/000.png"]])
def test_a_path_is_data(here: Path, data: Any) -> None:
    ranked = rank_images(data, Path("scores"), img_size=64)
    assert (ranked.ranked, ranked.unreadable) == (len(IndexCache("scores")), [])
    assert ranked.ranked == 5 + isinstance(data, list)


def test_an_archive_draws_nothing_outside(here: Path) -> None:
    with tarfile.open("set.tar", "w") as archive:
        archive.add("set/cat/000.png", "../../outside/000.png")
    assert main(["rank", "set.tar", "-o", "deep/out", *SMALL, "--overlays"]) == 0
    assert not list(Path().rglob("outside/*.png")) or Path("deep/out/overlays/outside").is_dir()
    drawn = [path for path in Path().rglob("*.png") if path.parts[0] != "set"]
    assert drawn == [Path("deep/out/overlays/outside/000.png.png")]


def test_padded_images_keep_what_the_model_keeps(here: Path) -> None:
    """The clusters of "mixed" are of the padded pixels, as in the model."""
    torch.manual_seed(0)
    padding = {"dynamic_img_size": True, "dynamic_img_pad": True}
    vit = timm.create_model(NAME, img_size=60, depth=1, **padding)
    model = drop_patches(vit.eval(), selection="mixed")
    images = torch.randn(4, 3, 60, 60)
    assert model.patch_grid == (4, 4)  # 64 x 64 pixels
    for ratio in (0.25, 0.5, 0.8):
        model.keep_ratio = ratio
        found = model.select(model.patch_scores(images), images)
        assert torch.equal(found, model.keep_indices(images))
        assert torch.equal(model(images), model(images, keep_indices=found))
        padded = torch.nn.functional.pad(images, (0, 4, 0, 4))
        assert torch.equal(found, model.select(model.patch_scores(images), padded))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["set"], "required: -o/--output"),
        (["set", "cat.png", "-o", "b", "--split", "val"], "a data set is ranked alone, got 2"),
        (["nowhere", "-o", "b"], "nowhere: No such file or directory"),
        (["set", "-o", "b", "--ranker", "conv"], "conv ranker is not trained"),
        (["text", "-o", "b"], "no image could be read"),
        (["set", "-o", "mine"], "mine already holds scores.npy; use --overwrite"),
    ],
)
def test_wrong_arguments_are_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    Path("text").mkdir()
    Path("text/a.png").write_text("text")
    Path("mine").mkdir()
    Path("mine/scores.npy").write_text("something else")
    assert main(["rank", *arguments, "--num-workers", "0"]) == 2
    err = capsys.readouterr().err
    assert text in err.splitlines()[-1]
    assert not Path("b/index.json").exists()
    assert Path("mine/scores.npy").read_text() == "something else"


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
    arguments = ["rank", "square", "-o", "orders", *SMALL, "--crop-mode", "squash"]
    assert main(arguments) == 0
    return here


def test_training_by_cached_orders_is_training_by_the_ranker(
    square: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranked = tune("ranked", **PLAIN)
    scores = np.load("orders/scores.npy")
    with monkeypatch.context() as patch:
        patch.setattr(LTRPModel, "ranker_scores", lambda *_: pytest.fail("the ranker must not run"))
        module = importlib.import_module("ltrp_timm.train.finetune")
        patch.setattr(module, "check_network", lambda net: None)  # runs it once
        cached = tune("cached", **PLAIN, index_cache="orders")
        np.save("orders/scores.npy", -scores)  # the worst patches first
        other = tune("other", **PLAIN, index_cache="orders")
        np.save("orders/scores.npy", scores)
        tune("augmented", index_cache="orders")  # RandAugment, crops, flips
    assert distance(cached, ranked) <= 1e-6
    assert distance(other, ranked) > 1e-3


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"mixup": 0.8}, "scores of single images; set mixup and cutmix to 0"),
        ({"keep_ratio": None}, "an index cache needs a pruned model"),
        ({"index_cache": "nowhere"}, "nowhere holds no scores"),
        ({"img_size": 96}, r"input_size = \[64, 64\], the model has \[96, 96\]"),
        ({"ranker": "pixel_std"}, "scores of the border ranker, the model has pixel_std"),
        ({"data": "set"}, "scores of another|lacks"),
        ({"aa": "augmix-m5-w4-d2"}, "an index cache cannot follow AugMixAugment"),
        ({"distill": "self", "distill_features": 1.0}, "gate and distill_features run it"),
    ],
)
def test_training_that_cannot_go_by_a_cache(
    square: Path, changes: dict[str, Any], text: str
) -> None:
    Path("set/dog/bad.png").unlink()
    with pytest.raises((ValueError, FileNotFoundError), match=text):
        tune("run", **{"index_cache": "orders", **changes})
    assert not Path("run").exists()
