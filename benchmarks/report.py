"""Write the tables of README, BENCHMARKS, the guide to rankers and the card of the weights.

Figures are from the CSVs, support is from the code.

python benchmarks/report.py          writes them; a new benchmark gets a section
python benchmarks/report.py --check  exits with 1 where they differ from CSVs or code
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from gpu.tables import gpu_text
from sections import SECTIONS, Cell, Section, images_of, laid_out, number, score_of
from studies.fairness.compared import labels_of
from tables import markdown_table, read_csv

from ltrp_timm.slots import ADAPTERS
from ltrp_timm.slots.refused import REFUSED_MODELS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README, DETAILS = ROOT / "README.md", ROOT / "BENCHMARKS.md"
GUIDE = ROOT / "docs" / "choosing_a_ranker.md"
CARD = ROOT / "ltrp_timm" / "weights" / "conv.md"


def ends(marker: str) -> tuple[str, str]:
    """The comments around a section."""
    return f"<!-- {marker}: written by benchmarks/report.py -->", f"<!-- /{marker} -->"


def support_rows() -> list[dict[str, str]]:
    """Which timm models can drop patches, and why the others cannot, as rows of a table."""
    rows = [
        (kinds, "supported", models, adapter.how)
        for adapter in ADAPTERS
        for kinds, models in adapter.examples.items()
    ]
    for reason, refused in REFUSED_MODELS.items():
        kinds = ", ".join(f"`{kind}`" for kind in refused)
        rows.append((kinds, "refused", tuple(refused.values())[:2], reason))
    columns = ("family", "drops patches", "examples", "how, or why not")
    return [
        dict(zip(columns, (kinds, answer, ", ".join(f"`{name}`" for name in models), why)))
        for kinds, answer, models, why in rows
    ]


def framed(marker: str, body: str) -> str:
    """A section: what is in it, between its comments."""
    start, end = ends(marker)
    return f"{start}\n{body}\n{end}"


def with_sections(text: str, results: Path, sections: Sequence[Section]) -> str:
    """A text with these sections of all CSVs in ``results`` as they should be.

    Raises:
        SystemExit: A section has no CSV or lacks one of its comments, figures are of models that
            were cut short, or there is no section behind which a new one could stand.
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
        body = section.text(rows)
        if count == (0, 0) and behind:
            text = text.replace(behind, f"{behind}\n\n{framed(section.marker, body)}")
        else:
            text = with_section(text, section.marker, body)
        behind = end
    return text


def with_section(text: str, marker: str, body: str) -> str:
    """The README's text with what is between the comments of this marker replaced.

    Raises:
        SystemExit: The text does not have both comments once, in this order.
    """
    start, end = ends(marker)
    if (text.count(start), text.count(end)) != (1, 1) or text.index(start) > text.index(end):
        raise SystemExit(f"README must hold the markers {start} and {end} once, in this order.")
    old = text[text.index(start) : text.index(end) + len(end)]
    return text.replace(old, framed(marker, body))


def with_support(text: str) -> str:
    """The README's text with the table of backbones as the code has it."""
    return with_section(text, "support", markdown_table(support_rows()))


def with_shortfalls(text: str, results: Path) -> str:
    """The README's text with all goals that the committed measurements do not meet."""
    rows = []
    for path in sorted(results.glob("*.md")):
        for line in path.read_text(encoding="utf-8").splitlines():
            cells = [cell.strip() for cell in line.strip("| ").split("|")]
            if cells[-1] == "not met":
                link = f"[{path.stem}]({path.relative_to(ROOT)})"
                row = {"goal": cells[0], "bound": cells[1], "measured": cells[2]}
                rows.append({**row, "in": link})
    table = markdown_table(rows) if rows else "Every goal is met."
    return with_section(text, "shortfalls", table)


def with_held_out(text: str, results: Path) -> str:
    """The card's text with the figures of the shipped ranker: the first of the first seed.

    Raises:
        SystemExit: The CSV does not exist.
    """
    every = _rows_of(results, "learning", CARD)
    first = (every[0]["seed"], every[0]["aggregate"])
    rows = [row for row in every if (row["seed"], row["aggregate"]) == first]
    shipped = next(row["weights_sha256"] for row in rows if row["weights_sha256"])
    columns: dict[str, Cell] = {
        "images": images_of,
        "score": score_of,
        "Spearman with the teacher's lists": number("spearman"),
        "with its mean rank": number("map_spearman"),
        "object AUC": number("object_auc"),
        "ink kept at 25 %": number("ink_kept"),
    }
    return with_section(text, "held-out", f"{laid_out(rows, columns)}\n\nSHA-256: `{shipped}`")


def with_choice(text: str, results: Path) -> str:
    """The guide's text with what each selector keeps of seen and of unseen classes.

    Raises:
        SystemExit: The CSV does not exist.
    """
    case = {"seed": "all", "images": "clutter", "keep_ratio": "0.25"}
    rows = [row for row in _rows_of(results, "fairness", GUIDE) if case.items() <= row.items()]
    rows = [row for row in rows if row["seen"] != "both"]
    columns: dict[str, Cell] = {
        "selector": lambda row: row["method"],
        "labels": lambda row: labels_of(row["method"]),
        "seen digits": lambda row: row["seen"],
        "ink of seen classes": number("recall_seen"),
        "of unseen ones": number("recall_unseen"),
        "mAP seen": number("map_seen"),
        "unseen": number("map_unseen"),
        "ms an image": number("rank_ms"),
    }
    return with_section(text, "choice", laid_out(rows, columns))


def _rows_of(results: Path, name: str, document: Path) -> list[dict[str, str]]:
    path = results / f"{name}.csv"
    if not path.exists():
        raise SystemExit(f"{document} has a table of {name}.csv, but there is no {path}.")
    return read_csv(path)


def main() -> None:
    """Write or check."""
    before = {path: path.read_text(encoding="utf-8") for path in (README, DETAILS, CARD, GUIDE)}
    front = with_sections(before[README], RESULTS, SECTIONS[:1])
    front = with_section(front, "gpu", gpu_text(RESULTS / "gpu"))
    after = {README: with_shortfalls(with_support(front), RESULTS)}
    after[DETAILS] = with_sections(before[DETAILS], RESULTS, SECTIONS[1:])
    after[CARD] = with_held_out(before[CARD], RESULTS)
    after[GUIDE] = with_choice(before[GUIDE], RESULTS)
    if "--check" in sys.argv[1:]:
        wrong = (
            "README, BENCHMARKS, guide or card and CSVs or code disagree: run benchmarks/report.py"
        )
        sys.exit(None if before == after else wrong)
    for path, text in after.items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
