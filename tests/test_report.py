"""The tables of the documents are those of the CSV files."""

import shutil
import sys
from pathlib import Path

import pytest
import tables
from benchmark_setup import BENCHMARKS, RESULTS, load


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """The committed CSVs; those of new runs are in ``test_smoke``."""
    for path in RESULTS.glob("*.csv"):
        shutil.copy(path, tmp_path)
    return tmp_path


def test_a_page_gets_its_sections(results: Path) -> None:
    module = load("report")
    markers = list(module.texts(results))
    plain = "\n".join(f"{a}\noutdated\n{b}\n" for a, b in map(module.ends, markers))
    page, other = Path("page.md"), Path("other.md")
    pages = module.written({page: f"# Title\n\n{plain}\n## Next\n", other: "Text\n"}, results)
    text = pages[page]
    assert module.written(pages, results) == pages  # written once
    assert pages[other] == "Text\n"
    assert text.startswith("# Title\n")
    assert text.endswith("\n\n## Next\n")
    assert "outdated" not in text
    for section in module.SECTIONS:
        assert f"`python {section.folder}/{section.file}.py`" in text
        assert (BENCHMARKS.parent / section.folder / f"{section.file}.py").is_file()
    speed = tables.read_csv(results / "speed_vs_keep_ratio.csv")
    half = [row for row in speed if row["keep_ratio"] == "0.5"]
    conv = next(row for row in half if row["method"] == "conv")
    line = next(line for line in text.splitlines() if line.startswith("| ViT-Ti"))
    assert f" {float(conv['speedup']):.2f}× |" in line
    # a figure that changes is seen
    half[0]["seconds_median"] = "9.0"
    tables.write_csv(speed, results / "speed_vs_keep_ratio.csv")
    assert "| 9000 ms |" in module.written(pages, results)[page]
    assert "| 9000 ms |" not in text


def test_the_first_table_is_of_the_quality_study(results: Path) -> None:
    module = load("report")
    rows = tables.read_csv(results / "quality.csv")
    case = {"img_size": "224", "method": "border", "setting": "keep 0.5"}
    of = {row["measure"]: row for row in rows if case.items() <= row.items()}
    lines = module.front(results).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:10]] == [
        "Full model",
        "`border`, keep 0.5",
        "`border`, coarse rest, keep 0.5",
        "Smaller image, 154 px",
        "Token merging, r=23",
        "`border`, keep 0.375",
        "`border`, coarse rest, keep 0.375",
        "Smaller image, 140 px",
    ]
    assert [cell.strip() for cell in lines[3].strip("|").split("|")] == [
        "`border`, keep 0.5",
        of["linear"]["tokens"],
        f"{float(of['linear']['speedup']):.2f}×",
        f"{100 * float(of['linear']['value']):.0f} %",
        f"{float(of['precision']['value']):.2f}",
        f"{float(of['map error']['value']):.2f}",
    ]


def test_the_report_refuses_what_it_cannot_answer_for(results: Path) -> None:
    module = load("report")
    start, end = module.ends("speed")
    for broken in ("no section", start, f"{end}\n{start}", f"{start}\n{end}\n" * 2):
        with pytest.raises(SystemExit, match="page must hold the markers"):
            module.written({Path("page.md"): broken}, results)
    rows = tables.read_csv(results / "peers.csv")
    tables.write_csv([{**row, "depth": "1"} for row in rows], results / "peers.csv")
    with pytest.raises(SystemExit, match=r"peers\.csv is of models cut to 1 blocks"):
        module.texts(results)["peers"]()
    (results / "peers.csv").unlink()
    with pytest.raises(SystemExit, match=r"a table of peers\.csv, but there is no"):
        module.texts(results)["peers"]()


@pytest.mark.parametrize("name", ["peers", "quality", "learning"])
def test_pictures_are_drawn_from_the_csv(name: str) -> None:
    picture, title = load("redraw").draw(name)
    shown = [ax for ax in picture.axes if ax.axison]
    assert title
    assert all(ax.has_data() for ax in shown)  # no empty panel
    assert picture.get_size_inches()[0] <= 8.5  # text keeps its size on a page
    sys.modules["matplotlib.pyplot"].close(picture)


def test_documents_agree_with_csv_and_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["report.py", "--check"])
    with pytest.raises(SystemExit) as ended:
        load("report").main()
    assert ended.value.code is None
