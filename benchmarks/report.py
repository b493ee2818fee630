"""Write the tables of README, BENCHMARKS and of the card of the weights that come along.

Figures are from the CSVs, support is from the code.

python benchmarks/report.py          writes them; a benchmark that is new gets its place
python benchmarks/report.py --check  exits with 1 when they disagree with CSVs or code
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from tables import environment_line, markdown_table, read_csv

from ltrp_timm.slots import support_rows

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README, DETAILS = ROOT / "README.md", ROOT / "BENCHMARKS.md"
CARD = ROOT / "ltrp_timm" / "weights" / "conv.md"

Row = Mapping[str, str]
Cell = Callable[[Row], str]


class Section(NamedTuple):
    """One benchmark's part of the README.

    Args:
        marker: its name in the comments around it.
        file: name of CSV, PNG, Markdown and script.
        says: what the figures of the table are.
        line: row -> columns in front, by name; rows with equal ones share a line.
        column: row -> heading of its figure.
        cell: row -> its figure as text.
        keep: which rows are shown.
        how: what stands for all figures.
        pictures: what further pictures show, by the names of their files.
    """

    marker: str
    file: str
    says: str
    line: Callable[[Row], dict[str, str]]
    column: Cell
    cell: Cell
    keep: Callable[[Row], bool] = lambda row: True
    how: str = "medians of rounds taken in turns in one process"
    pictures: Mapping[str, str] = MappingProxyType({})

    def text(self, rows: Sequence[Row]) -> str:
        """What was measured, table, picture and links, as Markdown."""
        path = f"benchmarks/results/{self.file}"
        links = f"All rows, with spread: [CSV]({path}.csv), [table and goals]({path}.md); measured "
        parts = [
            f"{self.says} ({_where(rows[0])}; {self.how}).",
            pivot([row for row in rows if self.keep(row)], self),
            f"![{self.says.split('.')[0]}]({path}.png)",
            *[f"![{text}](benchmarks/results/{name}.png)" for name, text in self.pictures.items()],
            f"{links}by `python benchmarks/{self.file}.py`.",
        ]
        return "\n\n".join(parts)


def _where(row: Row) -> str:
    if "depth" in row:
        return environment_line(row)
    return f"{row['machine']}, {row['threads']} thread, {row['dtype']}; torch {row['torch']}"


def pivot(rows: Sequence[Row], section: Section) -> str:
    """Rows that share a line side by side, a column for each heading; what is missing is –."""
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        front = section.line(row)
        line = lines.setdefault(tuple(front.values()), dict(front))
        line[section.column(row)] = section.cell(row)
    columns = list(dict.fromkeys(name for line in lines.values() for name in line))
    return markdown_table(
        [{name: line.get(name, "–") for name in columns} for line in lines.values()]
    )


def _milliseconds(row: Row) -> str:
    return f"{1e3 * float(row['seconds_median']):.0f} ms"


def _speed_cell(row: Row) -> str:
    if row["method"] == "full":
        return _milliseconds(row)
    speed = f"{float(row['speedup']):.2f}×"
    return speed if row["method"] == "ideal" else f"{speed} ({float(row['achieved']):.2f})"


def _model(row: Row) -> dict[str, str]:
    return {"model": f"`{row['model']}`", "batch": row["batch"]}


def _where_model(row: Row) -> str:
    return f"`{row['model']}` batch {row['batch']}"


def _images(row: Row) -> str:
    return f"{row['images']}, {row['px']} px" if row["px"] else "all with ink"


def _score(row: Row) -> str:
    name = row["method"].partition(",")[0]
    return name if name in ("teacher", "ink") else f"`{name}`"


def _two(figure: str) -> str:
    return f"{float(figure):.2f}" if figure else "–"


SECTIONS = [
    Section(
        "speed",
        "speed_vs_keep_ratio",
        "Times as fast as the plain model, ranker's time included. *Ideal* is the same encoder "
        "given as many tokens for nothing; in brackets how much of it is reached",
        lambda row: {**_model(row), "keep": row["keep_ratio"]},
        lambda row: row["method"] if row["method"] in ("full", "ideal") else f"`{row['method']}`",
        _speed_cell,
        lambda row: row["keep_ratio"] in ("0.5", "0.25") and row["batch"] in ("1", "8"),
    ),
    Section(
        "compile",
        "compile_and_export",
        "Times as fast as the plain eager model when compiled (on a CPU with frozen weights) or "
        "run by ONNX Runtime",
        lambda row: {**_model(row), "keep": row["keep_ratio"], "form": row["form"]},
        lambda row: row["method"] if row["method"] == "full" else f"`{row['method']}`",
        lambda row: f"{float(row['speedup_over_eager']):.2f}×",
    ),
    Section(
        "resolution",
        "resolution",
        "Times as fast as the plain model at larger images, in brackets the ranker's share of the "
        "plain model's time. `@224` ranks the image at 224 px and encodes it at full size",
        lambda row: {**_model(row), "px": row["img_size"]},
        lambda row: row["method"] if row["method"] in ("full", "ideal") else f"`{row['method']}`",
        lambda row: (
            _milliseconds(row)
            if row["method"] == "full"
            else f"{float(row['speedup']):.2f}×"
            + (f" ({float(row['ranker_share']):.2%})" if row["method"] != "ideal" else "")
        ),
    ),
    Section(
        "peers",
        "peers",
        "Times as fast as the plain model, in brackets the method's time ÷ ours. Merging and "
        "fusing are written from their papers and set to equal FLOPs, or to as many tokens at the "
        "end",
        lambda row: {"model": f"`{row['model']}`", "method": row["method"].replace("_", " ")},
        lambda row: f"batch {row['batch']}, keep {row['keep_ratio']}, equal {row['matched']}",
        lambda row: f"{float(row['speedup']):.2f}× ({float(row['gain']):.2f})",
    ),
    Section(
        "parts",
        "where_does_time_go",
        "Each part's share of the plain model's time",
        lambda row: {"part": row["part"], "": row["method"]},
        _where_model,
        lambda row: f"{float(row['share']):.2%}",
    ),
    Section(
        "break-even",
        "break_even",
        "The largest keep ratio up to which a ranker pays for itself",
        lambda row: {"ranker": f"`{row['method']}`"},
        _where_model,
        lambda row: f"{float(row['break_even']):.2f}" if float(row["break_even"]) else "never",
    ),
    Section(
        "index-cache",
        "index_cache",
        "Time of a step with patches given for nothing, and how many times as long others take; "
        "`cached` reads the orders of `vit_small` from an index cache",
        lambda row: {"step": row["step"], "keep": row["keep_ratio"]},
        lambda row: row["method"] if row["method"] in ("full", "given") else f"`{row['method']}`",
        lambda row: (
            _milliseconds(row) if row["method"] == "given" else f"{float(row['over_given']):.2f}×"
        ),
    ),
    Section(
        "memory",
        "memory",
        "Peak memory of one forward beside weights and images, in brackets ÷ the plain model's",
        lambda row: {**_model(row), "keep": row["keep_ratio"]},
        lambda row: row["method"],
        lambda row: f"{float(row['peak_mib']):.0f} MiB ({float(row['peak_ratio']):.2f})",
    ),
    Section(
        "training",
        "training_speed",
        "Training steps: times as fast as those of the plain model, ranker included. *Ideal* is "
        "given its patches for nothing",
        _model,
        lambda row: (
            "full" if row["method"] == "full" else f"{row['method']}, keep {row['keep_ratio']}"
        ),
        lambda row: (
            f"{float(row['images_per_second']):.1f} images/s"
            if row["method"] == "full"
            else f"{float(row['speedup']):.2f}×"
        ),
    ),
    Section(
        "adaptive",
        "adaptive_budget",
        "Share of object pixels in kept patches where a threshold or a share of the score mass "
        "chooses K for each image, and where all keep as many, in brackets the time ÷ that of the "
        "fixed budget",
        lambda row: {
            "ranker": f"`{row['ranker']}`",
            "batch": row["batch"],
            "mean keep": row["keep_ratio"],
        },
        lambda row: row["method"],
        lambda row: f"{float(row['kept_ink']):.3f} ({float(row['time_ratio']):.2f})",
    ),
    Section(
        "learning",
        "learning",
        "A ranker that a small MAE taught without labels, and scores without weights. Mean "
        "Spearman with the teacher's mean rank, and object AUC",
        lambda row: {"images": _images(row), "score": _score(row)},
        lambda row: f"seed {row['seed']}, {row['aggregate']} of the change",
        lambda row: f"{_two(row['map_spearman'])} / {_two(row['object_auc'])}",
        how="means over held-out images; at 224 px there is no teacher",
        pictures={"learning_maps": "Score maps of held-out images, and what is kept"},
    ),
]


def ends(marker: str) -> tuple[str, str]:
    """The comments around a section."""
    return f"<!-- {marker}: written by benchmarks/report.py -->", f"<!-- /{marker} -->"


def with_sections(text: str, results: Path, sections: Sequence[Section]) -> str:
    """A text with these sections of all CSVs in ``results`` as they should be.

    Raises:
        SystemExit: a section without its CSV, half a section, figures of models that were cut
            short, or no section to put the first new one behind.
    """
    behind = ""
    for section in sections:
        start, end = ends(section.marker)
        count = (text.count(start), text.count(end))
        path = results / f"{section.file}.csv"
        if not path.exists():
            if count != (0, 0):
                raise SystemExit(f"README has a {section.marker} section, but there is no {path}.")
            continue
        rows = read_csv(path)
        if rows[0].get("depth", "all") != "all":
            raise SystemExit(f"{path} is of models cut to {rows[0]['depth']} blocks.")
        new = f"{start}\n{section.text(rows)}\n{end}"
        if count == (0, 0) and behind:
            text = text.replace(behind, f"{behind}\n\n{new}")
        else:
            text = with_section(text, section.marker, new)
        behind = end
    return text


def with_section(text: str, marker: str, new: str) -> str:
    """The README's text with the section of this marker, the comments included, replaced.

    Raises:
        SystemExit: it is not there once, whole.
    """
    start, end = ends(marker)
    if (text.count(start), text.count(end)) != (1, 1) or text.index(start) > text.index(end):
        raise SystemExit(f"README must hold the markers {start} and {end} once, in this order.")
    return text.replace(text[text.index(start) : text.index(end) + len(end)], new)


def with_support(text: str) -> str:
    """The README's text with the table of backbones as the code has it."""
    start, end = ends("support")
    return with_section(text, "support", f"{start}\n{markdown_table(support_rows())}\n{end}")


def with_shortfalls(text: str, results: Path) -> str:
    """The README's text with all goals that the committed measurements do not meet."""
    start, end = ends("shortfalls")
    rows = []
    for path in sorted(results.glob("*.md")):
        for line in path.read_text(encoding="utf-8").splitlines():
            cells = [cell.strip() for cell in line.strip("| ").split("|")]
            if cells[-1] == "not met":
                link = f"[{path.stem}]({path.relative_to(ROOT)})"
                row = {"goal": cells[0], "asked": cells[1], "measured": cells[2]}
                rows.append({**row, "in": link})
    table = markdown_table(rows) if rows else "Every goal is met."
    return with_section(text, "shortfalls", f"{start}\n{table}\n{end}")


def with_held_out(text: str, results: Path) -> str:
    """The card's text with the figures of the ranker that comes along: of the first seed's first.

    Raises:
        SystemExit: the CSV is not there.
    """
    path = results / "learning.csv"
    if not path.exists():
        raise SystemExit(f"{CARD} has a table of held-out images, but there is no {path}.")
    every = read_csv(path)
    first = (every[0]["seed"], every[0]["aggregate"])
    rows = [row for row in every if (row["seed"], row["aggregate"]) == first]
    shipped = next(row["weights_sha256"] for row in rows if row["weights_sha256"])
    table = markdown_table(
        [
            {
                "images": _images(row),
                "score": _score(row),
                "Spearman with the teacher's lists": _two(row["spearman"]),
                "with its mean rank": _two(row["map_spearman"]),
                "object AUC": _two(row["object_auc"]),
                "ink kept at 25 %": _two(row["ink_kept"]),
            }
            for row in rows
        ]
    )
    start, end = ends("held-out")
    return with_section(text, "held-out", f"{start}\n{table}\n\nSHA-256: `{shipped}`\n{end}")


def main() -> None:
    """Write or check."""
    before = {path: path.read_text(encoding="utf-8") for path in (README, DETAILS, CARD)}
    front = with_sections(before[README], RESULTS, SECTIONS[:1])
    after = {README: with_shortfalls(with_support(front), RESULTS)}
    after[DETAILS] = with_sections(before[DETAILS], RESULTS, SECTIONS[1:])
    after[CARD] = with_held_out(before[CARD], RESULTS)
    if "--check" in sys.argv[1:]:
        wrong = "README, BENCHMARKS or card and CSVs or code disagree: run benchmarks/report.py"
        sys.exit(None if before == after else wrong)
    for path, text in after.items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
