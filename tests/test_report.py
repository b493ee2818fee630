"""README's and BENCHMARKS' tables are those of the CSV files."""

import shutil
import sys
from pathlib import Path

import pytest
import tables
from benchmark_setup import BENCHMARKS, RESULTS, SCRIPTS, TRAINED, load


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """The committed CSV of every benchmark; those of new runs are in ``test_smoke``."""
    for name in (*SCRIPTS, *TRAINED):
        shutil.copy(RESULTS / f"{name}.csv", tmp_path)
    return tmp_path


def test_the_report_has_a_section_for_every_csv(results: Path) -> None:
    module = load("report")
    assert {section.file for section in module.SECTIONS} == {*SCRIPTS, *TRAINED}
    start, end = module.ends(module.SECTIONS[0].marker)
    plain = f"# Title\n\n{start}\noutdated\n{end}\n\n## Next\n"
    text = module.with_sections(plain, results, module.SECTIONS)
    assert module.with_sections(text, results, module.SECTIONS) == text  # written once
    assert text.startswith("# Title\n")
    assert text.endswith("\n\n## Next\n")
    assert "outdated" not in text
    for section in module.SECTIONS:
        assert [text.count(marker) for marker in module.ends(section.marker)] == [1, 1]
        assert f"`python {section.folder}/{section.file}.py`" in text
        assert (BENCHMARKS.parent / section.folder / f"{section.file}.py").is_file()
    speed = tables.read_csv(results / "speed_vs_keep_ratio.csv")
    half = [row for row in speed if row["keep_ratio"] == "0.5"]
    conv = next(row for row in half if row["method"] == "conv")
    cell = f"{float(conv['speedup']):.2f}× ({float(conv['achieved']):.2f})"
    line = next(line for line in text.splitlines() if line.startswith("| `vit_tiny"))
    assert line.endswith(f" {cell} |")
    # a figure that changes is seen
    half[0]["seconds_median"] = "9.0"
    tables.write_csv(speed, results / "speed_vs_keep_ratio.csv")
    assert "| 9000 ms |" in module.with_sections(text, results, module.SECTIONS)
    assert "| 9000 ms |" not in text


def test_the_report_refuses_what_it_cannot_answer_for(results: Path) -> None:
    module = load("report")
    start, end = module.ends(module.SECTIONS[0].marker)
    plain = f"{start}\n{end}\n"
    text = module.with_sections(plain, results, module.SECTIONS)
    for broken in ("no section", start, f"{end}\n{start}", f"{plain}{plain}"):
        with pytest.raises(SystemExit, match="README must hold the markers"):
            module.with_sections(broken, results, module.SECTIONS)
    rows = tables.read_csv(results / "peers.csv")
    tables.write_csv([{**row, "depth": "1"} for row in rows], results / "peers.csv")
    with pytest.raises(SystemExit, match=r"peers\.csv is of models cut to 1 blocks"):
        module.with_sections(text, results, module.SECTIONS)
    (results / "peers.csv").unlink()
    with pytest.raises(SystemExit, match="README has a peers section, but there is no"):
        module.with_sections(text, results, module.SECTIONS)


def test_readme_agrees_with_csv_and_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["report.py", "--check"])
    with pytest.raises(SystemExit) as ended:
        load("report").main()
    assert ended.value.code is None
