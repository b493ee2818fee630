"""What the documentation site has beside the pages in ``docs/``: a hook of MkDocs.

Pages link to files of the repository as they lie there, ``../../benchmarks/results/speed.png``.
The site gets a copy of each file that is linked, and the link leads to it. The page of the command
line is made from the parsers.
"""

import argparse
import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File

from ltrp_timm.commands import _make_parser

ROOT = Path(__file__).parents[1]
COMMANDS = "<!-- the commands: written by scripts/site_pages.py -->"
_LINK = re.compile(r"(\]\()((?:\.\./)+[^)#\s]+)")
_COPIED = "files"  # folder of the site


class FencedExamples(griffe.Extension):
    """Shows the ``>>>`` examples of docstrings as code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Put a fence around each example."""
        if obj.docstring and ">>>" in obj.docstring.value:
            fenced = re.sub(r"(?ms)^( *)>>>.*?(?=\n *\n|\Z)", _fence, obj.docstring.value)
            obj.docstring.value = fenced


def _fence(example: re.Match[str]) -> str:
    return f"{example[1]}```pycon\n{example[0]}\n{example[1]}```"


def on_files(files: Any, config: Any) -> Any:
    """Add the files of the repository that pages link to, and CONTRIBUTING."""
    outside = {
        target
        for page in list(files.documentation_pages())
        for target in (_outside(page.src_uri, link) for _, link in _LINK.findall(_text(page)))
        if target is not None
    }
    for target in sorted(outside):
        files.append(File.generated(config, f"{_COPIED}/{target}", abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links to the copies; fill in the page of the command line."""
    up = "../" * page.file.src_uri.count("/")

    def led(found: re.Match[str]) -> str:
        target = _outside(page.file.src_uri, found[2])
        return found[0] if target is None else f"{found[1]}{up}{_COPIED}/{target}"

    return _LINK.sub(led, markdown).replace(COMMANDS, command_page(_make_parser()))


def _text(page: Any) -> str:
    return Path(page.abs_src_path).read_text(encoding="utf-8")


def _outside(page: str, link: str) -> str | None:
    """The path in the repository of a link that leaves ``docs``; None for one that does not."""
    target = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    return None if target.startswith("docs/") else target


def command_page(parser: argparse.ArgumentParser) -> str:
    """The commands of a parser, with their options as tables, in Markdown."""
    (commands,) = (
        action for action in parser._actions if isinstance(action, argparse._SubParsersAction)
    )
    return "\n\n".join(_command(name, one) for name, one in commands.choices.items())


def _command(name: str, parser: argparse.ArgumentParser) -> str:
    shown = [
        action
        for action in parser._actions
        if not isinstance(action, argparse._HelpAction) and action.help != argparse.SUPPRESS
    ]
    names = [action.metavar for action in shown if not action.option_strings]
    usage = " ".join(["ltrp-timm", name, *map(str, names), "[OPTIONS]"])
    rows = [f"| {_option(action)} | {_cell(_help(parser, action))} |" for action in shown]
    table = "\n".join(["| Option | What it does |", "| --- | --- |", *rows])
    parts = [f"## {name}", parser.description or "", f"```\n{usage}\n```", table]
    return "\n\n".join([*parts, *([parser.epilog] if parser.epilog else [])])


def _option(action: argparse.Action) -> str:
    value = action.metavar or (", ".join(map(str, action.choices)) if action.choices else "")
    value = value if isinstance(value, str) else " ".join(value)
    if not action.option_strings:
        return f"`{value}`"
    flags = ", ".join(f"`{flag}`" for flag in action.option_strings)
    return f"{flags} {_cell(value)}".strip() if action.nargs != 0 else flags


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    return parser._get_formatter()._expand_help(action)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")
