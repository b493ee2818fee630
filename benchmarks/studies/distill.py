"""Does a `conv` ranker that learns from another ranker find objects as that one does?

Claim. `ltrp-timm train-ranker --data FOLDER --teacher none --distill-from RANKER`, all else by
default, on a folder of 2000 JPEG files, gives a ranker with an object AUC of at least 0.88 on
photos with pasted objects, in at most ten minutes of one processor core.

Arithmetic. 8 epochs of 1900 pictures of 224 px are 232 updates of 64; each of the 4 crops of a
picture is scored once by the teacher.

The folder holds random squares of 13 photos of scikit-image and scikit-learn, whose licences are
free; none of them is among the pictures of the judge. `border` has no weights and no data, so the
student of the first teacher is what `create_ranker("conv", pretrained=True)` loads; `--ship
ltrp_timm/weights` writes it there. Judged as in `quality.py`, but at patches of 16 px: objects
pasted on photos, those for test; and photos whose objects have boxes. Intervals are resampled by
object, or by photo. A last set has one picture of each object, of which the backbone sees 32
patches: how much its feature changes without each of them (`semantic_density`), and what others say
about these patches. `seconds` is processor time of the whole training, one thread.
"""

import argparse
import hashlib
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# started by its path, only its own folder is on the path
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import tables
import torch
from common import WIDTH, Row, base_parser, load_pyplot, set_up
from tables import Goal

from ltrp_timm import FeatureTeacher, create_ranker, semantic_density
from ltrp_timm.commands._flags import positive
from ltrp_timm.layers.bridge import InputBridge, resize_score_map
from ltrp_timm.teacher import random_visible_indices
from ltrp_timm.train import train_ranker
from ltrp_timm.visualize import show_images
from ltrp_timm.weights.files import WEIGHTS_NAME
from studies.quality import judge
from studies.quality.material import (
    add_source_options,
    load_backbone,
    open_material,
    parse_sources,
)
from studies.quality.pictures import composites, object_photos
from studies.scenes import NEW_PHOTOS, OLD_PHOTOS, random_crops

NAME = "distill"
TITLE = "Students of other rankers"
BASE = "contrast"  # differences are to it
TEACHERS = ("border", "feature_contrast")
CHANGE = "change of features"
PATCH = 16
_OF_THE_JUDGE = ("brick", "camera", "grass", "rocket")
FREE_PHOTOS = tuple(name for name in OLD_PHOTOS + NEW_PHOTOS if name not in _OF_THE_JUDGE)


def write_folder(folder: Path, count: int) -> None:
    """Random squares of the free photos as JPEG files."""
    folder.mkdir()
    pictures = show_images(random_crops(FREE_PHOTOS, count, 0, 256))
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number:05}.jpg", quality=92)


def open_teacher(name: str, args: argparse.Namespace) -> Any:
    """A teacher; the one with a backbone sees images of 112 px."""
    if name != "feature_contrast":
        return create_ranker(name, patch_size=PATCH).eval()
    backbone = load_backbone(args, 48 if args.quick else 112)
    blocks = min(4, len(backbone.blocks))
    size = tuple(backbone.patch_embed.img_size)
    return create_ranker(name, backbone=backbone, blocks=blocks, img_size=size).eval()


def scores_of(ranker: Any, images: torch.Tensor, grid: Any = None) -> torch.Tensor:
    """uint8 images (B, 3, S, S) -> scores (B, N) for patches of 16 px, or on another grid."""
    grid = grid or (images.shape[-1] // PATCH,) * 2
    plain = ([0.0] * 3, [1.0] * 3)
    bridge = InputBridge(plain, (ranker.mean, ranker.std), ranker.img_size)

    def call(part: torch.Tensor) -> torch.Tensor:
        return resize_score_map(ranker(bridge(part.float() / 255)), *grid)

    return judge.in_batches(call, images)


def run(args: argparse.Namespace, folder: Path, where: Row) -> list[Row]:
    """Train a student of each teacher, judge all; rows."""
    material = open_material(args, folder)
    data = folder / "jpegs"
    write_folder(data, args.images)
    rankers = {BASE: create_ranker(BASE, patch_size=PATCH).eval()}
    seconds, digests = {}, {}
    for name in args.teachers:
        rankers[name] = open_teacher(name, args)
        method, home = f"conv from {name}", folder / f"conv_{name}"
        start = time.process_time()
        options: Any = {"ranker_args": {"img_size": None}}  # what is shipped takes any size
        options |= {"epochs": args.epochs} if args.epochs else {}
        train_ranker(
            *(data, home), teacher=None, distill_from=rankers[name], num_workers=0, **options
        )
        seconds[method] = round(time.process_time() - start, 1)
        digests[method] = hashlib.sha256((home / WEIGHTS_NAME).read_bytes()).hexdigest()
        rankers[method] = create_ranker("conv", pretrained=home).eval()
        print(f"{method}: {seconds[method]:.0f} s", flush=True)
    sets = {
        "pasted objects": composites(material, True, args.pictures, args.seed + 1, args.size),
        "photos with boxes": object_photos(material, args.size),
    }
    rows: list[Row] = []
    for kind, pictures in sets.items():
        share = judge.share_of_objects(pictures.masks, (args.size // PATCH,) * 2)
        found = {
            method: judge.object_auc(scores_of(ranker, pictures.images), share)
            for method, ranker in rankers.items()
        }
        rows += rows_of_set(kind, pictures.objects, found)
    rows += change_of_features(args, material, rankers)
    for row in rows:
        row["seconds"] = seconds.get(row["method"], "")
        row |= {"images": args.images, "seed": args.seed}
        row |= {"weights_sha256": digests.get(row["method"], ""), **where}
    return rows


def rows_of_set(kind: str, objects: torch.Tensor, found: dict[str, np.ndarray]) -> list[Row]:
    """Rows of a set of pictures from the AUC of each method in each picture."""
    groups = objects.numpy() if objects.min() >= 0 else np.arange(len(objects))
    rows = []
    for method, values in found.items():
        row: Row = {"method": method, "pictures": kind, "count": int((~np.isnan(values)).sum())}
        row |= judge.columns("object_auc", judge.interval(values, groups))
        row |= judge.columns(f"above_{BASE}", judge.interval(values - found[BASE], groups))
        rows.append(row)
    return rows


def change_of_features(args: argparse.Namespace, material: Any, rankers: Any) -> list[Row]:
    """Rows of pictures of which 32 patches are seen: what a ViT's features say about these."""
    teacher = FeatureTeacher(load_backbone(args, args.size))
    pictures = composites(material, True, args.pictures // 4, args.seed + 1, args.size)
    share = judge.share_of_objects(pictures.masks, teacher.grid_size)
    count, draw = share.shape[1], torch.Generator().manual_seed(0)
    hidden = 1 - min(32, count // 2) / count
    visible = random_visible_indices(len(share), count, hidden, draw)

    def change(images: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        return semantic_density(teacher, judge.normalised(images, teacher.net), seen)[0]

    seen = share.gather(1, visible)
    found = {CHANGE: judge.object_auc(judge.in_batches(change, pictures.images, visible), seen)}
    for method in (BASE, *args.teachers):
        scores = scores_of(rankers[method], pictures.images, teacher.grid_size)
        found[method] = judge.object_auc(scores.gather(1, visible), seen)
    return rows_of_set(f"{visible.shape[1]} patches of pasted objects", pictures.objects, found)


def goals(rows: list[Row]) -> list[Goal]:
    """What students must reach."""
    students = {"method": lambda name: name.startswith("conv"), "pictures": "pasted objects"}
    return [
        Goal("object AUC, pasted objects", students, "object_auc", ">=", 0.88),
        Goal("above contrast", students, f"above_{BASE}_low", ">=", 0.0),
        Goal("seconds of one core", students, "seconds", "<=", 600.0),
    ]


def table(rows: list[Row]) -> list[Row]:
    """The figures as text, a line for each ranker."""
    lines: dict[str, Row] = {}
    for row in rows:
        line = lines.setdefault(row["method"], {"ranker": row["method"]})
        line[f"AUC, {row['pictures']}"] = tables.figure(row, "object_auc", ".3f")
        line[f"above {BASE}, {row['pictures']}"] = tables.figure(row, f"above_{BASE}", ".3f")
        line["training, s of one core"] = row["seconds"]
    columns = list(dict.fromkeys(name for line in lines.values() for name in line))
    lines = {name: dict.fromkeys(columns, "") | line for name, line in lines.items()}
    return list(lines.values())


def plot(rows: list[Row]) -> Any:
    """A bar for each ranker and set of pictures."""
    pyplot = load_pyplot()
    kinds = list(dict.fromkeys(row["pictures"] for row in rows))[:2]
    figure, axes = pyplot.subplots(1, len(kinds), figsize=(WIDTH, 2.4))
    for axis, kind in zip(axes, kinds):
        own = [row for row in rows if row["pictures"] == kind]
        values = [row["object_auc"] for row in own]
        ends = [
            [row["object_auc"] - row["object_auc_low"] for row in own],
            [row["object_auc_high"] - row["object_auc"] for row in own],
        ]
        axis.barh([row["method"] for row in own], values, xerr=ends)
        axis.set(title=kind, xlabel="object AUC", xlim=(0.5, 1))
        axis.invert_yaxis()
    return figure


def main() -> None:
    """Train, judge, write CSV, PNG and Markdown, check the goals."""
    parser = base_parser((__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add_source_options(parser)
    add("--teachers", nargs="+", choices=TEACHERS, default=list(TEACHERS), help="rankers")
    add("--images", type=positive, default=2000, help="JPEG files to train on")
    add("--epochs", type=positive, help="of a student (default: those of train-ranker)")
    add("--pictures", type=positive, default=280, help="pictures with one object, for test")
    add("--size", type=positive, default=224, help="side of the pictures for test")
    text = "copy the student of the first teacher into this folder, as conv.safetensors"
    add("--ship", type=Path, metavar="FOLDER", help=text)
    args = parse_sources(parser)
    if args.quick:
        args.images, args.epochs, args.pictures, args.size = 8, 1, 6, 64
    where = set_up(args)
    with tempfile.TemporaryDirectory() as name:
        rows = run(args, Path(name), where)
        if args.ship is not None:
            source = Path(name) / f"conv_{args.teachers[0]}" / WEIGHTS_NAME
            shutil.copyfile(source, args.ship / "conv.safetensors")
    tables.conclude(NAME, TITLE, rows, table(rows), goals(rows), plot(rows), args)


if __name__ == "__main__":
    main()
