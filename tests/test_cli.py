import argparse
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import ImageNetInfo

import ltrp_timm
from ltrp_timm.commands import _make_parser, main

FAST = ("demo", "--model", "ltrp_vit_tiny", "--repeats", "1")
REPOSITORY = "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, and an empty Hub cache; a few photos."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    y, x = np.mgrid[0:120, 0:160]
    photo = Image.fromarray(np.stack([x, 2 * y, x + y], axis=-1).clip(0, 255).astype(np.uint8))
    photo.save("a.jpg")
    photo.convert("CMYK").save("cmyk.jpg")
    photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save("b.png")
    Path("empty.jpg").touch()
    Path("text.png").write_text("text")
    Path("cut.jpg").write_bytes(Path("a.jpg").read_bytes()[:700])
    Path("folder.png").mkdir()
    return folder


def leftovers(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(".")]


def one_line(err: str) -> str:
    assert err.startswith("ltrp-timm: "), err
    assert len(err.splitlines()) == 1, err
    return err


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ltrp-timm {ltrp_timm.__version__}\n"
    assert main([]) == 2
    assert "usage: ltrp-timm" in capsys.readouterr().out
    assert main(["demo", "--help"]) == 0
    assert "--keep-ratio" in capsys.readouterr().out


def test_demo_on_its_own_photos(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FAST, "--keep-ratio", "0.7", "0.33", "0.25"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "ltrp_vit_tiny, 5.7 M parameters, images of 224x224" in out
    assert "border: weight-free, no learning" in out
    assert "backbone weights: random (not in the cache; --pretrained downloads them)" in out
    kept = {float(r): int(k) for k, r in re.findall(r"(\d+) of 196 at ([\d.]+)", out)}
    assert kept == {r: ltrp_timm.num_keep(196, r) for r in (0.7, 0.33, 0.25)}
    times = re.findall(r"^  (0\.\d+) +([\d.]+) ms, ([\d.]+)x.* ([\d.]+) ms, ([\d.]+)x", out, re.M)
    assert [row[0] for row in times] == ["0.7", "0.33", "0.25"]
    assert all(float(cell) > 0 for row in times for cell in row)
    assert "1 (full)" in out
    assert "no ranking: patches are given" in out
    assert "\n  x: speed-up over the full model (lower to upper quartile)\n" in out
    assert "top-1" not in out  # of random weights
    with Image.open("ltrp_demo.png") as picture:
        assert picture.format == "PNG"
        assert picture.width <= 1640
        assert picture.height > 3 * 224  # three photos
    assert not leftovers(here)


def test_good_images_are_done_and_bad_ones_named(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (1, 5000)).save("strip.png")
    bad = ["empty.jpg", "text.png", "cut.jpg", "folder.png", "missing.png", "strip.png"]
    good = ["a.jpg", "cmyk.jpg", "b.png", "a.jpg"]  # one of them twice
    given = [bad[0], *good, *bad[1:]]
    assert main([*FAST, "--keep-ratio", "0.5", "--image", *given, "--output", "out.png"]) == 2
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert [line.split(": ")[:2] for line in lines] == [["ltrp-timm", name] for name in bad]
    assert "98 of 196 at 0.5" in out
    with Image.open("out.png") as picture:
        assert picture.size == (4 * 224 + 3 * 8, 3 * 224 + 2 * 8 + 24)


def test_nothing_good_means_no_picture(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FAST, "--image", "empty.jpg", "text.png"]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 3
    assert "nothing was written" in err
    assert not Path("ltrp_demo.png").exists()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["demo", "--keep-ratio", "0"], r"--keep-ratio: must be in \(0, 1\], got 0\."),
        (["demo", "--keep-ratio", "0.5", "1.5"], r"must be in \(0, 1\], got 1\.5\."),
        (["demo", "--keep-ratio", "-0.5"], r"got -0\.5\."),
        (["demo", "--keep-ratio", "nan"], r"got nan\."),
        (["demo", "--keep-ratio", "half"], r"got half\."),
        (["demo", "--repeats", "0"], r"--repeats: must be a whole number from 1, got 0\."),
        (["demo", "--threads", "two"], r"--threads: must be a whole number from 1, got two\."),
        (["demo", "--threads", "99999"], r"--threads must be from 1 to \d+, .* got 99999\."),
        (["demo", "--ranker", "best"], "--ranker must be one of attention, .* got 'best'"),
        (["demo", "--model", "ltrp_vit_bse"], "is unknown: did you mean ltrp_vit_base"),
        (["demo", "--model", "qqqqqqqqq"], "is unknown: see timm.list_models"),
        (["demo", "--model", "."], r"is unknown: a folder is given as 'local-dir:\.'\."),
        (
            ["demo", "--model", "a.jpg"],
            "'a.jpg' is unknown: it is a file: name the model, and give",
        ),
        (["demo", "--model", "ltrp_vit_tiny.best"], r"Invalid pretrained tag \(best\)"),
        (["demo", "--model", "resnet10t"], "MODEL resnet10t: cannot drop patches from ResNet"),
        (["demo", "--output", "b.png"], r"--output b\.png cannot be written: it exists already"),
        (["demo", "--output", "no/such.png"], r"--output no/such\.png cannot be written: No such"),
        (["demo", "--output", "a.jpg", "--overwrite"], r"--output must end in \.png, got a\.jpg"),
        (["demo", "--output", "folder.png", "--overwrite"], "it is not a regular file"),
        (
            ["demo", "--image", "b.png", "--output", "./b.png", "--overwrite"],
            "it is one of the photos",
        ),
        (["demo", "--imag", "b.png"], "unrecognized arguments"),
        (["save", "ltrp_vit_tiny", "-o", "new"], "either --pretrained or --checkpoint FILE"),
        (["save", "ltrp_vit_tiny", "-o", "a.jpg"], "--output a.jpg cannot be written: it is not a"),
    ],
)
def test_wrong_arguments_are_one_line_and_change_nothing(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: Sequence[str], text: str
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in here.iterdir()}
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(text, one_line(err)), err
    assert {path.name: path.stat().st_mtime_ns for path in here.iterdir()} == before


@pytest.mark.parametrize("folder", ["shut", "/proc"])  # the second refuses root too
def test_a_folder_that_may_not_be_written_to(
    here: Path, capsys: pytest.CaptureFixture[str], folder: str
) -> None:
    Path("shut").mkdir(mode=0o500)
    if folder == "shut" and os.access(folder, os.W_OK):
        folder = "a.jpg"  # root may write into any folder, but not into a file
    assert main([*FAST, "--output", f"{folder}/a.png"]) == 2
    assert "cannot be written" in one_line(capsys.readouterr().err)


def test_what_exists_is_replaced_only_when_asked(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*FAST, "--keep-ratio", "0.5", "--image", "a.jpg"]
    Path("real.png").write_text("old")
    Path("link.png").symlink_to("real.png")
    assert main([*arguments, "--output", "link.png"]) == 2
    assert Path("real.png").read_text() == "old"
    assert main([*arguments, "--output", "link.png", "--overwrite"]) == 0
    assert Path("link.png").is_symlink()
    with Image.open("real.png") as picture:
        assert picture.format == "PNG"
    for _ in range(2):  # the default name is ours
        assert main(arguments) == 0
    umask = os.umask(0)
    os.umask(umask)
    assert Path("ltrp_demo.png").stat().st_mode & 0o777 == 0o666 & ~umask
    assert not leftovers(here)


def test_a_failure_while_writing_leaves_the_old_picture(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("ltrp_demo.png").write_text("old")

    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    assert main([*FAST, "--image", "a.jpg"]) == 2
    assert "No space left on device" in one_line(capsys.readouterr().err)
    assert Path("ltrp_demo.png").read_text() == "old"
    assert not leftovers(here)


def test_without_scikit_image_it_says_what_to_type(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("skimage", "skimage.data"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main([*FAST]) == 2
    assert "pip install 'ltrp-timm[demo]'" in one_line(capsys.readouterr().err)
    assert main([*FAST, "--keep-ratio", "0.5", "--image", "a.jpg"]) == 0


def test_any_timm_vit_and_an_untrained_ranker(
    capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    arguments = ["--model", "vit_tiny_patch16_224", "--ranker", "conv", "--keep-ratio", "1", "0.5"]
    assert main(["demo", "--repeats", "1", "--image", "a.jpg", *arguments]) == 0
    out = capsys.readouterr().out
    assert "vit_tiny_patch16_224, 5.7 M parameters" in out
    assert re.search(r"conv: 0\.\d\d M parameters, untrained, its choice means nothing", out)
    assert "196 of 196 at 1, 98 of 196 at 0.5" in out
    assert not recwarn.list


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    assert main([*FAST, "--keep-ratio", "0.5", "--image", "a.jpg", "--threads", "1"]) == 0
    assert torch.get_num_threads() == before


def put_into_cache(folder: Path) -> torch.nn.Module:
    """Weights in the layout of the Hub's client, as after a download; the model they came from."""
    torch.manual_seed(7)
    net = timm.create_model("vit_tiny_patch16_224").eval()
    torch.nn.init.normal_(net.head.weight)
    repository = folder / f"models--{REPOSITORY.replace('/', '--')}"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    save_file(net.state_dict(), snapshot / "model.safetensors")
    return net


@pytest.mark.parametrize("name", ["ltrp_vit_tiny", "vit_tiny_patch16_224"])
def test_cached_weights_are_found_without_a_network(
    here: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    net = put_into_cache(here.parent / "hub")
    command = ["demo", "--model", name, "--repeats", "1", "--image", "a.jpg", "b.png"]
    assert main([*command, "--keep-ratio", "0.5"]) == 0
    out = capsys.readouterr().out
    assert "backbone weights: found in the local cache" in out
    found = re.findall(r"^    (full|keep 0\.5) +(\d+) (.+)$", out, re.M)
    assert [row[0] for row in found] == ["full", "keep 0.5"] * 2
    for _, index, label in found:
        assert ImageNetInfo("imagenet-1k").index_to_description(int(index)) == label
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(net))
    with torch.inference_mode():
        expected = net(transform(Image.open("b.png")).unsqueeze(0)).argmax()
    assert int(found[2][1]) == expected


def test_a_backbone_without_a_classifier_names_no_class(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    put_into_cache(here.parent / "hub")
    monkeypatch.setattr("ltrp_timm.commands._console.infer_imagenet_subset", lambda model: None)
    assert main([*FAST, "--keep-ratio", "0.5", "--image", "a.jpg"]) == 0
    assert "top-1: this backbone has no ImageNet classifier" in capsys.readouterr().out


def test_damaged_weights_are_one_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put_into_cache(here.parent / "hub")
    file = next((here.parent / "hub").rglob("model.safetensors"))
    file.write_bytes(file.read_bytes()[:1000])
    assert main([*FAST, "--image", "a.jpg"]) == 2
    assert "MODEL ltrp_vit_tiny: " in one_line(capsys.readouterr().err)


def test_the_installed_command_survives_a_closed_pipe(here: Path) -> None:
    code = "import sys; from ltrp_timm.commands import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *FAST, "--keep-ratio", "0.5", "--image", "a.jpg"]
    env = {**os.environ, "HF_HUB_CACHE": str(here.parent / "hub")}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 1
    assert "Traceback" not in err
    assert "Exception" not in err


def options() -> list[tuple[str, argparse.Action]]:
    """Command and option, for all commands."""
    (commands,) = (a for a in _make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return [
        (name, action)
        for name, parser in commands.choices.items()
        for action in parser._actions
        if not isinstance(action, argparse._HelpAction)
    ]


def test_every_option_has_a_help_that_speaks_to_a_shell() -> None:
    for name, action in options():
        text = f"{name} {action.dest}: {action.help}"
        assert action.help, text
        assert not re.search(r"\bNone\b|``|\bTrue\b|\bFalse\b", action.help), text
        assert action.nargs == 0 or action.choices or action.metavar, text


def test_one_name_for_one_thing() -> None:
    """Options of one name take one kind of value in all commands."""
    kinds: dict[str, set[object]] = {}
    for _, action in options():
        if action.option_strings and not action.choices:
            kinds.setdefault(action.dest, set()).add(action.metavar)
    assert not {name: found for name, found in kinds.items() if len(found) > 1}
