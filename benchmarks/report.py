"""Write the tables of README, BENCHMARKS, the guide to rankers and the card of shipped weights.

Figures are from the CSVs, support is from the code.

python benchmarks/report.py          writes them; a benchmark that is new gets its place
python benchmarks/report.py --check  exits with 1 when they disagree with CSVs or code
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from fairness.compared import labels_of
from sections import SECTIONS, Section, images_of, score_of, two_digits
from tables import markdown_table, read_csv

from ltrp_timm.slots import support_rows

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README, DETAILS = ROOT / "README.md", ROOT / "BENCHMARKS.md"
GUIDE = ROOT / "docs" / "choosing_a_ranker.md"
CARD = ROOT / "ltrp_timm" / "weights" / "conv.md"


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
                "images": images_of(row),
                "score": score_of(row),
                "Spearman with the teacher's lists": two_digits(row["spearman"]),
                "with its mean rank": two_digits(row["map_spearman"]),
                "object AUC": two_digits(row["object_auc"]),
                "ink kept at 25 %": two_digits(row["ink_kept"]),
            }
            for row in rows
        ]
    )
    start, end = ends("held-out")
    return with_section(text, "held-out", f"{start}\n{table}\n\nSHA-256: `{shipped}`\n{end}")


def with_choice(text: str, results: Path) -> str:
    """The guide's text with what each selector keeps of classes that labels named, and of others.

    Raises:
        SystemExit: the CSV is not there.
    """
    path = results / "fairness.csv"
    if not path.exists():
        raise SystemExit(f"{GUIDE} has a table of selectors, but there is no {path}.")
    case = {"seed": "all", "seen": "both", "images": "clutter", "keep_ratio": "0.25"}
    rows = [row for row in read_csv(path) if case.items() <= row.items()]
    table = markdown_table(
        [
            {
                "selector": row["method"],
                "labels": labels_of(row["method"]),
                "ink of seen classes": two_digits(row["recall_seen"]),
                "of unseen ones": two_digits(row["recall_unseen"]),
                "mAP seen": two_digits(row["map_seen"]),
                "unseen": two_digits(row["map_unseen"]),
                "ms an image": two_digits(row["rank_ms"]),
            }
            for row in rows
        ]
    )
    start, end = ends("choice")
    return with_section(text, "choice", f"{start}\n{table}\n{end}")


def main() -> None:
    """Write or check."""
    before = {path: path.read_text(encoding="utf-8") for path in (README, DETAILS, CARD, GUIDE)}
    front = with_sections(before[README], RESULTS, SECTIONS[:1])
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
