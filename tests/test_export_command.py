import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import onnxruntime
import pytest
import timm
import torch
from conftest import aoti_is_slow
from safetensors.torch import save_file

import ltrp_timm
from ltrp_timm.commands import main
from ltrp_timm.deploy.formats import FORMATS, load_exported
from ltrp_timm.models.open_model import open_model

SMALL = ("--img-size", "64", "--keep-ratio", "0.4")
FAST = ("export", "ltrp_vit_tiny", *SMALL)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, and an empty Hub cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(autouse=True)
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of one block: depth is no flag, and not what is tested."""
    real = timm.create_model

    def create(name: str, *args: Any, **kwargs: Any) -> Any:
        shallow = {} if "vit_tiny" not in f"{name}{kwargs.get('backbone')}" else {"depth": 1}
        return real(name, *args, **{**shallow, **kwargs})

    monkeypatch.setattr(timm, "create_model", create)


def one_line(err: str) -> str:
    assert err.startswith("ltrp-timm: "), err
    assert len(err.splitlines()) == 1, err
    return err


@aoti_is_slow
def test_a_file_is_written_checked_and_timed(
    here: Path, capsys: pytest.CaptureFixture[str], format: str
) -> None:
    assert main([*FAST, "--format", format, "--repeats", "2", "--threads", "1"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    name = f"ltrp_vit_tiny{FORMATS[format][0]}"
    assert os.listdir(here) == [name]
    assert "keeps 6 of 16 at 0.4" in out
    assert "backbone weights: random" in out
    batch = "any" if format == "torchscript" else "1"
    assert re.search(rf"^file +{name}, {format}, [\d.]+ MB, batch {batch}$", out, re.M)
    found = re.search(r"eager pruned model (\S+) \((\d) images; outputs up to", out)
    assert found
    assert float(found[1]) <= 1e-4
    assert int(found[2]) >= 4
    assert re.search(r"difference from the full model \d\.\de[-+]\d+$", out, re.M)
    assert "1 thread(s), float32, median of 2 round(s)" in out
    times = re.findall(r"^  (\S.*?) {2,}([\d.]+) ms", out, re.M)
    assert [row[0] for row in times] == [
        f"{format}, full model",
        f"{format}, keep 0.4",
        "eager, the same",
    ]
    assert all(float(row[1]) > 0 for row in times)
    assert "\n  x: speed-up over the full model in the same format, ranking included" in out


def test_what_the_flags_say_is_in_the_file(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--ranker", "conv", "--num-classes", "5", "--dynamic-batch", "--opset", "19"]
    flags += ["--selection", "top", "--repeats", "0", "--no-check", "-o", "a.onnx"]
    assert main(["export", "vit_tiny_patch16_224", *SMALL, *flags]) == 0
    out, _ = capsys.readouterr()
    assert "parity      not checked (--no-check)" in out
    assert "time of" not in out
    assert re.search(r"conv: .* untrained, its choice means nothing", out)
    session = onnxruntime.InferenceSession("a.onnx", providers=["CPUExecutionProvider"])
    assert session.get_outputs()[0].shape[1] == 5
    assert session.get_inputs()[0].shape[1:] == [3, 64, 64]
    assert not isinstance(session.get_inputs()[0].shape[0], int)
    metadata = json.loads(session.get_modelmeta().custom_metadata_map["ltrp_timm"])
    assert metadata["ranker"] == "conv"
    assert metadata["batch_size"] is None
    assert metadata["keep_ratio"] == 0.4


@pytest.mark.parametrize("whole", [False, True])
def test_weights_of_a_file_are_in_the_exported_one(
    here: Path, capsys: pytest.CaptureFixture[str], whole: bool
) -> None:
    torch.manual_seed(3)
    net: Any = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=5).eval()
    model = ltrp_timm.drop_patches(net, keep_ratio=0.4)
    save_file(model.state_dict() if whole else net.state_dict(), "w.safetensors")
    flags = ["--checkpoint", "w.safetensors", "--num-classes", "5", "--repeats", "0"]
    assert main([*FAST, *flags, "--format", "pt2", "-o", "a.pt2"]) == 0
    assert "backbone weights: read from w.safetensors" in capsys.readouterr().out
    run, _ = load_exported("a.pt2", "pt2")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert (run(images) - model(images)).abs().max() <= 1e-5


@pytest.mark.parametrize("ours", [False, True])
def test_a_saved_model_keeps_its_own_ranker_unless_one_is_named(here: Path, ours: bool) -> None:
    if ours and not hasattr(timm.models, "_input"):
        pytest.skip(f"timm {timm.__version__} does not record model arguments")
    name = "ltrp_vit_tiny" if ours else "vit_tiny_patch16_224"
    kwargs = {"ranker": "conv", "keep_ratio": 0.3} if ours else {}
    saved: Any = timm.create_model(name, img_size=64, num_classes=5, **kwargs).eval()
    if ours:
        saved.ranker.trained = True  # it would warn otherwise
    timm.models.save_for_hf(saved, "saved", safe_serialization=True)
    own, weights = open_model("local-dir:saved")
    assert weights == "those of local-dir:saved"
    assert own.ranker.name == ("conv" if ours else "border")
    assert own.keep_ratio == (0.3 if ours else 0.5)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        if ours:
            assert torch.equal(own(images), saved(images))
        other, _ = open_model("local-dir:saved", ranker="random", keep_ratio=0.6)
        assert other.ranker.name == "random"
        assert other.keep_ratio == 0.6
        assert torch.equal(other.backbone(images), getattr(saved, "backbone", saved)(images))
    assert open_model("local-dir:saved", keep_ratio=0.7)[0].keep_ratio == 0.7
    assert main(["export", "local-dir:saved", "--format", "pt2", "--repeats", "0"]) == 0
    assert Path("saved.pt2").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "required: MODEL"),
        (["ltrp_vit_bse"], "MODEL 'ltrp_vit_bse' is unknown: did you mean ltrp_vit_base"),
        (["resnet10t"], "MODEL resnet10t: cannot drop patches from ResNet"),
        (["local-dir:none"], "MODEL local-dir:none: Config file not found"),
        (["ltrp_vit_tiny", "--format", "tflite"], "invalid choice: 'tflite'"),
        (["ltrp_vit_tiny", "--keep-ratio", "0"], r"--keep-ratio: must be in \(0, 1\], got 0\."),
        (["ltrp_vit_tiny", "--batch-size", "-1"], "must be a whole number from 1, got -1"),
        (["ltrp_vit_tiny", "--batch-size", "0"], "must be a whole number from 1, got 0"),
        (["ltrp_vit_tiny", "--repeats", "-1"], "must be a whole number from 0, got -1"),
        (["ltrp_vit_tiny", "--ranker", "best"], "--ranker must be one of attention"),
        (["ltrp_vit_tiny", "--ranker-weights", "x"], r"leave 'x' \(--ranker-weights\) out"),
        (["ltrp_vit_tiny", "--selection", "best"], "invalid choice: 'best'"),
        (["ltrp_vit_tiny", "--img-size", "8"], "nothing was written: images of 8x8 are smaller"),
        (["ltrp_vit_tiny", "--checkpoint", "none.pth"], "none.pth does not exist"),
        (
            ["ltrp_vit_tiny", "--checkpoint", "there.onnx"],
            "must be a folder or a file of",
        ),
        (
            ["ltrp_vit_tiny", "-o", "there.onnx"],
            "there.onnx cannot be written: it exists already; --overwrite",
        ),
        (
            ["ltrp_vit_tiny", "-o", "folder.onnx"],
            "folder.onnx cannot be written: it is not a regular file",
        ),
        (["ltrp_vit_tiny", "-o", "no/a.onnx"], "no/a.onnx cannot be written: No such file"),
        (["ltrp_vit_tiny", "-o", "/proc/a.onnx"], "cannot be written"),
        (["ltrp_vit_tiny", "-o", "a.pt2"], r"--output must end in \.onnx, got a\.pt2"),
        (["ltrp_vit_tiny", "--format", "pt2", "--opset", "18"], "--opset requires --format onnx"),
        (["ltrp_vit_tiny", "--threads", "99999"], "--threads must be from 1 to"),
    ],
)
def test_wrong_arguments_are_one_line_and_change_nothing(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: Sequence[str], text: str
) -> None:
    Path("there.onnx").write_text("old")
    Path("folder.onnx").mkdir()
    assert main(["export", *arguments]) == 2
    assert re.search(text, one_line(capsys.readouterr().err))
    assert sorted(os.listdir(here)) == ["folder.onnx", "there.onnx"]
    assert Path("there.onnx").read_text() == "old"


def test_a_checkpoint_and_a_ranker_do_not_fight(capsys: pytest.CaptureFixture[str]) -> None:
    model: Any = timm.create_model("ltrp_vit_tiny", ranker="conv", img_size=64)
    save_file(model.state_dict(), "w.safetensors")
    model.ranker.save("ranker")
    flags = ["--ranker", "conv", "--ranker-weights", "ranker", "--checkpoint", "w.safetensors"]
    assert main([*FAST, *flags]) == 2
    assert "has a ranker: leave ranker_weights (--ranker-weights) out" in capsys.readouterr().err


def test_a_failed_check_leaves_no_file(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ltrp_timm.deploy.export.write_file

    def full(model: Any, *args: Any) -> None:
        with ltrp_timm.visualize.keeping(model, 1.0):
            real(model, *args)

    monkeypatch.setattr("ltrp_timm.deploy.export.write_file", full)
    assert main([*FAST, "--format", "pt2"]) == 2
    out, err = capsys.readouterr()
    assert re.search(r"nothing was written: .* pruned outputs \d\.\de", one_line(err))
    assert "time of" not in out
    assert os.listdir(here) == []


@aoti_is_slow
def test_a_full_disk_is_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    compile_program = torch._inductor.aoti_compile_and_package

    def fill_up() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, before[1]))  # the file has 2 to 3 MB

    def compile_and_fill_up(*args: Any, **options: Any) -> None:
        compile_program(*args, **options)  # the compiler's own files lie elsewhere
        fill_up()

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", compile_and_fill_up)
    try:
        if format != "aoti":
            fill_up()
        assert main([*FAST, "--format", format]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "cannot be written: File too large." in one_line(capsys.readouterr().err)
    assert os.listdir(here) == []


def test_a_missing_extra_is_said_before_any_work(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main([*FAST]) == 2
    out, err = capsys.readouterr()
    assert "pip install 'ltrp-timm[export]'" in one_line(err)
    assert out == ""
    assert main([*FAST, "--format", "pt2", "--repeats", "0"]) == 0  # needs none of them
