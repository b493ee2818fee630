"""The flags of ``ltrp-timm rank``."""

import argparse
import os
from typing import Any

from ltrp_timm.arguments import keep_ratio, positive
from ltrp_timm.console import CommandError


def add_rank(commands: Any) -> None:
    """Add the command to the subparsers of ``ltrp-timm``."""
    from ltrp_timm.rank.parts import FORMATS
    from ltrp_timm.selection import SELECTIONS

    about = (
        "Rank the patches of images and folders: scores and kept patches, and a picture of each."
    )
    more = (
        "An interrupted run goes on where it stopped when the same command is given again. "
        "torchrun --nproc-per-node N -m ltrp_timm.cli rank … shares the work."
    )
    parser = commands.add_parser(
        "rank", help=about, description=about, epilog=more, allow_abbrev=False
    )
    parser.set_defaults(run=_run)
    add = parser.add_argument
    add("inputs", nargs="+", metavar="IMAGE|DIR", help="files, and folders with all below them")
    add("-o", "--output", required=True, metavar="DIR", help="where the results go")
    add("--ranker", default="contrast", help="what scores the patches (%(default)s)")
    add("--ranker-weights", metavar="PATH", help="folder or .safetensors file of a trained ranker")
    add("--ranker-args", metavar="JSON", help="further arguments of create_ranker")
    add(
        "--pretrained", action="store_true", help="the ranker's published weights (conv, attention)"
    )
    add("--keep-ratio", type=keep_ratio, default=0.5, metavar="R", help="in (0, 1] (%(default)s)")
    fixed = [name for name in SELECTIONS if name != "adaptive"]  # one K for all images
    add("--selection", choices=fixed, default="top", help="(%(default)s)")
    add("--model", help="rank as in front of this timm ViT: its images, its patch grid")
    add("--img-size", type=positive, metavar="N", help="side of an image (224, or the model's)")
    add("--patch-size", type=positive, metavar="N", help="side of a patch without --model (16)")
    add("--format", choices=FORMATS, default="npz", help="of the scores (%(default)s)")
    add("--no-overlays", action="store_true", help="write no pictures")
    add("--batch-size", type=positive, default=32, metavar="N", help="(%(default)s)")
    add("--workers", type=_workers, metavar="N", help="processes that read images (up to 4)")
    add("--device", help="cpu, cuda, … (a GPU where there is one)")
    add("--overwrite", action="store_true", help="start anew, replace results that are there")


def _workers(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number from 0, got {text}.")
    return int(text)


def _run(arguments: argparse.Namespace) -> int:
    from ltrp_timm.rank.command import RankOptions, rank

    if not arguments.output:
        raise CommandError("--output must name a folder, got an empty name.")
    if arguments.model is not None and arguments.patch_size is not None:
        raise CommandError("--patch-size goes without --model: a model has its own.")
    if arguments.pretrained and arguments.ranker_weights is not None:
        raise CommandError("--pretrained and --ranker-weights exclude each other.")
    given = dict(vars(arguments), overlays=not arguments.no_overlays)
    if given["workers"] is None:
        given["workers"] = min(4, os.cpu_count() or 1)
    for name in ("command", "run", "no_overlays"):
        del given[name]
    return rank(RankOptions(**given))
