"""Text for people: printable, on one line, as a table, on the terminal; what to install."""

import csv
import importlib
import io
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any


def printable(path: str | os.PathLike[str]) -> str:
    r"""A file's name with control and undecodable characters escaped.

    >>> printable("two" + chr(10) + "lines.png")
    'two\\nlines.png'
    """
    text = str(path)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def first_names(names: Sequence[str], count: int = 5) -> str:
    """The first of many names, on one line.

    >>> first_names(["ant", "bee", "cat"], count=2)
    'ant, bee, …'
    """
    shown = ", ".join(printable(name) for name in names[:count])
    return shown + (", …" if len(names) > count else "")


def counted(number: int, noun: str) -> str:
    """A number with its noun, of one or of several.

    >>> counted(1, "class"), counted(2, "class"), counted(0, "image")
    ('1 class', '2 classes', '0 images')
    """
    return f"{number} {noun}" + ("" if number == 1 else "es" if noun.endswith("s") else "s")


def one_line(error: BaseException) -> str:
    """An exception's message on one line; its type if it has no message.

    >>> one_line(FileNotFoundError(2, "No such file or directory", "a.csv"))
    'a.csv: No such file or directory.'
    """
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{printable(error.filename)}: {error.strerror}."
    lines = (" ".join(line.split()) for line in str(error).splitlines())
    text = "; ".join(filter(None, lines)).replace(":; ", ": ")
    return text or type(error).__name__


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a CSV file; a value that a row lacks is empty."""
    file = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(file, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def optional_import(name: str, reason: str, package: str) -> Any:
    """Import a module that may be missing; ImportError with the reason and the command to type."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{reason}: pip install {package}") from error


def say(text: str) -> None:
    """Print to stdout; escape what the terminal's encoding cannot show."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def complain(text: str) -> int:
    """Print an error to stderr; return exit code 2."""
    print(f"ltrp-timm: {text}", file=sys.stderr, flush=True)
    return 2
