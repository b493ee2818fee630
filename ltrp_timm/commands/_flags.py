"""What the flags of several commands mean."""

import argparse
import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

from ltrp_timm.commands._console import CommandError

_CARD = {
    "license": "identifier of the licence for the card, such as apache-2.0",
    "training_data": "what it was trained on, for the card",
    "ranker_source": "where the ranker's weights come from, for the card",
    "base_model": "the repository it was trained from, for the card",
    "description": "a sentence for the card",
}


def keep_ratio(text: str) -> float:
    """A number in (0, 1].

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    from ltrp_timm.selection import check_keep_ratio

    try:
        return check_keep_ratio(float(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be in (0, 1], got {text}.") from None


def whole_from(least: int) -> Callable[[str], int]:
    """A type of flags: whole numbers from ``least``."""

    def whole(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number from {least}, got {text}.")
        return int(text)

    return whole


positive, not_negative = whole_from(1), whole_from(0)


def add_card(parser: Any) -> None:
    """Flags of what a model card shall say."""
    for name, text in _CARD.items():
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="TEXT", help=text)


def card_of(arguments: argparse.Namespace) -> dict[str, str]:
    """What was told for the card, as ``save_pretrained`` takes it."""
    told = {name: getattr(arguments, name) for name in _CARD}
    told["ranker"] = told.pop("ranker_source")
    return {name: text for name, text in told.items() if text}


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """So many CPU threads for a while; None leaves torch's own choice.

    Raises:
        CommandError: more than the machine has.
    """
    import torch

    before, most = torch.get_num_threads(), os.cpu_count() or 1
    if count is not None and count > most:
        raise CommandError(f"--threads must be from 1 to {most}, the cores here, got {count}.")
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
