"""A teacher and rankers small enough to train on one core in minutes, and their images."""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ltrp_timm.train import Summary, train_ranker, train_teacher
from ltrp_timm.train.folder import LOG_NAME, read_log
from ltrp_timm.visualize import show_images
from studies.judging import ink_per_patch
from studies.scenes import (
    NEW_DIGITS,
    NEW_PHOTOS,
    OLD_PHOTOS,
    draw_on,
    make_cluttered_scenes,
    random_crops,
)

SIDE, PATCH = 128, 16  # of the training; a patch as the default conv ranker has it
LARGE = 224
KINDS = ("scenes", "digits on photos", "photos")


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


def held_out(kind: str, count: int, side: int, seed: int = 2) -> HeldOut:
    """New images of a kind: new scenes of new digits, new photos, new digits on new photos."""
    if kind == "scenes":
        images, ink = make_cluttered_scenes(count, seed, side, NEW_DIGITS)
        return HeldOut(images, ink_per_patch(ink, PATCH))
    photos = random_crops(NEW_PHOTOS, count, seed, side)
    if kind == "photos":
        return HeldOut(photos, None)
    images, ink = draw_on(photos, torch.Generator().manual_seed(seed), NEW_DIGITS)
    return HeldOut(images, ink_per_patch(ink, PATCH))


def make_data(args: argparse.Namespace, folder: Path) -> dict[tuple[str, int], HeldOut]:
    """Write ``train`` and ``held_out`` into the folder; the latter, by (kind, side), as tensors."""
    write_images(make_cluttered_scenes(args.scenes, 0, SIDE)[0], folder / "train", "scene")
    write_images(random_crops(OLD_PHOTOS, args.crops, 0, SIDE), folder / "train", "photo")
    found = {
        (kind, side): held_out(kind, args.held_out, side)
        for side in (SIDE, LARGE)
        for kind in KINDS
        if (kind, side) != ("photos", LARGE)  # neither ink nor a teacher of that size
    }
    for kind in ("scenes", "photos"):
        write_images(found[kind, SIDE].images, folder / "held_out", kind)
    return found


def train(args: argparse.Namespace, folder: Path, seed: int) -> dict[str, float]:
    """Teacher and rankers of a seed into folders of their names; seconds of training of each.

    Raises:
        SystemExit: The training was stopped; its state is saved.
    """
    home = folder / f"seed_{seed}"
    home.mkdir(parents=True, exist_ok=True)
    common = {"val_data": folder / "held_out", "num_workers": 0, "device": args.device}
    common |= {"precision": {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[args.dtype]}
    common |= {"tensorboard": False, "plot": True, "resume": "auto", "seed": seed}
    small = {"patch_size": PATCH, "embed_dim": 128, "depth": args.depth or 3, "num_heads": 4}
    small |= {"decoder_embed_dim": 96, "decoder_depth": 1, "decoder_num_heads": 4}
    count = args.scenes + args.crops
    batch = min(64, count)
    options = {**common, "epochs": args.teacher_epochs, "batch_size": batch, "lr": args.teacher_lr}
    options |= {"norm_pix_loss": args.norm_pix}
    done = train_teacher(folder / "train", home / "teacher", SIDE, small, **options)
    seconds = {"teacher": _seconds(done, count // batch * batch)}
    batch = min(16, count)
    options = {**common, "epochs": args.ranker_epochs, "batch_size": batch, "lr": args.ranker_lr}
    options |= {"mask_ratio": args.mask_ratio, "removal": "full", "clip_grad": 1.0}
    options |= {"list_size": args.list_size}
    options |= {"teacher": home / "teacher", "img_size": SIDE}
    options |= {"ranker_args": {"img_size": None}}  # what is shipped takes images of any size
    for aggregate in args.aggregates:
        output = home / f"conv_{aggregate}"
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
