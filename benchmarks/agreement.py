"""Does a second run on the same machine give the same ratios?

Claim. Ratios of times that are taken in turns are properties of the code and the machine: a second
run gives the same ratios within the spread that both print.

Arithmetic. The spread of a row is that of its rounds, from the first to the third quartile. Even if
nothing changes between two runs, these ranges miss each other in a fifth of all cases with 5
rounds, in a third with 3, and next to never with 20. The share of rows with overlapping ranges is
therefore compared with that chance, computed for each row's number of rounds (normal rounds, 20 000
draws). The share is lower where a run was disturbed, or where a figure depends on the place of data
in memory, which does not vary within a process. Most committed rows are therefore pooled from
several runs (`--pool`); their range goes from the lowest first to the highest third quartile.

python benchmarks/agreement.py FOLDER compares every CSV of the committed results with that of
FOLDER, written by the same scripts with `--output FOLDER`:
    overlap      figures with overlapping ranges, of all that both runs have
    by chance    the same if nothing differed, and the distance of the share from it in standard
                 errors (as if figures were independent; those of one round are not)
    difference   of the two medians: median over the rows, and the largest
    left out     figures that the second run lacks: it may have fewer models or benchmarks
Figures of the plain model against itself are always 1 and do not count.
"""

import argparse
import math
import statistics
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import tables
import torch
from common import RESULTS, WIDTH, Row, base_parser, load_pyplot, set_up
from pooling import case_of, same_place

NAME = "agreement"
TITLE = "A second run on the same machine: the same ratios?"
# what the scripts measure, with columns NAME_low and NAME_high beside it
FIGURES = ("achieved", "speedup", "speedup_over_eager", "gain", "share", "over_given")
FIGURES += ("time_ratio", "peak_mib")


def goals() -> list[tables.Goal]:
    """What a second run of the same code should give."""
    every = {"file": "all"}
    return [
        tables.Goal("(overlap − by chance) ÷ standard error", every, "errors", ">=", -2.0),
        tables.Goal("median difference", every, "median_difference", "<=", 0.02),
    ]


@cache
def by_chance(rounds: int, runs: tuple[int, int] = (1, 1)) -> float:
    """How often the ranges of two series of runs overlap; all rounds are normally distributed.

    >>> round(by_chance(5), 1), round(by_chance(20), 1), round(by_chance(5, (3, 1)), 2)
    (0.8, 1.0, 0.98)
    """
    draw = torch.Generator().manual_seed(0)
    quarters = torch.tensor([0.25, 0.75])
    drawn = (torch.randn(number, rounds, 20_000, generator=draw) for number in runs)
    one, two = (rounds_of.quantile(quarters, dim=1) for rounds_of in drawn)
    meets = (one[0].amin(0) <= two[1].amax(0)) & (two[0].amin(0) <= one[1].amax(0))
    return float(meets.float().mean())


def chance_of(row: dict[str, str], other: dict[str, str]) -> float:
    """``by_chance`` for two rows; rounds a run are those of the row that has fewer on average."""
    one, two = ((int(r["rounds"]), int(r.get("runs", 1))) for r in (row, other))
    return by_chance(min(one[0] // one[1], two[0] // two[1]), (one[1], two[1]))


def figures_of(row: dict[str, str]) -> dict[str, list[float]]:
    """Low, median and high of each figure, but not of the plain model against itself."""
    found = {
        name: [float(row[name + end]) for end in ("_low", "", "_high")]
        for name in FIGURES
        if f"{name}_low" in row
    }
    return {name: figure for name, figure in found.items() if figure != [1.0] * 3}


def pairs(first: Path, second: Path) -> Iterator[Row]:
    """Every figure of a CSV beside that of another run, or beside None where that run lacks it.

    Raises:
        SystemExit: The runs were measured on different machines.
    """
    others = {case_of(row): row for row in tables.read_csv(second)} if second.exists() else {}
    for row in tables.read_csv(first):
        other = others.get(case_of(row))
        if other is not None:
            same_place(row, other, second)
        for name, one in figures_of(row).items():
            pair: Row = {"figure": name, "first": one, "second": None}
            if other is None:
                yield pair
                continue
            two = figures_of(other).get(name, [1.0] * 3)
            yield pair | {
                "case": ", ".join(part for part in case_of(row)[:-3] if part),
                "second": two,
                "overlap": one[0] <= two[2] and two[0] <= one[2],
                "by_chance": chance_of(row, other),
                "difference": abs(two[1] / one[1] - 1) if one[1] else abs(two[1]),
            }


def summed_up(file: str, figure: str, every: list[Row]) -> Row:
    """The row of some figures; both runs have at least one of them."""
    found = [pair for pair in every if pair["second"]]
    overlap = sum(pair["overlap"] for pair in found)
    chance = statistics.mean(pair["by_chance"] for pair in found)
    deviation = math.sqrt(sum(pair["by_chance"] * (1 - pair["by_chance"]) for pair in found))
    worst = max(found, key=lambda pair: pair["difference"])
    return {
        **{"file": file, "figure": figure, "compared": len(found), "overlap": overlap},
        "left_out": len(every) - len(found),
        "by_chance": round(chance, 4),
        "errors": round((overlap - chance * len(found)) / deviation, 3) if deviation else 0.0,
        "median_difference": round(statistics.median(p["difference"] for p in found), 5),
        "largest_difference": round(worst["difference"], 5),
        "largest_at": worst["case"],
    }


def run(first: Path, second: Path) -> list[Row]:
    """A row for each figure of each file that both runs have.

    Raises:
        SystemExit: The folders have no row in common.
    """
    rows: list[Row] = []
    every: list[Row] = []
    for path in sorted(first.glob("*.csv")):
        if path.stem == NAME:
            continue
        own = list(pairs(path, second / path.name))
        every += own
        for figure in dict.fromkeys(pair["figure"] for pair in own if pair["second"]):
            some = [pair for pair in own if pair["figure"] == figure]
            rows.append(summed_up(path.stem, figure, some))
    if not rows:
        raise SystemExit(f"{second} has no CSV with rows of one in {first}")
    return [*rows, summed_up("all", "all", every)]


def table(rows: list[Row]) -> list[Row]:
    """The figures as text."""
    return [
        {
            **{"benchmark": row["file"], "figure": row["figure"].replace("_", " ")},
            "overlap": f"{row['overlap']} of {row['compared']}",
            "left out": row["left_out"],
            "by chance": f"{row['by_chance']:.0%} ({row['errors']:+.1f} σ)",
            "median difference": f"{row['median_difference']:.1%}",
            "largest": f"{row['largest_difference']:.1%}",
            "at": row["largest_at"],
        }
        for row in rows
    ]


def plot(rows: list[Row]) -> Any:
    """The median and the largest difference of each benchmark's figures."""
    figure, ax = load_pyplot().subplots(figsize=(WIDTH, 4.2))
    shown = [row for row in rows if row["file"] != "all"]
    places = range(len(shown))
    for column, shift in (("median_difference", -0.2), ("largest_difference", 0.2)):
        at = [place + shift for place in places]
        ax.barh(at, [100 * row[column] for row in shown], 0.4, label=column.replace("_", " "))
    names = [f"{row['file']}, {row['figure']}".replace("_", " ") for row in shown]
    ax.set_yticks(places, names)
    ax.invert_yaxis()
    ax.set_xlabel("difference between two runs, %")
    ax.grid(alpha=0.3, axis="x")
    ax.legend()
    return figure


def main() -> None:
    """Compare, write CSV, PNG and Markdown, check the goals.

    Raises:
        SystemExit: The folders have no row in common.
    """
    parser = base_parser((__doc__ or "").splitlines()[0])
    parser.add_argument("second", type=Path, help="folder of the second run's CSVs")
    parser.add_argument("--first", type=Path, default=RESULTS, help="folder of the first run's")
    args: argparse.Namespace = parser.parse_args()
    for folder in (args.first, args.second):
        if not folder.is_dir():
            parser.error(f"{folder} is no folder")
    where = set_up(args)
    rows = run(args.first, args.second)
    rows = [{**row, **where} for row in rows]
    tables.conclude(NAME, TITLE, rows, table(rows), goals(), plot(rows), args)


if __name__ == "__main__":
    main()
