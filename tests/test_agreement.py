"""Two runs of a benchmark are compared as they should be."""

import math
from pathlib import Path
from typing import Any

import pytest
import tables
from benchmark_setup import load, run_once

PLACE = {"device": "cpu", "dtype": "float32", "depth": "all", "machine": "m", "cores": 1}
PLACE |= {"threads": 1}
CASE = {"model": "vit", "batch": 1, "rounds": 5}


def write(folder: Path, *rows: dict[str, Any], name: str = "peers") -> Path:
    path = folder / f"{name}.csv"
    tables.write_csv([{**CASE, **row, **PLACE} for row in rows], path)
    return folder


def ratio(method: str, low: float, middle: float, high: float, **more: Any) -> dict[str, Any]:
    return {"method": method, "gain": middle, "gain_low": low, "gain_high": high, **more}


def test_ranges_that_touch_overlap_and_others_do_not(tmp_path: Path) -> None:
    first = write(
        tmp_path / "a",
        ratio("ours", 1, 1, 1),
        ratio("near", 0.9, 1.0, 1.1),
        ratio("far", 1.0, 2.0, 2.1),
        ratio("gone", 1.0, 1.5, 2.0),
    )
    second = write(
        tmp_path / "b",
        ratio("far", 2.2, 2.5, 3.0),
        ratio("near", 1.1, 1.2, 1.3),
        ratio("ours", 1, 1, 1),
    )
    done = run_once("agreement", tmp_path / "out", "--first", str(first), str(second))
    assert [row["file"] for row in done.rows] == ["peers", "all"]
    for row in done.rows:
        assert (row["compared"], row["overlap"]) == ("2", "1")  # ours is 1 by its definition
        assert row["left_out"] == "1"
        assert float(row["median_difference"]) == pytest.approx(0.225)
        assert float(row["largest_difference"]) == pytest.approx(0.25)
        assert row["largest_at"] == "vit, 1, far"
        assert float(row["by_chance"]) == pytest.approx(0.793, abs=0.01)
        errors = (1 - 2 * 0.793) / math.sqrt(2 * 0.793 * 0.207)
        assert float(row["errors"]) == pytest.approx(errors, abs=0.05)
    assert done.text.count("not met") == 1  # two figures prove nothing; their medians lie far apart
    many = [ratio(f"far {number}", 1.0, 2.0, 2.1) for number in range(9)]
    others = [ratio(f"far {number}", 2.2, 2.5, 3.0) for number in range(9)]
    write(tmp_path / "many", *many)
    write(tmp_path / "others", *others)
    folders = ("--first", str(tmp_path / "many"), str(tmp_path / "others"))
    assert run_once("agreement", tmp_path / "out9", *folders).text.count("not met") == 2
    again = run_once("agreement", tmp_path / "same", "--first", str(first), str(first))
    assert (again.rows[-1]["compared"], again.rows[-1]["overlap"]) == ("3", "3")
    assert again.text.count("| met |") == 2


def test_numbers_are_the_same_however_they_are_written(tmp_path: Path) -> None:
    one = write(tmp_path / "a", ratio("x", 1, 2, 3, keep_ratio=0.5))
    other = write(tmp_path / "b", ratio("x", 1, 2, 3, keep_ratio="0.50"))
    assert run_once("agreement", tmp_path / "o", "--first", str(one), str(other)).rows


def test_more_rounds_must_agree_more_often() -> None:
    by_chance = load("agreement").by_chance
    found = [by_chance(rounds) for rounds in (3, 5, 9, 41)]
    assert found == pytest.approx([0.663, 0.793, 0.943, 1.0], abs=0.01)  # by another simulation
    wider = by_chance(5, (3, 1))  # more runs have a wider range
    assert wider == pytest.approx(by_chance(5, (1, 3)), abs=0.01)
    assert wider > found[1] + 0.1


def test_rounds_of_pooled_runs_count_each_for_itself() -> None:
    chance_of, by_chance = load("agreement").chance_of, load("agreement").by_chance
    old = {"rounds": "5"}  # a single run, of before there was a column for it
    assert chance_of(old, {"rounds": "7", "runs": "1"}) == by_chance(5)
    assert chance_of({"rounds": "15", "runs": "3"}, old) == by_chance(5, (3, 1))


def test_what_cannot_be_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = write(tmp_path / "a", ratio("x", 1, 2, 3))
    write(tmp_path / "b", ratio("x", 1, 2, 3), name="memory")
    with pytest.raises(SystemExit, match=r"b has no CSV with rows of one in .*a"):
        run_once("agreement", tmp_path, "--first", str(first), str(tmp_path / "b"))
    monkeypatch.setitem(PLACE, "machine", "n")
    second = write(tmp_path / "c", ratio("x", 1, 2, 3))
    with pytest.raises(SystemExit, match=r"not of the same machine: machine \(m, n\)"):
        run_once("agreement", tmp_path, "--first", str(first), str(second))
    with pytest.raises(SystemExit):
        run_once("agreement", tmp_path, str(tmp_path / "none"))
