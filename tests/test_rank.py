"""Folders of images in, scores and pictures out: the same however the work is cut up."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import ltrp_timm
from ltrp_timm import create_ranker, drop_patches, num_keep, select_top
from ltrp_timm.commands import main
from ltrp_timm.scoring import job, parts
from ltrp_timm.scoring import run as command

SMALL = ("--img-size", "64", "--workers", "0")
ROOT = Path(ltrp_timm.__file__).parents[1]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eleven images in three folders, two files that are none, and parts of four images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(parts, "PART_SIZE", 4)
    monkeypatch.setattr(command, "PART_SIZE", 4)
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


def load(output: str) -> dict[str, Any]:
    with np.load(Path(output) / "scores.npz", allow_pickle=False) as file:
        return dict(file)


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    assert first.keys() == second.keys()
    return all(np.array_equal(first[key], second[key]) for key in first)


def tree(root: str) -> set[str]:
    return {str(path.relative_to(root)) for path in Path(root).rglob("*") if path.is_file()}


def test_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["rank", "photos", "-o", "out", *SMALL, "--keep-ratio", "0.3", "--batch-size", "3"]
    assert main(arguments) == 2  # two files are no images
    out, err = capsys.readouterr()
    assert out == "ranked 11 images, 2 failed: out/scores.npz\n"
    lines = err.splitlines()
    assert [re.search(r"photos/(\S+): is", line).group(1) for line in lines] == [
        "b/bad.JPG",
        "empty.png",
    ]
    assert all(line.startswith("ltrp-timm: ") for line in lines)
    results = load("out")
    names = sorted(f"{('', 'b/c/', 'é/')[n % 3]}{n}.png" for n in range(11))
    assert results["images"].tolist() == names
    assert results["scores"].shape == (11, 16)
    assert results["scores"].dtype == np.float32
    assert results["grid_size"].tolist() == [4, 4]
    assert (results["ranker"], results["selection"]) == ("contrast", "top")
    assert results["keep_ratio"] == 0.3
    assert results["input_size"].tolist() == [64, 64]
    # what they are: the ranker on timm's own transform, the best of them
    transform = timm.data.create_transform(
        (3, 64, 64), interpolation="bicubic", mean=(0.0,) * 3, std=(1.0,) * 3, crop_pct=1.0
    )
    for name, scores, keep in zip(names, results["scores"], results["keep_indices"]):
        pixels = transform(Image.open(f"photos/{name}").convert("RGB")).unsqueeze(0)
        expected = create_ranker("contrast")(pixels).flatten(1)
        assert torch.equal(torch.from_numpy(scores), expected[0])
        assert torch.equal(torch.from_numpy(keep), select_top(expected, num_keep(16, 0.3))[0])
    assert len({row.tobytes() for row in results["scores"]}) == 11
    assert tree("out") == {"scores.npz", *(f"overlays/{name}.png" for name in names)}
    with Image.open("out/overlays/b/c/1.png.png") as picture:
        assert picture.size == (3 * 224 + 2 * 8, 224 + 24)


@pytest.mark.parametrize("ranker", ["contrast", "conv"])
def test_batches_and_workers_change_nothing(folder: Path, ranker: str) -> None:
    more = []
    if ranker == "conv":
        create_ranker("conv").save("ranker")
        more = ["--ranker", "conv", "--ranker-weights", "ranker"]
    runs = {
        "one": ["--batch-size", "1"],
        "five": ["--batch-size", "5"],
        "all": ["--batch-size", "64", "--workers", "2"],
    }
    for name, changes in runs.items():
        arguments = ["rank", "photos", "-o", name, *SMALL, "--no-overlays", *more, *changes]
        assert main(arguments) == 2
    first = load("one")
    for name in ("five", "all"):
        other = load(name)
        assert np.array_equal(other["keep_indices"], first["keep_indices"])
        assert np.abs(other["scores"] - first["scores"]).max() <= (0 if ranker != "conv" else 1e-6)
    assert tree("one") == {"scores.npz"}


def test_json_says_the_same(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["rank", "photos", *SMALL, "--no-overlays"]
    assert main([*common, "-o", "a"]) == 2
    assert main([*common, "-o", "b", "--format", "json"]) == 2
    text = (Path("b") / "scores.json").read_text()
    loaded, results = json.loads(text), load("a")
    assert len(text.splitlines()) == 13  # a line for each image
    assert [image["image"] for image in loaded["images"]] == results["images"].tolist()
    scores = np.array([image["scores"] for image in loaded["images"]], dtype=np.float32)
    assert np.array_equal(scores, results["scores"])
    keep = [image["keep_indices"] for image in loaded["images"]]
    assert np.array_equal(keep, results["keep_indices"])
    for key in ("ranker", "ranker_hash", "keep_ratio", "grid_size", "input_size", "model"):
        assert key == "model" or np.array_equal(results[key], loaded[key])
    assert loaded["model"] is None


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "ltrp_dinov2_small", "hybrid"])
def test_as_in_front_of_a_model(folder: Path, name: str) -> None:
    """Scores and kept patches are those that the pruned model would take."""
    side = {"ltrp_dinov2_small": 56, "hybrid": 64}.get(name, 64)
    name = "vit_tiny_r_s16_p8_224" if name == "hybrid" else name
    sizes = ["--img-size", str(side), "--workers", "0"]
    assert main(["rank", "photos", "-o", "out", *sizes, "--model", name, "--no-overlays"]) == 2
    results = load("out")
    net = timm.create_model(name, img_size=side).eval()
    model = net if name.startswith("ltrp") else drop_patches(net)
    assert results["model"] == name
    for image, scores, keep in zip(*(results[k] for k in ("images", "scores", "keep_indices"))):
        x = ltrp_timm.visualize.to_tensor(Image.open(f"photos/{image}").convert("RGB"), model)
        assert torch.equal(model.patch_scores(x)[0], torch.from_numpy(scores))
        assert torch.equal(model.keep_indices(x)[0], torch.from_numpy(keep))


class StopError(Exception):
    """Stands for whatever ends a run."""


def interrupt_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let so many parts be written, then stop."""
    write, written = parts.Parts.write, []

    def counted(self: Any, part: int, arrays: Any) -> None:
        if len(written) == count:
            raise StopError
        written.append(part)
        write(self, part, arrays)

    monkeypatch.setattr(parts.Parts, "write", counted)


def test_resume_equals_uninterrupted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["rank", "photos", *SMALL]
    assert main([*common, "-o", "whole"]) == 2
    with monkeypatch.context() as patch:
        interrupt_after(2, patch)
        with pytest.raises(StopError):
            main([*common, "-o", "cut", "--batch-size", "3"])
    assert not (Path("cut") / "scores.npz").exists()
    assert len(list(Path("cut/.rank-parts").glob("part-*.npz"))) == 2
    ranked: list[int] = []
    batch = job.rank_batch

    def count(scorer: Any, pixels: Any, *args: Any) -> Any:
        ranked.append(len(pixels))
        return batch(scorer, pixels, *args)

    monkeypatch.setattr(job, "rank_batch", count)
    capsys.readouterr()
    assert main([*common, "-o", "cut", "--batch-size", "4"]) == 2
    assert sum(ranked) == 13 - 2 * 4  # only what was missing
    assert len(capsys.readouterr().err.splitlines()) == 2  # also of parts made before
    assert same(load("cut"), load("whole"))
    assert tree("cut") == tree("whole")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (["--keep-ratio", "0.25"], r"unfinished run with keep_ratio = 0\.5, now it is 0\.25"),
        (["--ranker", "random"], "unfinished run with ranker = contrast, now it is random"),
        (["--img-size", "96"], r"input_size = \[64, 64\], now it is \[96, 96\]"),
        (["--patch-size", "8"], "unfinished run with ranker_args"),
        (["--selection", "random"], "unfinished run with selection = top, now it is random"),
        (["--no-overlays"], "unfinished run with overlays = True"),
        (["--ranker-args", '{"parts": ["std"]}'], "unfinished run with ranker_args"),
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
    with monkeypatch.context() as patch:
        interrupt_after(1, patch)
        with pytest.raises(StopError):
            main(["rank", "photos", "-o", "out", *SMALL])
    before = tree("out")
    if changes == ["new image"]:
        Image.new("RGB", (64, 64)).save("photos/z.png")
    elif changes == ["touched image"]:
        os.utime("photos/0.png", ns=(1, 1))
    again = ["rank", "photos", "-o", "out", *SMALL, *(c for c in changes if " image" not in c)]
    assert main(again) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert re.search(rf"{text}.*: --overwrite starts anew\.", err), err
    assert tree("out") == before
    assert main([*again, "--overwrite"]) == 2
    assert (Path("out") / "scores.npz").exists()
    assert not (Path("out") / ".rank-parts").exists()


def test_other_weights_are_not_mixed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["rank", "photos", "-o", "out", *SMALL, "--ranker", "conv", "--ranker-weights"]
    for name in ("one", "two"):
        create_ranker("conv").save(name)
    with monkeypatch.context() as patch:
        interrupt_after(1, patch)
        with pytest.raises(StopError):
            main([*arguments, "one"])
    assert main([*arguments, "two"]) == 2
    assert "unfinished run with ranker_hash" in capsys.readouterr().err
    assert main([*arguments, "one"]) == 2
    assert len(load("out")["images"]) == 11


def test_nothing_is_replaced_without_being_told(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["rank", "photos/0.png", "-o", "out", *SMALL]
    assert main(arguments) == 0
    before = (Path("out") / "scores.npz").read_bytes()
    for changes in ([], ["--keep-ratio", "0.1"], ["--format", "json"]):
        assert main([*arguments, *changes]) == 2
        assert "out holds scores.npz already: --overwrite replaces it." in capsys.readouterr().err
    assert (Path("out") / "scores.npz").read_bytes() == before
    assert main([*arguments, "--keep-ratio", "0.1", "--overwrite"]) == 0
    assert load("out")["keep_indices"].shape == (1, 2)
    (Path("other") / "overlays").mkdir(parents=True)
    (Path("other") / "overlays" / "mine.txt").write_text("mine")
    assert main(["rank", "photos/0.png", "-o", "other", *SMALL]) == 2
    assert "other holds overlays already" in capsys.readouterr().err
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
        expected = ["b/c/1.png", "b/c/10.png", "b/c/4.png", "b/c/7.png", "plain"]
        assert load("photos/out")["images"].tolist() == expected
        err = capsys.readouterr().err.splitlines()
        assert err[0] == "ltrp-timm: photos/nothing: No such file or directory."
        assert len(err) == 2
    assert main(["rank", "photos/b", "-o", "photos/b", *SMALL]) == 2
    assert main(["rank", "photos/b", "-o", "photos/b", *SMALL, "--overwrite"]) == 2
    assert load("photos/b")["images"].tolist() == ["c/1.png", "c/10.png", "c/4.png", "c/7.png"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nothing"], r"nothing: No such file or directory\."),
        (["."], "no images were found"),
        (["text.png"], r"no image could be read, nothing was written\."),
        (["a.png", "--ranker", "best"], "ranker must be one of attention, "),
        (
            ["a.png", "--ranker", "conv"],
            "conv ranker is not trained.*--ranker-weights FILE or --pretrained",
        ),
        (["a.png", "--ranker", "attention"], "--ranker-weights FILE or --pretrained"),
        (["a.png", "--ranker-weights", "nowhere"], "the contrast ranker has no weights"),
        (["a.png", "--ranker", "conv", "--ranker-weights", "no"], r"no does not exist\."),
        (
            ["a.png", "--ranker", "vit_tiny", "--pretrained"],
            "no published weights exist for the vi",
        ),
        (["a.png", "--ranker-args", "{"], r"--ranker-args is not JSON .* got \{\."),
        (["a.png", "--ranker-args", "[1]"], r"--ranker-args must be a JSON object, got \[1\]"),
        (["a.png", "--ranker-args", '{"x": 1}'], "unexpected keyword argument 'x'"),
        (["a.png", "--keep-ratio", "2"], r"--keep-ratio: must be in \(0, 1\], got 2"),
        (["a.png", "--img-size", "8"], "images of 8 pixels are smaller than a patch of 16"),
        (["a.png", "--model", "resnet10t"], "cannot drop patches from ResNet"),
        (["a.png", "--model", "nope"], "model 'nope' is unknown"),
        (["a.png", "--model", "x", "--patch-size", "8"], "--patch-size goes without --model"),
        (["a.png", "--device", "nope"], "--device nope: "),
        (["a.png", "--workers", "-1"], "--workers: "),
        (["a.png", "--batch-size", "0"], "--batch-size: must be a whole number from 1"),
        (["a.png", "-o", ""], "--output must name a folder"),
        (["a.png", "-o", "a.png"], "a.png: (File exists|Not a directory)"),
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
    assert main(["rank", "-o", "../out", "--workers", "0", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("ltrp-timm: ")
    assert re.search(text, err.splitlines()[-1]), err
    assert len(err.splitlines()) == (2 if arguments == ["text.png"] else 1), err
    assert tree(".") == before
    assert not tree("../out") if Path("../out").exists() else True


def test_strips_and_damaged_parts(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (1, 5000)).save("strip.png")
    assert main(["rank", "strip.png", "photos/0.png", "-o", "out", *SMALL]) == 2
    assert "strip.png: 1x5000 pixels, over 50 times longer than wide" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        interrupt_after(2, patch)
        with pytest.raises(StopError):
            main(["rank", "photos", "-o", "cut", *SMALL])
    Path("cut/.rank-parts/part-0000001.npz").write_bytes(b"damaged")
    capsys.readouterr()
    assert main(["rank", "photos", "-o", "cut", *SMALL]) == 2
    assert "part-0000001.npz is damaged: --overwrite starts anew." in capsys.readouterr().err


def test_results_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """63 MB of scores, one MB at a time."""
    monkeypatch.setattr(parts, "PART_SIZE", 64)
    count, n = 64 * 60, 4096
    store = parts.Parts(tmp_path, count)
    store.begin({"ranker": "contrast"}, overwrite=False)
    for part in range(store.total()):
        rows = np.full((64, n), part, dtype=np.float32)
        arrays = {"index": np.array(store.images(part)), "scores": rows}
        arrays |= {"keep_indices": np.zeros((64, 1), np.int64), "reasons": np.zeros(0, "<U1")}
        store.write(part, arrays)
    names = [f"{i}.png" for i in range(count)]
    tracemalloc.start()
    path = store.merge("npz", names, {"ranker": "contrast"})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12e6
    with np.load(path) as file:
        assert file["scores"].shape == (count, n)
        assert np.array_equal(file["scores"][:, 5], np.arange(count) // 64)
        assert file["images"][-1] == names[-1]


def command_line(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "ltrp_timm", "rank", *arguments]


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
    many_images(tmp_path / "many", 150)  # three parts
    (tmp_path / "many" / "bad.png").write_text("text")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    run += ["--master-addr", "127.0.0.1", "--master-port", port, "-m", "ltrp_timm", "rank"]
    run += ["many", "-o", "two", *SMALL, "--no-overlays"]
    done = subprocess.run(run, env=environment(), capture_output=True, text=True, check=False)
    assert "ranked 150 images, 1 failed: two/scores.npz" in done.stdout, done.stderr
    assert done.returncode != 0  # one file is no image
    assert done.stderr.count("bad.png: is not an image") == 1
    assert main(["rank", "many", "-o", "one", *SMALL, "--no-overlays"]) == 2
    assert same(load("two"), load("one"))
    assert tree("two") == {"scores.npz"}
    # what is wrong is said once, not by each process
    done = subprocess.run(run, env=environment(), capture_output=True, text=True, check=False)
    assert done.stderr.count("two holds scores.npz already") == 1
    assert "ltrp_timm/rank" not in done.stderr  # torchrun has a traceback, the command has none


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_whole_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: signal.Signals
) -> None:
    monkeypatch.chdir(tmp_path)
    many_images(tmp_path / "many", 200)
    arguments = ["many", "-o", "out", "--img-size", "64", "--workers", "1", "--batch-size", "4"]
    with subprocess.Popen(
        command_line(*arguments),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + 120
        while not list(Path("out").glob(".rank-parts/part-*.npz")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(process.pid, kind)  # as a terminal and torchrun do: data workers too
        _, err = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130}[kind]
    assert err == ""
    found = list(Path("out/.rank-parts").glob("part-*.npz"))
    assert 1 <= len(found) < 4
    assert not [name for name in tree("out") if name.endswith(".tmp")]
    for path in found:
        with np.load(path) as file:
            assert len(file["index"]) == 64
    for path in Path("out/overlays").iterdir():
        with Image.open(path) as picture:
            picture.load()
    assert main(["rank", *arguments]) == 0
    assert main(["rank", *arguments[:2], "whole", *arguments[3:], "--no-overlays"]) == 0
    resumed, whole = load("out"), load("whole")
    assert np.array_equal(resumed["scores"], whole["scores"])
    assert np.array_equal(resumed["images"], whole["images"])


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
    sizes = ("--img-size", "64", "--workers", "0")
    more = ["--ranker", "attention", "--ranker-weights", "ranker", "--no-overlays"]
    assert main(["rank", ".", "-o", "out", *sizes, *more]) == 0
    results = load("out")
    transform = timm.data.create_transform(
        (3, 64, 64), interpolation="bicubic", mean=ranker.mean, std=ranker.std, crop_pct=1.0
    )
    with torch.inference_mode():
        for name, scores in zip(results["images"], results["scores"]):
            x = transform(Image.open(name)).unsqueeze(0)
            assert np.abs(ranker(x).flatten().numpy() - scores).max() <= 1e-6
            assert np.ptp(scores) > 1e-4
    assert results["images"].tolist() == ["astronaut.jpg", "chelsea.jpg"]
    args = json.loads(str(results["ranker_args"]))
    assert args["depth"] == 2
    assert results["mean"].tolist() == [0.5, 0.5, 0.5]  # the ranker's own
