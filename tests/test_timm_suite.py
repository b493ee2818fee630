"""timm's own test-suite over our registered names, in subprocesses.

How it is pointed at them stands in ``timm_suite_plugin``. ``GITHUB_ACTIONS=1`` switches off the
tests that pull weights, as in timm's own CI.
"""

import os
import re
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Dict, Tuple

import pytest
import timm
from filelock import FileLock
from timm_suite_plugin import NAMES_VARIABLE, suite_list_models

import ltrp_timm  # noqa: F401  # registers the models

# the default run: one small name of each kind; base and larger are under the marker
SMALL = (
    "ltrp_vit_tiny",
    "ltrp_vit_small",
    "ltrp_deit3_small",
    "ltrp_dinov2_small",
    "ltrp_dinov3_small",
    "ltrp_eva02_tiny",
)
TINY = ("ltrp_vit_tiny", "ltrp_eva02_tiny")
EVERY_KIND = (*TINY, "ltrp_dinov3_small")  # one of each kind of backbone is in the default run
OTHERS = sorted(set(timm.list_models("ltrp*")) - set(SMALL))
# timm's CI leaves these out altogether for their memory: they run here without GITHUB_ACTIONS
HUGE = tuple(name for name in OTHERS if "huge" in name)

PRUNE = "test_prune_intermediate_layers_contract"
FX_BACKWARD = "test_model_backward_fx"
FX_TORCHSCRIPT = "test_model_forward_fx_torchscript"
NON_STD = "test_model_default_cfgs_non_std"
NEEDS_HUB = ("test_model_load_pretrained", "test_model_features_pretrained")

# the tests that timm holds its ViTs to, and the image size above which each skips a model that is
# bound to one size: at 518 pixels that is all of them for DINOv2, which our own tests cover instead
LIMITS = {
    "test_model_forward": 384,
    "test_model_backward": 320,
    NON_STD: 320,
    "test_model_forward_torchscript": 320,
    "test_model_forward_intermediates_features": 256,
    "test_model_forward_intermediates": 256,
    "test_model_forward_fx": 256,
    FX_BACKWARD: 224,
    PRUNE: 256,
    FX_TORCHSCRIPT: 320,
}
EVERY_RUN = tuple(test for test in LIMITS if test not in (PRUNE, FX_TORCHSCRIPT))

PASSED = ("PASSED", "")
TOO_LARGE = ("SKIPPED", "Fixed input size model > limit.")
TOO_MANY = ("SKIPPED", "Skipping FX backward test on model with more than 100M params.")

# (test function, model name with or without tag) -> (result, reason)
Outcomes = Dict[Tuple[str, str], Tuple[str, str]]


# -- the test file of the installed timm ---------------------------------------------------------


def fetch(folder: Path) -> None:
    """Put the ``tests/test_models.py`` that was released with the installed timm in ``folder``."""
    command = [sys.executable, "-m", "pip", "download", f"timm=={timm.__version__}"]
    command += ["--no-binary", "timm", "--no-deps", "--retries", "2", "--dest", str(folder)]
    command += ["--disable-pip-version-check", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    archives = sorted(folder.glob("timm-*.tar.gz"))
    if done.returncode or len(archives) != 1:
        raise OSError(f"{' '.join(command[1:5])} failed: {(done.stderr or done.stdout).strip()}")
    with tarfile.open(archives[0]) as archive:
        # read, not extracted: no path of the archive's reaches the disk
        member = archive.extractfile(f"timm-{timm.__version__}/tests/test_models.py")
        assert member is not None
        (folder / "test_models.py").write_bytes(member.read())
    archives[0].unlink()
    (folder / "pytest.ini").write_text("[pytest]\n")  # so that no other configuration is found


@pytest.fixture(scope="session")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with timm's test file, fetched once for all workers."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder = root / "timm_suite"
    failure = folder / "failure.txt"
    with FileLock(root / "timm_suite.lock"):
        if not folder.exists():
            folder.mkdir()
            try:
                fetch(folder)
            except (OSError, KeyError, tarfile.TarError, subprocess.SubprocessError) as error:
                failure.write_text(f"cannot fetch timm {timm.__version__}'s tests: {error}")
    if failure.exists():
        if os.environ.get("CI"):
            pytest.fail(failure.read_text())
        pytest.skip(failure.read_text())
    return folder


# -- running it ----------------------------------------------------------------------------------


def keyword_of(name: str, tests: Iterable[str]) -> str:
    if set(tests) <= {PRUNE, FX_TORCHSCRIPT}:
        return f"{name} and ({' or '.join(tests)})"
    unwanted = {PRUNE, FX_TORCHSCRIPT, *NEEDS_HUB}.difference(tests)
    return " and ".join([name, *(f"not {test}" for test in sorted(unwanted))])


def run_suite(
    suite: Path, tests: Mapping[str, Iterable[str]], github_actions: bool = True
) -> Outcomes:
    """Run timm's tests over each name, those of the slow or special ones only that it asks for."""
    keyword = " or ".join(f"({keyword_of(name, chosen)})" for name, chosen in tests.items())
    env = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    for key in ("GITHUB_ACTIONS", "TORCH_BACKEND", "TORCH_DEVICE"):
        env.pop(key, None)
    env.update({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    env.update({NAMES_VARIABLE: ",".join(tests), "COLUMNS": "1000"})
    paths = [str(Path(__file__).parent), env.get("PYTHONPATH", "")]
    env["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    env["TIMEOUT"] = "1200"  # seconds for one of timm's tests; its own are for its own machines
    if github_actions:
        env["GITHUB_ACTIONS"] = "1"
    command = [sys.executable, "-m", "pytest", "test_models.py", "-p", "timm_suite_plugin"]
    command += ["-p", "no:cacheprovider", "-p", "no:xdist", "-c", "pytest.ini", "-k", keyword]
    command += ["-v", "-rs", "--no-fold-skipped", "--tb=short", "--disable-warnings"]
    done = subprocess.run(command, cwd=suite, env=env, capture_output=True, text=True)
    assert done.returncode == 0, (
        f"{keyword}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
    )
    return read_outcomes(done.stdout)


def read_outcomes(report: str) -> Outcomes:
    """pytest's verbose report, held against its own last line."""
    case = r"test_models\.py::(test_\w+)\[(?:\d+-)?([^\]]+)\]"
    skips = re.findall(rf"^SKIPPED (?:\[1\] )?{case} - (?:Skipped: )?(.*)$", report, re.M)
    reasons = {(test, name): reason for test, name, reason in skips}
    lines = re.findall(rf"^{case} ([A-Z]+)", report, re.M)
    outcomes = {
        (test, name): (result, reasons.get((test, name), "")) for test, name, result in lines
    }
    summary = re.search(r"^=+ (.* in [\d.]+s.*) =+$", report, re.M)
    assert summary is not None, report
    counted = Counter(result.lower() for result, _ in outcomes.values())
    said = re.findall(r"(\d+) (passed|failed|skipped|error|xfailed|xpassed)", summary[1])
    assert {word: int(count) for count, word in said} == counted, report
    return outcomes


def released(suite: Path, tests: Iterable[str]) -> Tuple[str, ...]:
    """Those of the tests that this timm has: the prune contract is younger than our floor."""
    known = f"def {PRUNE}(" in (suite / "test_models.py").read_text()
    return tuple(test for test in tests if known or test != PRUNE)


def expected_outcomes(name: str, tests: Iterable[str], github_actions: bool = True) -> Outcomes:
    """What timm's own limits make of each test: skipped above them, passed below."""
    expected: Outcomes = {}
    for test in tests:
        for case in timm.list_models(name, include_tags=test == NON_STD):
            cfg = timm.models.get_pretrained_cfg(case)
            skipped = cfg.fixed_input_size and max(cfg.input_size) > LIMITS[test]
            expected[test, case] = TOO_LARGE if skipped else PASSED
    large = "large" in name and github_actions
    if large and expected.get((FX_BACKWARD, name)) == PASSED:
        expected[FX_BACKWARD, name] = TOO_MANY
    return expected


# -- the tests -----------------------------------------------------------------------------------


def test_the_plugin_adds_ours_beside_timms_vits_and_changes_nothing_else() -> None:
    listed = suite_list_models(["ltrp_vit_tiny", "ltrp_eva02_*"])
    both = ["ltrp_eva02_base", "ltrp_eva02_tiny", "ltrp_vit_tiny"]
    filters = ["vit_*", "deit*"]
    assert listed() == listed(filters) == listed("vit_*") == both
    assert filters == ["vit_*", "deit*"]
    assert listed(exclude_filters=["resnet*"]) == both
    assert listed(exclude_filters=filters) == listed("deit*") == listed("vit_large*") == []
    assert listed(exclude_filters=["*eva02*"]) == ["ltrp_vit_tiny"]
    assert listed(module=["beit", "vision_transformer"]) == listed(module="ltrp_vit") == both
    assert listed(module=["beit", "eva"]) == []
    assert listed(name_matches_cfg=True) == both
    tags = [tag for name in both for tag in timm.list_models(name, include_tags=True)]
    assert listed(filters, include_tags=True) == listed(pretrained=True) == sorted(tags)
    assert listed(filters, exclude_filters=["*in1k"], include_tags=True) == sorted(
        tag for tag in tags if not tag.endswith("in1k")
    )


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "names",  # all that a run takes besides its tests takes as long as those of a small model
    [EVERY_KIND]
    + [pytest.param((n,), marks=pytest.mark.timm_suite) for n in SMALL if n not in EVERY_KIND],
    ids=" ".join,
)
def test_small_models_meet_timms_contracts(suite: Path, names: Sequence[str]) -> None:
    tests = {
        name: released(suite, (*EVERY_RUN, PRUNE) if name in TINY else EVERY_RUN) for name in names
    }
    expected: Outcomes = {}
    for name in names:
        expected |= expected_outcomes(name, tests[name])
    assert run_suite(suite, tests) == expected


@pytest.mark.timeout(900)
def test_tiny_models_script_after_fx(suite: Path) -> None:
    """timm's CI switches this test off for its memory, not for the Hub."""
    outcomes = run_suite(suite, {name: [FX_TORCHSCRIPT] for name in TINY}, github_actions=False)
    assert outcomes == {(FX_TORCHSCRIPT, name): PASSED for name in TINY}


@pytest.mark.timm_suite
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", [name for name in SMALL if name not in TINY])
def test_small_models_meet_timms_prune_contract(suite: Path, name: str) -> None:
    if not released(suite, [PRUNE]):
        pytest.skip(f"timm {timm.__version__} has no prune contract.")
    assert run_suite(suite, {name: [PRUNE]}) == expected_outcomes(name, [PRUNE])


@pytest.mark.timm_suite
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", [name for name in OTHERS if name not in HUGE])
def test_larger_models_meet_timms_contracts(suite: Path, name: str) -> None:
    tests = released(suite, (*EVERY_RUN, PRUNE))
    assert run_suite(suite, {name: tests}) == expected_outcomes(name, tests)


@pytest.mark.timm_suite
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", HUGE)
def test_huge_models_meet_timms_contracts(suite: Path, name: str) -> None:
    """timm never runs the prune contract over a huge model."""
    outcomes = run_suite(suite, {name: EVERY_RUN}, github_actions=False)
    assert outcomes == expected_outcomes(name, EVERY_RUN, github_actions=False)
