"""What a command says, where it may write, and how it fails: one line on stderr."""

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from ltrp_timm._text import printable


class CommandError(Exception):
    """What a user can put right: one line, exit code 2."""


@contextlib.contextmanager
def library_errors() -> Iterator[None]:
    """What the library says against the arguments, tables too, as a CommandError on one line."""
    try:
        yield
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        lines = [" ".join(line.split()) for line in str(error).splitlines()]
        raise CommandError("; ".join(filter(None, lines)).replace(":; ", ": ")) from error


def check_output(
    output: str, suffixes: Sequence[str], overwrite: bool, photos: Sequence[str] = ()
) -> None:
    """Say what is wrong with ``--output`` before any long work.

    Args:
        output: the file to write.
        suffixes: how its name may end, in small letters.
        overwrite: whether it may exist.
        photos: files that are read and must not be replaced.

    Raises:
        CommandError: another ending, no regular file, a photo, a file that exists, or a folder
            that takes no new files.
    """
    name, path = printable(output), Path(output)
    if path.suffix.lower() not in suffixes:
        raise CommandError(f"--output must end in {' or '.join(suffixes)}, got {name}.")
    with output_errors(output):
        if os.path.lexists(path):
            if not path.is_file():
                raise CommandError(f"--output {name} is no regular file.")
            if any(os.path.exists(photo) and path.samefile(photo) for photo in photos):
                raise CommandError(f"--output {name} is one of the photos.")
            if not overwrite:
                raise CommandError(f"--output {name} exists already: --overwrite replaces it.")
        with tempfile.TemporaryFile(dir=behind_links(output).parent):
            pass  # the folder takes new files


@contextlib.contextmanager
def output_errors(output: str) -> Iterator[None]:
    """What the system says against ``--output``, as a CommandError."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CommandError(f"--output {printable(output)} cannot be written: {reason}.") from error


def behind_links(output: str) -> Path:
    """The file itself where ``output`` is a link to it: the link stays when it is replaced."""
    return Path(os.path.realpath(output))
