"""A teacher and rankers small enough to train on one core in minutes, and their images."""

import argparse
from pathlib import Path
from typing import NamedTuple

from judging import ink_per_patch
from scenes import PHOTOS, make_cluttered_scenes, random_crops
from torch import Tensor

from ltrp_timm.train import Summary, train_ranker, train_teacher
from ltrp_timm.train.logs import LOG_NAME, read_log
from ltrp_timm.train.pictures import show_images

SIDE, PATCH = 128, 16
GRID = (SIDE // PATCH, SIDE // PATCH)
NEW_PHOTOS = ("chelsea", "coins", "flower")  # held out
AGGREGATES = ("mean", "max")


class HeldOut(NamedTuple):
    """Images to measure on, pixels in [0, 1] (B, 3, H, W); ink of each patch (B, N), or None."""

    images: Tensor
    ink: Tensor | None


def write_images(images: Tensor, folder: Path, name: str) -> None:
    """images (B, 3, H, W) as PNG files, beside none of that name of another run.

    Raises:
        SystemExit: the folder has others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}_{number:04d}.png" for number in range(len(images))]
    others = set(folder.glob(f"{name}_*.png")) - set(paths)
    if others:
        raise SystemExit(f"{folder} has {len(others)} images of another run; choose another --runs")
    for path, picture in zip(paths, show_images(images)):
        picture.save(path)


def make_data(args: argparse.Namespace, folder: Path) -> dict[str, HeldOut]:
    """Write ``train`` and ``held_out`` into the folder; the latter also as tensors."""
    old_photos = [name for name in PHOTOS if name not in NEW_PHOTOS]
    write_images(make_cluttered_scenes(args.scenes, 0, SIDE)[0], folder / "train", "scene")
    write_images(random_crops(old_photos, args.crops, 0, SIDE), folder / "train", "photo")
    scenes, ink = make_cluttered_scenes(args.held_out, 1, SIDE)
    photos = random_crops(NEW_PHOTOS, args.held_out, 1, SIDE)
    found = {
        "scenes": HeldOut(scenes, ink_per_patch(ink, PATCH)),
        "photos": HeldOut(photos, None),
    }
    for name, held in found.items():
        write_images(held.images, folder / "held_out", name)
    return found


def train(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Teacher and rankers into folders of their names; seconds of training of each.

    Raises:
        SystemExit: it was asked to stop; what was reached is saved.
    """
    common = {"val_data": folder / "held_out", "num_workers": 0, "device": args.device}
    common |= {"precision": {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[args.dtype]}
    common |= {"tensorboard": False, "plot": True, "resume": "auto", "seed": args.seed}
    small = {"patch_size": PATCH, "embed_dim": 128, "depth": args.depth or 4, "num_heads": 4}
    small |= {"decoder_embed_dim": 64, "decoder_depth": 1, "decoder_num_heads": 4}
    count = args.scenes + args.crops
    batch = min(64, count)
    options = {**common, "epochs": args.teacher_epochs, "batch_size": batch, "lr": args.teacher_lr}
    done = train_teacher(folder / "train", folder / "teacher", SIDE, small, **options)
    seconds = {"teacher": _seconds(done, count // batch * batch)}
    batch = min(16, count)
    options = {**common, "epochs": args.ranker_epochs, "batch_size": batch, "lr": args.ranker_lr}
    options |= {"mask_ratio": args.mask_ratio, "removal": "full", "clip_grad": 1.0}
    options |= {"teacher": folder / "teacher", "img_size": SIDE}
    for aggregate in AGGREGATES:
        output = folder / f"conv_{aggregate}"
        done = train_ranker(folder / "train", output, aggregate=aggregate, **options)
        seconds[f"conv, {aggregate}"] = _seconds(done, count // batch * batch)
    return seconds


def _seconds(done: Summary, images: int) -> float:
    """Training time by the log, held-out images not counted: right for a run in parts too."""
    if done.stopped_by:
        raise SystemExit(
            f"{done.output} was stopped; started again with the same --runs, it goes on"
        )
    return sum(images / row["images_per_second"] for row in read_log(done.output / LOG_NAME))
