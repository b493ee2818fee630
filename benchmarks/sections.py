"""The sections of the documents: which figures of each benchmark, and how they are laid out."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from studies.fairness.compared import labels_of
from tables import METHODS, MODELS, markdown_table

from ltrp_timm import list_rankers

Row = Mapping[str, str]
Cell = Callable[[Row], str]
STUDIES = "benchmarks/studies"


class Section(NamedTuple):
    """A table of a benchmark, with its caption, pictures and links.

    Args:
        marker: its name in the comments around it.
        file: name of CSV, Markdown and script.
        says: what the figures are, in a sentence without its full stop.
        line: row -> columns in front, by name; rows with equal ones share a line.
        column: row -> heading of its figure.
        cell: row -> its figure as text.
        keep: which rows are shown.
        how: what kind of figures they are; by default medians of timed rounds.
        pictures: what pictures show, by the names of their files.
        folder: of the script.
    """

    marker: str
    file: str
    says: str
    line: Callable[[Row], dict[str, str]]
    column: Cell
    cell: Cell
    keep: Callable[[Row], bool] = lambda row: True
    how: str = ""
    pictures: Mapping[str, str] = MappingProxyType({})
    folder: str = "benchmarks"

    def text(self, rows: Sequence[Row], top: str = "../../") -> str:
        """Table, caption, pictures and links, as Markdown; ``top`` leads to the repository."""
        path = f"{top}benchmarks/results/{self.file}"
        shown = [row for row in rows if self.keep(row)]
        parts = [
            pivot(shown, self),
            f"{self.says}. {self.how or rounds_of(shown)} {machine_of(rows[0])}.",
            *[
                f"![{alt}]({top}benchmarks/results/{name}.png)"
                for name, alt in self.pictures.items()
            ],
            f"[All figures]({path}.csv) · [full table]({path}.md) · "
            f"repeat it: `python {self.folder}/{self.file}.py`{seed_of(rows)}",
        ]
        return "\n\n".join(parts)


def machine_of(row: Row) -> str:
    """Processor, threads, type of numbers and versions of a row."""
    threads = "one thread" if row["threads"] == "1" else f"{row['threads']} threads"
    versions = " and ".join(f"{name} {row[name].partition('+')[0]}" for name in ("torch", "timm"))
    return f"Measured on {threads} of an {row['machine']} in {row['dtype']}, with {versions}"


def seed_of(rows: Sequence[Row]) -> str:
    """The option that repeats rows of one seed, if that is not the default."""
    seeds = {row.get("seed", "") for row in rows} - {"mean"}
    seed = seeds.pop() if len(seeds) == 1 else ""
    return f" with `--seed {seed}`" if seed not in ("", "0") else ""


def rounds_of(rows: Sequence[Row]) -> str:
    """How many timed rounds are behind the figures, as a sentence."""
    rounds = sorted({int(row["rounds"]) for row in rows})
    runs = max(int(row.get("runs") or 1) for row in rows)
    number = f"{rounds[0]}" if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]}"
    separate = f" in {runs} runs" if runs > 1 else ""
    return f"Median over {number} interleaved rounds{separate}."


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


def _times(name: str) -> Cell:
    """The speed-up in a column as text."""
    return lambda row: f"{float(row[name]):.2f}×"


def _time_or_speedup(row: Row) -> str:
    return _milliseconds(row) if row["method"] == "full" else _times("speedup")(row)


def model_of(row: Row) -> str:
    """The name of a model for readers."""
    return MODELS.get(row["model"], f"`{row['model']}`")


def _model(row: Row) -> dict[str, str]:
    return {"Model": model_of(row), "Batch": row["batch"]}


def _model_and_batch(row: Row) -> str:
    return f"{model_of(row)}, batch {row['batch']}"


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


def with_interval(row: Row) -> str:
    """A value and its interval as text."""
    return interval_of(row, "value", 3 if row["measure"].endswith("error") else 2)


def interval_of(row: Row, column: str, digits: int = 2) -> str:
    """A column's value and its interval as text."""
    ends = ("", "_low", "_high")
    figures = (round(float(row[f"{column}{end}"]), digits) + 0.0 for end in ends)  # no -0.00
    value, low, high = (f"{figure:.{digits}f}" for figure in figures)
    return f"{value} ({low} to {high})"


def student_of(row: Row) -> str:
    """The name of a ranker of the students' study for readers."""
    if row["method"] == "change of features":
        return "Change of a ViT's feature without the patch"
    head, _, teacher = row["method"].partition(" from ")
    return f"`{head}`" + (f", student of `{teacher}`" if teacher else "")


def percent(share: str) -> str:
    """A share as text."""
    return f"{100 * float(share):.0f} %"


def method_of(row: Row) -> str:
    """The name of a method for readers; a ranker's is code."""
    head, comma, rest = METHODS.get(row["method"], row["method"]).partition(", ")
    known = row["method"] in METHODS and head not in list_rankers()
    return (f"{head[0].upper()}{head[1:]}" if known else f"`{head}`") + comma + rest


MEASURES = {
    "accuracy": "Mean of the next three",
    "linear": "Accuracy, one object",
    "neighbours": "Accuracy, 5 neighbours",
    "retrieval": "Retrieval",
    "precision": "Average precision, several objects",
    "recall": "Object area kept",
    "AUC single": "Objects pasted on photos",
    "AUC photos": "Photos with boxes",
    "token error": "Distance of the pooled feature",
    "map error": "Distance of the feature map",
    "mask": "Mask of the object, overlap",
    "mask zeros": "The same, holes filled with zeros",
}


def _measure(row: Row) -> str:
    return MEASURES[row["measure"]]


def setting_of(row: Row) -> str:
    """A method and its setting for readers."""
    if row["method"] == "full":
        return "Full model"
    if row["setting"].startswith("keep"):
        return f"{method_of(row)}, {row['setting']}"
    return f"{method_of(row)}, {row['setting'].replace(' = ', '=')}"


def _at_equal_time(row: Row) -> dict[str, str]:
    name, rival = row["method"].split(" − ")
    ours = name.partition(", ")[2] or "dropping"
    return {"Speed-up": f"{float(row['at']):g}×", "`border`": ours, "Rival": rival}


COARSE_VARIANTS = {
    "drop": "`border`, dropping",
    "coarse": "`border`, coarse rest",
    "no bias": "without size bias",
    "random": "random cells",
}
_INTERVALS = "Values with 95 % intervals over objects or photos."
_HALF = ("keep 0.5", "154 px", "r = 23")
_ON_SCENES = ("border", "border, dithered", "border, coarse rest", "cell_std, coarse rest")
_AT_TWICE_THE_SPEED = {
    size: [
        *[(method, "keep 0.5") for method in (*_ON_SCENES, "random")],
        *[("smaller image", pixels), ("token merging", merges)],
    ]
    for size, pixels, merges in (("224", "154 px", "r = 23"), ("448", "322 px", "r = 93"))
}


def _of_pictures(
    marker: str,
    says: str,
    line: Callable[[Row], dict[str, str]],
    keep: Callable[[Row], bool],
    file: str = "quality",
    cell: Cell = with_interval,
    pictures: Mapping[str, str] = MappingProxyType({}),
) -> Section:
    """A section of a study of real pictures: a column for each measure, with its interval."""
    return Section(marker, file, says, line, _measure, cell, keep, _INTERVALS, pictures, STUDIES)


SECTIONS = [
    Section(
        "speed",
        "speed_vs_keep_ratio",
        "Time of the full model, and speed-up over it with the ranking included",
        _model,
        lambda row: (
            "Full model"
            if row["method"] == "full"
            else f"{method_of(row)}, keep {row['keep_ratio']}"
        ),
        _time_or_speedup,
        lambda row: (
            (
                row["keep_ratio"] == "0.5"
                or (row["keep_ratio"] == "0.25" and row["method"] != "full")
            )
            and row["batch"] in ("1", "8")
            and row["method"] != "ideal"
        ),
        pictures={"speed_vs_keep_ratio": "Speed-up over the full model by keep ratio"},
    ),
    Section(
        "coarse-speed",
        "coarse_rest",
        "Speed-up over the full model at batch 8; in brackets the share of the speed that the same "
        "encoder reaches when it is given as many tokens",
        lambda row: {"Model": model_of(row), "Keep": f"{float(row['keep_ratio']):g}"},
        lambda row: COARSE_VARIANTS[row["method"]],
        lambda row: f"{float(row['speedup']):.2f}× ({float(row['achieved']):.2f})",
        lambda row: row["method"] in COARSE_VARIANTS,
        pictures={"coarse_rest": "Speed-up of dropping and of a coarse rest"},
    ),
    Section(
        "compile",
        "compile_and_export",
        "Speed-up over the full model in eager mode, at keep ratio 0.5",
        lambda row: {**_model(row), "Form": row["form"]},
        method_of,
        _times("speedup_over_eager"),
        pictures={"compile_and_export": "Speed-up of compiled and exported forms"},
    ),
    Section(
        "resolution",
        "resolution",
        "Time of the full model, and speed-up over it at keep ratio 0.5 with the ranking included; "
        "`@224` ranks a version of 224 px",
        lambda row: {"Model": model_of(row), "Image": f"{row['img_size']} px"},
        method_of,
        _time_or_speedup,
        pictures={"resolution": "Speed-up by image size"},
    ),
    Section(
        "visual-tokens",
        "visual_tokens",
        "Time of the vision tower and the projector, ranking included, divided by that of the "
        "plain ones. The language model is not timed",
        lambda row: {"Tower": f"`{row['model']}`", "Method": method_of(row)},
        lambda row: f"{row['img_size']} px, keep {row['keep_ratio']}",
        lambda row: f"{float(row['time_ratio']):.2f} ({row['visual_tokens']} tokens)",
        pictures={"visual_tokens": "Time of the vision side by method"},
    ),
    Section(
        "peers",
        "peers",
        "Speed-up over the full model; in brackets the time divided by that of dropping patches",
        lambda row: {"Method": method_of(row)},
        lambda row: f"Batch {row['batch']}, equal {row['matched'].replace('flops', 'FLOPs')}",
        lambda row: f"{float(row['speedup']):.2f}× ({float(row['gain']):.2f})",
        lambda row: row["method"] not in ("conv", "random", "merging_plain_fused"),
        pictures={"peers": "Speed-up of dropping, merging and fusing for equal work"},
    ),
    Section(
        "parts",
        "where_does_time_go",
        "Share of the full model's time",
        lambda row: {"Part": row["part"], "Method": row["method"]},
        model_of,
        lambda row: f"{float(row['share']):.1%}",
        lambda row: (
            row["batch"] == "1"
            and (row["part"] in ("ranker", "embed", "gather", "blocks") or row["method"] == "mixed")
        ),
        pictures={"where_does_time_go": "Time of each part of a forward pass"},
    ),
    Section(
        "break-even",
        "break_even",
        "Largest keep ratio at which the ranker still saves time (0.95 is the largest measured)",
        lambda row: {"Ranker": f"`{row['method']}`"},
        _model_and_batch,
        lambda row: f"{float(row['break_even']):.2f}" if float(row["break_even"]) else "never",
        pictures={"break_even": "Speed-up by keep ratio for each ranker"},
    ),
    Section(
        "index-cache",
        "index_cache",
        "Time of a step with given patches, and the other times divided by it, at keep ratio 0.5",
        lambda row: {"Step": row["step"]},
        method_of,
        lambda row: (
            _milliseconds(row) if row["method"] == "given" else f"{float(row['over_given']):.2f}"
        ),
        pictures={"index_cache": "Time of a step by the origin of the scores"},
    ),
    Section(
        "memory",
        "memory",
        "Peak memory of a forward pass beyond weights and images, at keep ratio 0.5",
        _model,
        method_of,
        lambda row: f"{float(row['peak_mib']):.0f} MiB",
        lambda row: row["keep_ratio"] == "0.5",
        pictures={"memory": "Peak memory by keep ratio"},
    ),
    Section(
        "training",
        "training_speed",
        "Training steps: images/s of the full model, and speed-up over it",
        _model,
        lambda row: (
            "Full model"
            if row["method"] == "full"
            else f"{method_of(row)}, keep {row['keep_ratio']}"
        ),
        lambda row: (
            f"{float(row['images_per_second']):.1f} images/s"
            if row["method"] == "full"
            else _times("speedup")(row)
        ),
        pictures={"training_speed": "Speed-up of training steps"},
    ),
    Section(
        "adaptive",
        "adaptive_budget",
        "Share of object pixels kept; in brackets the time divided by that of a fixed budget. "
        "Images keep 30 % of their patches on average",
        lambda row: {"Ranker": f"`{row['ranker']}`", "Batch": row["batch"]},
        method_of,
        lambda row: f"{float(row['kept_ink']):.2f} ({float(row['time_ratio']):.2f})",
        lambda row: row["keep_ratio"] == "0.3",
        pictures={"adaptive_budget": "Object pixels kept and time, by budget"},
    ),
    _of_pictures(
        "quality",
        "Images of 224 px",
        lambda row: {"Model": setting_of(row)},
        lambda row: (
            row["img_size"] == "224"
            and row["measure"] in ("linear", "neighbours", "retrieval", "precision")
            and (row["method"] == "full" or row["setting"] in _HALF)
            and row["method"] not in ("pixel_std", "centre", "conv")  # the latter has new weights
            and (", " not in row["method"] or row["method"].startswith("border, "))
        ),
        pictures={"quality": "Accuracy, and distance to the full model, against speed-up"},
    ),
    _of_pictures(
        "equal-time",
        "The figure of `border` minus that of its rival, each at its best setting of that speed. "
        "Positive differences favour `border`",
        _at_equal_time,
        lambda row: (
            row["method"].startswith("border")
            and " − " in row["method"]
            and row["measure"] in ("linear", "precision")
        ),
    ),
    _of_pictures(
        "quarter",
        "Images of 224 px",
        lambda row: {"Model": method_of(row)},
        lambda row: row["measure"] != "recall",
        file="quality_quarter",
    ),
    _of_pictures(
        "above-contrast",
        "The figure minus that of the best patches by `contrast`. Positive differences are better",
        lambda row: {"Model": method_of(row)},
        lambda row: row["measure"] != "recall" and row["method"] not in ("full", "contrast"),
        file="quality_quarter",
        cell=lambda row: interval_of(row, "above_contrast"),
        pictures={"quality_quarter": "Differences to the best patches by contrast"},
    ),
    _of_pictures(
        "closeness",
        "1 − cosine to the full model on whole photos; lower is closer",
        lambda row: {"Image": f"{row['img_size']} px", "Model": setting_of(row)},
        lambda row: (
            row["measure"] in ("token error", "map error")
            and (row["method"], row["setting"]) in _AT_TWICE_THE_SPEED[row["img_size"]]
        ),
    ),
    _of_pictures(
        "masks",
        "Overlap (intersection over union) of the mask that a linear probe finds, and the object",
        lambda row: {"Model": setting_of(row)},
        lambda row: (
            row["img_size"] == "224"
            and row["measure"].startswith("mask")
            and row["at"] == ""
            and (
                row["method"] == "full"
                or row["setting"] in ("154 px", "140 px")
                or (
                    row["setting"] in ("keep 0.5", "keep 0.375")
                    and row["method"] in ("cell_std", *_ON_SCENES)
                )
            )
        ),
    ),
    _of_pictures(
        "objects",
        "Chance that a patch of an object outranks a patch without one (0.5: random)",
        lambda row: {"Ranker": method_of(row)},
        lambda row: (
            row["img_size"] == "224"
            and row["measure"].startswith("AUC")
            and row["method"] != "conv"  # its weights have a study of their own
        ),
    ),
    Section(
        "students",
        "distill",
        "Chance that a patch of an object outranks a patch without one (0.5: random)",
        lambda row: {"Ranker": student_of(row)},
        lambda row: f"{row['pictures'].capitalize()} ({row['count']})",
        lambda row: interval_of(row, "object_auc"),
        how=_INTERVALS,
        folder=STUDIES,
    ),
    Section(
        "learning",
        "learning",
        "Rank correlation with the teacher's mean rank / chance that a patch with ink outranks one "
        "without",
        lambda row: {"Score": score_of(row)},
        lambda row: images_of(row).capitalize(),
        lambda row: f"{two_digits(row['map_spearman'])} / {two_digits(row['object_auc'])}",
        lambda row: row["px"] == "128" and row["method"] not in ("gradient", "colour", "centre"),
        how="Means over held-out images, one seed.",
        pictures={
            "learning": "Rank correlation and object AUC by score",
            "learning_maps": "Score maps of held-out images, and what is kept",
        },
        folder=STUDIES,
    ),
    Section(
        "coverage",
        "coverage",
        "A quarter of the patches of 27 photo crops, ranked by `contrast`",
        lambda row: {
            "Selection": f"`{row['method']}`",
            "2 × 2 cells left empty": percent(row["empty_cells"]),
            "Distance to the nearest kept patch": two_digits(row["distance"]),
        },
        lambda row: "Score kept",
        lambda row: percent(row["score"]),
        lambda row: row["keep_ratio"] == "0.25" and "," not in row["method"],
        how="Means over the crops; distances in patches.",
        pictures={"coverage": "What each selection leaves empty, by keep ratio"},
        folder=STUDIES,
    ),
    Section(
        "teacher-cost",
        "pseudo_score_cost",
        "Time of the exact scores of one image, 19 visible patches of 196",
        lambda row: {"Removal": f"`{row['removal']}`"},
        lambda row: {
            "loop": "One patch after another",
            "batch": "All in one batch",
            "drawn:5": "5 patches only",
        }[row["method"]],
        lambda row: f"{float(row['seconds_median']):.1f} s",
        lambda row: row["method"] in ("loop", "batch", "drawn:5"),
        pictures={"pseudo_score_cost": "Time of the teacher's scores"},
    ),
    Section(
        "finetune-digits",
        "finetune_digits",
        "Top-1 accuracy of a small ViT after fine-tuning",
        lambda row: {"Patches chosen by": method_of(row)},
        lambda row: f"Keep {float(row['keep_ratio']):g}",
        lambda row: percent(row["top1"]),
        how="1000 held-out images, one seed.",
        pictures={"finetune_digits": "Top-1 accuracy by keep ratio"},
        folder=STUDIES,
    ),
    Section(
        "coarse-digits",
        "coarse_digits",
        "Top-1 accuracy on digits in clutter after one epoch of fine-tuning, 24 of 64 patch tokens",
        lambda row: {"Seed": row["seed"]},
        lambda row: {
            "full": "All patches",
            "drop": "`border`, dropping",
            "dithered": "`border`, dithered",
            "coarse": "`border`, coarse rest",
            "smaller image": "Smaller image",
        }[row["method"]],
        lambda row: f"{100 * float(row['top1']):.1f} %",
        how="1000 held-out images.",
        pictures={"coarse_digits": "Top-1 accuracy of each method and seed"},
        folder=STUDIES,
    ),
    Section(
        "fairness",
        "fairness",
        "Share of the digits' pixels in kept patches, and average precision of a classifier that "
        "sees the kept patches only, at keep ratio 0.25",
        lambda row: {
            "Patches chosen by": method_of(row),
            "Labels used": labels_of(row["method"]),
            "Pixels kept, labelled digits": two_digits(row["recall_seen"]),
            "Other digits": two_digits(row["recall_unseen"]),
            "Precision, labelled digits": two_digits(row["map_seen"]),
        },
        lambda row: "Others",
        number("map_unseen"),
        lambda row: (
            (row["seed"], row["images"], row["seen"], row["keep_ratio"])
            == ("all", "clutter", "both", "0.25")
            and row["method"] not in ("centre", "gradient", "colour", "decoder max", "grad_cam")
        ),
        how="Means over three seeds and over both halves of the digits.",
        pictures={
            "fairness": "Share of pixels kept of labelled and of other digits",
            "fairness_scenes": "What is kept of new scenes at keep ratio 0.25",
        },
        folder=STUDIES,
    ),
    Section(
        "fairness-ablations",
        "fairness_ablations",
        "Rankers trained without labels, at keep ratio 0.25",
        lambda row: {
            "Ranker": row["method"],
            "Kept patches with ink": two_digits(row["found"]),
            "Order by ink": two_digits(row["ink_order"]),
            "Pixels kept": two_digits(row["recall"]),
            "Precision": two_digits(row["map"]),
        },
        lambda row: "Above `contrast`",
        lambda row: f"{float(row['above_contrast']):+.3f}",
        lambda row: (
            row["seed"] == "all"
            and row["axis"] in ("base", "more", "max and", "distilled", "no weights")
        ),
        how="Means over seeds.",
        pictures={"fairness_ablations": "Average precision of each ranker"},
        folder=STUDIES,
    ),
    Section(
        "agreement",
        "agreement",
        "Figures of two runs on the same machine that have overlapping ranges, and the share "
        "expected by chance",
        lambda row: {
            "Benchmark": row["file"].replace("_", " "),
            "Figure": row["figure"].replace("_", " "),
            "Overlap": f"{row['overlap']} of {row['compared']}",
            "By chance": f"{float(row['by_chance']):.0%}",
            "Largest difference": f"{float(row['largest_difference']):.1%}",
        },
        lambda row: "Median difference",
        lambda row: f"{float(row['median_difference']):.1%}",
        lambda row: row["figure"] in ("speedup", "peak_mib", "time_ratio", "all"),
        how="Ranges as each benchmark prints them.",
        pictures={"agreement": "Differences between two runs"},
    ),
]
