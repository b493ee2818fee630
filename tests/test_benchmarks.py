"""The benchmarks run, on settings so small that their figures mean nothing."""

import csv
import math
import subprocess
import sys
from pathlib import Path

import pytest

from ltrp_timm import throughput

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def speed_vs_keep_ratio(tmp_path_factory):
    output = tmp_path_factory.mktemp("results")
    command = [sys.executable, str(BENCHMARKS / "speed_vs_keep_ratio.py")]
    command += ["--models", "vit_tiny_patch16_224", "--batch-sizes", "1"]
    command += ["--keep-ratios", "0.5", "0.25", "--repeats", "1", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return output, done


def read_rows(output):
    with open(output / "speed_vs_keep_ratio.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_rows_say_what_was_measured_where(speed_vs_keep_ratio):
    rows = read_rows(speed_vs_keep_ratio[0])
    cases = [(row["keep_ratio"], row["patches_kept"], row["method"]) for row in rows]
    methods = ["full", "ideal", "contrast", "conv"]
    expected = [("0.5", "98", method) for method in methods]
    expected += [("0.25", "49", method) for method in methods]
    assert cases == expected
    for row in rows:
        assert row["model"] == "vit_tiny_patch16_224"
        assert (row["batch"], row["rounds"], row["threads"]) == ("1", "1", "1")
        assert (row["device"], row["dtype"], row["compiled"]) == ("cpu", "float32", "False")
        assert set(throughput.environment()) < set(row)
        assert all(row.values()), row


def test_figures_belong_together(speed_vs_keep_ratio):
    rows = read_rows(speed_vs_keep_ratio[0])
    by_case = {(row["keep_ratio"], row["method"]): row for row in rows}
    for row in rows:
        seconds = float(row["seconds_median"])
        full = float(by_case[row["keep_ratio"], "full"]["seconds_median"])
        ideal = float(by_case[row["keep_ratio"], "ideal"]["seconds_median"])
        # of a single round the median of the ratios is the ratio of the medians
        assert math.isclose(float(row["speedup"]), full / seconds, rel_tol=1e-2)
        assert math.isclose(float(row["achieved"]), ideal / seconds, rel_tol=1e-2)
        assert math.isclose(float(row["images_per_second"]), 1 / seconds, rel_tol=1e-2)
        ranks = row["method"] not in ("full", "ideal")
        assert (float(row["ranker_share"]) > 0) is ranks


def test_picture_and_table_are_written(speed_vs_keep_ratio):
    output, done = speed_vs_keep_ratio
    assert (output / "speed_vs_keep_ratio.png").read_bytes().startswith(PNG_MAGIC)
    text = (output / "speed_vs_keep_ratio.md").read_text(encoding="utf-8")
    assert "| model | batch | keep | method |" in text
    assert text.count("| vit_tiny_patch16_224 | 1 |") == 6
    assert "No goal applies to these settings." in text
    assert "Goals" in done.stdout
    assert sorted(path.suffix for path in output.iterdir()) == [".csv", ".md", ".png"]


def test_untrained_rankers_are_silent_there(speed_vs_keep_ratio):
    assert "no trained weights" not in speed_vs_keep_ratio[1].stderr


@pytest.fixture
def benchmark_module(monkeypatch):
    """``benchmarks/speed_vs_keep_ratio.py`` as a module, imported as a script would be."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import speed_vs_keep_ratio as module

    yield module
    for name in ("speed_vs_keep_ratio", "common"):
        sys.modules.pop(name, None)


def make_row(**changes):
    row = {"model": "vit_base_patch16_224", "batch": 8, "keep_ratio": 0.5, "method": "conv"}
    row |= {"device": "cpu", "dtype": "float32", "threads": "1", "compiled": False, "rounds": 5}
    for column in ("achieved", "speedup_over_eager", "ranker_share"):
        row |= {column: 0.0, f"{column}_low": 0.0, f"{column}_high": 0.0}
    return {**row, **changes}


def verdicts(module, row):
    goals = module._goals(["contrast", "conv"])
    return [line[""] for goal in goals for line in goal.check([row])]


@pytest.mark.parametrize(
    ("row", "verdict"),
    [
        (make_row(achieved=0.98), "met"),
        (make_row(achieved=0.96), "not met"),
        (make_row(method="contrast", ranker_share=0.004), "met"),
        (make_row(method="contrast", ranker_share=0.006), "not met"),
        (make_row(batch=1, method="contrast", speedup_over_eager=1.6), "met"),
        (make_row(batch=1, speedup_over_eager=1.5), "not met"),
        (make_row(batch=1, speedup_over_eager=2.0, compiled=True), "not met"),
        (make_row(batch=1, speedup_over_eager=2.3, compiled=True), "met"),
    ],
)
def test_goals_are_checked_against_their_bounds(benchmark_module, row, verdict):
    assert verdicts(benchmark_module, row) == [verdict]


@pytest.mark.parametrize(
    "changes",
    [{"threads": "2"}, {"dtype": "bfloat16"}, {"method": "random"}, {"keep_ratio": 0.75}],
)
def test_goals_are_silent_on_other_settings(benchmark_module, changes):
    assert verdicts(benchmark_module, make_row(**changes)) == []


@pytest.mark.parametrize(
    ("options", "seconds_per_round", "rounds"),
    [
        (["--seconds", "20"], 2.0, 10),
        (["--seconds", "20"], 100.0, 5),
        (["--seconds", "20"], 0.01, 41),
        (["--seconds", "20", "--repeats", "3"], 2.0, 3),
    ],
)
def test_rounds_fit_the_time_allowed(
    benchmark_module, monkeypatch, options, seconds_per_round, rounds
):
    now = [0.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])

    def spend():
        now[0] += seconds_per_round / 2

    args = benchmark_module.common.make_parser("test").parse_args(options)
    timings = benchmark_module.common.compare({"a": spend, "b": spend}, args)
    assert [len(timing.seconds) for timing in timings.values()] == [rounds, rounds]


def test_variants_share_weights_and_ideal_keeps_k_tokens(benchmark_module):
    import torch

    options = ["--rankers", "random"]
    args = benchmark_module.common.make_parser("test").parse_args(options)
    models = benchmark_module.build("vit_tiny_patch16_224", args)
    full, ideal, pruned = (models[name] for name in ("full", "ideal", "random"))
    assert full.blocks[0].attn.qkv.weight is ideal.blocks[0].attn.qkv.weight
    assert full.blocks[0].attn.qkv.weight is pruned.backbone.blocks[0].attn.qkv.weight
    images = torch.randn(2, 3, *full.patch_embed.img_size)
    benchmark_module.callables(models, images, 0.5, compiled=False)
    patches = full.patch_embed.num_patches
    with torch.inference_mode():
        assert full.forward_features(images).shape[1] == 1 + patches
        assert ideal.forward_features(images).shape[1] == 1 + patches // 2
        assert pruned.forward_features(images).shape[1] == 1 + patches // 2


def test_readme_agrees_with_csv_and_code() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "report.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
