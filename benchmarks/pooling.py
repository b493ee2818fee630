"""Pool several runs of a benchmark: the spread then shows differences between processes too.

The rounds of one process share the places of weights, buffers and threads in memory, and the hour.
Their quartiles do not show what another process would give.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tables

from ltrp_timm.measure import throughput

Row = dict[str, Any]
# the columns that identify a row, where it has them
CASE = ("model", "batch", "keep_ratio", "img_size", "step", "ranker", "matched", "form", "part")
CASE += ("method", "removal", "removed", "device", "dtype", "depth")


def case_of(row: Row) -> tuple[str, ...]:
    """The columns that identify a row, as text; equal numbers give equal text."""
    found = []
    for name in CASE:
        value = row.get(name, "")
        try:
            found.append(f"{float(value):g}")
        except ValueError:
            found.append(value)
    return tuple(found)


def same_place(row: Row, other: Row, path: Path) -> None:
    """Check that two rows were measured on the same machine with the same versions.

    Raises:
        SystemExit: They were not; the message names ``path``, the file of the other row.
    """
    places = [name for name in throughput.environment() if name in row and name in other]
    different = [name for name in places if row[name] != other[name]]
    if different:
        texts = [f"{name} ({row[name]}, {other[name]})" for name in different]
        raise SystemExit(f"{path} is not of the same machine: {', '.join(texts)}")


def read(path: Path) -> dict[tuple[str, ...], Row]:
    """The rows of a run by their cases, as the benchmark made them.

    Raises:
        SystemExit: The file does not exist, or it is not the CSV of a single run.
    """
    if not path.is_file():
        raise SystemExit(f"there is no {path}: run the benchmark with --output first.")
    rows = [typed(row) for row in tables.read_csv(path)]
    cases = {case_of(row): row if "runs" in row else {**row, "runs": 1} for row in rows}
    if not rows or any(None in (*row, *row.values()) for row in rows):
        raise SystemExit(f"{path} is no whole CSV.")
    if len(cases) < len(rows) or any(row["runs"] != 1 for row in cases.values()):
        raise SystemExit(f"{path} is not of a single run.")
    return cases


def typed(row: dict[str, str]) -> Row:
    """A row of a CSV as the benchmark made it: numbers, and text where it names the machine."""
    places = throughput.environment()
    return {name: text if name in places else _number(text) for name, text in row.items()}


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except (ValueError, TypeError):
            continue
    return text


def pool(name: str, folders: Sequence[Path]) -> list[Row]:
    """The rows of NAME.csv in all folders, in the order in which they are first found.

    A figure is the median over the runs; its range goes from the lowest first quartile to the
    highest third quartile. Rounds and runs are summed. Errors, operators that wait and equal bits
    are those of the worst run. A run may lack rows that others have.

    Raises:
        SystemExit: A folder lacks the file or is given twice, the runs differ in machine, versions
            or columns, or a column of text differs between runs.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise SystemExit("each folder is one run: one of them is given twice.")
    paths = [folder / f"{name}.csv" for folder in folders]
    runs = [read(path) for path in paths]
    first = next(iter(runs[0].values()))
    found: dict[tuple[str, ...], list[Row]] = {}
    for path, run in zip(paths, runs):
        for case, row in run.items():
            same_place(first, row, path)
            if set(row) != set(first):
                columns = ", ".join(sorted(set(row) ^ set(first)))
                raise SystemExit(f"{path} has other columns than {paths[0]}: {columns}.")
            found.setdefault(case, []).append(row)
    return [
        {column: _pooled(column, [row[column] for row in rows], case) for column in first}
        for case, rows in found.items()
    ]


WORST = {"low": min, "high": max, "error": max, "syncs": max, "bits": min, "even": min}


def _pooled(column: str, values: list[Any], case: tuple[str, ...]) -> Any:
    if column in ("rounds", "runs"):
        return sum(values)
    if len(set(values)) == 1:
        return values[0]
    if not all(isinstance(value, (int, float)) and value == value for value in values):
        where = ", ".join(part for part in case if part)
        texts = ", ".join(map(str, values))
        raise SystemExit(f"the runs cannot be pooled: {column} of {where} is {texts}.")
    worst = WORST.get(column.rpartition("_")[2])
    return worst(values) if worst else round(statistics.median(values), 7)
