"""Several runs of one benchmark as one: what differs between processes is in the spread then.

Rounds of one process share where in memory its weights, buffers and threads came to lie, and the
hour; their quartiles do not show what another process would give.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tables

from ltrp_timm import throughput

Row = dict[str, Any]
# what a row is about, where it has the column
CASE = ("model", "batch", "keep_ratio", "img_size", "step", "ranker", "matched", "form", "part")
CASE += ("method", "removal", "removed", "device", "dtype", "depth")
PLACE = ("machine", "cores", "threads")


def case_of(row: Row) -> tuple[str, ...]:
    """What a row is about; numbers as numbers are written."""
    found = []
    for name in CASE:
        value = row.get(name, "")
        try:
            found.append(f"{float(value):g}")
        except ValueError:
            found.append(value)
    return tuple(found)


def same_place(row: Row, other: Row, path: Path) -> None:
    """Nothing, if two rows were measured on the same machine.

    Raises:
        SystemExit: they were not; ``path`` is where the other one is from.
    """
    different = [name for name in PLACE if row[name] != other[name]]
    if different:
        texts = [f"{name} ({row[name]}, {other[name]})" for name in different]
        raise SystemExit(f"{path} is not of the same machine: {', '.join(texts)}")


def typed(row: dict[str, str]) -> Row:
    """A row of a CSV as the benchmark made it: numbers as numbers, what names a place as text."""
    places = throughput.environment()
    return {name: text if name in places else _number(text) for name, text in row.items()}


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def pool(name: str, folders: Sequence[Path]) -> list[Row]:
    """The rows of NAME.csv in all folders, in the order in which they are first found.

    A figure is the median of the runs'; its spread goes from the lowest first quartile to the
    highest third one; rounds and runs are summed up. A run may have fewer rows than others.

    Raises:
        SystemExit: a folder without the file, runs of different machines, or rows that do not
            speak of the same thing.
    """
    found: dict[tuple[str, ...], list[Row]] = {}
    for folder in folders:
        path = folder / f"{name}.csv"
        if not path.is_file():
            raise SystemExit(f"{folder} has no {path.name}: run the benchmark with --output first.")
        for text in tables.read_csv(path):
            row = typed(text)
            rows = found.setdefault(case_of(row), [])
            if rows:
                same_place(rows[0], row, path)
            rows.append({**row, "runs": row.get("runs", 1)})
    return [
        {column: _pooled(column, [row[column] for row in rows]) for column in rows[0]}
        for rows in found.values()
    ]


def _pooled(column: str, values: list[Any]) -> Any:
    if column in ("rounds", "runs"):
        return sum(values)
    if len(set(values)) == 1:
        return values[0]
    if not all(isinstance(value, (int, float)) for value in values):
        raise SystemExit(f"the runs cannot be pooled: {column} is {', '.join(map(str, values))}.")
    if column.endswith("_low"):
        return min(values)
    if column.endswith(("_high", "_error")):
        return max(values)
    return round(statistics.median(values), 7)
