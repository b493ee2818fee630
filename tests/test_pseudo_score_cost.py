"""The benchmark of pseudo-scores runs, and what it compares is the same thing."""

import csv
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_teacher

from ltrp_timm import semantic_density
from ltrp_timm.measure import throughput
from ltrp_timm.teacher import random_visible_indices
from ltrp_timm.teacher.density import REMOVALS

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The script as a module, imported as a script would be."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import pseudo_score_cost

    yield pseudo_score_cost
    for name in ("pseudo_score_cost", "common"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("removal", REMOVALS)
def test_the_loop_computes_the_same_scores(module: Any, removal: str) -> None:
    teacher, images = small_teacher(), torch.randn(2, 3, 32, 32)
    visible = random_visible_indices(2, 16, 0.6)
    scores, _ = semantic_density(teacher, images, visible, removal=removal)
    assert (module.masked_loop(teacher, images, visible, removal) - scores).abs().max() <= 1e-5
    module.prove({"loop": lambda: scores, "batch": lambda: scores + 1e-6}, "float32")
    with pytest.raises(SystemExit, match="loop and batch disagree"):
        module.prove({"loop": lambda: scores, "batch": lambda: scores.flip(1)}, "float32")


def test_goals(module: Any) -> None:
    row = {"device": "cpu", "dtype": "float32", "threads": "1", "depth": "all", "rounds": 5}
    row |= {
        "batch": 1,
        "method": "batch",
        "removal": "full",
        "speedup_low": 1.0,
        "speedup_high": 2.0,
    }
    for changes, verdicts in (
        ({"speedup": 1.26}, ["met"]),
        ({"speedup": 1.24}, ["not met"]),
        ({"speedup": 2.1, "device": "cuda"}, ["met"]),
        ({"speedup": 1.9, "device": "cuda"}, ["not met"]),
        ({"speedup": 1.3, "removal": "decoder"}, []),
        ({"speedup": 1.3, "method": "drawn:5"}, []),
        ({"speedup": 1.3, "depth": 1}, []),
        ({"speedup": 1.3, "batch": 4}, []),
        ({"speedup": 1.3, "threads": "2"}, []),
    ):
        lines = [line for goal in module.goals() for line in goal.check([{**row, **changes}])]
        assert [line[""] for line in lines] == verdicts, changes


def test_a_small_run(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "pseudo_score_cost.py"), "--img-size", "64"]
    command += ["--depth", "1", "--mask-ratio", "0.5", "--batch-sizes", "1", "--chunks", "3"]
    command += ["--num-removed", "4", "--repeats", "1", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "pseudo_score_cost.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    methods = ["loop", "batch", "chunk:3", "drawn:4"]
    assert [(row["removal"], row["method"]) for row in rows] == [
        (removal, method) for removal in REMOVALS for method in methods
    ]
    for row in rows:
        assert (row["visible"], row["patches"], row["depth"]) == ("8", "16", "1")
        assert row["removed"] == ("4" if row["method"] == "drawn:4" else "8")
        assert set(throughput.environment()) < set(row)
        assert all(row.values()), row
    assert (tmp_path / "pseudo_score_cost.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "pseudo_score_cost.md").read_text(encoding="utf-8")
    assert text.count("| full | 1 |") == 4
    assert "No goal applies to these settings." in text
