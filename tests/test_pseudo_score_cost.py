"""The benchmark of pseudo-scores runs, and what it compares is the same thing."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from benchmark_setup import PNG_MAGIC, Done, load
from conftest import small_teacher

from ltrp_timm import semantic_density
from ltrp_timm.measure import throughput
from ltrp_timm.teacher import random_visible_indices
from ltrp_timm.teacher.density import REMOVALS


@pytest.fixture
def module() -> ModuleType:
    return load("pseudo_score_cost")


@pytest.mark.parametrize("removal", REMOVALS)
def test_the_loop_computes_the_same_scores(module: ModuleType, removal: str) -> None:
    teacher, images = small_teacher(), torch.randn(2, 3, 32, 32)
    visible = random_visible_indices(2, 16, 0.6)
    scores, _ = semantic_density(teacher, images, visible, removal=removal)
    assert (module.masked_loop(teacher, images, visible, removal) - scores).abs().max() <= 1e-5
    module.prove({"loop": lambda: scores, "batch": lambda: scores + 1e-6}, "float32")
    with pytest.raises(SystemExit, match="loop and batch disagree"):
        module.prove({"loop": lambda: scores, "batch": lambda: scores.flip(1)}, "float32")


def test_goals(module: ModuleType) -> None:
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


def test_a_small_run(run_benchmark: Callable[..., Done]) -> None:
    options = ["--img-size", "64", "--depth", "1", "--mask-ratio", "0.5", "--batch-sizes", "1"]
    options += ["--chunks", "3", "--num-removed", "4", "--repeats", "1"]
    done = run_benchmark("pseudo_score_cost", *options)
    methods = ["loop", "batch", "chunk:3", "drawn:4"]
    expected = [(removal, method) for removal in REMOVALS for method in methods]
    assert done.cells("removal", "method") == expected
    for row in done.rows:
        assert (row["visible"], row["patches"], row["depth"]) == ("8", "16", "1")
        assert row["removed"] == ("4" if row["method"] == "drawn:4" else "8")
        assert set(throughput.environment()) < set(row)
        assert all(row.values()), row
    assert done.png.startswith(PNG_MAGIC)
    assert done.text.count("| full | 1 |") == 4
    assert "No goal applies to these settings." in done.text
