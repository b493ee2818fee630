"""The flags of ``ltrp-timm rank``."""

import argparse
from typing import Any

from ltrp_timm.commands._console import CommandError
from ltrp_timm.commands._flags import keep_ratio, positive
from ltrp_timm.measure.throughput import NUM_WORKERS


def add_rank(commands: Any) -> None:
    """Add the command to the subparsers of ``ltrp-timm``."""
    from ltrp_timm.scoring.cache import CROP_MODES
    from ltrp_timm.scoring.parts import FORMATS
    from ltrp_timm.selection import SELECTIONS

    about = (
        "Rank the patches of images and folders: scores and kept patches, and a picture of each."
    )
    more = (
        "An interrupted run goes on where it stopped when the same command is given again. "
        "torchrun --nproc-per-node N -m ltrp_timm rank … shares the work."
    )
    parser = commands.add_parser(
        "rank", help=about, description=about, epilog=more, allow_abbrev=False
    )
    parser.set_defaults(run=_run)
    add = parser.add_argument
    add("inputs", nargs="+", metavar="IMAGE|DIR", help="files, and folders with all below them")
    add("-o", "--output", metavar="DIR", help="where the results go")
    text = "write an index cache here instead, of one data set as train and evaluate name it"
    add("--cache", metavar="DIR", help=text)
    add("--ranker", default="contrast", help="what scores the patches (%(default)s)")
    add("--ranker-weights", metavar="PATH", help="folder or .safetensors file of a trained ranker")
    add("--ranker-args", metavar="JSON", help="further arguments of create_ranker")
    published = "the ranker's published weights (conv, attention, cam, grad_cam)"
    add("--pretrained", action="store_true", help=published)
    add("--keep-ratio", type=keep_ratio, metavar="R", help="in (0, 1] (0.5)")
    fixed = [name for name in SELECTIONS if name != "adaptive"]  # one K for all images
    add("--selection", choices=fixed, help="(top)")
    add("--model", help="rank as in front of this timm ViT: its images, its patch grid")
    add("--img-size", type=positive, metavar="N", help="side of an image (224, or the model's)")
    add("--patch-size", type=positive, metavar="N", help="side of a patch without --model (16)")
    text = "of a cache's images: squash shows all of them, so that crops can be followed (center)"
    add("--crop-mode", choices=CROP_MODES, help=text)
    add("--split", help="of a cache's data (train)")
    add("--data-root", metavar="DIR", help="folder of a cache's named dataset")
    add("--input-key", metavar="NAME", help="where a cache's named dataset keeps its images")
    add("--format", choices=FORMATS, help="of the scores (npz)")
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
    from ltrp_timm.scoring.cache import rank_cache
    from ltrp_timm.scoring.job import RankOptions
    from ltrp_timm.scoring.run import rank

    if arguments.output == "" or arguments.cache == "":
        flag = "--output" if arguments.output == "" else "--cache"
        raise CommandError(f"{flag} must name a folder, got an empty name.")
    if (arguments.output is None) == (arguments.cache is None):
        raise CommandError("one of --output DIR and --cache DIR says where the results go.")
    if arguments.model is not None and arguments.patch_size is not None:
        raise CommandError("--patch-size goes without --model: a model has its own.")
    if arguments.pretrained and arguments.ranker_weights is not None:
        raise CommandError("--pretrained and --ranker-weights exclude each other.")
    _check_goal(arguments)
    given = dict(vars(arguments), overlays=not arguments.no_overlays)
    if given["workers"] is None:
        given["workers"] = NUM_WORKERS
    for name in ("command", "run", "no_overlays"):
        del given[name]
    options = RankOptions(**{name: value for name, value in given.items() if value is not None})
    return rank(options) if options.cache is None else rank_cache(options)


def _check_goal(arguments: argparse.Namespace) -> None:
    """Flags of results with a cache, or of a cache without one, would do nothing."""
    for_results = ("keep_ratio", "selection", "format", "no_overlays")
    for_cache = ("crop_mode", "split", "data_root", "input_key")
    names = for_cache if arguments.cache is None else for_results
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(arguments, name)]
    if given:
        word = "without" if arguments.cache is not None else "with"
        raise CommandError(f"{given[0]} goes {word} --cache.")
    if arguments.cache is not None and len(arguments.inputs) > 1:
        raise CommandError(f"--cache is of one data set, got {len(arguments.inputs)}.")
