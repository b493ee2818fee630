"""The flags of ``ltrp-timm evaluate``."""

import argparse
from typing import Any

from ltrp_timm.commands._console import CommandError
from ltrp_timm.commands._flags import keep_ratio, not_negative, positive


def add_evaluate(commands: Any) -> None:
    """Add the command to the subparsers of ``ltrp-timm``."""
    from ltrp_timm.selection import SELECTIONS
    from ltrp_timm.train.settings import PRECISIONS

    about = "Accuracy of a model on labelled images at several keep ratios, and its images/s."
    more = "torchrun --nproc-per-node N -m ltrp_timm evaluate … shares the images."
    parser = commands.add_parser(
        "evaluate", help=about, description=about, epilog=more, allow_abbrev=False
    )
    parser.set_defaults(run=_run)
    add = parser.add_argument
    add("model", metavar="MODEL", help="an ltrp_* name, any timm model, hf-hub:… or local-dir:…")
    text = "a folder with one for each class, a .tar of it, hfds/… or torch/… as timm names them"
    add("--data", required=True, metavar="DIR", help=text)
    add("--split", default="validation", help="of the data; a folder's of that name (%(default)s)")
    add("--data-root", metavar="DIR", help="folder of a named dataset")
    add("--input-key", metavar="NAME", help="where a named dataset keeps its images (image)")
    add("--target-key", metavar="NAME", help="where it keeps its labels (label)")
    add("--class-map", metavar="FILE", help="a text file: line n names class n, from 0")
    add("--multi-label", action="store_true", help="images have several classes: mAP, not top-1")
    text = "with --multi-label: COCO's annotations (.json) or a .csv; --data is their folder"
    add("--labels", metavar="FILE", help=text)
    text = "with --multi-label: class names, one a line; mAP of them and of the others apart"
    add("--seen-classes", metavar="FILE", help=text)
    add("--all-classes", action="store_true", help="classes that the data lacks compete too")
    add(
        "--keep-ratio",
        nargs="+",
        type=keep_ratio,
        metavar="R",
        help="shares of patches to keep, in (0, 1] (1 0.7 0.5 0.25)",
    )
    add("--ranker", help="what scores the patches (the model's own, or contrast)")
    add("--ranker-weights", metavar="PATH", help="folder or .safetensors file of the ranker")
    add("--selection", choices=SELECTIONS, help="how scores become patches (the model's own)")
    add("--index-cache", metavar="DIR", help="read scores that ltrp-timm rank has written")
    add("--pretrained", action="store_true", help="download the backbone's weights if need be")
    add("--checkpoint", metavar="FILE", help="weights of the model or of its plain backbone")
    add("--img-size", type=positive, metavar="PIXELS", help="side of the images (the model's)")
    add("--num-classes", type=positive, metavar="N", help="classes (the model's)")
    add("--batch-size", type=positive, default=64, metavar="N", help="(%(default)s)")
    text = "processes that read images (up to 4; on a CPU 0, so that they do not disturb the clock)"
    add("--workers", type=not_negative, metavar="N", help=text)
    add("--device", help="cpu, cuda, … (a GPU where there is one)")
    add("--precision", choices=PRECISIONS, default="fp32", help="autocast (%(default)s)")
    add("--threads", type=positive, metavar="N", help="CPU threads (torch's own choice)")
    add("-o", "--output", metavar="DIR", help="where evaluate.csv and evaluate.json go")
    add("--plot", action="store_true", help="draw accuracy against images/s as evaluate.png too")
    add("--per-image", action="store_true", help="write per_image.csv too")
    add("--overwrite", action="store_true", help="replace what --output holds")


def _run(arguments: argparse.Namespace) -> int:
    from ltrp_timm.commands._evaluate_run import EvaluateOptions, evaluate

    if arguments.output is None and (arguments.plot or arguments.per_image):
        raise CommandError("--plot and --per-image need --output DIR.")
    if arguments.output == "":
        raise CommandError("--output must name a folder, got an empty name.")
    given = dict(vars(arguments))
    for name in ("command", "run"):
        del given[name]
    return evaluate(EvaluateOptions(**given))
