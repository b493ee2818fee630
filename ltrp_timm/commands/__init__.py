"""The command line: what ``ltrp-timm`` understands.

It turns flags into plain arguments. An error is one line on stderr and exit code 2.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from ltrp_timm._text import complain
from ltrp_timm.commands._console import CommandError
from ltrp_timm.commands._flags import keep_ratio, positive, threads


class _Parser(argparse.ArgumentParser):
    """argparse without the usage text in front of an error."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong on one line and leave with 2."""
        self.exit(2, f"ltrp-timm: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; None takes those of the process.

    Returns:
        0, or 2 when something was wrong with what the user gave.
    """
    parser = _make_parser()
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has printed its line, the help or the version
        return int(stop.code or 0)
    if arguments.command is None:
        parser.print_help()
        return 2
    try:
        code: int = arguments.run(arguments)
    except CommandError as error:
        return complain(str(error))
    except BrokenPipeError:  # the reader of our output has gone, as in `ltrp-timm demo | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    return code


def _make_parser() -> argparse.ArgumentParser:
    from ltrp_timm import __version__
    from ltrp_timm.commands.benchmark import add_benchmark
    from ltrp_timm.commands.evaluate import add_evaluate
    from ltrp_timm.commands.export import add_export
    from ltrp_timm.commands.finetune import add_finetune
    from ltrp_timm.commands.rank import add_rank
    from ltrp_timm.commands.share import add_push, add_save
    from ltrp_timm.commands.train import add_train_commands

    parser = _Parser(
        prog="ltrp-timm",
        description="Rank the patches of an image and encode only the best.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"ltrp-timm {__version__}")
    commands = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND")
    _add_demo(commands)
    add_rank(commands)
    add_train_commands(commands)
    add_finetune(commands)
    add_evaluate(commands)
    add_export(commands)
    add_benchmark(commands)
    add_save(commands)
    add_push(commands)
    return parser


def _add_demo(commands: Any) -> None:
    from ltrp_timm.commands.demo import DEFAULT_OUTPUT
    from ltrp_timm.visualize import KEEP_RATIOS

    about = "Show which patches of photos are kept, and measure how much time that saves."
    demo = commands.add_parser("demo", help=about, description=about, allow_abbrev=False)
    demo.set_defaults(run=_run_demo)
    add = demo.add_argument
    add("--image", nargs="+", metavar="FILE", help="photos; without, three of scikit-image's")
    add("--model", default="ltrp_vit_base", help="an ltrp_* name or any timm ViT (%(default)s)")
    add("--ranker", help="what scores the patches (the model's own, or contrast)")
    add(
        "--keep-ratio",
        nargs="+",
        type=keep_ratio,
        default=list(KEEP_RATIOS),
        metavar="R",
        help="shares of patches to keep, in (0, 1] (0.7 0.5 0.25)",
    )
    add("--output", default=DEFAULT_OUTPUT, metavar="PNG", help="the picture (%(default)s)")
    add("--overwrite", action="store_true", help="replace an existing --output")
    add("--pretrained", action="store_true", help="download the backbone's weights if need be")
    add("--repeats", type=positive, default=10, metavar="N", help="timed rounds (%(default)s)")
    add("--threads", type=positive, metavar="N", help="CPU threads (torch's own choice)")


def _run_demo(arguments: argparse.Namespace) -> int:
    from ltrp_timm.commands.demo import demo

    with threads(arguments.threads):
        return demo(
            None if arguments.image is None else list(dict.fromkeys(arguments.image)),
            model_name=arguments.model,
            ranker=arguments.ranker,
            keep_ratios=list(dict.fromkeys(arguments.keep_ratio)),
            output=arguments.output,
            overwrite=arguments.overwrite,
            pretrained=arguments.pretrained,
            repeats=arguments.repeats,
        )
