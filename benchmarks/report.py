"""Write the tables of the README, the documentation and the card of the weights.

Figures are from the CSVs, support is from the code. A section stands between two comments that
name it; a new one needs an entry in ``SECTIONS`` and its two comments on a page.

python benchmarks/report.py          writes them
python benchmarks/report.py --check  exits with 1 where they differ from CSVs or code
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from families import REFUSED_EXAMPLES, SUPPORTED
from gpu.tables import gpu_text
from sections import (
    SECTIONS,
    interval_of,
    machine_of,
    percent,
    setting_of,
    two_digits,
)
from tables import markdown_table, nice, read_csv

from ltrp_timm.slots import REFUSED_MODELS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README, DOCS = ROOT / "README.md", ROOT / "docs"
# parts of goals' names, for readers
GOALS = {
    "time ÷ that of the fixed budget": "time divided by that of a fixed budget",
    "time ÷ that of dropping": "time divided by that of dropping patches",
    "speed-up over eager full": "speed-up over the full model in eager mode",
    "map spearman − best without weights": "rank correlation above the best score without weights",
    "object AUC − best without weights": "object AUC above the best score without weights",
    "AUC": "object AUC",
    "linear above contrast's": "accuracy above that of `contrast`, lower end of the interval",
    "seconds": "seconds for the selection",
}
CARD = ROOT / "ltrp_timm" / "weights" / "conv.md"


def ends(marker: str) -> tuple[str, str]:
    """The comments around a section."""
    return f"<!-- {marker}: written by benchmarks/report.py -->", f"<!-- /{marker} -->"


def with_section(text: str, marker: str, body: str) -> str:
    """A text with what is between the comments of this marker replaced.

    Raises:
        SystemExit: The text does not have both comments once, in this order.
    """
    start, end = ends(marker)
    if (text.count(start), text.count(end)) != (1, 1) or text.index(start) > text.index(end):
        raise SystemExit(f"A page must hold the markers {start} and {end} once, in this order.")
    old = text[text.index(start) : text.index(end) + len(end)]
    return text.replace(old, f"{start}\n{body}\n{end}")


def rows_of(results: Path, name: str) -> list[dict[str, str]]:
    """The rows of a CSV.

    Raises:
        SystemExit: It does not exist, or its figures are of models that were cut short.
    """
    path = results / f"{name}.csv"
    if not path.exists():
        raise SystemExit(f"A page has a table of {name}.csv, but there is no {path}.")
    rows = read_csv(path)
    if rows[0].get("depth", "all") != "all":
        raise SystemExit(f"{path} is of models cut to {rows[0]['depth']} blocks.")
    return rows


def support_table() -> str:
    """Which timm models can drop patches, and why the others cannot."""
    rows = [
        (kinds, "yes", models, how)
        for how, examples in SUPPORTED.values()
        for kinds, models in examples.items()
    ]
    for reason, refused in REFUSED_MODELS.items():
        kinds = ", ".join(f"`{kind}`" for kind in refused)
        rows.append((kinds, "no", tuple(REFUSED_EXAMPLES[kind] for kind in refused[:2]), reason))
    columns = ("Family", "Supported", "Examples", "How, or why not")
    return markdown_table(
        [
            dict(zip(columns, (kinds, answer, ", ".join(f"`{name}`" for name in models), why)))
            for kinds, answer, models, why in rows
        ]
    )


def shortfalls(results: Path) -> str:
    """All goals that the committed measurements do not meet."""
    rows = []
    for path in sorted(results.glob("*.md")):
        for line in path.read_text(encoding="utf-8").splitlines():
            cells = [cell.strip() for cell in line.strip("| ").split("|")]
            if cells[-1] == "not met":
                link = f"[{path.stem.replace('_', ' ')}](../../{path.relative_to(ROOT)})"
                goal = ", ".join(nice(GOALS.get(part, part)) for part in cells[0].split(", "))
                goal = goal[0].upper() + goal[1:]
                bound = cells[1].replace("<=", "at most").replace(">=", "at least")
                row = {"Goal": goal, "Bound": bound, "Measured": cells[2]}
                rows.append({**row, "Benchmark": link})
    return markdown_table(rows) if rows else "Every goal is met."


def front(results: Path) -> str:
    """The README's table: speed beside accuracy for the default ranker and its rivals."""
    rows = rows_of(results, "quality")

    def figures(method: str, setting: str) -> dict[str, str]:
        case = {"img_size": "224", "method": method, "setting": setting}
        found = {row["measure"]: row for row in rows if case.items() <= row.items()}
        row = found["linear"]
        return {
            "Model": setting_of(row),
            "Patch tokens": f"{float(row['tokens']):.0f}",
            "Speed-up": f"{float(row['speedup']):.2f}×",
            "Accuracy, one object": percent(row["value"]),
            "Average precision, several objects": two_digits(found["precision"]["value"]),
            "Distance of the feature map": (
                f"{float(found['map error']['value']):.2f}" if "map error" in found else "–"
            ),
        }

    def interval(method: str, setting: str, measure: str) -> tuple[float, ...]:
        case = {"img_size": "224", "method": method, "measure": measure}
        own = (row for row in rows if case.items() <= row.items())
        row = next(row for row in own if row["setting"].startswith(setting))
        return tuple(float(row[f"value{end}"]) for end in ("", "_low", "_high"))

    ours = ("border", "border, coarse rest")
    shown = [("full", ""), *((method, "keep 0.5") for method in ours)]
    shown += [("smaller image", "154 px"), ("token merging", "r = 23")]
    shown += [*((method, "keep 0.375") for method in ours), ("smaller image", "140 px")]
    points, precision = (
        (high - low) / 2
        for _, low, high in (interval("full", "", one) for one in ("linear", "precision"))
    )
    gain, low, high = (
        100 * end for end in interval("border − smaller image", "at 2.7 x: ", "linear")
    )
    return (
        f"{markdown_table([figures(*one) for one in shown])}\n\n"
        "A ViT-S/14 with DINOv2 weights, not fine-tuned to drop patches. Linear probes for 19 "
        "classes of objects, pasted on photos of 224 px. "
        f"{machine_of(rows[0])}, in batches of 8. "
        f"95 % intervals: ± {100 * points:.0f} points of accuracy, ± {precision:.2f} of precision. "
        f"At 2.7 times the speed, dropping by `border` is {gain:.0f} points of accuracy above the "
        f"smaller image ({low:.0f} to {high:.0f}, on the same pictures)."
    )


def held_out(results: Path) -> str:
    """The card's table: figures of the shipped ranker and of what it is compared with."""
    rows = rows_of(results, "distill")
    shipped = next(row for row in rows if row["weights_sha256"])
    shown = (shipped["method"], shipped["method"].removeprefix("conv from "), "contrast")
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        if row["method"] in shown and "patches" not in row["pictures"]:
            name = "these weights" if row["method"] == shown[0] else f"`{row['method']}`"
            line = lines.setdefault(name, {"ranker": name})
            line[f"{row['pictures']} ({row['count']})"] = interval_of(row, "object_auc")
    seconds = f"{float(shipped['seconds']):.0f} s of processor time. {machine_of(shipped)}."
    table = markdown_table(list(lines.values()))
    return f"{table}\n\nTraining: {seconds}\n\nSHA-256: `{shipped['weights_sha256']}`"


def texts(results: Path) -> dict[str, Callable[[], str]]:
    """What stands between the comments of each marker."""
    found: dict[str, Callable[[], str]] = {
        section.marker: lambda section=section: section.text(rows_of(results, section.file))  # type: ignore[misc]
        for section in SECTIONS
    }
    return found | {
        "front": lambda: front(results),
        "support": support_table,
        "gpu": lambda: gpu_text(results / "gpu"),
        "shortfalls": lambda: shortfalls(results),
        "held-out": lambda: held_out(results),
    }


def written(pages: Mapping[Path, str], results: Path) -> dict[Path, str]:
    """The pages with all their sections as they should be.

    Raises:
        SystemExit: A section stands on no page or on several, lacks one of its comments, or has no
            figures.
    """
    after = dict(pages)
    for marker, text in texts(results).items():
        homes = [path for path in after if any(end in after[path] for end in ends(marker))]
        if len(homes) != 1:
            raise SystemExit(f"One page must hold the markers {' and '.join(ends(marker))}.")
        after[homes[0]] = with_section(after[homes[0]], marker, text())
    return after


def main() -> None:
    """Write or check."""
    pages = [README, CARD, *sorted(DOCS.rglob("*.md"))]
    before = {path: path.read_text(encoding="utf-8") for path in pages}
    after = written(before, RESULTS)
    if "--check" in sys.argv[1:]:
        wrong = [str(path.relative_to(ROOT)) for path in pages if before[path] != after[path]]
        answer = f"{', '.join(wrong)} and the CSVs or the code disagree: run benchmarks/report.py"
        sys.exit(answer if wrong else None)
    for path, text in after.items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
