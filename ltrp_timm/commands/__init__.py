"""The command line ``ltrp-timm``.

An error is one line on stderr and exit code 2.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import torch

from ltrp_timm._text import complain, one_line
from ltrp_timm.commands._flags import threads
from ltrp_timm.runtime.world import first_process


class _Parser(argparse.ArgumentParser):
    """argparse without the usage text in front of an error."""

    def error(self, message: str) -> NoReturn:
        """Print the error on one line and exit with code 2."""
        self.exit(2, f"ltrp-timm: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; ``argv`` is without the program's name.

    Returns:
        The exit code: 0, 2 for an error or for input that could not be read, 130 after Ctrl-C,
        128 + the signal's number for a training that a signal stopped.
    """
    parser = _make_parser()
    try:
        given = vars(parser.parse_args(argv))
    except SystemExit as stop:  # argparse has printed its line, the help or the version
        return int(stop.code or 0)
    if given.pop("command") is None:
        parser.print_help()
        return 2
    try:
        with threads(given.get("threads")):
            code: int = given.pop("run")(**given)
    except BrokenPipeError:  # the reader of our output has gone, as in `ltrp-timm demo | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        if not first_process():
            return 2
        smaller = isinstance(error, torch.OutOfMemoryError) and "; try a smaller --batch-size"
        return complain(f"{one_line(error)}{smaller or ''}")
    return code


def _make_parser() -> argparse.ArgumentParser:
    from ltrp_timm import __version__
    from ltrp_timm.commands.app import add_app
    from ltrp_timm.commands.benchmark import add_benchmark
    from ltrp_timm.commands.demo import add_demo
    from ltrp_timm.commands.evaluate import add_evaluate
    from ltrp_timm.commands.export import add_export
    from ltrp_timm.commands.rank import add_rank
    from ltrp_timm.commands.share import add_push, add_save
    from ltrp_timm.commands.train import add_finetune, add_train_ranker, add_train_teacher

    parser = _Parser(
        prog="ltrp-timm",
        description="Rank the patches of an image and encode only the best.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"ltrp-timm {__version__}")
    commands = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND")
    for add in (
        *(add_demo, add_rank, add_train_ranker, add_train_teacher, add_finetune),
        *(add_evaluate, add_export, add_benchmark, add_app, add_save, add_push),
    ):
        add(commands)
    return parser
