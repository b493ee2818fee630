"""The sections of the documents: which figures of each benchmark, and how they are laid out."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from tables import environment_line, markdown_table, runs_line

Row = Mapping[str, str]
Cell = Callable[[Row], str]
STUDIES = "benchmarks/studies"


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
        how: what all figures are, unless runs were pooled.
        pictures: what further pictures show, by the names of their files.
        folder: of the script.
    """

    marker: str
    file: str
    says: str
    line: Callable[[Row], dict[str, str]]
    column: Cell
    cell: Cell
    keep: Callable[[Row], bool] = lambda row: True
    how: str = "medians of interleaved rounds in one process"
    pictures: Mapping[str, str] = MappingProxyType({})
    folder: str = "benchmarks"

    def text(self, rows: Sequence[Row]) -> str:
        """What was measured, table, picture and links, as Markdown."""
        path = f"benchmarks/results/{self.file}"
        links = f"All rows, with spread: [CSV]({path}.csv), [table and goals]({path}.md); measured "
        parts = [
            f"{self.says} ({_where(rows[0])}; {runs_line(rows) or self.how}).",
            pivot([row for row in rows if self.keep(row)], self),
            f"![{self.says.split('. ')[0]}]({path}.png)",
            *[f"![{text}](benchmarks/results/{name}.png)" for name, text in self.pictures.items()],
            f"{links}by `python {self.folder}/{self.file}.py`.",
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


def laid_out(rows: Sequence[Row], columns: Mapping[str, Cell]) -> str:
    """A line for each row, a column for each heading, as Markdown."""
    return markdown_table([{name: of(row) for name, of in columns.items()} for row in rows])


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


def images_of(row: Row) -> str:
    """Which images a row of the learning run is about."""
    return f"{row['images']}, {row['px']} px" if row["px"] else "all with ink"


def score_of(row: Row) -> str:
    """Which score a row of the learning run is about."""
    name = row["method"].partition(",")[0]
    return name if name in ("teacher", "ink") else f"`{name}`"


def two_digits(figure: str) -> str:
    """A figure as text; – for none."""
    return f"{float(figure):.2f}" if figure else "–"


def number(name: str) -> Cell:
    """The figure of a column as text."""
    return lambda row: two_digits(row[name])


def _method(*plain: str) -> Cell:
    """The method, as code unless it is one of these."""
    return lambda row: row["method"] if row["method"] in plain else f"`{row['method']}`"


def _seen_and_unseen(row: Row) -> str:
    recall = f"{two_digits(row['recall_seen'])} / {two_digits(row['recall_unseen'])}"
    return f"{recall}, {two_digits(row['map_seen'])} / {two_digits(row['map_unseen'])}"


SECTIONS = [
    Section(
        "speed",
        "speed_vs_keep_ratio",
        "Speed-up over the plain model, ranking included. *Ideal* is the same encoder given the "
        "same number of patches for nothing; in brackets the share of it that is reached",
        lambda row: {**_model(row), "keep": row["keep_ratio"]},
        _method("full", "ideal"),
        _speed_cell,
        lambda row: row["keep_ratio"] in ("0.5", "0.25") and row["batch"] in ("1", "8"),
    ),
    Section(
        "compile",
        "compile_and_export",
        "Speed-up over the plain eager model when compiled (on a CPU with frozen weights), by "
        "torch.compile or ahead of time by AOTInductor, or run by ONNX Runtime",
        lambda row: {**_model(row), "keep": row["keep_ratio"], "form": row["form"]},
        _method("full"),
        lambda row: f"{float(row['speedup_over_eager']):.2f}×",
    ),
    Section(
        "resolution",
        "resolution",
        "Speed-up over the plain model at larger images, in brackets the ranker's share of the "
        "plain model's time. `@224` ranks the image at 224 px and encodes it at full size",
        lambda row: {**_model(row), "px": row["img_size"]},
        _method("full", "ideal"),
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
        "Speed-up over the plain model, in brackets the method's time ÷ that of dropping patches. "
        "Merging and fusing are written from their papers and set to equal FLOPs, or to an equal "
        "number of tokens after the last block",
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
        "The largest keep ratio up to which a ranker pays for itself; 0.95 is the largest measured",
        lambda row: {"ranker": f"`{row['method']}`"},
        _where_model,
        lambda row: f"{float(row['break_even']):.2f}" if float(row["break_even"]) else "never",
    ),
    Section(
        "index-cache",
        "index_cache",
        "Time of a step with patches given for nothing, and the times of others as multiples of "
        "it; `cached` reads the orders of `vit_small` from an index cache",
        lambda row: {"step": row["step"], "keep": row["keep_ratio"]},
        _method("full", "given"),
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
        "Training steps: speed-up over those of the plain model, ranking included. *Ideal* is "
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
        "chooses K for each image, and where all images keep the same K; in brackets the time ÷ "
        "that of the fixed budget",
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
        "A ranker trained by a small MAE without labels, and scores without weights. Mean "
        "Spearman correlation with the teacher's mean rank, and object AUC",
        lambda row: {"images": images_of(row), "score": score_of(row)},
        lambda row: f"seed {row['seed']}, {row['aggregate']} of the change",
        lambda row: f"{two_digits(row['map_spearman'])} / {two_digits(row['object_auc'])}",
        how="means over held-out images; at 224 px there is no teacher",
        pictures={"learning_maps": "Score maps of held-out images, and what is kept"},
        folder=STUDIES,
    ),
    Section(
        "fairness",
        "fairness",
        "Digits whose labels a selector saw (seen) and others (unseen): share of their ink in kept "
        "patches, seen / unseen, then mAP of one classifier that gets only the kept patches, seen "
        "/ unseen. Selectors without labels are compared on the same two halves of the digits",
        lambda row: {"selector": f"`{row['method']}`", "seen digits": row["seen"]},
        lambda row: f"keep {float(row['keep_ratio']):g}",
        _seen_and_unseen,
        lambda row: (row["seed"], row["images"]) == ("all", "clutter") and row["seen"] != "both",
        how="means over seeds",
        pictures={"fairness_scenes": "What selectors keep of new scenes at keep ratio 0.25"},
        folder=STUDIES,
    ),
    Section(
        "fairness-ablations",
        "fairness_ablations",
        "Rankers trained without labels, each with the change to `base` that its name says: share "
        "of kept patches with ink, rank correlation of score and ink among these patches, share of "
        "all ink that is kept, and mAP of the classifier, in brackets its difference to `contrast`",
        lambda row: {
            "axis": row["axis"],
            "variant": row["method"],
            "patches with ink": two_digits(row["found"]),
            "order by ink": two_digits(row["ink_order"]),
            "ink kept": two_digits(row["recall"]),
        },
        lambda row: "mAP (− contrast's)",
        lambda row: f"{two_digits(row['map'])} ({float(row['above_contrast']):+.3f})",
        lambda row: row["seed"] == "all",
        how="means over seeds, at keep ratio 0.25",
        folder=STUDIES,
    ),
    Section(
        "agreement",
        "agreement",
        "A second run of the benchmarks on the same machine: the number of figures with "
        "overlapping ranges, the share expected by chance if nothing differed, and the difference "
        "of the medians",
        lambda row: {
            "benchmark": row["file"],
            "figure": row["figure"].replace("_", " "),
            "overlap": f"{row['overlap']} of {row['compared']}",
            "left out": row["left_out"],
            "by chance": f"{float(row['by_chance']):.0%}",
            "largest difference": f"{float(row['largest_difference']):.1%}",
        },
        lambda row: "median difference",
        lambda row: f"{float(row['median_difference']):.1%}",
        how="ranges as each benchmark prints them",
    ),
]
