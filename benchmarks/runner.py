"""The runner of the benchmarks: options, measuring or pooling, table, goals, picture."""

import argparse
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pooling
import tables
from common import WIDTH, Row, load_pyplot, make_parser, set_up
from tables import Goal, nice

import ltrp_timm

Cell = Callable[[Row], Any]
# option of a benchmark -> column of its rows
CASES = {"models": "model", "batch_sizes": "batch", "keep_ratios": "keep_ratio"}
CASES |= {"img_sizes": "img_size", "forms": "form", "removals": "removal"}


def cells(columns: Mapping[str, Cell]) -> Callable[[Sequence[Row]], list[Row]]:
    """Rows -> rows of text for readers: a cell for each heading."""
    return lambda rows: [{name: cell(row) for name, cell in columns.items()} for row in rows]


def plain(column: str) -> Cell:
    """A column as it is."""
    return lambda row: row[column]


def figure(column: str, spec: str) -> Cell:
    """A figure as text, with its quartiles where the row has them."""
    return lambda row: tables.figure(row, column, spec)


def milliseconds(row: Row) -> str:
    """The median time."""
    time = 1e3 * row["seconds_median"]
    return f"{time:.1f}" if time >= 10 else f"{time:.3f}"


MODEL: dict[str, Cell] = {"model": plain("model"), "batch": plain("batch")}
CASE: dict[str, Cell] = {**MODEL, "keep": lambda row: f"{row['keep_ratio']:g}"}
SPEEDUP = "speed-up over the full model (quartiles)"


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """All parts of a benchmark.

    Args:
        name: of the script and of the files it writes.
        doc: the script's docstring; its first line describes the command.
        title: of table and picture.
        run: measures; yields the rows of each case, without the columns of ``set_up``.
        progress: a format string: what to print of a row once its case is measured.
        table: rows -> the same as text for readers.
        goals: makes the goals.
        plot: rows and options -> a matplotlib figure.
        parser: description -> the options.
        check: ends the run with a message where options do not fit together.
    """

    name: str
    doc: str | None
    title: str
    run: Callable[[argparse.Namespace], Iterable[list[Row]]]
    progress: str
    table: Callable[[Sequence[Row]], list[Row]]
    goals: Callable[[], list[Goal]]
    plot: Callable[[list[Row], argparse.Namespace], Any]
    parser: Callable[[str], argparse.ArgumentParser] = make_parser
    check: Callable[[argparse.ArgumentParser, argparse.Namespace], None] = lambda *_: None

    def main(self) -> None:
        """Measure or pool, write CSV, PNG and Markdown, check the goals."""
        parser = self.parser((self.doc or "").splitlines()[0])
        args = parser.parse_args()
        self.check(parser, args)
        rows = self.pooled(args) if vars(args).get("pool") else self.measured(args)
        picture = self.plot(rows, args)
        tables.conclude(self.name, self.title, rows, self.table(rows), self.goals(), picture, args)

    def measured(self, args: argparse.Namespace) -> list[Row]:
        """The rows of all cases; each case is printed as soon as it is measured."""
        where, rows = set_up(args), []
        for case in self.run(args):
            same = {name: value for name, value in case[0].items() if name in pooling.CASE}
            same = {k: v for k, v in same.items() if all(row[k] == v for row in case)}
            same |= {"rounds": case[0]["rounds"]} if "rounds" in case[0] else {}
            head = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in same.items())
            text = "; ".join(self.progress.format(**row) for row in case)
            print(f"{head}: {text}", flush=True)
            rows += [{**row, **where} for row in case]
        return rows

    def pooled(self, args: argparse.Namespace) -> list[Row]:
        """The rows that earlier runs measured; ``args`` get the cases of these runs."""
        rows = pooling.pool(self.name, args.pool)
        self.set_cases(args, rows)
        return rows

    @staticmethod
    def set_cases(args: argparse.Namespace, rows: Sequence[Row]) -> None:
        """Set the options that rows of an earlier run tell: its cases and its rankers."""
        for option, column in CASES.items():
            if column in rows[0] and hasattr(args, option):
                setattr(args, option, list(dict.fromkeys(row[column] for row in rows)))
        methods = list(dict.fromkeys(row["method"] for row in rows))
        if "rankers" in args and not set(args.rankers) <= set(methods):
            args.rankers = [method for method in methods if method in ltrp_timm.list_rankers()]


def panels(rows: int, columns: int, height: float = 2.6, **options: Any) -> tuple[Any, Any]:
    """A figure of panels, and their axes (rows, columns), each with a grid."""
    size = (WIDTH, 0.6 + height * rows)
    figure, axes = load_pyplot().subplots(rows, columns, figsize=size, squeeze=False, **options)
    for ax in axes.flat:
        ax.grid(alpha=0.3)
    return figure, axes


def whiskers(rows: Sequence[Row], column: str) -> tuple[list[float], list[float]] | None:
    """How far the quartiles lie below and above the figures; None where rows have no quartiles."""
    if f"{column}_low" not in rows[0]:
        return None
    below = [row[column] - row[f"{column}_low"] for row in rows]
    return below, [row[f"{column}_high"] - row[column] for row in rows]


def lines(rows: Sequence[Row], column: str, text: str, reference: float | None = None) -> Any:
    """A figure against the keep ratio.

    Args:
        rows: with model, batch, keep_ratio and method: a column of panels for each model, a row for
            each batch size, a line for each method.
        column: the figure.
        text: what it is.
        reference: a dotted line at the full model's figure, whose rows are not drawn then.
    """
    models, batches = (list(dict.fromkeys(row[key] for row in rows)) for key in ("model", "batch"))
    picture, axes = panels(len(batches), len(models), height=2.0, sharex=True)
    for i, batch in enumerate(batches):
        for ax, model in zip(axes[i], models):
            own = [row for row in rows if (row["model"], row["batch"]) == (model, batch)]
            if reference is not None:
                own = [row for row in own if row["method"] != "full"]
                ax.axhline(reference, color="k", linestyle=":", label="full model")
            for method in dict.fromkeys(row["method"] for row in own):
                some = [row for row in own if row["method"] == method]
                line = sorted(some, key=lambda row: row["keep_ratio"])
                x, y = ([row[key] for row in line] for key in ("keep_ratio", column))
                style = {"full": "k:o", "ideal": "k--o"}.get(method, "-o")
                errors = whiskers(line, column)
                ax.errorbar(x, y, errors, fmt=style, ms=3, capsize=2, label=nice(method))
            ax.set_title(nice(f"{model}, batch {batch}"))
            ax.set_ylim(bottom=0)
    for ax in axes[-1]:
        ax.set_xlabel("keep ratio")
    picture.supylabel(text, fontsize=9)
    axes[0][-1].legend(fontsize=7)
    return picture


def bars(
    rows: Sequence[Row],
    column: str,
    text: str,
    *,
    panel: str,
    bar: str = "{method}",
    group: str = "",
    reference: float | None = 1.0,
    log: bool = False,
) -> Any:
    """A figure as horizontal bars with quartiles.

    Args:
        rows: what was measured.
        column: the figure.
        text: what it is.
        panel: a format string; rows that it makes equal share a panel.
        bar: the same for the place of a bar.
        group: the same for bars of one colour, side by side at each place.
        reference: a dotted line at this figure.
        log: whether the axis is logarithmic.
    """
    titles, groups = (list(dict.fromkeys(f.format(**row) for row in rows)) for f in (panel, group))
    across = len(titles) if len(titles) < 4 else 2
    places = len({(panel.format(**row), bar.format(**row)) for row in rows}) / len(titles)
    inches = 0.8 + places * (0.17 if len(groups) == 1 else 0.25)
    picture, axes = panels(math.ceil(len(titles) / across), across, inches, sharey=True)
    height = 0.8 / len(groups)
    for ax, title in zip(axes.flat, titles):
        own = [row for row in rows if panel.format(**row) == title]
        names = list(dict.fromkeys(bar.format(**row) for row in own))
        for i, label in enumerate(groups):
            some = [row for row in own if group.format(**row) == label]
            if some:
                places = [names.index(bar.format(**row)) + i * height for row in some]
                values, errors = [row[column] for row in some], whiskers(some, column)
                ax.barh(places, values, height, xerr=errors, capsize=2, label=nice(label))
        ax.set_yticks([i + 0.4 - height / 2 for i in range(len(names))], [*map(nice, names)])
        ax.set_ylim(len(names) - 0.1, -0.5)
        ax.grid(axis="y", visible=False)
        if reference is not None:
            ax.axvline(reference, color="k", linestyle=":")
        if log:
            ax.set_xscale("log")
        ax.set_title(nice(title))
    picture.supxlabel(text, fontsize=9)
    if len(groups) > 1:
        picture.legend(*axes[0][0].get_legend_handles_labels(), loc="lower right", ncols=2)
    return picture
