"""What is released: the package as a wheel, and rankers by the recipe at toy size.

The recipe takes a teacher from a Hub and rankers to it, and back, bit for bit.
"""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder
from hub_server import Hub
from safetensors.torch import load
from test_hub import environment, files_of
from train_setup import make_photos, same_bits, tiny_teacher, weights

from ltrp_timm.commands import main
from ltrp_timm.rankers import list_rankers, ranker_class
from ltrp_timm.train.folder import read_log

SCRIPTS = Path(__file__).parents[1] / "scripts"
NOTEBOOKS = sorted((SCRIPTS.parent / "examples" / "notebooks").glob("*.ipynb"))
TEACHER = "facebook/vit-mae-base"
TOY = [
    *("--epochs", "2", "--batch-size", "4", "--lr", "0.01", "--mask-ratio", "0.5"),
    *("--num-workers", "0", "--no-tensorboard", "--no-progress", "--holdout", "0.2"),
    *("--ranker-args", "depth=1"),
]
CARD = ["--license", "apache-2.0", "--training-data", "twenty photos"]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    make_photos(tmp_path / "photos")
    tiny_teacher().save(tmp_path / "mae")
    with Hub() as server:
        server.add(TEACHER, files_of(tmp_path / "mae"))
        yield server


PREAMBLE = """
import contextlib, io, os, sys
sys.path.insert(0, sys.argv[1])
from release_rankers import RANKERS, main
assert RANKERS == ("conv", "vit_small")
def run(*flags):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
        code = main(flags)
    print(code, err.getvalue().strip())
    return out.getvalue()
"""


def command(*flags: str) -> list[str]:
    script = [sys.executable, str(SCRIPTS / "release_rankers.py"), "--data", "photos"]
    return [*script, "--output", "out", "--repo-id", "me/ltrp-{ranker}", *CARD, *TOY, *flags]


def inside(hub: Hub, tmp_path: Path, source: str, **more: str) -> list[str]:
    """Lines that Python prints which may call the recipe more than once."""
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + source, str(SCRIPTS), *command()[2:]],
        cwd=tmp_path,
        env=environment(hub, tmp_path / "home", **more),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def stored(hub: Hub, name: str) -> dict[str, bytes]:
    repository = hub.repositories[name]
    return repository.commits[repository.branches["main"]]


def test_from_photos_to_rankers_on_the_hub(hub: Hub, tmp_path: Path) -> None:
    lines = inside(
        hub,
        tmp_path,
        """
print(run(*sys.argv[2:], "--dry-run"))
print(os.path.exists("out"))
""",
        HF_TOKEN="writer",  # noqa: S106
    )
    settings = "2 epochs, 4 updates of 4 images an epoch, 4 images held out, learning rate 0.01, "
    settings += "fp32, 1 process on cpu"
    assert lines == [
        *("0 ", "me/ltrp-conv: nothing yet", "me/ltrp-vit-small: nothing yet"),
        *("out/conv: new", settings, "out/vit_small: new", settings, "", "False"),
    ]
    assert list(hub.repositories) == [TEACHER]
    assert not hub.asked("POST", "")
    assert len(hub.asked("GET", "/cdn/")) == 1  # the teacher

    hub.fault("commit/main", "POST", times=1, status=500)  # what was trained stays
    source = "for _ in range(3):\n    print(run(*sys.argv[2:]))"
    text = "\n".join(inside(hub, tmp_path, source, HF_TOKEN="writer"))  # noqa: S106
    failed, done, again = re.split(r"^(?=0 $|2 ltrp-timm)", text, flags=re.M)[1:]
    assert "2 ltrp-timm: the Hub has an internal error for me/ltrp-conv (500)" in failed
    assert "pushed" not in failed
    assert done.startswith("0 \n")
    assert "out/conv is finished: 2 epochs, 8 steps" in done
    for name, repository in (("conv", "me/ltrp-conv"), ("vit_small", "me/ltrp-vit-small")):
        assert f"hf-hub:{repository} pushed, pulled again and compared" in done
        files = stored(hub, repository)
        assert same_bits(load(files["model.safetensors"]), weights(tmp_path / "out" / name))
        assert json.loads(files["config.json"])["ranker"] == name
        check_card(files["README.md"].decode(), tmp_path / "out" / name, repository)
        assert f"{repository}: these weights" in again
        assert f"hf-hub:{repository} has these weights already" in again
        assert len(hub.repositories[repository].commits) == 2  # made, and filled once


def check_card(text: str, run: Path, repository: str) -> None:
    """It says what the log says, of this ranker and of those without weights, and no more."""
    row = read_log(run / "log.csv")[-1]
    for who, name in (("this ranker", ""), ("contrast (no weights)", "_contrast")):
        metrics = (f"{row[f'val_{metric}{name}']:.4f}" for metric in ("spearman", "ndcg"))
        assert f"| {who} | {' | '.join(metrics)} |" in text
    assert row["val_spearman"] != row["val_spearman_contrast"]
    free = [name for name in list_rankers() if not ranker_class(name).learned]
    assert re.findall(r"(\w+) \(no weights\)", text) == free
    assert "Whether it finds objects was not measured." in text
    assert "Trained for 2 epochs, 8 updates of 4 images (mask_ratio 0.5, removal full" in text
    assert f"the order of the pseudo-scores of {TEACHER}" in text
    assert "- **Training data:** twenty photos" in text
    assert f"base_model: {TEACHER}" in text
    assert f"hf-hub:{repository}" in text


def test_what_is_half_trained_is_not_pushed(hub: Hub, tmp_path: Path) -> None:
    source = """
import signal, threading, time
from pathlib import Path
from huggingface_hub import HfApi
from ltrp_timm.train.folder import read_log
flags = (*sys.argv[2:], "--rankers", "conv", "--epochs", "30")
log = Path("out/conv/log.csv")
def stop():
    while not log.exists():
        time.sleep(0.005)
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=stop, daemon=True).start()
run(*flags)
print(1 <= len(read_log(log)) < 30)
print(os.path.exists("out/conv/model.safetensors"))  # of the epochs it had
print(HfApi().repo_exists("me/ltrp-conv"), os.path.exists("out/conv/release"))
print(run(*flags))
"""
    lines = inside(hub, tmp_path, source, HF_TOKEN="writer")  # noqa: S106
    assert lines[:5] == [f"{128 + signal.SIGTERM} ", "True", "True", "False False", "0 "]
    assert any(line.startswith("resuming out/conv at epoch") for line in lines)
    assert len(read_log(tmp_path / "out" / "conv" / "log.csv")) == 30
    pushed = load(stored(hub, "me/ltrp-conv")["model.safetensors"])
    assert same_bits(pushed, weights(tmp_path / "out" / "conv"))


@pytest.mark.slow
def test_two_processes(hub: Hub, tmp_path: Path) -> None:
    """They stay together from ranker to ranker, and one of them talks."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    flags = ["--rankers", "conv", "vit_tiny", "--device", "cpu", "--batch-size", "2"]
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 180}
    env = environment(hub, tmp_path / "home", HF_TOKEN="writer")  # noqa: S106
    for dry in (["--dry-run"], []):
        line = [*torchrun, *command(*flags, *dry)[1:]]
        done = subprocess.run(line, env=env, **options)  # type: ignore[call-overload]
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("me/ltrp-conv: nothing yet") == 1
        assert done.stdout.count("2 processes on cpu") == 2 * bool(dry)
    assert done.stdout.count("pushed, pulled again and compared") == 2
    for name, repository in (("conv", "me/ltrp-conv"), ("vit_tiny", "me/ltrp-vit-tiny")):
        pushed = load(stored(hub, repository)["model.safetensors"])
        assert same_bits(pushed, weights(tmp_path / "out" / name))


def test_what_is_wrong_is_said_before_any_training(hub: Hub, tmp_path: Path) -> None:
    hub.add("me/ltrp-conv", {"config.json": b'{"ranker": "x"}', "model.safetensors": b"other"})
    source = """
card = ["--license", "mit", "--training-data", "x"]
push = ["--repo-id", "me/ltrp-{ranker}", *card]
def show(*flags):
    run("--data", "photos", "--output", "out", *flags)
show("--rankers", "contrast")
show("--repo-id", "me/x", *card)
show("--repo-id", "{ranker}", *card)
show("--repo-id", "me/{ranker}", "--license", "mit")
show(*push)
show(*push, "--token", "wrong")
show(*push, "--token", "reader")
show(*push, "--token", "writer")
show("--no-such-flag")
show("--teacher", "me/none", "--dry-run")
show("--mask-ratio", "0.99", "--dry-run")
print(os.path.exists("out"))
"""
    lines = inside(hub, tmp_path, source)
    expected = [
        "--rankers must be rankers that learn, got 'contrast'.",
        "--repo-id must hold {ranker}, got 'me/x'.",
        "--repo-id must give OWNER/NAME, got 'conv'.",
        "what is published must state it: --training-data.",
        "pushing needs a token: set HF_TOKEN or run `hf auth login`.",
        "the Hub wants a valid token for me/ltrp-conv (401): set HF_TOKEN or run",
        "me/ltrp-conv holds other weights: --overwrite replaces them.",
        "me/ltrp-conv holds other weights: --overwrite replaces them.",
        "unrecognized arguments: --no-such-flag",
        "me/none is no local path, and as a repository: the Hub shows no repository me/none",
        "mask_ratio = 0.99 leaves 0 of 16 visible.",
        "False",
    ]
    assert len(lines) == len(expected), lines
    for line, text in zip(lines, expected):
        assert text in line
        assert line.startswith("2 ltrp-timm: ") or text == "False"
    assert not hub.asked("POST", "")


def test_the_documented_flags_exist(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every flag that docs/releasing.md shows is one of the script's or of train-ranker's."""
    monkeypatch.syspath_prepend(SCRIPTS)
    make_parser = importlib.import_module("release_rankers").make_parser
    text = (SCRIPTS.parent / "docs" / "releasing.md").read_text(encoding="utf-8")
    text = text.partition("## The reference rankers")[2]
    flags = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    assert main(["train-ranker", "--help"]) == 0
    known = make_parser().format_help() + capsys.readouterr().out
    assert {"--data", "--repo-id", "--dry-run", "--val-data", "--epochs"} <= flags
    assert flags - {"--nproc-per-node"} <= set(re.findall(r"--[a-z][a-z-]+", known))


@pytest.mark.slow
def test_the_wheel_is_all_that_a_newcomer_needs(tmp_path: Path) -> None:
    """Built from the checkout and from the sdist; installed alone; a demo far from both."""
    root = SCRIPTS.parent
    built = {"directory": str(tmp_path / "dist"), "versions": ["standard"]}
    wheel = next(WheelBuilder(str(root)).build(**built))
    with tarfile.open(next(SdistBuilder(str(root)).build(**built))) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    for name in (
        *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "SECURITY.md", "LICENSE"),
        *("mkdocs.yml", "docs/index.md", "docs/app.png", "docs/guides/app.md"),
        *("tests/conftest.py", "benchmarks/report.py", "scripts/release_rankers.py"),
        *(f"examples/notebooks/{path.name}" for path in NOTEBOOKS),
    ):
        assert (source / name).read_bytes() == (root / name).read_bytes(), name
    built["directory"] = str(tmp_path / "again")
    again = next(WheelBuilder(str(source)).build(**built))
    assert files_in(wheel) == files_in(again)

    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    home = tmp_path / "venv" / "bin"
    subprocess.run([home / "pip", "install", "-q", "--no-deps", wheel], check=True)
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    others = Path(importlib.import_module("torch").__file__ or "").parents[1]
    (site / "others.pth").write_text(str(others))  # its dependencies, which lie behind it
    away = tmp_path / "away"
    away.mkdir()
    env = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    options: dict[str, Any] = {"cwd": away, "capture_output": True, "text": True, "check": False}
    options["env"] = {**env, "HF_HUB_CACHE": str(away / "hub"), "HF_HUB_OFFLINE": "1"}
    where = [home / "python", "-c", "import ltrp_timm; print(ltrp_timm.__file__)"]
    assert subprocess.run(where, **options).stdout.startswith(str(site))
    demo = [home / "ltrp-timm", "demo", "--model", "ltrp_vit_tiny", "--repeats", "1"]
    done = subprocess.run(demo, **options)
    assert (done.returncode, done.stderr) == (0, "")
    assert "pruned: with ranking" in done.stdout
    assert (away / "ltrp_demo.png").read_bytes().startswith(b"\x89PNG")
    rank = [home / "python", "-c", "import ltrp_timm; ltrp_timm.create_ranker('conv', True)"]
    assert subprocess.run(rank, **options).returncode == 0  # weights inside the wheel


def files_in(wheel: str) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}
