"""Files of the benchmarks: rows as CSV and Markdown, goals, pictures."""

import argparse
import csv
import importlib
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """A figure to reach: ``column`` of the rows that ``where`` describes, against ``bound``.

    ``where`` has for each column its value, a tuple of values, or a test of the value.
    """

    text: str
    where: Mapping[str, Any]
    column: str
    relation: str
    bound: float

    def check(self, rows: Sequence[Row]) -> list[Row]:
        """One line for each row that the goal is about."""
        holds = {">=": operator.ge, "<=": operator.le}[self.relation]
        return [
            {
                "goal": f"{self.text}, {row['method']}" if "method" in row else self.text,
                "bound": f"{self.relation} {self.bound:g}",
                "measured": figure(row, self.column, ".4g"),
                "rounds": row.get("rounds", "–"),
                "": "met" if holds(row[self.column], self.bound) else "not met",
            }
            for row in rows
            if all(self._matches(row.get(name), value) for name, value in self.where.items())
        ]

    @staticmethod
    def _matches(found: Any, wanted: Any) -> bool:
        if callable(wanted):
            return bool(wanted(found))
        return found in wanted if isinstance(wanted, tuple) else bool(found == wanted)


def figure(row: Row, column: str, spec: str) -> str:
    """A column as text, followed by its quartiles where the row has them."""
    text = f"{row[column]:{spec}}"
    if f"{column}_low" in row:
        text += f" ({row[f'{column}_low']:{spec}} – {row[f'{column}_high']:{spec}})"
    return text


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """All rows and columns; the columns are those of the first row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of ``write_csv``, as text."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


MODELS = {
    f"vit_{size}_patch16_224": f"ViT-{letter}"
    for size, letter in (("tiny", "Ti"), ("small", "S"), ("base", "B"), ("large", "L"))
}
METHODS = {
    "full": "full model",
    "ideal": "patches given",
    "given": "patches given",
    "cached": "scores from a cache",
    "fixed": "same K for all images",
    "mass": "share of the score mass",
    "merging": "token merging",
    "merging_proportional_fused": "token merging, fused",
    "merging_plain_fused": "token merging, plain, fused",
    "fusing": "token fusing",
    "full mean": "trained, mean change",
    "full max": "trained, largest change",
    "decoder mean": "trained, decoder removal",
    "decoder max": "decoder removal, largest change",
    "learned": "conv, earlier packaged weights",
    "gate": "conv, through the gate",
    "ink": "the true pixels",
    "smaller image": "smaller image",
    "token merging": "token merging",
    "the objects' masks": "the objects' true masks",
    "threshold": "threshold",
    "cam, blurred": "cam, blurred",
    "loop": "one after another",
    "batch": "all in one batch",
}


def nice(text: str) -> str:
    """A name of a method, or a text with names of models, for readers."""
    for name, short in MODELS.items():
        text = text.replace(name, short)
    method, comma, rest = text.partition(", ")
    text = METHODS.get(text) or METHODS.get(method, method) + comma + rest
    return text.replace("flops", "FLOPs")


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of text as a Markdown table; the columns are those of the first row."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(str(row[name]) for name in columns) + " |" for row in rows]
    return "\n".join(lines)


def environment_line(row: Mapping[str, Any]) -> str:
    """Machine, settings and versions of a row in one line of prose."""
    known = [name for name in ("torch", "timm", "ltrp_timm") if row[name] != "unknown"]
    versions = ", ".join(f"{name} {row[name]}" for name in known)
    cores = f"{row['cores']} core{'s' if str(row['cores']) != '1' else ''}"
    where = f"{row['machine']} ({cores}, {row['threads']} used)"
    short = "" if row["depth"] == "all" else f", models cut to {row['depth']} blocks"
    return f"{where}, {row['device']}, {row['dtype']}{short}; {versions}"


def runs_line(rows: Sequence[Mapping[str, Any]]) -> str:
    """The number of runs behind the rows and what their ranges are; empty for a single run."""
    runs = sorted({int(row.get("runs", 1)) for row in rows})
    if runs[-1] == 1:
        return ""
    number = f"{runs[-1]}" if len(runs) == 1 else f"{runs[0]} to {runs[-1]}"
    ranges = "ranges enclose the interquartile ranges of all runs"
    return f"median over {number} runs of interleaved rounds, each in a separate process; {ranges}"


def conclude(
    name: str,
    title: str,
    rows: Sequence[Row],
    table: Sequence[Row],
    goals: Iterable[Goal],
    picture: Any,
    args: argparse.Namespace,
) -> None:
    """Write NAME.csv, NAME.md and NAME.png into ``--output``, print the goals.

    Args:
        name: Of the files; those of a quick run end in _quick.
        title: Of picture and Markdown.
        rows: What was measured, with the columns of the environment.
        table: The same as text, for readers.
        goals: Checked only where models have all their blocks.
        picture: A matplotlib figure.
        args: The benchmark's options.
    """
    if getattr(args, "quick", False):
        name += "_quick"
    args.output.mkdir(parents=True, exist_ok=True)
    line = environment_line(rows[0])
    whole = all(str(row["depth"]) == "all" for row in rows)
    checks = [check for goal in goals for check in goal.check(rows)] if whole else []
    verdict = markdown_table(checks) if checks else "No goal applies to these settings."
    runs = runs_line(rows)
    below = f"{line}\n\n{runs[0].upper()}{runs[1:]}." if runs else line
    text = f"# {title}\n\n{below}\n\n{markdown_table(table)}\n\n## Goals\n\n{verdict}\n"
    write_csv(rows, args.output / f"{name}.csv")
    (args.output / f"{name}.md").write_text(text, encoding="utf-8")
    save_picture(picture, title, args.output / f"{name}.png")
    print(f"\nGoals\n{verdict}")


def save_picture(picture: Any, title: str, path: Path) -> None:
    """Write a matplotlib figure with its title, and close it."""
    picture.suptitle(title, fontsize=10)
    picture.tight_layout()
    picture.savefig(path, dpi=150)
    importlib.import_module("matplotlib.pyplot").close(picture)
