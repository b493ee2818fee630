"""Folders of images in, scores and pictures out: the same however the work is cut up."""

import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from processes import Started, run_command, run_two

import ltrp_timm
from ltrp_timm import create_ranker, drop_patches, num_keep, select_top
from ltrp_timm.commands import main
from ltrp_timm.scoring import store
from ltrp_timm.scoring.scorer import Scorer
from ltrp_timm.scoring.store import FAILED, PENDING, RANKED, ScoreWriter
from ltrp_timm.share import save_pretrained

SMALL = ("--img-size", "64", "--num-workers", "0")
ROOT = Path(ltrp_timm.__file__).parents[1]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eleven images in three folders, and two files that are none."""
    monkeypatch.chdir(tmp_path)
    make_images(Path("photos"))
    return tmp_path


def make_images(root: Path) -> None:
    generator = np.random.default_rng(0)
    for place in (".", "b/c", "é"):
        (root / place).mkdir(parents=True, exist_ok=True)
    for number in range(11):
        place = root / (".", "b/c", "é")[number % 3]
        coarse = generator.integers(0, 255, (9, 7, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((70 + 9 * number, 80), Image.Resampling.BICUBIC)
        image.save(place / f"{number}.png")
    (root / "b" / "bad.JPG").write_text("text")
    (root / "empty.png").touch()
    (root / "notes.txt").write_text("no image by its name")
    (root / ".hidden.png").write_text("passed over")


FILES = {"scores.npy", "done.npy", "index.json"}
BAD = ["b/bad.JPG", "empty.png"]


def load(output: str) -> dict[str, Any]:
    """The arrays of a finished run, and its index."""
    arrays = {path.stem: np.load(path) for path in Path(output).glob("*.npy")}
    return {**arrays, **json.loads((Path(output) / "index.json").read_text())}


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    assert first.keys() == second.keys()
    return all(np.array_equal(first[key], second[key], key == "scores") for key in first)


def tree(root: str) -> set[str]:
    found = {str(path.relative_to(root)) for path in Path(root).rglob("*") if path.is_file()}
    return found - {".lock"}


def test_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["rank", "photos", "-o", "out", *SMALL, "--keep-ratio", "0.3", "--batch-size", "3"]
    assert main([*arguments, "--overlays"]) == 2  # two files are no images
    out, err = capsys.readouterr()
    assert out == "ranked 11 images, 2 failed: out\n"
    lines = err.splitlines()
    assert [re.search(r"ltrp-timm: (\S+): is", line).group(1) for line in lines] == BAD
    results = load("out")
    names = sorted([f"{('', 'b/c/', 'é/')[n % 3]}{n}.png" for n in range(11)] + BAD)
    assert results["images"] == names
    assert list(results["failures"]) == BAD
    assert [f"ltrp-timm: {reason}" for reason in results["failures"].values()] == lines
    assert results["sizes"] == [(Path("photos") / name).stat().st_size for name in names]
    assert results["scores"].shape == (13, 16)
    assert results["scores"].dtype == np.float32
    assert results["grid_size"] == [4, 4]
    assert (results["ranker"], results["selection"]) == ("border", "top")
    assert results["keep_ratio"] == 0.3
    assert results["input_size"] == [64, 64]
    # what they are: the ranker on timm's own transform, the best of them
    transform = timm.data.create_transform(
        (3, 64, 64), interpolation="bicubic", mean=(0.0,) * 3, std=(1.0,) * 3, crop_pct=1.0
    )
    for name, *arrays in zip(names, *(results[k] for k in ("scores", "keep_indices", "done"))):
        scores, keep, done = arrays
        if name in BAD:
            assert np.isnan(scores).all()
            assert (keep == -1).all()
            assert done == FAILED
            continue
        pixels = transform(Image.open(f"photos/{name}").convert("RGB")).unsqueeze(0)
        expected = create_ranker("border")(pixels).flatten(1)
        assert torch.equal(torch.from_numpy(scores), expected[0])
        assert torch.equal(torch.from_numpy(keep), select_top(expected, num_keep(16, 0.3))[0])
        assert done == RANKED
    assert len({row.tobytes() for row in results["scores"]}) == 12
    good = [name for name in names if name not in BAD]
    assert tree("out") == {*FILES, "keep_indices.npy", *(f"overlays/{name}.png" for name in good)}
    with Image.open("out/overlays/b/c/1.png.png") as picture:
        assert picture.size == (3 * 224 + 2 * 8, 224 + 24)


@pytest.mark.parametrize("ranker", ["contrast", "conv"])
def test_batches_and_workers_change_nothing(folder: Path, ranker: str) -> None:
    more = ["--keep-ratio", "0.5"]
    if ranker == "conv":
        create_ranker("conv").save("ranker")
        more += ["--ranker", "conv", "--ranker-weights", "ranker"]
    runs = {
        "one": ["--batch-size", "1"],
        "five": ["--batch-size", "5"],
        "all": ["--batch-size", "64", "--num-workers", "2"],
    }
    for name, changes in runs.items():
        assert main(["rank", "photos", "-o", name, *SMALL, *more, *changes]) == 2
    first = load("one")
    good = first["done"] == RANKED
    for name in ("five", "all"):
        other = load(name)
        assert np.array_equal(other["keep_indices"], first["keep_indices"])
        difference = np.abs(other["scores"] - first["scores"])[good].max()
        assert difference <= (0 if ranker != "conv" else 1e-6)
    assert tree("one") == {*FILES, "keep_indices.npy"}


def test_a_selection_alone_takes_half(folder: Path) -> None:
    assert main(["rank", "photos", "-o", "out", *SMALL, "--selection", "stratified"]) == 2
    results = load("out")
    assert (results["keep_ratio"], results["selection"]) == (0.5, "stratified")
    assert results["keep_indices"].shape == (13, 8)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "ltrp_dinov2_small", "hybrid"])
def test_as_in_front_of_a_model(folder: Path, name: str) -> None:
    """Scores and kept patches are those that the pruned model would take."""
    side = {"ltrp_dinov2_small": 56, "hybrid": 64}.get(name, 64)
    name = "vit_tiny_r_s16_p8_224" if name == "hybrid" else name
    sizes = ["--img-size", str(side), "--num-workers", "0", "--keep-ratio", "0.5"]
    assert main(["rank", "photos", "-o", "out", *sizes, "--model", name]) == 2
    results = load("out")
    net = timm.create_model(name, img_size=side).eval()
    model = net if name.startswith("ltrp") else drop_patches(net)
    assert results["model"] == name
    for image, scores, keep in zip(*(results[k] for k in ("images", "scores", "keep_indices"))):
        if image in BAD:
            continue
        x = ltrp_timm.visualize.to_tensor(Image.open(f"photos/{image}").convert("RGB"), model)
        assert torch.equal(model.patch_scores(x)[0], torch.from_numpy(scores))
        assert torch.equal(model.keep_indices(x)[0], torch.from_numpy(keep))


def test_a_saved_model_ranks_with_its_own_ranker(folder: Path) -> None:
    create_ranker("conv").save("ranker")
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1)
    model = drop_patches(vit.eval(), "conv", ranker_weights="ranker")
    save_pretrained(model, "saved")
    arguments = ["rank", "photos", "--model", "local-dir:saved", "--num-workers", "0"]
    assert main([*arguments, "-o", "own"]) == 2
    assert main([*arguments, "-o", "other", "--ranker", "contrast"]) == 2
    own, other = load("own"), load("other")
    assert (own["ranker"], other["ranker"]) == ("conv", "contrast")
    x = ltrp_timm.visualize.to_tensor(Image.open("photos/0.png").convert("RGB"), model)
    scores = torch.from_numpy(own["scores"][own["images"].index("0.png")])
    assert torch.allclose(model.patch_scores(x)[0], scores, atol=1e-6)


class StopError(Exception):
    """Stands for whatever ends a run."""


def interrupt_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let so many batches be written, then stop."""
    write, written = ScoreWriter.write, []

    def counted(self: Any, *arguments: Any) -> None:
        if len(written) == count:
            raise StopError
        written.append(arguments)
        write(self, *arguments)

    monkeypatch.setattr(ScoreWriter, "write", counted)


def test_resume_equals_uninterrupted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["rank", "photos", *SMALL, "--overlays", "--keep-ratio", "0.5", "--batch-size", "4"]
    assert main([*common, "-o", "whole"]) == 2
    with monkeypatch.context() as patch:
        interrupt_after(2, patch)
        with pytest.raises(StopError):
            main([*common, "-o", "cut"])
    done = np.load("cut/done.npy")
    assert (done[8:] == PENDING).all()
    assert (done[:8] == RANKED).sum() == 7  # b/bad.JPG is among them
    ranked: list[int] = []
    call = Scorer.__call__

    def count(self: Any, pixels: Any) -> Any:
        ranked.append(len(pixels))
        return call(self, pixels)

    monkeypatch.setattr(Scorer, "__call__", count)
    capsys.readouterr()
    assert main([*common, "-o", "cut"]) == 2
    assert ranked == [4, 4, 1]  # what was missing, and the batch of what could not be read
    assert len(capsys.readouterr().err.splitlines()) == 2
    assert same(load("cut"), load("whole"))
    assert tree("cut") == tree("whole")


def test_files_that_were_unreadable_are_tried_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "photos" / "empty.png").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("ltrp_timm.data.images.Images.read_item", unreadable)
        interrupt_after(1, patch)
        with pytest.raises(StopError):
            main(["rank", "photos", "-o", "out", *SMALL, "--batch-size", "4"])
    assert (np.load("out/done.npy")[:4] == FAILED).all()
    assert main(["rank", "photos", "-o", "out", *SMALL, "--batch-size", "4"]) == 2
    assert list(load("out")["failures"]) == ["b/bad.JPG"]


def unreadable(*_: Any) -> Any:
    raise ValueError("the disk is away.")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (["--keep-ratio", "0.25"], r"unfinished run with keep_ratio = 0\.5, this run has 0\.25"),
        (["--ranker", "random"], "unfinished run with ranker = border, this run has random"),
        (["--img-size", "96"], r"input_size = \[64, 64\], this run has \[96, 96\]"),
        (["--patch-size", "8"], "unfinished run with ranker_args"),
        (["--selection", "random"], "unfinished run with selection = top, this run has random"),
        (["--overlays"], "unfinished run with overlays = False"),
        (["--ranker-args", "img_size=32"], "unfinished run with ranker_args"),
        (["no keep ratio"], "unfinished run with keep_ratio = 0.5, this run has None"),
        (["--crop-mode", "squash"], "crop_mode = center, this run has squash"),
        (["new image"], "unfinished run with images_hash"),
        (["touched image"], "unfinished run with images_hash"),
    ],
)
def test_other_settings_are_not_mixed(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: list[str],
    text: str,
) -> None:
    first = ["rank", "photos", "-o", "out", *SMALL, "--keep-ratio", "0.5", "--batch-size", "4"]
    with monkeypatch.context() as patch:
        interrupt_after(1, patch)
        with pytest.raises(StopError):
            main(first)
    before = {name: (Path("out") / name).read_bytes() for name in tree("out")}
    if changes == ["new image"]:
        Image.new("RGB", (64, 64)).save("photos/z.png")
    elif changes == ["touched image"]:
        os.utime("photos/0.png", ns=(1, 1))
    again = [*first, *(c for c in changes if " " not in c)]
    if changes == ["no keep ratio"]:
        again = [flag for flag in first if flag not in ("--keep-ratio", "0.5")]
    assert main(again) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert re.search(rf"{text}.*; use --overwrite to start again\.", err), err
    assert {name: (Path("out") / name).read_bytes() for name in tree("out")} == before
    assert main([*again, "--overwrite"]) == 2
    assert load("out")["finished"]


def test_other_weights_are_not_mixed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["rank", "photos", "-o", "out", *SMALL, "--batch-size", "4", "--ranker", "conv"]
    arguments += ["--ranker-weights"]
    for name in ("one", "two"):
        create_ranker("conv").save(name)
    with monkeypatch.context() as patch:
        interrupt_after(1, patch)
        with pytest.raises(StopError):
            main([*arguments, "one"])
    assert main([*arguments, "two"]) == 2
    assert "unfinished run with ranker_hash" in capsys.readouterr().err
    assert main([*arguments, "one"]) == 2
    assert (load("out")["done"] == RANKED).sum() == 11


def test_nothing_is_replaced_without_overwrite(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["rank", "photos/0.png", "-o", "out", *SMALL]
    assert main(arguments) == 0
    before = {name: (Path("out") / name).read_bytes() for name in tree("out")}
    for changes in ([], ["--keep-ratio", "0.1"], ["--overlays"]):
        assert main([*arguments, *changes]) == 2
        assert "out already holds scores; use --overwrite to replace" in capsys.readouterr().err
    assert {name: (Path("out") / name).read_bytes() for name in tree("out")} == before
    assert main([*arguments, "--keep-ratio", "0.1", "--overwrite"]) == 0
    assert load("out")["keep_indices"].shape == (1, 2)
    assert main([*arguments, "--overwrite"]) == 0
    assert tree("out") == FILES  # and not the kept patches of the run before
    (Path("other") / "overlays").mkdir(parents=True)
    (Path("other") / "overlays" / "mine.txt").write_text("mine")
    assert main(["rank", "photos/0.png", "-o", "other", *SMALL]) == 2
    assert "other already holds overlays" in capsys.readouterr().err
    assert main(["rank", "photos/0.png", "-o", "other", *SMALL, "--overwrite"]) == 0
    assert (Path("other") / "overlays" / "mine.txt").read_text() == "mine"


def test_what_is_an_image_and_what_it_is_called(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # twice the same, files and folders, results inside the folder, a name without a suffix
    Path("photos/plain").write_bytes(Path("photos/0.png").read_bytes())
    given = ["photos/b", "photos/b/c/1.png", "photos/plain", "photos/nothing"]
    for _ in range(2):
        assert main(["rank", *given, "-o", "photos/out", *SMALL, "--overwrite"]) == 2
        expected = ["b/bad.JPG", "b/c/1.png", "b/c/10.png", "b/c/4.png", "b/c/7.png", "plain"]
        assert load("photos/out")["images"] == expected
        err = capsys.readouterr().err.splitlines()
        assert err[0] == "ltrp-timm: photos/nothing: No such file or directory."
        assert err[1].startswith("ltrp-timm: b/bad.JPG: is not an image")
        assert len(err) == 2
    assert main(["rank", "photos/b", "-o", "photos/b", *SMALL]) == 2
    assert main(["rank", "photos/b", "-o", "photos/b", *SMALL, "--overwrite"]) == 2
    expected = ["bad.JPG", "c/1.png", "c/10.png", "c/4.png", "c/7.png"]
    assert load("photos/b")["images"] == expected


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nothing"], r"nothing: No such file or directory\."),
        (["."], "no images were found"),
        ([""], "an input has an empty name"),
        (["text.png"], "no image could be read, nothing was written: text.png: is not an image"),
        (["a.png", "--ranker", "best"], "ranker must be one of attention, .*'best'"),
        (
            ["a.png", "--ranker", "conv"],
            "conv ranker is not trained.*--ranker-weights PATH or --pretrained",
        ),
        (["a.png", "--ranker", "attention"], "--ranker-weights PATH or --pretrained"),
        (["a.png", "--ranker", "vit_tiny"], r"--ranker-weights PATH\.$"),
        (
            ["a.png", "--pretrained", "--ranker-weights", "x"],
            "--pretrained and --ranker-weights exclude each other",
        ),
        (["a.png", "--ranker-weights", "nowhere"], "the border ranker has no weights"),
        (["a.png", "--ranker", "conv", "--ranker-weights", "no"], r"no does not exist\."),
        (
            ["a.png", "--ranker", "vit_tiny", "--pretrained"],
            "no published weights exist for the vi",
        ),
        (["a.png", "--ranker-args", "x"], "expected NAME=VALUE, got 'x'"),
        (["a.png", "--ranker-args", "x=1"], "unexpected keyword argument 'x'"),
        (["a.png", "--keep-ratio", "2"], r"--keep-ratio: must be in \(0, 1\], got 2"),
        (["a.png", "--img-size", "8"], "images of 8 pixels are smaller than a patch of 16"),
        (["a.png", "--model", "resnet10t"], "cannot drop patches from ResNet"),
        (["a.png", "--model", "nope"], r"model 'nope' is unknown: "),
        (["a.png", "--model", "x", "--patch-size", "8"], "--patch-size does not go with --model"),
        (["a.png", "--crop-mode", "corner"], "crop_mode must be center or squash, got 'corner'"),
        (["a.png", "--device", "nope"], "device 'nope' cannot be used: "),
        (["a.png", "--device", "meta"], "device 'meta' cannot be used: "),
        (["a.png", "--num-workers", "-1"], "--num-workers: "),
        (["a.png", "text.png", "--split", "val"], "a data set is ranked alone, got 2 inputs"),
        (["nowhere", "--split", "val"], "nowhere does not exist"),
        (["hfds/none", "a.png"], "a data set is ranked alone, got 2 inputs"),
        (["a.png", "--batch-size", "0"], "--batch-size: must be a whole number from 1"),
        (["a.png", "-o", ""], "--output must name a folder"),
        (["a.png", "-o", "a.png"], r"ltrp-timm: a\.png is not a folder\."),
    ],
)
def test_wrong_arguments_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    text: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    if arguments != ["."]:
        Image.new("RGB", (64, 64)).save("a.png")
        Path("text.png").write_text("text")
    before = tree(".")
    assert main(["rank", "-o", "../out", "--num-workers", "0", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ltrp-timm: ")
    assert re.search(text, err.splitlines()[-1]), err
    assert len(err.splitlines()) == 1, err
    assert tree(".") == before
    assert not tree("../out") if Path("../out").exists() else True


def test_strips_and_damaged_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (1, 5000)).save("strip.png")
    assert main(["rank", "strip.png", "photos/0.png", "-o", "out", *SMALL]) == 2
    assert "strip.png: 1x5000 pixels, over 50 times longer than wide" in capsys.readouterr().err
    arguments = ["rank", "photos", "-o", "cut", *SMALL, "--batch-size", "4"]
    with monkeypatch.context() as patch:
        interrupt_after(2, patch)
        with pytest.raises(StopError):
            main(arguments)
    capsys.readouterr()
    scores = np.load("cut/scores.npy")
    for content in (b"damaged", None):
        np.save("cut/scores.npy", scores[:3])
        if content is not None:
            Path("cut/scores.npy").write_bytes(content)
        assert main(arguments) == 2
        err = capsys.readouterr().err
        assert "cut/scores.npy is damaged" in err
        assert len(err.splitlines()) == 1
    Path("cut/scores.npy").unlink()
    assert main(arguments) == 2
    assert "cut/scores.npy is damaged" in capsys.readouterr().err
    np.save("cut/scores.npy", scores)
    Path("cut/done.npy").write_bytes(b"damaged")
    assert main(arguments) == 2
    assert "cut/done.npy is damaged" in capsys.readouterr().err
    Path("cut/index.json").write_text("[]")
    assert main(arguments) == 2
    assert "cut/index.json must be a JSON object" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 2
    assert load("cut")["finished"]


def header(shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    about = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, about)
    return file.getvalue()


@pytest.mark.parametrize("name", ["scores.npy", "done.npy", "keep_indices.npy"])
@pytest.mark.parametrize("content", [None, b"", b"PK\3\4", header((13, 2**33))])
def test_an_array_that_lost_its_end_is_not_filled_with_zeros(
    folder: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes | None
) -> None:
    arguments = ["rank", "photos", "-o", "out", "--keep-ratio", "0.5", *SMALL]
    assert main(arguments) == 2
    index = Path("out/index.json")
    index.write_text(index.read_text().replace('"finished": true', '"finished": false'))
    path = Path("out") / name
    short = path.read_bytes()[:-4] if content is None else content
    path.write_bytes(short)
    capsys.readouterr()
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"out/{name} is damaged: " in line
    assert line.endswith("rank the images again with --overwrite.")
    assert path.read_bytes() == short


def test_a_start_that_was_cut_off_is_made_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["rank", "photos", "-o", "out", *SMALL]
    create = store._create
    for name in ("scores.npy", "done.npy"):
        with monkeypatch.context() as patch:

            def stop(path: Path, *shape: Any, name: str = name) -> None:
                if path.name == name:
                    raise StopError
                create(path, *shape)

            patch.setattr(store, "_create", stop)
            with pytest.raises(StopError):
                main(arguments)
    assert main(arguments) == 2
    assert (load("out")["done"] != PENDING).all()


def test_a_full_disk_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Space is reserved before the work: a memory map on a full disk kills the process."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        size = ["--img-size", "224", "--patch-size", "4", "--num-workers", "0"]
        assert main(["rank", "photos", "-o", "out", *size]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "File too large" in capsys.readouterr().err
    assert not (Path("out") / "scores.npy").exists()


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def many_images(folder: Path, count: int) -> None:
    generator = np.random.default_rng(1)
    folder.mkdir()
    for number in range(count):
        pixels = generator.integers(0, 255, (48, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")


def test_two_processes_of_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    many_images(tmp_path / "many", 150)  # five batches
    (tmp_path / "many" / "bad.png").write_text("text")
    create_ranker("conv").save("ranker")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = ["rank", "many", *SMALL, "--keep-ratio", "0.5"]
    command += ["--ranker", "conv", "--ranker-weights", "ranker"]
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    run += ["--master-addr", "127.0.0.1", "--master-port", port, "-m", "ltrp_timm"]
    run += [*command, "-o", "two"]
    done = subprocess.run(run, env=environment(), capture_output=True, text=True, check=False)
    assert "ranked 150 images, 1 failed: two" in done.stdout, done.stderr
    assert done.returncode != 0  # one file is no image
    assert done.stderr.count("bad.png: is not an image") == 1
    with one_thread():
        assert main([*command, "-o", "one"]) == 2
    assert same(load("two"), load("one"))  # to the last bit: the batches are the same
    assert tree("two") == {*FILES, "keep_indices.npy"}
    done = run_two(*command, "-o", "two")
    assert done == (
        2,
        "",
        "ltrp-timm: two already holds scores; use --overwrite to replace them.\n",
    )


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """As in ``environment``: sums depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


RENDEZVOUS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555"}
TORCHRUN = "; start several processes with torchrun, or unset"


@pytest.mark.parametrize("command", ["rank", "train-ranker"])
@pytest.mark.parametrize(
    ("variables", "text"),
    [
        (
            {"WORLD_SIZE": "2"},
            f"WORLD_SIZE is 2, but RANK, MASTER_ADDR, MASTER_PORT are not set{TORCHRUN} WORLD_SIZE",
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"},
            f"WORLD_SIZE is 2, but MASTER_PORT is not set{TORCHRUN} WORLD_SIZE",
        ),
        (
            {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"},
            f"SLURM_NTASKS is 2, but MASTER_ADDR, MASTER_PORT are not set{TORCHRUN} SLURM_NTASKS",
        ),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "WORLD_SIZE must be a number of processes, got '0'"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE must be a number of processes, got 'two'"),
        ({"WORLD_SIZE": "2", "RANK": "x"}, "RANK must be a number from 0 to 1, got 'x'"),
        (
            {"SLURM_NTASKS": "2", "SLURM_PROCID": "-1"},
            "RANK must be a number from 0 to 1, got '-1'",
        ),
    ],
)
def test_several_processes_need_torchrun(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    variables: dict[str, str],
    text: str,
) -> None:
    place = [] if "not set" in text else [RENDEZVOUS]
    monkeypatch.setattr(os, "environ", {**os.environ, **variables, **dict(*place)})
    options = {
        "rank": ["photos", *SMALL],
        "train-ranker": ["--data", "photos", "--ranker", "conv", "--img-size", "64"],
    }
    assert main([command, *options[command], "-o", "out"]) == 2
    assert capsys.readouterr().err.startswith(f"ltrp-timm: {text}")
    assert not Path("out").exists()


def test_two_processes_of_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    many_images(tmp_path / "many", 16)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {**RENDEZVOUS, "MASTER_PORT": str(free.getsockname()[1])}
    command = ["rank", "many", "-o", "out", *SMALL, "--batch-size", "4"]
    processes = [
        Started(main, command, **place, SLURM_NTASKS="2", SLURM_PROCID=number)
        for number in ("0", "1")
    ]
    first, second = (process.wait() for process in processes)
    assert first[:2] == (0, "ranked 16 images, 0 failed: out\n"), first
    assert second == (0, "", "")


class Running(Started):
    """``ltrp-timm rank`` in a process of its own, started and seen to have written something."""

    def __init__(self, *arguments: str) -> None:
        super().__init__(main, ["rank", *arguments])
        self.output = Path(arguments[arguments.index("-o") + 1])
        deadline = time.monotonic() + 120
        while not self.ranked():
            assert self.poll() is None, self.wait()
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def ranked(self) -> int:
        """How many rows are done."""
        path = self.output / "done.npy"
        return int((np.load(path) == RANKED).sum()) if path.exists() else 0


def test_two_rankers_are_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process never writes into the results of a run that goes on, nor of one that died."""
    monkeypatch.chdir(tmp_path)
    many_images(tmp_path / "many", 160)
    common = ["many", "-o", "out", *SMALL, "--batch-size", "4"]
    slow = [*common, "--overlays"]  # drawing takes long enough to be stopped
    first = Running(*slow)
    os.killpg(first.pid, signal.SIGSTOP)  # it goes on for as long as the others try
    for more in (["--ranker", "pixel_std", "--overwrite"], ["--ranker", "pixel_std"], []):
        done = run_command("rank", *slow, *more)
        assert done.returncode == 2
        assert done.stderr == ("ltrp-timm: another process is writing out; wait for it to end.\n")
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert 0 < first.ranked() < 160
    # what a killed run has left is continued by itself alone, or replaced as a whole
    assert main(["rank", *slow, "--ranker", "pixel_std"]) == 2
    assert main(["rank", *slow]) == 0
    assert main(["rank", *common[:2], "contrast", *common[3:]]) == 0
    assert np.array_equal(np.load("out/scores.npy"), np.load("contrast/scores.npy"))
    assert main(["rank", *common, "--ranker", "pixel_std", "--overwrite"]) == 0
    assert main(["rank", *common[:2], "std", *common[3:], "--ranker", "pixel_std"]) == 0
    assert np.array_equal(np.load("out/scores.npy"), np.load("std/scores.npy"))
    assert load("out")["ranker"] == "pixel_std"
    assert not np.array_equal(np.load("out/scores.npy"), np.load("contrast/scores.npy"))


def test_a_process_left_over_writes_into_files_that_are_gone(folder: Path) -> None:
    """One of torchrun's processes may outlive the one with the lock for a moment."""
    arguments = ["rank", "photos", "-o", "out", *SMALL]
    assert main(arguments) == 2
    orphan = ScoreWriter(Path("out"))
    assert main([*arguments, "--ranker", "pixel_std", "--overwrite"]) == 2
    before = load("out")
    rows = list(range(13))
    orphan.write(rows, torch.zeros(13, 16), torch.zeros(13, 1), [True] * 13)
    orphan.close()
    assert same(load("out"), before)


@pytest.mark.parametrize(
    "kind", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_leaves_whole_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: signal.Signals
) -> None:
    monkeypatch.chdir(tmp_path)
    many_images(tmp_path / "many", 200)
    arguments = ["many", "-o", "out", "--img-size", "64", "--num-workers", "1"]
    arguments += ["--batch-size", "4", "--overlays"]
    process = Running(*arguments)
    os.killpg(process.pid, kind)  # as a terminal and torchrun do: data workers too
    done = process.wait()
    assert done.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130}[kind]
    assert done.stderr == ""
    done, scores = np.load("out/done.npy"), np.load("out/scores.npy")
    assert 4 <= (done == RANKED).sum() < 200
    assert (np.ptp(scores[done == RANKED], axis=1) > 0).all()
    assert not [name for name in tree("out") if name.endswith(".tmp")]
    for path in Path("out/overlays").iterdir():
        with Image.open(path) as picture:
            picture.load()
    assert main(["rank", *arguments]) == 0
    assert main(["rank", *arguments[:2], "whole", *arguments[3:]]) == 0
    assert same(load("out"), load("whole"))


def test_real_photos_with_a_learned_ranker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = pytest.importorskip("skimage.data")
    monkeypatch.chdir(tmp_path)
    for name in ("astronaut", "chelsea"):
        Image.fromarray(getattr(data, name)()).save(f"{name}.jpg")
    args = {"backbone": "vit_tiny_patch16_224", "img_size": 64, "depth": 2}
    ranker = create_ranker("attention", **args).eval()
    for parameter in ranker.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ranker.save("ranker")
    more = ["--ranker", "attention", "--ranker-weights", "ranker"]
    assert main(["rank", ".", "-o", "out", *SMALL, *more]) == 0
    results = load("out")
    transform = timm.data.create_transform(
        (3, 64, 64), interpolation="bicubic", mean=ranker.mean, std=ranker.std, crop_pct=1.0
    )
    with torch.inference_mode():
        for name, scores in zip(results["images"], results["scores"]):
            x = transform(Image.open(name)).unsqueeze(0)
            assert np.abs(ranker(x).flatten().numpy() - scores).max() <= 1e-6
            assert np.ptp(scores) > 1e-4
    assert results["images"] == ["astronaut.jpg", "chelsea.jpg"]
    assert results["ranker_args"]["depth"] == 2
    assert results["mean"] == [0.5, 0.5, 0.5]  # the ranker's own
