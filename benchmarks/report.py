"""Write the README's speed table from the committed CSV: never by hand.

python benchmarks/report.py          writes it
python benchmarks/report.py --check  exits with 1 when README and CSV disagree
"""

import csv
import re
import sys
from pathlib import Path
from typing import Any

from tables import markdown_table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
MARKERS = ("<!-- speed: written by benchmarks/report.py -->", "<!-- /speed -->")

Row = dict[str, Any]


def read_rows() -> list[Row]:
    """The rows of the speed benchmark as text."""
    with (RESULTS / "speed_vs_keep_ratio.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def speed_section(rows: list[Row]) -> str:
    """Table, picture and machine, as Markdown."""
    cases = {(row["model"], row["batch"], row["keep_ratio"]): None for row in rows}
    kept = [case for case in cases if case[2] in ("0.5", "0.25")]
    lines = [_line(rows, *case) for case in kept]
    first = rows[0]
    where = (
        f"{first['machine']}, {first['threads']} thread, {first['dtype']}, eager, PyTorch "
        f"{first['torch']}, timm {first['timm']}"
    )
    return "\n".join(
        [
            f"Times as fast as the plain model, ranker's time included ({where}; median of paired",
            "rounds in one process, quartiles in the CSV). *Ideal* is the same encoder given as",
            "many tokens for nothing; *of ideal* says how much of it is reached.",
            "",
            markdown_table(lines),
            "",
            "![Speed-up against keep ratio](benchmarks/results/speed_vs_keep_ratio.png)",
            "",
            "All rows, with spread: [CSV](benchmarks/results/speed_vs_keep_ratio.csv), "
            "[table and goals](benchmarks/results/speed_vs_keep_ratio.md); measured by "
            "`python benchmarks/speed_vs_keep_ratio.py`.",
        ]
    )


def _line(rows: list[Row], model: str, batch: str, keep_ratio: str) -> Row:
    found = {
        row["method"]: row
        for row in rows
        if (row["model"], row["batch"], row["keep_ratio"]) == (model, batch, keep_ratio)
    }
    line = {"model": f"`{model}`", "batch": batch, "keep": keep_ratio}
    line["full"] = f"{1e3 * float(found['full']['seconds_median']):.0f} ms"
    line["ideal"] = f"{float(found['ideal']['speedup']):.2f}×"
    for method in (name for name in found if name not in ("full", "ideal")):
        speed, share = float(found[method]["speedup"]), float(found[method]["achieved"])
        line[f"`{method}` (of ideal)"] = f"{speed:.2f}× ({share:.2f})"
    return line


def with_section(text: str, section: str) -> str:
    """The README's text with its speed section replaced."""
    start, end = (re.escape(marker) for marker in MARKERS)
    new = f"{MARKERS[0]}\n{section}\n{MARKERS[1]}"
    out, count = re.subn(f"{start}.*?{end}", lambda _: new, text, flags=re.S)
    if count != 1:
        raise SystemExit(f"{README.name} must hold the markers {' and '.join(MARKERS)} once.")
    return out


def main() -> None:
    """Write or check."""
    before = README.read_text(encoding="utf-8")
    after = with_section(before, speed_section(read_rows()))
    if "--check" in sys.argv[1:]:
        sys.exit(None if before == after else "README and CSV disagree: run benchmarks/report.py")
    README.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
