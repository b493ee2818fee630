"""What a command is told, what it says, and how it fails: one line on stderr."""

import argparse
import sys


class CommandError(Exception):
    """What a user can put right: one line, exit code 2."""


def say(text: str) -> None:
    """Print, also where the terminal's encoding lacks a character of a file's name."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def complain(text: str) -> int:
    """Say what is wrong on stderr; returns exit code 2."""
    print(f"ltrp-timm: {text}", file=sys.stderr, flush=True)
    return 2


def keep_ratio(text: str) -> float:
    """A flag's keep ratio; argparse makes a line of the error."""
    from ltrp_timm.selection import check_keep_ratio

    try:
        return check_keep_ratio(float(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be in (0, 1], got {text}.") from None


def positive(text: str) -> int:
    """A flag's whole number from 1; argparse makes a line of the error."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text}.")
    return int(text)
