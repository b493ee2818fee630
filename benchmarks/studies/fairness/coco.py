r"""What do rankers keep of annotated objects, of kinds that labels named and of others?

Claim. A ranker that never saw a label keeps as much of objects of kinds that ImageNet-1k names
("seen") as of other kinds ("unseen"); one that was made with its labels may not. This script has no
committed figures: it measures on a folder of images with COCO's instance annotations.

    python benchmarks/studies/fairness/coco.py val2017 annotations/instances_val2017.json \
        --rankers contrast pixel_std conv=my-ranker cam --pretrained --keep-ratios 0.5 0.25 0.125

Arithmetic. Of an object the share of its area that lies in kept patches; of a category the mean
over its objects; of the seen and of the unseen categories the mean over those that an object
shows. The gap is seen − unseen. Random patches keep K / N of any object, so their gap is noise.
Kinds differ in size and place, which moves the gap of every ranker: hold a gap against those of
`random`, `centre` and `contrast` in the same table, not against 0 alone.

Images go through timm's evaluation transform of the ranker or of `--model` (the shorter side to
224, then the middle square; `--crop-mode squash` shows the whole image). Masks go through the same
transform, by box averages, so an object is the part that the ViT sees; objects outside the picture
do not count. Polygons are drawn at the size of the image: a pixel belongs to one if its middle lies
inside. RLE must be uncompressed. Crowds are excluded (`--crowds` includes them), and so are objects
that have only a box. The results count both. Patches are chosen by `top`; `random` draws a new
order for every image.

Intervals: 95 %, of `--resamples` draws of images with replacement (percentiles; the same draws for
every row). A draw that lacks all seen or all unseen categories has no gap and is left out.

Which categories are seen: `coco_imagenet.csv` beside this script, `--seen-classes FILE` (a name a
line, as `ltrp-timm evaluate` takes them) in its place. It has COCO's 80 categories by their names
and, compared by hand with timm's names of the ImageNet-1k classes (the first name of each), one
class that is the same kind of thing, a kind of it (golden retriever: dog), a wider kind that takes
it in (street sign: stop sign), or a part by which the images show all of it (toilet seat: toilet).
The column is empty where there is no class; the same word for another thing (kite, the bird) does
not count. In doubt a category is seen, as labels may have shown it; a person is (ballplayer).

Written to `--output`: coco.csv, .md and .png, coco_categories.csv with the mean of each category,
and coco_seen.txt, the seen categories for `ltrp-timm evaluate … --multi-label --seen-classes`.
"""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

# started by its path, this folder is on Python's path, not the one above it
sys.path.insert(0, str(Path(__file__).parents[2]))

import tables
import timm
import torch
from common import load_pyplot
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from ltrp_timm._text import first_names, one_line, printable
from ltrp_timm.commands._console import output_errors
from ltrp_timm.commands._flags import keep_ratio, not_negative, positive, threads
from ltrp_timm.data.multi_label import read_coco
from ltrp_timm.measure.accuracy import seen_classes
from ltrp_timm.measure.throughput import NUM_WORKERS, environment
from ltrp_timm.runtime.world import join_world, worker_init
from ltrp_timm.scoring.scorer import CROP_MODES, Scorer
from ltrp_timm.selection import num_keep
from studies.fairness.coco_objects import Annotated, ObjectDataset, collate, find_objects
from studies.fairness.coco_rankers import Entry, kept_shares, open_rankers
from studies.fairness.coco_report import FILES, Measured, report, table_rows

DEFAULT_SEEN = Path(__file__).with_name("coco_imagenet.csv")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("images", type=Path, metavar="IMAGES", help="folder that the names of files are below")
    add("annotations", metavar="ANNOTATIONS.json", help="COCO's instance annotations of them")
    text = "names, each with =WEIGHTS where it is trained: a folder, a file or hf-hub:…; random is "
    add("--rankers", nargs="+", default=["contrast", "pixel_std", "centre"], help=text + "added")
    text = "further arguments of create_ranker by name as in --rankers, {NAME: {…}}"
    add("--ranker-args", metavar="JSON", default="{}", help=text)
    text = "published weights for rankers that have them (conv, attention, cam, grad_cam)"
    add("--pretrained", action="store_true", help=text)
    ratios = [0.5, 0.25, 0.125]
    add("--keep-ratios", nargs="+", type=keep_ratio, default=ratios, help="in (0, 1] (%(default)s)")
    text = "names of the seen categories, one a line, in place of coco_imagenet.csv"
    add("--seen-classes", metavar="FILE", help=text)
    add("--crowds", action="store_true", help="take a crowd's region for an object")
    add("--crop-mode", choices=CROP_MODES, help="squash shows all of an image (center)")
    add("--model", help="rank as in front of this timm ViT: its images, its patch grid")
    add("--img-size", type=positive, metavar="N", help="side of a picture (224, or the model's)")
    add("--patch-size", type=positive, metavar="N", help="side of a patch without --model (16)")
    add("--resamples", type=positive, default=1000, metavar="N", help="(%(default)s)")
    add("--seed", type=int, default=0, help="of the random ranker (%(default)s)")
    add("--batch-size", type=positive, default=32, metavar="N", help="(%(default)s)")
    add("--workers", type=not_negative, metavar="N", help="processes that read (up to 4)")
    add("--threads", type=positive, metavar="N", help="of torch")
    add("--device", help="cpu, cuda, … (a GPU where there is one)")
    output = Path("coco-fairness")
    add("--output", type=Path, default=output, metavar="DIR", help="of results (%(default)s)")
    add("--overwrite", action="store_true", help="replace results that are there")
    return parser.parse_args(argv)


def find_seen(path: str | None, categories: Sequence[str]) -> Tensor:
    """Which categories are seen, (C,) bool.

    Raises:
        FileNotFoundError, ValueError: what is wrong with the file, or it does not fit.
    """
    if path is not None:
        names = set(seen_classes(path, categories) or ())
    else:
        listed = {row["category"]: row["imagenet_class"] for row in tables.read_csv(DEFAULT_SEEN)}
        strangers = [name for name in categories if name not in listed]
        if strangers:
            raise ValueError(
                f"{len(strangers)} categories are not in {DEFAULT_SEEN.name}: "
                f"{first_names(strangers)}; --seen-classes FILE names those that are seen."
            )
        names = {name for name in categories if listed[name]}
    return torch.tensor([name in names for name in categories])


def check_both(category: Tensor, seen: Tensor) -> None:
    """Check that seen and unseen objects are there, else there is no gap.

    Raises:
        ValueError: one kind has none.
    """
    for kind, mine in (("seen", seen), ("unseen", ~seen)):
        if not bool(mine[category].any()):
            raise ValueError(f"no object of {kind} categories is there: there is no gap.")


def open_images(args: argparse.Namespace, found: Annotated, scorer: Scorer) -> ObjectDataset:
    """The images and their objects, as the rankers get them; they differ in normalisation alone.

    Raises:
        ValueError: images are not there.
    """
    if not args.images.is_dir():
        raise ValueError(f"{printable(args.images)} is no folder of images.")
    absent = [image.name for image in found.images if not (args.images / image.name).is_file()]
    if absent:
        raise ValueError(
            f"{len(absent)} of {len(found.images)} annotated images are not in "
            f"{printable(args.images)}: {first_names(absent)}."
        )
    config = {**scorer.config, "interpolation": "box"}  # of areas, no ringing
    of_masks = timm.data.create_transform(**config, is_training=False, normalize=False)
    sizes = scorer.grid_size, scorer.patch_size
    return ObjectDataset(args.images, found.images, scorer.transform(), of_masks, *sizes)


def measure(
    args: argparse.Namespace, found: Annotated, seen: Tensor, entries: Sequence[Entry]
) -> tuple[Measured, tables.Row]:
    """Rank all images, batch by batch; unreadable ones are named and counted.

    Returns:
        What was found, and how many images were used and what was not.
    """
    dataset = open_images(args, found, entries[0].scorer)
    workers = NUM_WORKERS if args.workers is None else args.workers
    loader = DataLoader(
        dataset,
        args.batch_size,
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=worker_init(),
    )
    parts: list[tuple[Tensor, ...]] = []
    count = {"images": 0, "images_unreadable": 0, "objects_hidden": 0}
    with tqdm(total=len(dataset), unit="image") as bar:
        for batch in loader:
            for reason in batch.reasons:
                bar.write(f"coco.py: {reason}", file=sys.stderr)
            count["images"] += len(batch.pixels)
            count["images_unreadable"] += len(batch.reasons)
            count["objects_hidden"] += batch.hidden
            if len(batch.row):
                size = batch.pixels.shape[-2] * batch.pixels.shape[-1]
                share = batch.areas.sum(dim=1) / size
                recall = kept_shares(batch, entries, args.keep_ratios)
                parts.append((batch.image, batch.category, share, recall))
            bar.update(len(batch.pixels) + len(batch.reasons))
    if not parts:
        raise ValueError("not one object can be seen: nothing was written.")
    columns = [(entry.label, ratio) for entry in entries for ratio in args.keep_ratios]
    image, category, share, recall = (torch.cat(column) for column in zip(*parts))
    return Measured(image, category, share, recall, columns, found.categories, seen), count


def check_output(args: argparse.Namespace) -> None:
    """Make the folder of the results, unless some would be lost.

    Raises:
        ValueError: it holds results, or cannot be made.
    """
    there = [name for name in FILES if (args.output / name).exists()]
    if there and not args.overwrite:
        name = printable(args.output)
        raise ValueError(f"{name} holds {there[0]} already: --overwrite replaces it.")
    with output_errors(str(args.output)):
        args.output.mkdir(parents=True, exist_ok=True)


def run(args: argparse.Namespace) -> int:
    """Measure and write; returns 0, or 2 where images could not be used.

    Raises:
        ValueError: an argument is wrong, or the files do not fit together.
    """
    if importlib.util.find_spec("skimage") is None:
        raise ValueError("polygons need scikit-image: pip install 'ltrp-timm[demo]'")
    load_pyplot()
    with join_world(args.device, patient=True) as world:
        device = str(world.device)
    args.keep_ratios = list(dict.fromkeys(args.keep_ratios))
    found = find_objects(read_coco(args.annotations), args.crowds)
    seen = find_seen(args.seen_classes, found.categories)
    named = [category for image in found.images for category, _ in image.objects]
    check_both(torch.tensor(named), seen)
    entries = open_rankers(args, device)
    open_images(args, found, entries[0].scorer)  # says what is missing before a folder is made
    check_output(args)
    measured, count = measure(args, found, seen, entries)
    check_both(measured.category, seen)
    scorer = entries[0].scorer
    facts = {
        "annotations": Path(args.annotations).name,
        **count,
        "crowds_left_out": found.crowds,
        "boxes_left_out": found.boxes,
        "model": args.model or "none",
        "img_size": "x".join(str(side) for side in scorer.config["input_size"][-2:]),
        "patch_size": "x".join(str(side) for side in scorer.patch_size),
        "crop_mode": scorer.config["crop_mode"],
        "crop_pct": scorer.config["crop_pct"],
        "selection": "top",
        **{"device": device, "dtype": "float32", "depth": "all"},
        **environment(device),
    }
    h, w = scorer.grid_size
    rows = table_rows(measured, args.resamples, {"patches": h * w, **facts})
    rows = [{**row, "patches_kept": num_keep(h * w, row["keep_ratio"])} for row in rows]
    report(rows, measured, args)
    return 2 if count["images_unreadable"] else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run; returns the exit code."""
    args = parse(argv)
    try:
        with threads(args.threads):
            return run(args)
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        print(f"coco.py: {one_line(error)}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(main())
