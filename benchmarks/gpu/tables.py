"""The section on GPUs: tables of the CSVs that ``benchmarks/gpu.py`` writes."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from sections import Cell, Row, Section, pivot
from tables import environment_line, read_csv

from gpu.record import MEASURED

Line = Callable[[Row], dict[str, str]]
COMMAND = "`python benchmarks/gpu.py --out benchmarks/results/gpu`"
LINK = "[speed.csv](../../benchmarks/results/gpu/speed.csv)"
NOT_MEASURED = f"No GPU has been measured yet; {COMMAND} measures one."


def _measured(cell: Cell) -> Cell:
    """The figure, or why there is none."""
    return lambda row: cell(row) if row["status"] == MEASURED else row["status"]


def _times(row: Row) -> str:
    return f"{float(row['speedup']):.2f}×" if row["speedup"] else "–"


def _share(row: Row) -> str:
    share = row["share_of_ideal"]
    return f" ({float(share):.2f})" if share and row["method"] not in ("full", "ideal") else ""


def _speed(row: Row) -> str:
    full = f"{float(row['images_per_second']):.0f} images/s"
    return full if row["method"] == "full" else _times(row) + _share(row)


def _milliseconds(row: Row) -> str:
    time = f"{1e3 * float(row['seconds_median']):.2f} ms"
    return time if not row["speedup"] else f"{time} ({_times(row)})"


def _case(row: Row) -> dict[str, str]:
    return {"model": f"`{row['model']}`", "keep": row["keep_ratio"]}


def _section(
    file: str,
    says: str,
    line: Line,
    column: Cell,
    cell: Cell,
    keep: Callable[[Row], bool] = lambda row: True,
) -> Section:
    return Section(file, file, says, line, column, _measured(cell), keep)


GPU = [
    _section(
        "speed",
        "Batch 256: images per second of the plain model, and the speed-up over it, ranking "
        "included. *Ideal* is given its patches for nothing and embeds only these; in brackets how "
        "much of it is reached. `border` and `conv` drop the rest; *coarse* ranks with `border` "
        "and gives the rest coarsely, with the size bias and without",
        _case,
        lambda row: row["method"],
        _speed,
        lambda row: row["batch"] == "256",
    ),
    _section(
        "latency",
        "Keep 0.5, from one image on: milliseconds, and the speed-up over the plain eager model. "
        '*Graph* is a captured CUDA graph, *compiled* is `torch.compile(mode="reduce-overhead")`',
        lambda row: {"model": f"`{row['model']}`", "batch": row["batch"], "form": row["form"]},
        lambda row: row["method"],
        _milliseconds,
    ),
    _section(
        "merging",
        "Ranking before the first block against token merging in each block, with fused attention: "
        "milliseconds, and the speed-up over the plain model. At *equal time* the smallest number "
        "of merges is taken that is as fast as `border`",
        lambda row: {"batch": row["batch"], "matched": row["form"]},
        lambda row: row["method"].replace("_", " ").removesuffix(" fused"),
        _milliseconds,
    ),
    _section(
        "multiple_of_8",
        "Milliseconds of the encoder by number of tokens, and the speed-up over the plain model",
        lambda row: {"model": f"`{row['model']}`", "batch": row["batch"]},
        lambda row: row["setting"].replace(" tokens", "") or "full",
        _milliseconds,
    ),
    _section(
        "large_images",
        "Large images, columns as in the first table; the goal is 4.00× at keep 0.25, batch 8",
        lambda row: {**_case(row), "px": row["img_size"], "batch": row["batch"]},
        lambda row: row["method"],
        _speed,
    ),
    _section(
        "training",
        "Training steps at keep 0.5: speed-up over the plain model. Exact pseudo-scores: speed-up "
        "of one batch over a loop that removes one patch after another; the goal is 2.00×",
        lambda row: {"what": row["form"], "model": f"`{row['model']}`", "batch": row["batch"]},
        lambda row: {"batch": "one batch"}.get(row["method"], row["method"]),
        lambda row: (
            f"{float(row['images_per_second']):.0f} images/s"
            if row["method"] in ("full", "loop")
            else _times(row)
        ),
    ),
]


def _beside(rows: Sequence[Row]) -> Iterator[Row]:
    """The plain model's row beside those of each keep ratio it was compared with."""
    for row in rows:
        others = [other for other in rows if other["method"] != "full" and _like(row, other)]
        ratios = dict.fromkeys(other["keep_ratio"] for other in others)
        for ratio in ratios if row["method"] == "full" else [row["keep_ratio"]]:
            yield {**row, "keep_ratio": ratio}


def _like(row: Row, other: Row) -> bool:
    return all(row[name] == other[name] for name in ("model", "img_size", "batch", "form"))


def gpu_text(folder: Path) -> str:
    """The machine, a table for each part that was measured, and what was not; or one sentence.

    Raises:
        SystemExit: a CSV is of a rehearsal.
    """
    found = [(section, _rows(folder / f"{section.file}.csv")) for section in GPU]
    found = [(section, rows) for section, rows in found if rows]
    if not found:
        return NOT_MEASURED
    machine = environment_line(found[0][1][0])
    parts = [f"Measured on {machine}; medians of interleaved rounds in one process."]
    for section, rows in found:
        if any((row["device"], row["depth"]) != ("cuda", "all") for row in rows):
            raise SystemExit(f"{folder / section.file}.csv is of a rehearsal on a CPU.")
        parts += [
            f"{section.says}.",
            pivot([row for row in _beside(rows) if section.keep(row)], section),
        ]
    missing = [row for row in _rows(folder / "status.csv") if row["status"] != "done"]
    if missing:
        texts = [f"{row['part'].replace('_', ' ')} ({row['status']})" for row in missing]
        parts.append(f"Not finished: {', '.join(texts)}.")
    parts.append(f"All rows: {LINK} and the files beside it, by {COMMAND}.")
    return "\n\n".join(parts)


def _rows(path: Path) -> list[dict[str, str]]:
    return read_csv(path) if path.exists() else []
