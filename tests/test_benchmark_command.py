import csv
from pathlib import Path

import pytest
import timm

import ltrp_timm
from ltrp_timm.commands import main
from ltrp_timm.rankers import DEFAULT_RANKER
from ltrp_timm.share import save_pretrained

FAST = (
    "--img-size",
    "64",
    "--batch-size",
    "1",
    "--repeats",
    "1",
    "--warmup",
    "0",
    "--threads",
    "1",
)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    err = capsys.readouterr().err
    assert err.startswith("ltrp-timm: "), err
    assert len(err.splitlines()) == 1, err
    return err


def test_what_it_says_and_writes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output = tmp_path / "found.csv"
    given = ("vit_tiny_patch16_224", "ltrp_vit_tiny", "--keep-ratio", "0.25", "0.5", *FAST)
    assert main(["benchmark", *given, "-o", str(output), "--no-memory"]) == 0
    out = capsys.readouterr().out
    for model in given[:2]:
        assert f"-> {model} at batch 1: " in out
    assert "ltrp_vit_tiny, 64x64 pixels, batch 1, selection top\n" in out
    assert "keep 0.5, 8 of 16 patch tokens" in out
    with open(output, newline="") as file:
        rows = list(csv.DictReader(file))
    # a plain model is held against several rankers, one of ours against its own
    per_ratio = {"vit_tiny_patch16_224": [DEFAULT_RANKER, "conv", "vit_small"]}
    per_ratio["ltrp_vit_tiny"] = [DEFAULT_RANKER]
    expected = []
    for model, rankers in per_ratio.items():
        expected.append((model, "full", "1.0", "16"))
        for ratio, kept in (("0.5", "8"), ("0.25", "4")):
            methods = ["ideal", "no ranking", *rankers]
            expected += [(model, method, ratio, kept) for method in methods]
    columns = ("model", "method", "keep_ratio", "num_kept")
    assert [tuple(row[column] for column in columns) for row in rows] == expected
    for row in rows:
        assert float(row["seconds_median"]) > 0
        assert row["peak_bytes"] == ""
        assert (row["threads"], row["img_size"]) == ("1", "64")
        assert row["machine"]
    assert main(["benchmark", *given, "-o", str(output)]) == 2
    assert "exists already" in one_line(capsys)


def test_the_smaller_image_is_in_the_table(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    given = ("ltrp_vit_tiny", "vit_small_patch16_dinov3", "--keep-ratio", "0.5", "0.25", *FAST)
    output, more = str(tmp_path / "found.csv"), ("--smaller-image", "--ranker", "contrast")
    assert main(["benchmark", *given, "-o", output, "--no-memory", *more]) == 0
    out = capsys.readouterr().out
    for text in ("full model on 48x48 pixels, 9 patches\n  smaller image ", "32x32 pixels, 4 p"):
        assert out.count(text) == 2
    with open(output, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["method"] == "smaller image"]
    columns = ("model", "keep_ratio", "num_kept", "img_size")
    expected = [(m, *case) for m in given[:2] for case in (("0.5", "9", "48"), ("0.25", "4", "32"))]
    assert [tuple(row[column] for column in columns) for row in rows] == expected
    assert all(float(row["speedup"]) > 0 and row["ranking_share"] == "" for row in rows)


def test_a_saved_model_brings_its_ranker(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = timm.create_model("ltrp_vit_tiny", img_size=64, depth=1, ranker="gradient")
    save_pretrained(model, tmp_path / "mine")
    options = ("--keep-ratio", "0.5", *FAST[2:])
    assert main(["benchmark", f"local-dir:{tmp_path / 'mine'}", *options]) == 0
    out = capsys.readouterr().out
    assert all(text in out for text in ("  gradient", "64x64 pixels", "MiB"))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["vit_tiny_patch16_22"], "did you mean"),
        (["resnet18"], "resnet18"),
        (["ltrp_vit_tiny", "--keep-ratio", "1"], "below 1"),
        (["ltrp_vit_tiny", "--keep-ratio", "0"], "in (0, 1]"),
        (["ltrp_vit_tiny", "--ranker", "best"], "--ranker must be one of"),
        (["ltrp_vit_tiny", "--device", "cudaa"], "device 'cudaa'"),
        (["ltrp_vit_tiny", "--device", "meta"], "device 'meta'"),
        (["ltrp_vit_tiny", "--dtype", "int8"], "--dtype"),
        (["ltrp_vit_tiny", "--batch-size", "0"], "from 1"),
        (["ltrp_vit_tiny", "--img-size", "50"], "50"),
        (["cait_xxs24_224", "--smaller-image"], "a Cait takes images of one size"),
        (["swin_tiny_patch4_window7_224", "--smaller-image"], "cannot drop patches from Swin"),
        (["ltrp_vit_tiny", "-o", "a.txt"], ".csv"),
        (["ltrp_vit_tiny", "-o", "no/such/a.csv"], "cannot be written"),
    ],
)
def test_bad_input(given: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", *given, "--repeats", "1"]) == 2
    assert text in one_line(capsys)


def test_rankers_to_choose_from_exist() -> None:
    from ltrp_timm.commands.benchmark import RANKERS

    assert set(RANKERS) <= set(ltrp_timm.list_rankers())


def test_a_saved_model_is_measured_with_its_own_selection(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    args = {"selection": "mixed", "selection_args": {"ratio": 0.5}, "ranker": "pixel_std"}
    model = timm.create_model("ltrp_vit_tiny", depth=1, img_size=64, **args)
    save_pretrained(model, tmp_path / "model")
    given = [f"local-dir:{tmp_path / 'model'}", "--keep-ratio", "0.5", *FAST[2:], "--no-memory"]
    assert main(["benchmark", *given]) == 0
    assert "selection mixed\n" in capsys.readouterr().out
    assert main(["benchmark", *given, "--selection", "top"]) == 0
    assert "selection top\n" in capsys.readouterr().out
