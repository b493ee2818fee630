"""``benchmarks/gpu.py`` keeps its budget and says what went wrong; a CPU can rehearse it."""

import os
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tables
import torch
from benchmark_setup import BENCHMARKS, load
from gpu import parts
from gpu.record import COLUMNS, Case, Method, NotHereError, Record, run_cases
from gpu.tables import GPU, NOT_MEASURED, gpu_text

PARTS = ["tests", "speed", "latency", "merging", "multiple_of_8", "large_images", "training"]
SPEED = ("full", "ideal", "border", "conv", "coarse", "coarse, no bias")
ARGS = {"device": "cpu", "dtype": "bfloat16", "depth": 1, "repeats": 2, "threads": 1}


@pytest.fixture
def gpu() -> ModuleType:
    return load("gpu")


def statuses(folder: Path) -> dict[str, str]:
    return {row["part"]: row["status"] for row in tables.read_csv(folder / "status.csv")}


def check_measured(rows: list[dict[str, str]]) -> None:
    for row in rows:
        assert list(row) == list(COLUMNS)
        assert row["dtype"].startswith("bfloat16")
        if row["form"] == "graph":
            assert (row["status"], row["seconds_median"]) == ("needs CUDA", "")
        else:
            assert row["status"] == "measured"
            assert float(row["seconds_median"]) > 0
            assert float(row["speedup"]) > 0


def check_part(part: str, rows: list[dict[str, str]]) -> None:
    check_measured(rows)
    forms = [(row["form"], row["method"]) for row in rows]
    if part == "speed":
        methods = [(row["batch"], row["method"]) for row in rows]
        assert methods == [(b, m) for b in "12" for m in SPEED]
        assert all(bool(row["share_of_ideal"]) is (row["method"] != "full") for row in rows)
    elif part == "latency":
        assert {form for form, _ in forms} == {"eager", "graph", "compiled"}
    elif part == "merging":
        assert {form for form, _ in forms} == {"equal FLOPs", "equal time"}
    elif part == "large_images":
        assert {row["keep_ratio"] for row in rows} == {"1.0", "0.5", "0.25"}
    elif part == "training":
        assert forms[0] == ("training step", "full")
        assert forms[-2:] == [("pseudo-scores", "loop"), ("pseudo-scores", "batch")]


@pytest.mark.parametrize(
    "part",  # latency compiles; tests are in the default run anyway
    [name for name in PARTS if name not in ("latency", "tests")],
)
def test_a_part_is_rehearsed_in_this_process(gpu: ModuleType, tmp_path: Path, part: str) -> None:
    assert gpu.main(["--out", str(tmp_path), "--smoke", "--part", part]) == 0
    rows = tables.read_csv(tmp_path / f"{part}.csv")
    assert rows
    check_part(part, rows)


@pytest.mark.slow
def test_every_part_is_rehearsed_on_a_cpu(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu.py"), "--out", str(tmp_path), "--smoke"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert statuses(tmp_path) == dict.fromkeys(PARTS, "done"), done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == PARTS  # a line each
    files = sorted(tmp_path.iterdir())
    assert [path.stem for path in files] == sorted([*PARTS, "status"])
    assert len(files) <= 8
    assert sum(path.stat().st_size for path in files) < 2**17
    outcomes = tables.read_csv(tmp_path / "tests.csv")
    assert {row["status"] for row in outcomes} == {"passed"}
    assert any("test_drop_equals_mask" in row["test"] for row in outcomes)
    for name in PARTS[1:]:
        check_part(name, tables.read_csv(tmp_path / f"{name}.csv"))
    with pytest.raises(SystemExit, match="is of a rehearsal on a CPU"):
        gpu_text(tmp_path)


WORKS = """
import sys
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with open(f"{given['--out']}/{given['--part']}.csv", "w") as file:
    file.write("status\\nmeasured\\n")
"""


def test_the_parts_run_one_after_another(
    gpu: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = tmp_path / "works.py"
    script.write_text(WORKS, encoding="utf-8")
    monkeypatch.setattr(gpu, "__file__", str(script))
    assert gpu.main(["--out", str(tmp_path), "--smoke"]) == 0
    assert statuses(tmp_path) == dict.fromkeys(PARTS, "done")
    assert {row["rows"] for row in tables.read_csv(tmp_path / "status.csv")} == {"1"}
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == PARTS  # a line each


def test_the_budget_is_kept(
    gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = time.monotonic()
    assert gpu.main(["--out", str(tmp_path), "--smoke", "--budget", "3"]) == 0
    assert time.monotonic() - start < 3 + 2
    assert list(statuses(tmp_path)) == PARTS
    # to import torch alone takes longer than any of these parts may
    assert set(statuses(tmp_path).values()) <= {"out of time", "not started"}
    assert len(capsys.readouterr().out.splitlines()) == len(PARTS)


HANGS = """
import subprocess, sys, time
folder = sys.argv[sys.argv.index("--out") + 1]
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open(f"{folder}/speed.csv", "w") as file:
    file.write(f"status,seconds_median\\nmeasured,{child.pid}\\n")
time.sleep(600)
"""


def test_a_part_that_hangs_is_killed_and_its_rows_are_kept(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "hangs.py"
    script.write_text(HANGS, encoding="utf-8")
    monkeypatch.setattr(gpu, "__file__", str(script))
    row = gpu.run_apart(gpu.PARTS[1], Namespace(out=tmp_path, smoke=True), 3.0)
    assert (row["part"], row["status"], row["rows"]) == ("speed", "out of time", 1)
    assert 3.0 <= row["seconds"] < 6.0
    child = int(tables.read_csv(tmp_path / "speed.csv")[0]["seconds_median"])
    for _ in range(100):  # whoever adopts it takes a moment to notice
        if not _runs(child):
            break
        time.sleep(0.05)
    assert not _runs(child)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_a_part_that_fails_says_why_and_the_next_begins(
    gpu: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = tmp_path / "fails.py"
    script.write_text("raise RuntimeError('no luck')", encoding="utf-8")
    monkeypatch.setattr(gpu, "__file__", str(script))
    assert gpu.main(["--out", str(tmp_path), "--smoke"]) == 1
    rows = tables.read_csv(tmp_path / "status.csv")
    assert {(row["status"], row["reason"]) for row in rows} == {("failed", "RuntimeError: no luck")}
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == len(rows) == len(PARTS)
    assert "Traceback" in err


def method(name: str, call: Callable[[], Any], ratio: float = 0.5) -> Method:
    return Method({"method": name, "keep_ratio": ratio}, lambda: call)


def fails(error: Exception) -> Callable[[], Any]:
    def call() -> Any:
        raise error

    return call


def test_what_does_not_run_is_a_row_and_the_next_batch_size_goes_on(tmp_path: Path) -> None:
    def work() -> Any:
        time.sleep(0.001)

    full, memory = torch.OutOfMemoryError("CUDA out of memory."), []
    cases = [
        Case({"batch": 256}, lambda: [method("full", fails(full)), method("ideal", work)]),
        Case({"batch": 128}, lambda: fails(full)()),
        Case(
            {"batch": 64},
            lambda: [
                method("full", work, 1.0),
                method("ideal", work),
                method("conv", work),
                method("graph", fails(NotHereError("needs CUDA"))),
                method("odd", fails(ValueError("first line\nsecond line"))),
            ],
        ),
        # enough for a first call, not for a second one
        Case({"batch": 1}, lambda: [method("full", lambda: memory.pop())]),
    ]
    memory.append(None)
    record = Record(tmp_path / "speed.csv", COLUMNS)
    args = Namespace(**ARGS, smoke=True)
    run_cases(cases, record, args, {"device": "cpu"}, time.monotonic() + 5)
    rows = tables.read_csv(tmp_path / "speed.csv")
    assert [(row["batch"], row["method"], row["status"]) for row in rows] == [
        ("256", "full", "out of memory"),
        ("256", "ideal", "measured"),
        ("128", "", "out of memory"),
        ("64", "full", "measured"),
        ("64", "ideal", "measured"),
        ("64", "conv", "measured"),
        ("64", "graph", "needs CUDA"),
        ("64", "odd", "failed: ValueError: first line"),
        ("1", "full", "failed: IndexError: pop from empty list"),
    ]
    assert [bool(row["seconds_median"]) for row in rows] == [
        row["status"] == "measured" for row in rows
    ]
    assert rows[1]["speedup"] == ""  # there is nothing to compare it with
    assert [bool(row["share_of_ideal"]) for row in rows[3:6]] == [False, True, True]
    assert float(rows[5]["speedup"]) > 0


def test_rows_are_there_before_the_next_case_begins(tmp_path: Path) -> None:
    path = tmp_path / "speed.csv"
    seen = []

    def look() -> list[Method]:
        seen.append(len(tables.read_csv(path)))
        return [method("full", int), method("ideal", int)]

    cases = [Case({"batch": batch}, look) for batch in (1, 2, 3)]
    run_cases(cases, Record(path, COLUMNS), Namespace(**ARGS), {}, time.monotonic() + 5)
    assert seen == [0, 2, 4]


def test_merging_at_equal_time_merges_no_more_than_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    full = parts.new("vit_tiny_patch16_224", Namespace(**ARGS, smoke=True))
    monkeypatch.setattr(parts, "seconds_of", lambda model, images: 10.0 - model.blocks.r)
    for limit, expected in ((10.0, 0), (6.5, 4), (0.0, 8)):  # at most half of 16 patches
        peer = parts.least_merging(full, "plain_fused", limit, torch.empty(0))
        assert peer.setting == f"r={expected}"


@pytest.mark.parametrize("budget", ["0", "-3", "nan", "inf", "soon"])
def test_a_budget_is_positive(
    gpu: ModuleType, tmp_path: Path, budget: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--out", str(tmp_path), f"--budget={budget}"])
    assert stopped.value.code == 2
    assert f"must be a positive number, got {budget}." in capsys.readouterr().err


def test_without_cuda_nothing_begins(
    gpu: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "no CUDA device: --smoke rehearses on a CPU\n"
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_said_at_once(
    gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    assert gpu.main(["--out", str(out), "--smoke"]) == 2
    assert capsys.readouterr().err == f"cannot write into {out}: Not a directory\n"


def test_without_pytest_the_other_parts_still_run(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    record = Record(tmp_path / "tests.csv", gpu.TEST_COLUMNS)
    with pytest.raises(SystemExit, match="pytest is not installed"):
        gpu.run_tests(record, Namespace(smoke=True), {})


def test_the_readme_says_what_was_measured(tmp_path: Path) -> None:
    assert gpu_text(tmp_path) == NOT_MEASURED
    assert NOT_MEASURED.count(". ") == 0  # one sentence
    place = {"device": "cuda", "dtype": "bfloat16", "depth": "all", "runs": 1, "torch": "2.11"}
    place |= {"machine": "NVIDIA X", "cores": 16, "threads": 8, "timm": "1", "ltrp_timm": "0"}
    place |= {"model": "vit", "img_size": 224, "batch": 256, "status": "measured"}
    place |= {"seconds_median": 0.002, "images_per_second": 500.0, "peak_mib": 90.0}
    for section in GPU:
        record = Record(tmp_path / f"{section.file}.csv", COLUMNS)
        record.add({**place, "method": "full", "keep_ratio": 1.0, "speedup": 1.0})
        ours = {**place, "method": "conv", "speedup": 1.9}
        record.add({**ours, "keep_ratio": 0.5, "share_of_ideal": 0.97})
        lost = {**dict.fromkeys(COLUMNS, ""), **place, "method": "conv", "status": "out of memory"}
        figures = ("seconds_median", "images_per_second", "peak_mib")
        record.add({**lost, **dict.fromkeys(figures, ""), "keep_ratio": 0.25})
    record.add({**place, "method": "batch", "form": "pseudo-scores", "speedup": 2.5})
    ended = [{"part": part, "status": "done"} for part in PARTS]
    ended[-1]["status"] = "out of time"
    tables.write_csv(ended, tmp_path / "status.csv")
    text = gpu_text(tmp_path)
    assert text.startswith("Measured on NVIDIA X (16 cores, 8 used), cuda, bfloat16; torch 2.11")
    rows = [line for line in text.splitlines() if line.startswith("| `vit` | 0.5 |")]
    assert rows[0] == "| `vit` | 0.5 | 500 images/s | 1.90× (0.97) |"
    assert "| `vit` | 0.25 | 500 images/s | out of memory |" in text
    assert "2.00 ms (1.00×)" in text
    assert "| pseudo-scores | `vit` | 256 | – | – | 2.50× |" in text
    assert "Not finished: training (out of time)." in text
    assert all(section.says in text for section in GPU)
