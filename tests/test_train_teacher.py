"""Training an MAE: it learns to paint, and comes back as a teacher."""

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from train_setup import QUIET, TEACHER_ARGS, distance, make_photos, run, weights

import ltrp_timm
from ltrp_timm.train import train_teacher
from ltrp_timm.train.folder import read_log

SIZES = {name: value for name, value in TEACHER_ARGS.items() if name != "img_size"}
TINY: dict[str, Any] = {
    **QUIET,
    "teacher_args": SIZES,
    "img_size": 32,
    "epochs": 6,
    "batch_size": 4,
    "lr": 3e-3,
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_photos(tmp_path_factory.mktemp("data") / "photos")


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_it_learns_and_becomes_a_teacher(photos: Path, tmp_path: Path, norm_pix_loss: bool) -> None:
    folder = tmp_path / "mae"
    train_teacher(photos, folder, norm_pix_loss=norm_pix_loss, holdout=0.2, **TINY)
    rows = read_log(folder / "log.csv")
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] - 0.02
    assert rows[-1]["chance"] is None
    teacher = ltrp_timm.create_teacher(folder)
    assert teacher.frozen
    assert teacher.norm_pix_loss == norm_pix_loss
    assert teacher.grid_size == (4, 4)
    assert not any(p.requires_grad for p in teacher.parameters())
    summary = run(photos, tmp_path / "ranker", teacher=folder, epochs=1)
    assert summary.steps == 4


def test_any_shape_of_image(photos: Path, tmp_path: Path) -> None:
    sizes = {**SIZES, "img_size": (32, 48), "patch_size": (8, 16)}
    options = {**TINY, "teacher_args": sizes, "img_size": None, "epochs": 1}
    train_teacher(photos, tmp_path / "mae", **options)
    teacher = ltrp_timm.create_teacher(tmp_path / "mae")
    assert teacher.grid_size == (4, 3)
    args = {"width": 16, "depth": 1}
    run(photos, tmp_path / "ranker", teacher=teacher, epochs=1, ranker_args=args)
    ranker = ltrp_timm.create_ranker("conv", pretrained=tmp_path / "ranker")
    assert ranker(torch.zeros(1, 3, 32, 48)).shape == (1, 4, 3)


def test_it_goes_on_from_another_teacher_at_another_size(photos: Path, tmp_path: Path) -> None:
    train_teacher(photos, tmp_path / "mae", **{**TINY, "epochs": 1})
    still = {**TINY, "epochs": 1, "lr": 1e-12, "sched": "none", "teacher_args": None}
    train_teacher(photos, tmp_path / "on", init_from=tmp_path / "mae", **still)
    assert distance(weights(tmp_path / "mae"), weights(tmp_path / "on")) < 1e-6
    large = {**still, "img_size": 48}
    train_teacher(photos, tmp_path / "large", init_from=tmp_path / "mae", **large)
    assert ltrp_timm.create_teacher(tmp_path / "large").grid_size == (6, 6)


def test_pictures(photos: Path, tmp_path: Path) -> None:
    train_teacher(photos, tmp_path / "mae", plot=True, **{**TINY, "epochs": 2})
    for name in ("pictures.png", "curves.png"):
        with Image.open(tmp_path / "mae" / name) as picture:
            assert min(picture.size) > 200


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"mask_ratio": 1.0}, ValueError, r"mask_ratio must be in \(0, 1\), got 1.0"),
        ({"mask_ratio": 0.99}, ValueError, "leaves 0 of 16 visible"),
        ({"img_size": 30}, ValueError, "must be a multiple of patch_size"),
        ({"img_size": 4}, ValueError, "must be a multiple of patch_size"),
        ({"teacher_args": {"nonsense": 1}}, TypeError, "nonsense"),
        ({"init_from": "missing", "teacher_args": None}, FileNotFoundError, "missing does not"),
    ],
    ids=str,
)
def test_bad_input(
    photos: Path, tmp_path: Path, change: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        train_teacher(photos, tmp_path / "mae", **{**TINY, **change})
    assert not (tmp_path / "mae").exists()


def test_the_scale_of_crops_is_checked_and_kept(photos: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {**TINY, "epochs": 1}
    with pytest.raises(ValueError, match=r"scale must be two numbers, 0 < from <= to <= 1, got"):
        train_teacher(photos, tmp_path / "mae", scale=(0.5, 2.0), **options)
    with pytest.raises(ValueError, match=r"scale must be two numbers"):
        run(photos, tmp_path / "ranker", scale=(0.5,))
    assert not list(tmp_path.iterdir())
    train_teacher(photos, tmp_path / "mae", scale=(0.9, 1.0), **options)
    train_teacher(photos, tmp_path / "other", **options)
    ours, theirs = (weights(tmp_path / name) for name in ("mae", "other"))
    assert distance(ours, theirs) > 0.0  # they saw other crops
    with pytest.raises(ValueError, match=r"data\.scale \(\[0\.9, 1\.0\] there, None here"):
        train_teacher(photos, tmp_path / "mae", resume="auto", **options)
