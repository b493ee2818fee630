"""Several runs of a benchmark become one whose spread shows what differs between processes."""

from pathlib import Path
from typing import Any

import pooling
import pytest
import tables
from benchmark_setup import SCRIPTS, run_once

PLACE = {"device": "cpu", "dtype": "float32", "depth": "all", "machine": "m", "cores": 1}
PLACE |= {"threads": 1, "torch": 2}


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    tables.write_csv([{"model": "vit", **row, **PLACE} for row in rows], folder / "peers.csv")
    return folder


def row(gain: float, low: float, high: float, **more: Any) -> dict[str, Any]:
    found = {"batch": 1, "keep_ratio": 0.5, "method": "ours", "setting": "K=98", "rounds": 5}
    found |= {"seconds_median": gain / 8, "seconds_low": low / 8, "seconds_high": high / 8}
    found |= {"gain": gain, "gain_low": low, "gain_high": high}
    return {**found, "operators": 700, "max_error": gain * 1e-6, **more}


def test_medians_of_runs_and_the_widest_range(tmp_path: Path) -> None:
    runs = [
        write(tmp_path / "1", row(1.1, 1.05, 1.15)),
        write(tmp_path / "2", row(1.5, 1.2, 1.6)),
        write(tmp_path / "3", row(1.2, 0.9, 1.3, keep_ratio="0.50")),
    ]
    (found,) = pooling.pool("peers", runs)
    assert (found["gain"], found["gain_low"], found["gain_high"]) == (1.2, 0.9, 1.6)
    seconds = [found[f"seconds_{part}"] for part in ("median", "low", "high")]
    assert seconds == [0.15, 0.1125, 0.2]
    assert (found["rounds"], found["runs"]) == (15, 3)
    assert found["max_error"] == pytest.approx(1.5e-6)  # the worst
    # as a benchmark has them itself: numbers, and text where it names a place
    assert (found["batch"], found["keep_ratio"], found["operators"]) == (1, 0.5, 700)
    assert (found["threads"], found["depth"], found["setting"]) == ("1", "all", "K=98")


def test_what_must_hold_in_every_run_is_that_of_the_worst(tmp_path: Path) -> None:
    one = write(tmp_path / "1", row(1.0, 1.0, 1.0, same_bits=1, host_syncs=0, break_even=0.9))
    other = write(tmp_path / "2", row(1.0, 1.0, 1.0, same_bits=0, host_syncs=3, break_even=0.0))
    (found,) = pooling.pool("peers", [one, other])
    assert (found["same_bits"], found["host_syncs"], found["break_even"]) == (0, 3, 0.0)


def test_rows_of_some_runs_only_stay_in_order(tmp_path: Path) -> None:
    one = write(tmp_path / "1", row(1.0, 1.0, 1.0), row(2.0, 2.0, 2.0, batch=8))
    other = write(tmp_path / "2", row(4.0, 4.0, 4.0, batch=32), row(3.0, 3.0, 3.0))
    found = pooling.pool("peers", [one, other])
    assert [(r["batch"], r["runs"], r["gain"]) for r in found] == [
        (1, 2, 2.0),
        (8, 1, 2.0),
        (32, 1, 4.0),
    ]


@pytest.mark.parametrize(
    ("rows", "place", "text"),
    [
        (
            [row(1.0, 1.0, 1.0, setting="r=16")],
            {},
            "setting of vit, 1, 0.5, .* is K=98, r=16",
        ),
        ([row(float("nan"), 1.0, 1.0)], {}, "pooled: seconds_median of vit, .* is 0.125, nan"),
        ([row(1.0, 1.0, 1.0, batch=8)], {"machine": "n"}, r"not of the same machine: .*\(m, n\)"),
        ([row(1.0, 1.0, 1.0, batch=8)], {"torch": "9"}, r"not of the same machine: torch \(2, 9\)"),
        (
            [row(1.0, 1.0, 1.0, more=1)],
            {},
            "2.peers.csv has other columns than .*peers.csv: more",
        ),
        ([row(1.0, 1.0, 1.0)] * 2, {}, "2.peers.csv is not of a single run"),
        ([row(1.0, 1.0, 1.0, runs=2)], {}, "2.peers.csv is not of a single run"),
    ],
)
def test_what_cannot_be_pooled(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows: list[dict[str, Any]],
    place: dict[str, str],
    text: str,
) -> None:
    one = write(tmp_path / "1", row(1.0, 1.0, 1.0))
    for name, value in place.items():
        monkeypatch.setitem(PLACE, name, value)
    other = write(tmp_path / "2", *rows)
    with pytest.raises(SystemExit, match=text):
        pooling.pool("peers", [one, other])


def test_files_that_are_none(tmp_path: Path) -> None:
    one = write(tmp_path / "1", row(1.0, 1.0, 1.0))
    with pytest.raises(SystemExit, match=r"no .*peers.csv: run the benchmark with --output first"):
        pooling.pool("peers", [one, tmp_path / "none"])
    with pytest.raises(SystemExit, match="one of them is given twice"):
        pooling.pool("peers", [one, tmp_path / "none" / ".." / "1"])
    text = (one / "peers.csv").read_text()
    for content in (text.splitlines()[0], text.rstrip().rpartition(",")[0], ""):
        (tmp_path / "2").mkdir(exist_ok=True)
        (tmp_path / "2" / "peers.csv").write_text(content)
        with pytest.raises(SystemExit, match=r"2.peers.csv is no whole CSV"):
            pooling.pool("peers", [one, tmp_path / "2"])


beyond = pytest.mark.benchmarks
LONGER = ("speed_vs_keep_ratio", "compile_and_export", "memory")


@pytest.mark.parametrize(
    "name", ["break_even", *[pytest.param(name, marks=beyond) for name in LONGER]]
)
def test_a_benchmark_pools_what_it_wrote(name: str, tmp_path: Path) -> None:
    options = SCRIPTS[name]
    first = run_once(name, tmp_path / "1", *options)
    second = run_once(name, tmp_path / "2", *options)
    folders = [str(tmp_path / run) for run in "12"]
    both = run_once(name, tmp_path / "pooled", "--pool", *folders)  # and draws what they are of
    assert both.files == first.files
    assert "Median over 2 runs" in both.text
    assert "No goal applies to these settings." in both.text  # the models are cut
    assert len(both.rows) == len(first.rows) == len(second.rows)
    for one, two, pooled in zip(first.rows, second.rows, both.rows):
        assert list(pooled) == list(one)
        assert (pooled["runs"], pooled["rounds"]) == ("2", "2")
        low = next(column for column in one if column.endswith("_low"))
        assert float(pooled[low]) == min(float(one[low]), float(two[low]))
