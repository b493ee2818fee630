"""What a command says, and how it fails: one line on stderr."""

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
