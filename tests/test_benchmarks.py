"""The benchmarks run, on settings so small that their figures mean nothing."""

import contextlib
import dataclasses
import hashlib
import importlib.util
import io
import math
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import common
import judging
import pytest
import scenes
import small_run
import tables
import timm
import torch

from ltrp_timm import payoff, throughput
from ltrp_timm.selection import keep_tokens
from ltrp_timm.teacher import MAETeacher
from ltrp_timm.train import Summary

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
TINY = ["--models", "vit_tiny_patch16_224", "--depth", "1", "--batch-sizes", "1", "--repeats", "1"]


def load(name: str) -> ModuleType:
    """A benchmark by its file: ``peers`` is a package of that name too."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
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


@pytest.fixture(scope="module")
def run_benchmark(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Done]:
    """Run a benchmark's ``main`` once for each set of options."""
    done: dict[tuple[str, ...], Done] = {}

    def run(name: str, *options: str) -> Done:
        key = (name, *options)
        if key not in done:
            output, stdout = tmp_path_factory.mktemp(name), io.StringIO()
            with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(stdout):
                patch.setattr(sys, "argv", [name, *TINY, "--output", str(output), *options])
                load(name).main()
            done[key] = Done(name, output, stdout.getvalue())
        return done[key]

    return run


TRAINED = ("learning", "fairness")  # tests of their own
SCRIPTS: dict[str, tuple[str, ...]] = {
    "speed_vs_keep_ratio": ("--keep-ratios", "0.5", "0.25"),
    "compile_and_export": ("--forms", "eager", "onnxruntime"),
    "resolution": ("--img-sizes", "64", "96", "--rank-size", "64"),
    "peers": ("--rankers", "contrast"),
    "where_does_time_go": (),
    "break_even": ("--rankers", "contrast", "conv"),
    "index_cache": (),
    "memory": (),
    "training_speed": (),
    "adaptive_budget": ("--scenes", "24", "--rankers", "pixel_std", "--keep-ratios", "0.3"),
}
every = pytest.mark.parametrize("name", SCRIPTS)


@every
def test_rows_say_where_they_were_measured(name: str, run_benchmark: Callable[..., Done]) -> None:
    for row in run_benchmark(name, *SCRIPTS[name]).rows:
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


@every
def test_csv_picture_and_table_are_written(name: str, run_benchmark: Callable[..., Done]) -> None:
    done = run_benchmark(name, *SCRIPTS[name])
    assert done.files == [f"{name}.csv", f"{name}.md", f"{name}.png"]
    assert done.png.startswith(PNG_MAGIC)
    assert "| model |" in done.text
    assert "models cut to 1 blocks" in done.text
    assert "No goal applies to these settings." in done.text  # nor may it: the model is cut
    assert "Goals" in done.stdout


@every
def test_each_begins_with_its_claim_and_its_arithmetic(name: str) -> None:
    text = load(name).__doc__ or ""
    assert text.splitlines()[0].endswith("?")
    for part in ("\nClaim. ", "\nArithmetic. ", "in turns in one process"):
        assert part in text


def test_speed_rows(run_benchmark: Callable[..., Done]) -> None:
    done = run_benchmark("speed_vs_keep_ratio", *SCRIPTS["speed_vs_keep_ratio"])
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


def test_exported_rows(run_benchmark: Callable[..., Done]) -> None:
    pytest.importorskip("onnxruntime")
    done = run_benchmark("compile_and_export", *SCRIPTS["compile_and_export"])
    cases = [(form, method) for method in ("full", "contrast") for form in ("eager", "onnxruntime")]
    assert done.cells("form", "method") == cases
    for row in done.rows:
        assert float(row["max_error"]) <= 1e-4
        assert (float(row["max_error"]) > 0) is (row["form"] != "eager")  # other kernels


@pytest.mark.slow
def test_compiled_rows(run_benchmark: Callable[..., Done]) -> None:
    done = run_benchmark("compile_and_export", "--forms", "eager", "compiled")
    assert len(done.rows) == 4
    for row in done.rows:
        assert float(row["max_error"]) <= 1e-4
        assert (float(row["prepare_seconds"]) > 0.5) is (row["form"] == "compiled")


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


def test_resolution_rows(run_benchmark: Callable[..., Done]) -> None:
    done = run_benchmark("resolution", *SCRIPTS["resolution"])
    methods = ["full", "ideal", "contrast", "conv"]
    expected = [("64", "16", "8", method) for method in methods]
    expected += [("96", "36", "18", m) for m in [*methods, "contrast@64", "conv@64"]]
    assert done.cells("img_size", "patches", "patches_kept", "method") == expected


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


def test_peer_rows(run_benchmark: Callable[..., Done]) -> None:
    done = run_benchmark("peers", *SCRIPTS["peers"])
    methods = ["full", "contrast", "random"]
    methods += ["merging", "merging_proportional_fused", "merging_plain_fused", "fusing"]
    expected = [(matched, method) for matched in ("flops", "tokens") for method in methods]
    assert done.cells("matched", "method") == expected
    for row in done.rows:
        ours = {"contrast", "random"}
        assert (row["setting"] == "K=98") is (row["method"] in ours)
        assert (float(row["gain"]) == 1.0) is (row["method"] == "contrast")


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


def test_parts_of_a_forward(run_benchmark: Callable[..., Done]) -> None:
    done = run_benchmark("where_does_time_go")
    rows = {(row["part"], row["method"]): row for row in done.rows}
    parts = {part for part, _ in rows}
    assert parts == {"whole", "ranker", "select", "embed", "gather", "blocks", "head"}
    rules = {method for part, method in rows if part == "select"}
    assert rules == {"top", "random", "stratified", "mixed", "mixed (4 x 4 pixels)"}
    assert all(row["same_bits"] == "1" for row in done.rows)
    whole, kept = int(rows["whole", "full"]["operators"]), int(rows["blocks", "full"]["operators"])
    assert 10 < kept < whole < int(rows["whole", "contrast"]["operators"])
    assert rows["whole", "contrast"]["host_syncs"] == "0"


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


def test_break_even_rows(run_benchmark: Callable[..., Done]) -> None:
    done = run_benchmark("break_even", *SCRIPTS["break_even"])
    ratios = ["0.25", "0.5", "0.75", "0.95"]
    expected = [(method, ratio) for method in ("contrast", "conv") for ratio in ratios]
    assert done.cells("method", "keep_ratio") == expected
    for method in ("contrast", "conv"):
        assert len({row["break_even"] for row in done.rows if row["method"] == method}) == 1
    assert done.text.count("| vit_tiny_patch16_224 | 1 |") == 2


def test_cached_steps(run_benchmark: Callable[..., Done]) -> None:
    done = run_benchmark("index_cache", *SCRIPTS["index_cache"])
    methods = ["vit_small", "full", "contrast", "given", "cached"]
    expected = [(step, method) for step in ("evaluation", "training") for method in methods]
    assert done.cells("step", "method") == expected
    for row in done.rows:
        assert (float(row["over_given"]) == 1.0) == (row["method"] == "given")
        if row["method"] == "vit_small":  # twelve blocks of it before the model's one
            assert float(row["over_given"]) > 1.5


def test_memory_falls_with_the_tokens() -> None:
    module = load("memory")
    found = {"full": [40 * 2**20] * 3, "ideal": [20 * 2**20, 10 * 2**20, 30 * 2**20]}
    rows = module.to_rows(found, {"model": "m"}, {})
    assert [row["peak_ratio"] for row in rows] == [1.0, 0.5]
    low, high = rows[1]["peak_mib_low"], rows[1]["peak_mib_high"]
    assert (low, rows[1]["peak_mib"], high) == (10, 20, 30)
    buffers = {"small": lambda: torch.ones(2**20), "large": lambda: torch.ones(2**24)}
    peaks = module.peaks(buffers, Namespace(repeats=3, device="cpu"))
    assert min(peaks["large"]) > 2**25 > max(peaks["small"])  # 64 MiB and 4 MiB


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


def verdicts(name: str, row: dict[str, Any]) -> list[str]:
    module = load(name)
    args = Namespace(rankers=["contrast", "conv"], rank_size=224)
    goals = module.goals(args) if name == "resolution" else module.goals()
    return [line[""] for goal in goals for line in goal.check([row])]


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
    bad = {"operators_ratio": 1.31, "host_syncs": 1, "same_bits": 0}
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


@pytest.fixture
def results(run_benchmark: Callable[..., Done], tmp_path: Path) -> Path:
    """A CSV of every benchmark, as if the models had been whole."""
    for name, options in {**SCRIPTS, "learning": LEARNING}.items():
        rows = run_benchmark(name, *options).rows
        tables.write_csv([{**row, "depth": "all"} for row in rows], tmp_path / f"{name}.csv")
    for name in TRAINED[1:]:  # they train for long: those that are committed
        shutil.copy(BENCHMARKS / "results" / f"{name}.csv", tmp_path)
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
        assert f"`python benchmarks/{section.file}.py`" in text
    speed = tables.read_csv(results / "speed_vs_keep_ratio.csv")
    conv = next(row for row in speed if row["method"] == "conv")
    cell = f"{float(conv['speedup']):.2f}× ({float(conv['achieved']):.2f})"
    line = next(line for line in text.splitlines() if line.startswith("| `vit_tiny"))
    assert line.endswith(f" {cell} |")
    # a figure that changes is seen
    speed[0]["seconds_median"] = "9.0"
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


def test_readme_agrees_with_csv_and_code() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "report.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_coverage_by_hand() -> None:
    module = load("coverage")
    scores = torch.arange(196.0).expand(1, -1)
    keep = torch.tensor([[0, 195]])
    pixels = torch.zeros(1, 196, 1)
    pixels[0, 0] = 1.0
    found = module.cover(keep, scores, pixels)
    assert found["empty_cells"].item() == pytest.approx(1 - 2 / 49)
    assert found["farthest"].item() == pytest.approx(13.0)
    assert found["unlike"].item() == pytest.approx(0.0, abs=1e-3)  # all others are like the last
    assert found["score"].item() == pytest.approx((0.5 + 195.5) / (194.5 + 195.5))
    alone = module.cover(keep[:, :1], scores, pixels)
    assert alone["unlike"].item() == pytest.approx(255 * 195 / 196, rel=1e-4)


def test_coverage(run_benchmark: Callable[..., Done]) -> None:
    done = run_benchmark("coverage", "--keep-ratios", "0.25")
    assert done.files == ["coverage.csv", "coverage.md", "coverage.png"]
    assert done.png.startswith(PNG_MAGIC)
    rows = {row["method"]: row for row in done.rows}
    assert float(rows["stratified"]["empty_cells"]) == 0.0
    assert float(rows["mixed"]["unlike"]) < float(rows["top"]["unlike"])
    assert float(rows["top"]["score"]) == 1.0 > float(rows["mixed"]["score"])


def test_adaptive_budget(run_benchmark: Callable[..., Done]) -> None:
    done = run_benchmark("adaptive_budget", *SCRIPTS["adaptive_budget"])
    rows = {row["method"]: row for row in done.rows}
    assert set(rows) == {"fixed", "mass", "threshold"}
    assert float(rows["fixed"]["mean_share"]) == pytest.approx(59 / 196, abs=1e-4)
    assert all(0.3 < float(row["kept_ink"]) <= 1.0 for row in rows.values())
    assert float(rows["fixed"]["ink_gain"]) == 0.0


def test_training_steps(run_benchmark: Callable[..., Done]) -> None:
    done = run_benchmark("training_speed")
    methods = [(r, m) for r in ("0.5", "0.25") for m in ("ideal", "contrast", "conv")]
    assert done.cells("keep_ratio", "method") == [("1.0", "full"), *methods]
    full = float(done.rows[0]["seconds_median"])
    for row in done.rows:
        expected = full / float(row["seconds_median"])
        assert float(row["speedup"]) == pytest.approx(expected, rel=1e-2)


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


def test_digits(run_benchmark: Callable[..., Done]) -> None:
    options = ("--scenes", "64", "--held-out", "20", "--first-epochs", "1", "--epochs", "1")
    done = run_benchmark("finetune_digits", *options)
    assert done.files == [f"finetune_digits.{kind}" for kind in ("csv", "md", "png")]
    assert done.png.startswith(PNG_MAGIC)
    assert "No goal applies to these settings." in done.text  # nor may it: the model is cut
    cases = [(m, r) for r in ("0.5", "0.25") for m in ("contrast", "learned", "random", "gate")]
    assert done.cells("method", "keep_ratio") == [("full", "1.0"), *cases]
    rows = {(row["method"], row["keep_ratio"]): row for row in done.rows}
    for (method, ratio), row in rows.items():
        gap = float(row["top1"]) - float(rows["full", "1.0"]["top1"])
        assert float(row["over_full"]) == pytest.approx(gap, abs=1e-4)
        assert float(row["seconds_per_epoch"]) > 0
        if method != "full":
            gap = float(row["top1"]) - float(rows["random", ratio]["top1"])
            assert float(row["over_random"]) == pytest.approx(gap, abs=1e-4)


def test_goals_of_digits() -> None:
    quarter = {"method": "contrast", "keep_ratio": 0.25, "img_size": 64}
    assert verdicts("finetune_digits", {**quarter, "over_random": 0.1}) == ["met"]
    assert verdicts("finetune_digits", {**quarter, "over_random": 0.09}) == ["not met"]
    half = {"method": "contrast", "keep_ratio": 0.5, "img_size": 64}
    assert verdicts("finetune_digits", {**half, "over_full": -0.03}) == ["met"]
    assert verdicts("finetune_digits", {**half, "over_full": -0.04}) == ["not met"]


def test_digits_in_clutter() -> None:
    images, labels = scenes.make_digit_scenes(30, seed=3, side=64)
    assert images.shape == (30, 3, 64, 64)
    assert 0 <= float(images.min()) < float(images.max()) <= 1
    assert len(set(labels.tolist())) > 6
    again, _ = scenes.make_digit_scenes(30, seed=3, side=64)
    assert torch.equal(images, again)
    held, _ = scenes.make_digit_scenes(30, seed=3, side=64, held_out=True)
    assert not torch.equal(images, held)
    white = (images.amin(dim=1) > 0.8).flatten(1).float().mean(1)
    assert (white > 0.01).all()  # there is a digit in each


LEARNING = ("--scenes", "20", "--crops", "12", "--held-out", "4", "--draws", "2", "--seeds", "5")
LEARNING += ("--teacher-epochs", "2", "--ranker-epochs", "1", "--aggregates", "mean", "max")


def test_learning(run_benchmark: Callable[..., Done]) -> None:
    done = run_benchmark("learning", *LEARNING)
    assert done.files == ["learning.csv", "learning.md", "learning.png", "learning_maps.png"]
    assert done.png.startswith(PNG_MAGIC)
    assert "No goal applies to these settings." in done.text  # nor may it: the teacher is cut
    rows = {(row["images"], row["px"], row["aggregate"], row["method"]): row for row in done.rows}
    assert len(rows) == len(done.rows)
    free = ["contrast", "pixel_std", "gradient", "colour", "centre", "random"]
    inked = [("scenes", "128"), ("digits on photos", "128"), ("scenes", "224")]
    inked.append(("digits on photos", "224"))
    for aggregate in ("mean", "max"):
        own = f"conv, {aggregate}"
        for place in (*inked, ("photos", "128"), ("all", "")):
            names = [own, *free]
            names = ["teacher", *names] if place[1] == "128" else names
            names = names if place[0] == "photos" else [*names, "ink"]
            assert [key[3] for key in rows if key[:3] == (*place, aggregate)] == names
            measure = "object_auc" if place[0] != "photos" else "spearman"
            figures = {name: float(rows[(*place, aggregate, name)][measure]) for name in names}
            best = max(figures[name] for name in free)
            gain = float(rows[(*place, aggregate, own)][f"{measure}_gain"])
            assert gain == pytest.approx(figures[own] - best, abs=1e-4)
            if place[1] == "128":
                agreement = {n: float(rows[(*place, aggregate, n)]["spearman"]) for n in names}
                assert max(agreement, key=lambda name: agreement[name]) == "teacher"
        assert float(rows["all", "", aggregate, "ink"]["object_auc"]) == 1.0
        mean = sum(float(rows[(*place, aggregate, own)]["ink_kept"]) for place in inked) / 4
        assert float(rows["all", "", aggregate, own]["ink_kept"]) == pytest.approx(mean, abs=1e-4)
        assert rows["photos", "128", aggregate, "contrast"]["object_auc"] == ""
        assert rows["scenes", "224", aggregate, own]["spearman"] == ""
        above = [float(rows[(*place, aggregate, own)]["above_random"]) for place in inked]
        assert float(rows["all", "", aggregate, own]["above_random"]) == min(above)
    # the two teachers are not one: aggregates differ in what a score without weights is worth
    pair = [rows["scenes", "128", aggregate, "contrast"] for aggregate in ("mean", "max")]
    assert len({row["spearman"] for row in pair}) == 2
    assert len({row["ink_kept"] for row in pair}) == 1
    assert len({row["weights_sha256"] for row in done.rows}) == 3  # two rankers, and none


def test_the_first_ranker_of_learning_is_what_ships(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, home = load("learning"), tmp_path / "runs" / "seed_3" / "conv_max"
    home.mkdir(parents=True)
    (home / "model.safetensors").write_bytes(b"weights")
    flags = ["--ship", str(tmp_path), "--runs", str(tmp_path / "runs"), "--seeds", "3", "4"]
    monkeypatch.setattr(sys, "argv", ["learning", *flags, "--aggregates", "max", "mean"])
    monkeypatch.setattr(module, "run", lambda *_: ([], None))
    monkeypatch.setattr(module.tables, "conclude", lambda *_: None)
    module.main()
    assert (tmp_path / "conv.safetensors").read_bytes() == b"weights"
    digest = hashlib.sha256(b"weights").hexdigest()
    assert module.digest(tmp_path / "runs" / "seed_3", "conv, max") == digest
    assert module.digest(tmp_path / "runs" / "seed_3", "contrast") == ""


def test_goals_of_learning() -> None:
    conv = {"method": "conv, max", "images": "scenes", "px": 128, "map_spearman": 0.5}
    for gain, verdict in ((0.1, "met"), (0.09, "not met")):
        for images in ("scenes", "photos", "digits on photos"):
            row = {**conv, "images": images, "map_spearman_gain": gain}
            assert verdicts("learning", row) == [verdict]
    assert verdicts("learning", {**conv, "px": 224}) == []
    every = {"method": "conv, mean", "images": "all", "px": ""}
    good = {"above_random": 0.05, "object_auc_gain": 0.0, "ink_kept_gain": 0.0}
    assert verdicts("learning", {**every, **good}) == ["met"] * 3
    bad = {"above_random": 0.04, "object_auc_gain": -0.01, "ink_kept_gain": -0.01}
    assert verdicts("learning", {**every, **bad}) == ["not met"] * 3
    assert verdicts("learning", {**every, **good, "method": "contrast"}) == []


def test_judging_by_hand() -> None:
    ink = torch.tensor([[0.5, 0.1, 0.0, 0.0]])
    for scores, auc in (([4, 3, 2, 1], 1.0), ([1, 2, 3, 4], 0.0), ([4, 1, 2, 3], 0.5)):
        assert judging.object_auc(torch.tensor([scores]).float(), ink).item() == pytest.approx(auc)
    assert judging.object_auc(torch.zeros(1, 4), ink).item() == pytest.approx(0.5)
    assert judging.ink_kept(torch.tensor([[4.0, 1, 2, 3]]), ink, 0.5).item() == pytest.approx(5 / 6)
    lists = [(torch.tensor([[5.0, 7.0]]), torch.tensor([[3, 0]]))]
    lists += [(torch.tensor([[2.0, 1.0]]), torch.tensor([[1, 2]]))]
    found = judging.mean_map(lists, 4)
    assert found.tolist() == [[0.75, 0.75, 0.25, 0.25]]
    twice = judging.mean_map([*lists, (torch.tensor([[1.0, 2.0]]), torch.tensor([[0, 1]]))], 4)
    assert twice.tolist() == [[0.5, 0.75, 0.25, 0.25]]
    assert judging.agreement(found, lists).item() == pytest.approx(1.0)
    assert judging.agreement(torch.tensor([[0.0, 1, 0, 1]]), lists).item() == pytest.approx(0.0)


def test_lists_of_a_draw_are_parts_of_the_grid() -> None:
    small = {"embed_dim": 16, "depth": 1, "num_heads": 2, "decoder_embed_dim": 16}
    teacher = MAETeacher(32, 8, **small, decoder_depth=1, decoder_num_heads=2)
    lists = judging.teacher_lists(teacher, torch.rand(2, 3, 32, 32), 0.75, "mean", draws=2, seed=0)
    assert [tuple(scores.shape) for scores, _ in lists] == [(2, 4)] * 8
    for draw in (lists[:4], lists[4:]):
        every = torch.cat([indices for _, indices in draw], dim=1).sort(dim=1).values
        assert torch.equal(every, torch.arange(16).expand(2, -1))
    assert not torch.equal(lists[0][1], lists[4][1])


def test_runs_of_other_images_are_refused(tmp_path: Path) -> None:
    small_run.write_images(torch.rand(3, 3, 8, 8), tmp_path, "scene")
    small_run.write_images(torch.rand(3, 3, 8, 8), tmp_path, "scene")
    with pytest.raises(SystemExit, match="has 1 images of another run"):
        small_run.write_images(torch.rand(2, 3, 8, 8), tmp_path, "scene")


def test_seconds_of_a_run_are_those_of_its_log(tmp_path: Path) -> None:
    rows = [{"epoch": 1, "images_per_second": 20.0}, {"epoch": 2, "images_per_second": 5.0}]
    tables.write_csv(rows, tmp_path / "log.csv")
    done = Summary(tmp_path, 2, 8, {}, [], None)
    assert small_run._seconds(done, 10) == pytest.approx(2.5)
    with pytest.raises(SystemExit, match="was stopped; started again with the same --runs"):
        small_run._seconds(dataclasses.replace(done, stopped_by=15), 10)


def test_scenes_by_hand() -> None:
    images, ink = scenes.make_cluttered_scenes(40, seed=3, side=64)
    other = scenes.make_cluttered_scenes(40, seed=3, side=64, part=scenes.NEW_DIGITS)
    assert not torch.equal(ink, other[1])  # the same scenes, drawn of other digits
    assert images.shape == (40, 3, 64, 64)
    assert 0.0 <= float(images.min()) < 0.1 < 0.9 < float(images.max()) <= 1.0
    assert set(ink.unique().tolist()) == {0.0, 1.0}
    assert bool((ink.sum(dim=(1, 2)) > 0).all())
    again = scenes.make_cluttered_scenes(40, seed=3, side=64)
    assert torch.equal(images, again[0])
    assert not torch.equal(images, scenes.make_cluttered_scenes(40, seed=4, side=64)[0])
    # digits are cut by the border: no ranker is right for liking the middle
    border = torch.cat([ink[:, 0], ink[:, -1], ink[:, :, 0], ink[:, :, -1]])
    assert float(border.mean()) > 0.5 * float(ink.mean())
    # ink is of one colour in an image, texture is not
    inked = ink.unsqueeze(1).expand(-1, 3, -1, -1) > 0
    spread = [float(image[mask].std()) for image, mask in zip(images[:, :1], inked[:, :1])]
    assert sum(spread) / len(spread) < 0.5 * float(images[:, 0].flatten(1).std(dim=1).mean())
    crops = scenes.random_crops(("coins", "chelsea"), 4, seed=0, side=48)
    assert crops.shape == (4, 3, 48, 48)
    grey = [bool((crop[0] - crop[1]).abs().max() < 1e-6) for crop in crops]
    assert grey == [True, False, True, False]  # in turns
