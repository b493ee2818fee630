"""Flags derived from a function or a dataclass.

The name, type and default of an option come from the signature, its text from the ``Args:`` of the
docstring: an option is declared in one place.
"""

import argparse
import ast
import contextlib
import inspect
import os
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from ltrp_timm.selection.registry import SELECTIONS
from ltrp_timm.selection.rules import check_keep_ratio


def keep_ratio(text: str) -> float:
    """An argparse type: a number in (0, 1]."""
    try:
        return check_keep_ratio(float(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be in (0, 1], got {text}.") from None


def whole_from(least: int) -> Callable[[str], int]:
    """An argparse type: whole numbers from ``least``."""

    def whole(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number from {least}, got {text}.")
        return int(text)

    return whole


positive, not_negative = whole_from(1), whole_from(0)


class Metavar(str):
    """What stands for a value in the help."""


# annotations of options; a function parses the text, a tuple lists the choices
Positive = Annotated[int, positive]
NotNegative = Annotated[int, not_negative]
PathName = Annotated[str, Metavar("PATH")]
Words = Annotated[str, Metavar("TEXT")]

# what parses options that library functions have too, by name
_PARSERS: dict[str, Callable[[str], Any]] = {
    "keep_ratio": keep_ratio,
    "batch_size": positive,
    "img_size": positive,
    "patch_size": positive,
    "num_workers": not_negative,
}
_CHOICES = {"selection": tuple(SELECTIONS)}
_PLAIN: dict[Any, dict[str, Any]] = {
    int: {"type": int, "metavar": "N"},
    float: {"type": float, "metavar": "X"},
    str: {"metavar": "NAME"},
}


def add_command(
    commands: Any,
    name: str,
    about: str,
    run: Callable[..., int],
    *sources: Callable[..., Any],
    positional: Sequence[str] = (),
    skip: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
    epilog: str | None = None,
) -> None:
    """Add a command whose flags are the parameters of functions and dataclasses.

    Args:
        commands: The subparsers of ``ltrp-timm``.
        name: Name of the command.
        about: One sentence for the help.
        run: Called with the flags that the user gave; returns the exit code.
        *sources: Functions and dataclasses. Their ``**`` parameters are ignored.
        positional: Parameters that are positional arguments.
        skip: Parameters that the command line does not have.
        defaults: Defaults to show in place of those of the signatures.
        epilog: Text below the flags.
    """
    parser = commands.add_parser(
        name, help=about, description=about, epilog=epilog, allow_abbrev=False
    )
    parser.set_defaults(run=run)
    parameters = {
        key: (parameter, source)
        for source in sources
        for key, parameter in inspect.signature(source).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD and key not in skip
    }
    for key, (parameter, source) in parameters.items():
        annotation = get_type_hints(source, include_extras=True)[key]
        required = parameter.default is parameter.empty
        default = (defaults or {}).get(key, None if required else parameter.default)
        kwargs = _argument(annotation, default)
        if key in _PARSERS:
            kwargs["type"] = _PARSERS[key]
        if key in _CHOICES:
            kwargs = {"choices": _CHOICES[key]}
        kwargs["help"] = _help(_texts(source).get(key, ""), default, parameters)
        if getattr(kwargs.get("type"), "takes_none", False):
            kwargs["help"] = re.sub(r"\bNone\b", "none", kwargs["help"])
        if key in positional:
            parser.add_argument(key, **{**kwargs, "metavar": key.upper()})
            continue
        flags = [*(["-o"] if key == "output" else []), flag(key)]
        parser.add_argument(
            *flags, dest=key, default=argparse.SUPPRESS, required=required, **kwargs
        )


def flag(name: str) -> str:
    """The flag of an option: ``--img-size`` for ``img_size``."""
    return "--" + name.replace("_", "-")


def _argument(annotation: Any, default: Any) -> dict[str, Any]:
    """What ``add_argument`` needs to know of a type."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        kwargs = _argument(args[0], default)
        for mark in args[1:]:
            if isinstance(mark, Metavar):
                kwargs["metavar"] = mark
            elif isinstance(mark, tuple):
                kwargs = {"choices": mark}
            elif callable(mark):
                kwargs["type"] = mark
    elif origin in (Union, types.UnionType):
        several = [arg for arg in args if arg not in (bool, types.NoneType)]
        if not several:
            return {"action": argparse.BooleanOptionalAction}
        kwargs = _argument(several[-1], default)  # one value or a list of them: a list
        if types.NoneType in args and default is not None:
            kwargs["type"] = _or_none(kwargs.get("type", str))
    elif origin is Literal:
        kwargs = {"choices": args}
    elif annotation is bool:
        kwargs = {"action": argparse.BooleanOptionalAction if default else "store_true"}
    elif isinstance(origin, type) and issubclass(origin, Mapping):
        kwargs = {"nargs": "+", "type": _pair, "action": _Pairs, "metavar": "NAME=VALUE"}
    elif isinstance(origin, type) and issubclass(origin, Sequence):
        fixed = origin is tuple and Ellipsis not in args
        kwargs = {**_argument(args[0], None), "nargs": len(args) if fixed else "+"}
    elif annotation in _PLAIN:
        kwargs = dict(_PLAIN[annotation])
    else:
        kwargs = {"metavar": "PATH"}  # Any: a file, a folder, a name of either
        if default is not None:
            kwargs["type"] = _or_none(str)
    return kwargs


def _or_none(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse_or_none(text: str) -> Any:
        return None if text == "none" else parse(text)

    parse_or_none.__name__ = parse.__name__  # argparse names it in an error
    parse_or_none.takes_none = True  # type: ignore[attr-defined]
    return parse_or_none


def _pair(text: str) -> tuple[str, Any]:
    """``width=32`` -> name and value; a value that is no Python literal is a string."""
    name, mark, value = text.partition("=")
    if not mark or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}.")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


class _Pairs(argparse.Action):
    """Collects ``NAME=VALUE`` in a dictionary."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        setattr(namespace, self.dest, {**getattr(namespace, self.dest, {}), **dict(values)})


def _texts(source: Any) -> dict[str, str]:
    """The ``Args:`` of a docstring by name; those of base classes too."""
    found = {}
    for part in reversed(getattr(source, "__mro__", (source,))):
        text = inspect.cleandoc(part.__doc__ or "")
        section = re.search(r"^Args:\n((?: .*\n?|\n)*)", text, re.M)
        entries = re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section[1] if section else "", re.M)
        found.update({name: " ".join(words.split()) for name, words in entries})
    return found


def _help(text: str, default: Any, names: Mapping[str, Any]) -> str:
    """A docstring's entry as help: names of options as flags, the default at the end.

    A last sentence that begins with "In Python" is left out.
    """

    def spell(match: re.Match[str]) -> str:
        return flag(match[1]) if match[1] in names else match[1]

    text = re.sub(r" In Python\b.*$", "", text)
    text = re.sub(r"``(.+?)``", spell, text).removesuffix(".")
    if re.match(r"(?!timm\b)[a-z]+[ ,]", text):
        text = text[0].upper() + text[1:]
    if default is True:
        text += " (on by default)"
    if default not in (None, "", ()) and not isinstance(default, bool):
        values = default if isinstance(default, (tuple, list)) else (default,)
        if isinstance(default, Mapping):
            values = [f"{key}={value}" for key, value in default.items()]
        shown = " ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values)
        text += f" (default: {shown})"
    return text.replace("%", "%%")


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Limit torch to ``count`` CPU threads for a while; ValueError if there are fewer cores."""
    before, most = torch.get_num_threads(), os.cpu_count() or 1
    if count is not None and count > most:
        raise ValueError(f"--threads must be from 1 to {most}, the number of cores, got {count}.")
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
