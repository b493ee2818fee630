"""Shared by the tests of the benchmarks: how one is loaded and run, and what its goals give."""

import contextlib
import importlib.util
import io
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tables

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
RESULTS = BENCHMARKS / "results"
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
TINY = ("--models", "vit_tiny_patch16_224", "--depth", "1", "--batch-sizes", "1", "--repeats", "1")
# every benchmark that is timed, and its smallest options
SCRIPTS: dict[str, tuple[str, ...]] = {
    "speed_vs_keep_ratio": (*TINY, "--keep-ratios", "0.5", "0.25"),
    "coarse_rest": (*TINY, "--keep-ratios", "0.5"),
    "compile_and_export": (*TINY, "--forms", "eager", "onnxruntime"),
    "resolution": (*TINY, "--img-sizes", "64", "96", "--rank-size", "64"),
    "peers": (*TINY, "--rankers", "contrast"),
    "visual_tokens": (*TINY, "--img-sizes", "64", "--rankers", "contrast"),
    "where_does_time_go": TINY,
    "break_even": (*TINY, "--rankers", "contrast", "conv"),
    "index_cache": TINY,
    "memory": (*TINY, "--keep-ratios", "0.5"),
    "training_speed": TINY,
    "adaptive_budget": (*TINY, "--scenes", "24", "--rankers", "pixel_std", "--keep-ratios", "0.3"),
}
# those that take long, or that compare what others wrote
TRAINED = ("learning", "fairness", "fairness_ablations", "agreement")


def path_of(name: str) -> Path:
    path = BENCHMARKS / f"{name}.py"
    return path if path.exists() else BENCHMARKS / "studies" / f"{name}.py"


def load(name: str) -> ModuleType:
    """A benchmark by its file: ``peers`` is a package of that name too."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path_of(name))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Done:
    """What a benchmark wrote."""

    def __init__(self, name: str, output: Path, stdout: str) -> None:
        self.rows = tables.read_csv(output / f"{name}.csv")
        self.text = (output / f"{name}.md").read_text(encoding="utf-8")
        self.png = (output / f"{name}.png").read_bytes()
        self.files = sorted(path.name for path in output.iterdir())
        self.stdout = stdout

    def cells(self, *columns: str) -> list[tuple[str, ...]]:
        return [tuple(row[column] for column in columns) for row in self.rows]


def run_once(name: str, output: Path, *options: str) -> Done:
    """Run a benchmark's ``main`` in this process."""
    stdout = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(stdout):
        patch.setattr(sys, "argv", [name, "--output", str(output), *options])
        load(name).main()
    return Done(name, output, stdout.getvalue())


def verdicts(name: str, row: dict[str, Any]) -> list[str]:
    return [line[""] for goal in load(name).goals() for line in goal.check([row])]
