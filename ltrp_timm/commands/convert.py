"""``ltrp-timm convert``: flags into arguments of ``convert_checkpoint``."""

import argparse
from typing import Any

from ltrp_timm._text import say
from ltrp_timm.commands._console import library_errors
from ltrp_timm.commands._flags import add_card, card_of, positive

_WHAT = ("ranker", "teacher", "model")


def add_convert(commands: Any) -> None:
    """Define ``ltrp-timm convert``."""
    about = (
        "Turn a checkpoint of the authors (LTRP stage 1 or 2), of MAE or of Hugging Face (ViTMAE) "
        "into a folder that this library loads. Nothing is overwritten."
    )
    parser = commands.add_parser("convert", help=about, description=about, allow_abbrev=False)
    parser.set_defaults(run=_run_convert)
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="a file, a folder or a Hub id (owner/name)")
    add("-o", "--output", required=True, metavar="DIR", help="the new folder")
    add("--teacher", metavar="DIR", help="another new folder, for the MAE of a stage 1 checkpoint")
    add("--to", choices=_WHAT, dest="kind", help="what --output gets (by the layout)")
    add("--ranker", metavar="RANKER", help="of a pruned model: its folder, or a weight-free name")
    add("--keep-ratio", type=float, default=0.5, metavar="R", help="of that model (%(default)s)")
    add("--selection", default="mixed", help="of that model (%(default)s, the published one)")
    heads = "where file and width do not tell them"
    add("--num-heads", type=positive, metavar="N", help=f"of what --output gets, {heads}")
    add("--teacher-num-heads", type=positive, metavar="N", help=f"of --teacher's encoder, {heads}")
    add("--decoder-num-heads", type=positive, metavar="N", help=f"of an MAE's decoder, {heads}")
    size = "side of the images, or height and width, where their grid of patches is not square"
    add("--img-size", type=positive, nargs="+", metavar="PIXELS", help=size)
    add_card(parser)


def _run_convert(arguments: argparse.Namespace) -> int:
    from ltrp_timm.convert import convert_checkpoint

    names = ["teacher", "kind", "ranker", "keep_ratio", "selection"]
    names += ["num_heads", "teacher_num_heads", "decoder_num_heads"]
    options = {name: getattr(arguments, name) for name in names}
    size = arguments.img_size
    with library_errors():
        done = convert_checkpoint(
            arguments.checkpoint,
            arguments.output,
            img_size=size[0] if size and len(size) == 1 else size,
            model_card=card_of(arguments),
            **options,
        )
    for word, line in done.report:
        say(f"{word:8} {line}")
    for folder in done.folders:
        say(f"{'written':8} {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    return 0
