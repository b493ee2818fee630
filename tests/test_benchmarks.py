"""The benchmarks run, on settings so small that their figures mean nothing."""

import math
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import pytest
import timm
import torch
from benchmark_setup import (
    BENCHMARKS,
    PNG_MAGIC,
    SCRIPTS,
    TINY,
    TRAINED,
    Done,
    load,
    path_of,
    verdicts,
)
from sections import SECTIONS

from ltrp_timm.measure import payoff, throughput
from ltrp_timm.selection.rules import keep_tokens


@pytest.mark.parametrize("name", SCRIPTS)
def test_smoke(name: str, run_benchmark: Callable[..., Done]) -> None:
    """All that is checked of a script's output, in one test: it runs once."""
    if name == "compile_and_export":
        pytest.importorskip("onnxruntime")
    if name == "visual_tokens":
        pytest.importorskip("transformers", "5")
    done = run_benchmark(name, *SCRIPTS[name])
    check_where_rows_were_measured(name, done)
    check_files(name, done)
    if name in CHECKS:
        CHECKS[name](done)


def check_where_rows_were_measured(name: str, done: Done) -> None:
    for row in done.rows:
        assert row["model"] == "vit_tiny_patch16_224"
        assert (row["batch"], row["rounds"], row["threads"]) == ("1", "1", "1")
        assert (row["device"], row["dtype"], row["depth"]) == ("cpu", "float32", "1")
        assert set(throughput.environment()) < set(row)
        assert all(row.values()), row
        if name == "memory":
            continue
        assert float(row["seconds_median"]) > 0
        per_second = 1 / float(row["seconds_median"])
        assert math.isclose(float(row["images_per_second"]), per_second, rel_tol=1e-2)


def check_files(name: str, done: Done) -> None:
    assert done.files == [f"{name}.csv", f"{name}.md", f"{name}.png"]
    assert done.png.startswith(PNG_MAGIC)
    assert "| model |" in done.text
    assert "models cut to 1 blocks" in done.text
    assert "No goal applies to these settings." in done.text  # nor may it: the model is cut
    assert "Goals" in done.stdout
    # the section of the documents can show these rows
    section = next(section for section in SECTIONS if section.file == name)
    whole = [{**row, "depth": "all"} for row in done.rows]
    assert "| --- |" in section.text(whole)


def check_speed_vs_keep_ratio(done: Done) -> None:
    methods = ["full", "ideal", "contrast", "conv"]
    expected = [("0.5", "98", method) for method in methods]
    expected += [("0.25", "49", method) for method in methods]
    assert done.cells("keep_ratio", "patches_kept", "method") == expected
    by_case = {(row["keep_ratio"], row["method"]): row for row in done.rows}
    for row in done.rows:
        seconds = float(row["seconds_median"])
        full = float(by_case[row["keep_ratio"], "full"]["seconds_median"])
        ideal = float(by_case[row["keep_ratio"], "ideal"]["seconds_median"])
        # of a single round the median of the ratios is the ratio of the medians
        assert math.isclose(float(row["speedup"]), full / seconds, rel_tol=1e-2)
        assert math.isclose(float(row["achieved"]), ideal / seconds, rel_tol=1e-2)
        ranks = row["method"] not in ("full", "ideal")
        assert (float(row["ranker_share"]) > 0) is ranks
    assert done.text.count("| vit_tiny_patch16_224 | 1 |") == 6


def check_compile_and_export(done: Done) -> None:
    cases = [(form, method) for method in ("full", "contrast") for form in ("eager", "onnxruntime")]
    assert done.cells("form", "method") == cases
    for row in done.rows:
        assert float(row["max_error"]) <= 1e-4
        assert (float(row["max_error"]) > 0) is (row["form"] != "eager")  # other kernels


def check_resolution(done: Done) -> None:
    methods = ["full", "ideal", "contrast", "conv"]
    expected = [("64", "16", "8", method) for method in methods]
    expected += [("96", "36", "18", m) for m in [*methods, "contrast@64", "conv@64"]]
    assert done.cells("img_size", "patches", "patches_kept", "method") == expected


def check_visual_tokens(done: Done) -> None:
    expected = [("64", "full", "4"), ("64", "contrast", "2"), ("64", "contrast, coarse", "4")]
    assert done.cells("img_size", "method", "visual_tokens") == expected
    for row in done.rows:
        assert math.isclose(float(row["time_ratio"]), 1 / float(row["speedup"]), rel_tol=1e-3)


def check_peers(done: Done) -> None:
    methods = ["full", "contrast", "random"]
    methods += ["merging", "merging_proportional_fused", "merging_plain_fused", "fusing"]
    expected = [(matched, method) for matched in ("flops", "tokens") for method in methods]
    assert done.cells("matched", "method") == expected
    for row in done.rows:
        ours = {"contrast", "random"}
        assert (row["setting"] == "K=98") is (row["method"] in ours)
        assert (float(row["gain"]) == 1.0) is (row["method"] == "contrast")


def check_where_does_time_go(done: Done) -> None:
    rows = {(row["part"], row["method"]): row for row in done.rows}
    parts = {part for part, _ in rows}
    assert parts == {"whole", "ranker", "select", "embed", "gather", "blocks", "head"}
    rules = {method for part, method in rows if part == "select"}
    assert rules == {"top", "random", "stratified", "mixed", "mixed (4 x 4 pixels)"}
    assert all(row["same_bits"] == "1" for row in done.rows)
    whole, kept = int(rows["whole", "full"]["operators"]), int(rows["blocks", "full"]["operators"])
    assert 10 < kept < whole < int(rows["whole", "contrast"]["operators"])
    assert rows["whole", "contrast"]["host_syncs"] == "0"


def check_break_even(done: Done) -> None:
    ratios = ["0.25", "0.5", "0.75", "0.95"]
    expected = [(method, ratio) for method in ("contrast", "conv") for ratio in ratios]
    assert done.cells("method", "keep_ratio") == expected
    for method in ("contrast", "conv"):
        assert len({row["break_even"] for row in done.rows if row["method"] == method}) == 1
    assert done.text.count("| vit_tiny_patch16_224 | 1 |") == 2


def check_index_cache(done: Done) -> None:
    methods = ["vit_small", "full", "contrast", "given", "cached"]
    expected = [(step, method) for step in ("evaluation", "training") for method in methods]
    assert done.cells("step", "method") == expected
    for row in done.rows:
        assert (float(row["over_given"]) == 1.0) == (row["method"] == "given")
        if row["method"] == "vit_small":  # twelve blocks of it before the model's one
            assert float(row["over_given"]) > 1.5


def check_adaptive_budget(done: Done) -> None:
    rows = {row["method"]: row for row in done.rows}
    assert set(rows) == {"fixed", "mass", "threshold"}
    assert float(rows["fixed"]["mean_share"]) == pytest.approx(59 / 196, abs=1e-4)
    assert all(0.3 < float(row["kept_ink"]) <= 1.0 for row in rows.values())
    assert float(rows["fixed"]["ink_gain"]) == 0.0


def check_training_speed(done: Done) -> None:
    methods = [(r, m) for r in ("0.5", "0.25") for m in ("ideal", "contrast", "conv")]
    assert done.cells("keep_ratio", "method") == [("1.0", "full"), *methods]
    full = float(done.rows[0]["seconds_median"])
    for row in done.rows:
        expected = full / float(row["seconds_median"])
        assert float(row["speedup"]) == pytest.approx(expected, rel=1e-2)


WITHOUT_SECTION = ("pseudo_score_cost", "coverage", "finetune_digits", "coarse_digits", "gpu")
CHECKS = {
    "speed_vs_keep_ratio": check_speed_vs_keep_ratio,
    "compile_and_export": check_compile_and_export,
    "resolution": check_resolution,
    "visual_tokens": check_visual_tokens,
    "peers": check_peers,
    "where_does_time_go": check_where_does_time_go,
    "break_even": check_break_even,
    "index_cache": check_index_cache,
    "adaptive_budget": check_adaptive_budget,
    "training_speed": check_training_speed,
}


@pytest.mark.benchmarks
@pytest.mark.parametrize("name", [*SCRIPTS, *TRAINED, *WITHOUT_SECTION])
def test_each_is_started_by_its_path(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(path_of(name)), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_begins_with_its_claim_and_its_arithmetic(name: str) -> None:
    text = load(name).__doc__ or ""
    assert text.splitlines()[0].endswith("?")
    for part in ("\nClaim. ", "\nArithmetic. ", "in turns in one process"):
        assert part in text


def test_variants_share_weights_and_ideal_keeps_k_tokens() -> None:
    args = common.make_parser("test").parse_args(["--depth", "1"])
    full = common.create_full("vit_tiny_patch16_224", args)
    ideal, pruned = payoff.ideal(full, 98), common.pruned(full, "random", 0.5)
    for variant in (ideal, pruned.backbone):
        assert variant is not full
        assert full.blocks[0].attn.qkv.weight is variant.blocks[0].attn.qkv.weight
    images = common.make_images(full, 2, args)
    assert images.shape == (2, 3, 224, 224)
    with torch.inference_mode():
        assert full.forward_features(images).shape[1] == 197
        assert ideal.forward_features(images).shape[1] == 99
        assert pruned.forward_features(images).shape[1] == 99


@pytest.mark.slow
def test_compiled_rows(run_benchmark: Callable[..., Done]) -> None:
    forms = ("eager", "compiled", "aotinductor")
    done = run_benchmark("compile_and_export", *TINY, "--forms", *forms)
    assert len(done.rows) == 6
    for row in done.rows:
        assert float(row["max_error"]) <= 1e-4
        assert (float(row["prepare_seconds"]) > 0.5) is (row["form"] != "eager")


def test_a_wrong_output_is_not_timed() -> None:
    module = load("compile_and_export")
    args = common.make_parser("test").parse_args([])
    args.forms = ["eager"]
    model = common.create_full("vit_tiny_patch16_224", Namespace(**{**vars(args), "depth": 1}))
    images = torch.randn(1, 3, 224, 224)
    assert len(module.prepare({"full": model}, images, args)[0]) == 1
    module.FORMS["eager"] = lambda model, images, args: lambda: model(images) + 1.0
    with pytest.raises(SystemExit, match=r"eager full is off by .* not timed"):
        module.prepare({"full": model}, images, args)


def test_low_resolution_rankers_look_at_less() -> None:
    module = load("resolution")
    args = Namespace(rankers=["contrast"], rank_size=64)
    assert list(module.rankers_at(64, args)) == ["contrast"]
    ranker, options = module.rankers_at(96, args)["contrast@64"]
    full = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=96).eval()
    model, seen = common.pruned(full, ranker, 0.5, **options), []
    model.ranker.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    model(torch.randn(2, 3, 96, 96))
    assert seen == [(2, 3, 64, 64)]


def test_peers_are_matched() -> None:
    module = load("peers")
    full = timm.create_model("vit_tiny_patch16_224").eval()
    ours = module.dropping(full, 98)
    for name, peer in module.match(full, 98, "flops").items():
        assert abs(peer.flops / ours.flops - 1) < 0.02, name
    for name, peer in module.match(full, 98, "tokens").items():
        assert abs(peer.last - ours.last) <= 3, name  # merging goes in steps of 12
        assert (peer.flops > 1.1 * ours.flops) is (name != "random")
    assert module.match(full, 98, "tokens")["merging"].setting == "r=8"


def test_the_parts_are_the_forward() -> None:
    """Embed, gather, blocks and head of the parts make the pruned model's logits."""
    module = load("where_does_time_go")
    full = timm.create_model("vit_tiny_patch16_224", depth=1).eval()
    torch.nn.init.normal_(full.head.weight)
    images = torch.randn(2, 3, 224, 224)
    calls = module.parts(full, images, 0.5, ["contrast"])
    with torch.inference_mode():
        tokens = calls["blocks kept"]()
        expected = full.forward_head(full.norm(tokens))
        scores, keep = calls["ranker contrast"](), calls["select top"]()
    assert torch.allclose(calls["whole contrast"](), expected, rtol=1e-5, atol=1e-4)
    embedded = [keep_tokens(calls[f"embed {which}"](), keep, 1) for which in ("all", "kept")]
    assert (embedded[0] - embedded[1]).abs().max() <= 1e-5
    assert torch.equal(scores.topk(98).indices.sort(1).values, keep)
    assert calls["gather kept"]().shape == tokens.shape == (2, 99, 192)
    assert calls["embed all"]().shape == (2, 197, 192)
    assert not torch.allclose(calls["whole full"](), expected, rtol=1e-2, atol=1e-2)


def test_host_syncs_are_seen() -> None:
    x = torch.randn(4)
    for read in (lambda: bool(x.sum() > 0), lambda: x.sum().item(), lambda: x[x > 0]):
        assert len(common.host_syncs(common.operators(read))) == 1
        with torch.inference_mode():
            assert len(common.host_syncs(common.operators(read))) == 1
    some = torch.tensor([2, 0])
    assert common.host_syncs(common.operators(lambda: x.exp()[some])) == []
    assert len(common.operators(lambda: x.exp()[some])) == 2


def test_memory_falls_with_the_tokens() -> None:
    module = load("memory")
    found = {"full": [40 * 2**20] * 3, "ideal": [20 * 2**20, 10 * 2**20, 30 * 2**20]}
    rows = module.to_rows(found, {"model": "m"})
    assert [row["peak_ratio"] for row in rows] == [1.0, 0.5]
    low, high = rows[1]["peak_mib_low"], rows[1]["peak_mib_high"]
    assert (low, rows[1]["peak_mib"], high) == (15, 20, 25)


IN_A_FRESH_PROCESS = """
import memory, torch
from argparse import Namespace

def with_holes():
    del [torch.ones(2**22)][:]  # of blocks up to this size glibc would make a heap now
    parts = [torch.ones(2**18) for _ in range(64)]
    del parts[::2]
    parts += [torch.ones(2**19) for _ in range(8)]  # too large for the holes

calls = {"small": lambda: torch.ones(2**20), "holes": with_holes}
with memory.only_what_is_alive():
    peaks = memory.peaks(calls, Namespace(repeats=3, device="cpu"))
print(*[min(peak) for peak in peaks.values()])  # the first may load code besides
"""


@pytest.mark.benchmarks
def test_memory_is_what_is_alive() -> None:
    env = {**os.environ, "PYTHONPATH": str(BENCHMARKS)}
    command = [sys.executable, "-c", IN_A_FRESH_PROCESS]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    small, holes = (int(size) for size in done.stdout.split())
    assert abs(small - 2**22) < 2**20
    assert abs(holes - 2**26) < 2**20


def test_memory_says_where_it_cannot_be_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "peak_memory", lambda fn, device: None)
    with pytest.raises(SystemExit, match="peak memory is not known here"):
        load("memory").peaks({"a": lambda: None}, Namespace(repeats=1, device="cpu"))


ON_ONE_CORE = {"device": "cpu", "dtype": "float32", "threads": "1", "rounds": 5}
BASE = {**ON_ONE_CORE, "model": "vit_base_patch16_224", "batch": 8, "keep_ratio": 0.5}
B1 = {**BASE, "batch": 1}
CACHED = {**BASE, "model": "vit_small_patch16_224", "method": "cached"}
PEER = {**B1, "matched": "flops"}
AT_1024 = {**B1, "img_size": 1024, "method": "conv@224"}


@pytest.mark.parametrize(
    ("name", "row", "column", "good", "bad"),
    [
        ("speed_vs_keep_ratio", {**BASE, "method": "conv"}, "achieved", 0.98, 0.96),
        (
            "speed_vs_keep_ratio",
            {**BASE, "model": "vit_large_patch16_224", "method": "conv"},
            "achieved",
            0.98,
            0.97,
        ),
        ("speed_vs_keep_ratio", {**BASE, "method": "contrast"}, "ranker_share", 0.004, 0.006),
        ("speed_vs_keep_ratio", {**B1, "method": "contrast"}, "speedup", 1.6, 1.5),
        (
            "compile_and_export",
            {**B1, "form": "eager", "method": "conv"},
            "speedup_over_eager",
            1.6,
            1.5,
        ),
        (
            "compile_and_export",
            {**B1, "form": "compiled", "method": "conv"},
            "speedup_over_eager",
            2.2,
            2.1,
        ),
        ("break_even", {**B1, "method": "conv"}, "speedup", 1.0, 0.99),
        ("memory", {**BASE, "method": "conv"}, "peak_ratio", 0.7, 0.71),
        ("index_cache", {**CACHED, "step": "training"}, "over_given", 1.02, 1.03),
        ("index_cache", {**CACHED, "step": "evaluation"}, "over_given", 1.02, 1.03),
        ("peers", {**PEER, "method": "merging"}, "gain", 1.1, 1.09),
        ("peers", {**PEER, "method": "merging_plain_fused"}, "gain", 1.05, 1.04),
        (
            "where_does_time_go",
            {**BASE, "part": "ranker", "method": "contrast"},
            "share",
            0.005,
            0.006,
        ),
        (
            "visual_tokens",
            {**AT_1024, "model": "vit_pe_core_small_patch16_384", "method": "border"},
            "time_ratio",
            0.6,
            0.61,
        ),
        (
            "where_does_time_go",
            {**BASE, "part": "select", "method": "mixed"},
            "seconds_median",
            0.002,
            0.003,
        ),
    ],
)
def test_goals_are_checked_against_their_bounds(
    name: str, row: dict[str, Any], column: str, good: float, bad: float
) -> None:
    assert verdicts(name, {**row, column: good}) == ["met"]
    assert verdicts(name, {**row, column: bad}) == ["not met"]
    others = {"threads": "2", "dtype": "bfloat16", "model": "vit_huge_patch14_224"}
    for change in [{key: value} for key, value in others.items()]:
        assert verdicts(name, {**row, column: good, **change}) == []


def test_goals_with_two_figures() -> None:
    good = {"ranker_share": 0.004, "achieved": 0.99}
    assert verdicts("resolution", {**AT_1024, **good}) == ["met", "met"]
    assert verdicts("resolution", {**AT_1024, **good, "achieved": 0.9}) == ["met", "not met"]
    assert verdicts("resolution", {**AT_1024, **good, "method": "conv"}) == []
    whole = {**BASE, "part": "whole", "method": "conv"}
    good = {"operators_ratio": 1.3, "host_syncs": 0, "same_bits": 1}
    assert verdicts("where_does_time_go", {**whole, **good}) == ["met", "met", "met"]
    bad = {"operators_ratio": 1.41, "host_syncs": 1, "same_bits": 0}
    assert verdicts("where_does_time_go", {**whole, **bad}) == ["not met"] * 3


@pytest.mark.parametrize(
    ("options", "seconds_per_round", "rounds"),
    [
        (["--seconds", "20"], 2.0, 10),
        (["--seconds", "20"], 12.0, 5),
        (["--seconds", "20"], 100.0, 3),
        (["--seconds", "20"], 0.01, 41),
        (["--seconds", "20", "--repeats", "3"], 2.0, 3),
    ],
)
def test_rounds_fit_the_time_allowed(
    monkeypatch: pytest.MonkeyPatch, options: list[str], seconds_per_round: float, rounds: int
) -> None:
    now = [0.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])

    def spend() -> None:
        now[0] += seconds_per_round / 2

    args = common.make_parser("test").parse_args(options)
    timings = common.compare({"a": spend, "b": spend}, args)
    assert [len(timing.seconds) for timing in timings.values()] == [rounds, rounds]


def test_slow_models_are_measured_where_goals_are() -> None:
    module = load("speed_vs_keep_ratio")
    args = Namespace(keep_ratios=[0.75, 0.5, 0.25, 0.1], seconds=20.0, repeats=0)
    assert module.keep_ratios(args, 4.9) == args.keep_ratios
    assert module.keep_ratios(args, 5.1) == [0.5, 0.25]
    args.keep_ratios = [0.7]
    assert module.keep_ratios(args, 5.1) == [0.7]
    args = Namespace(keep_ratios=[0.75, 0.5], seconds=20.0, repeats=2)
    assert module.keep_ratios(args, 5.1) == [0.75, 0.5]


def test_a_step_trains_the_model_and_not_its_ranker() -> None:
    module = load("training_speed")
    args = common.make_parser("test").parse_args(["--depth", "1"])
    model = common.pruned(common.create_full("vit_tiny_patch16_224", args), "conv", 0.25)
    model.ranker.trained = True  # it must not move, whatever it says
    before = {name: value.clone() for name, value in model.state_dict().items()}
    module.training_step(model, torch.randn(2, 3, 224, 224))()
    moved = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert moved == {name for name, _ in model.named_parameters() if name.startswith("backbone.")}


def test_goals_of_training_speed() -> None:
    row = {"model": common.VIT_S, "keep_ratio": 0.5, "method": "contrast", **common.ON_ONE_CORE}
    assert verdicts("training_speed", {**row, "speedup": 1.6}) == ["met"]
    assert verdicts("training_speed", {**row, "speedup": 1.59}) == ["not met"]
    assert verdicts("training_speed", {**row, "speedup": 1.59, "method": "ideal"}) == []
