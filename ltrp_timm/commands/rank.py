"""``ltrp-timm rank``: flags to plain arguments."""

import argparse
import os
from typing import Any

from ltrp_timm._text import complain, printable, say
from ltrp_timm.commands._console import CommandError, library_errors
from ltrp_timm.commands._flags import keep_ratio, not_negative, positive
from ltrp_timm.commands.train import parse_values
from ltrp_timm.measure.throughput import NUM_WORKERS


def add_rank(commands: Any) -> None:
    """Add the command to the subparsers of ``ltrp-timm``."""
    from ltrp_timm.rankers import list_rankers
    from ltrp_timm.scoring.scorer import CROP_MODES
    from ltrp_timm.selection import SELECTIONS

    about = "Score the patches of images: files, folders, or a data set."
    more = (
        "DIR gets scores.npy (images, patches) and index.json; evaluate and finetune read both "
        "with --index-cache DIR. Run the same command again to continue an interrupted run. Use "
        "torchrun --nproc-per-node N -m ltrp_timm rank … to share the work among processes."
    )
    parser = commands.add_parser(
        "rank", help=about, description=about, epilog=more, allow_abbrev=False
    )
    parser.set_defaults(run=_run)
    add = parser.add_argument
    text = "image files and folders, searched recursively; or one data set: a .tar or hfds/…, "
    add("data", nargs="+", metavar="DATA", help=text + "wds/…, torch/… as in timm")
    add("-o", "--output", metavar="DIR", required=True, help="folder of the results")
    text = "what scores the patches (default: the ranker of --model, or contrast)"
    add("--ranker", choices=list_rankers(), help=text)
    add("--ranker-args", nargs="+", metavar="NAME=VALUE", help="options of the ranker")
    weights = parser.add_mutually_exclusive_group()
    text = "weights of the ranker: a folder, a .safetensors file or hf-hub:owner/name"
    weights.add_argument("--ranker-weights", metavar="PATH", help=text)
    text = "use the ranker's published weights (conv, attention, cam, grad_cam)"
    weights.add_argument("--pretrained", action="store_true", help=text)
    text = "timm model; prepare images and patches as for this model"
    add("--model", metavar="NAME", help=text)
    text = "side of the images in pixels (default: 224, or the model's)"
    add("--img-size", type=positive, metavar="N", help=text)
    text = "side of a patch in pixels, without --model (default: 16)"
    add("--patch-size", type=positive, metavar="N", help=text)
    text = "squash resizes the whole picture, as finetune --index-cache needs (default: center)"
    add("--crop-mode", choices=CROP_MODES, help=text)
    text = "also write keep_indices.npy with this share of the patches, in (0, 1]"
    add("--keep-ratio", type=keep_ratio, metavar="R", help=text)
    text = "rule behind keep_indices.npy (default: top)"
    add("--selection", choices=SELECTIONS, help=text)
    text = "also write a picture of each image with its scores and kept patches"
    add("--overlays", action="store_true", help=text)
    add("--split", metavar="NAME", help="split of a data set (default: train)")
    add("--data-root", metavar="DIR", help="folder of a named data set")
    add("--input-key", metavar="NAME", help="column of the images in a named data set")
    text = "images per batch (default: %(default)s)"
    add("--batch-size", type=positive, default=32, metavar="N", help=text)
    text = "processes that read images (default: %(default)s)"
    add("--num-workers", type=not_negative, default=NUM_WORKERS, metavar="N", help=text)
    add("--device", metavar="NAME", help="cpu, cuda, … (default: a GPU if there is one)")
    add("--overwrite", action="store_true", help="replace existing results")


def _run(arguments: argparse.Namespace) -> int:
    from ltrp_timm.scoring import rank_images

    if not arguments.output:
        raise CommandError("--output must name a folder, got an empty name.")
    values = dict(vars(arguments), ranker_args=parse_values(arguments.ranker_args))
    if values.pop("pretrained"):
        values["ranker_weights"] = True
    for name in ("command", "run"):
        del values[name]
    reports = os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1"
    try:
        with library_errors():
            ranked = rank_images(**values)
    except CommandError:
        if not reports:  # the first process does
            return 2
        raise
    if not reports:
        return 0
    for line in ranked.unreadable:
        complain(line)
    noun = "image" if ranked.ranked == 1 else "images"
    count = f"{ranked.ranked} {noun}, {len(ranked.unreadable)} failed"
    say(f"ranked {count}: {printable(arguments.output)}")
    return 2 if ranked.unreadable else 0
