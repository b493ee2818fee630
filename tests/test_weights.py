"""The weights that come along: there without a network, as their card says, marked experimental."""

import hashlib
import subprocess
import sys
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder
from PIL import Image
from safetensors import safe_open
from tables import read_csv

import ltrp_timm
from ltrp_timm import create_ranker, drop_patches, save_pretrained
from ltrp_timm.commands import main
from ltrp_timm.rankers import DEFAULT_RANKER
from ltrp_timm.train.ranker import CROPS, EPOCHS
from ltrp_timm.weights.files import read_weights

ROOT = Path(__file__).parents[1]
FOLDER = Path(ltrp_timm.__file__).parent / "weights"  # of the package that is installed
WEIGHTS, CARD = FOLDER / "conv.safetensors", FOLDER / "conv.md"


@pytest.fixture
def images() -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    coarse = torch.rand(4, 3, 7, 7, generator=draw)
    return torch.nn.functional.interpolate(coarse, (224, 224), mode="bicubic")


@torch.inference_mode()
def test_they_load_in_silence_and_without_a_network() -> None:
    source = (
        "import socket\n"
        "def refuse(*args, **kwargs): raise AssertionError('network')\n"
        "socket.socket.connect = refuse\n"
        "import timm, torch, ltrp_timm\n"
        "model = timm.create_model('ltrp_vit_tiny', depth=1, ranker='conv', ranker_weights=True)\n"
        "assert model.ranker.trained\n"
        "assert model.eval()(torch.rand(1, 3, 224, 224)).shape == (1, 1000)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", source],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_they_are_no_better_than_is_said_first() -> None:
    first = CARD.read_text(encoding="utf-8").splitlines()[0]
    assert f"no better than `{DEFAULT_RANKER}`, the default" in first
    for text in (create_ranker.__doc__, drop_patches.__doc__, type(create_ranker("conv")).__doc__):
        assert "find objects no better than the weight-free" in " ".join((text or "").split())
    lines = (ROOT / "docs" / "guides" / "rankers.md").read_text(encoding="utf-8").splitlines()
    (row,) = (line for line in lines if line.startswith("| `conv` |") and "weights" in line)
    assert f"no better than `{DEFAULT_RANKER}`" in row


@torch.inference_mode()
def test_they_are_small_fixed_and_not_random(images: torch.Tensor) -> None:
    assert WEIGHTS.stat().st_size < 1_000_000
    first, second = (create_ranker("conv", pretrained=True).eval() for _ in range(2))
    assert torch.equal(first(images), second(images))
    untrained = create_ranker("conv").eval()
    assert first.config() == untrained.config()  # a default ranker, any image size
    for (name, own), (_, fresh) in zip(first.named_parameters(), untrained.named_parameters()):
        assert not torch.equal(own, fresh), name
    from_file, config = read_weights(WEIGHTS)[:2]
    assert config is not None
    assert config["ranker"] == "conv"
    assert all(torch.equal(tensor, from_file[name]) for name, tensor in first.state_dict().items())
    scores = first(images).flatten(1)
    assert scores.shape == (4, 196)
    assert float(scores.std(dim=1).min()) > 1e-3


@torch.inference_mode()
def test_a_model_keeps_other_patches_by_them(
    backbone_of: Callable[..., Any], images: torch.Tensor
) -> None:
    kept = {}
    for weights in (True, None):
        vit = timm.create_model("vit_tiny_patch16_224", depth=1).eval()
        model = drop_patches(vit, "conv", keep_ratio=0.25, ranker_weights=weights)
        assert model.ranker.trained is bool(weights)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            kept[weights] = model.keep_indices(images)
        told = [str(warning.message) for warning in caught]
        assert len(told) == (0 if weights else 1)
        assert weights or "ranker_weights=True (experimental weights" in told[0]
    assert bool((kept[True] != kept[None]).any(dim=1).all())


@torch.inference_mode()
def test_other_grids_and_channels(images: torch.Tensor) -> None:
    """A backbone's patches may have another size, its images other channels."""
    vit = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=224, depth=1, in_chans=4)
    model = drop_patches(vit.eval(), "conv", ranker_weights=True)
    assert model.ranker.patch_size == (16, 16)
    assert model.patch_scores(torch.rand(1, 4, 224, 224)).shape == (1, 256)
    with pytest.raises(RuntimeError, match=r"mismatched +stem\.weight"):
        create_ranker("conv", pretrained=True, width=32)
    with pytest.raises(RuntimeError, match="does not fit the model"):
        create_ranker("conv", pretrained=True, patch_size=8)
    with pytest.raises(ValueError, match="no published weights exist for the vit_tiny ranker"):
        create_ranker("vit_tiny", pretrained=True)
    with pytest.raises(ValueError, match="the contrast ranker has no weights"):
        create_ranker("contrast", pretrained=True)


def test_a_saved_model_says_where_its_ranker_is_from(tmp_path: Path) -> None:
    told = "experimental, part of ltrp_timm"
    model = timm.create_model("ltrp_vit_tiny", depth=1, ranker="conv", ranker_weights=True)
    save_pretrained(model, tmp_path / "model")
    save_pretrained(model.ranker, tmp_path / "ranker")
    for name in ("model", "ranker"):
        card = (tmp_path / name / "README.md").read_text(encoding="utf-8")
        assert f"**Weights of the ranker:** {told} {ltrp_timm.__version__}" in card
    twin = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    assert twin.ranker.trained
    for own, other in zip(model.ranker.parameters(), twin.ranker.parameters()):
        assert torch.equal(own, other)
    # other weights are no longer those
    other = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.load_state_dict(other)
    save_pretrained(model, tmp_path / "changed")
    assert told not in (tmp_path / "changed" / "README.md").read_text(encoding="utf-8")


def test_the_command_takes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = torch.Generator().manual_seed(0)
    pixels = (255 * torch.rand(3, 64, 64, generator=draw)).to(torch.uint8)
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    command = ["rank", str(tmp_path / "a.png"), "-o", str(tmp_path / "out"), "--ranker", "conv"]
    command += ["--img-size", "64", "--num-workers", "0", "--device", "cpu"]
    assert main([*command, "--pretrained"]) == 0
    assert "ranked 1 image, 0 failed" in capsys.readouterr().out


def test_the_card_says_what_was_measured() -> None:
    """Its table is held against the CSV by ``report.py --check``; these are the very weights."""
    card = " ".join(CARD.read_text(encoding="utf-8").split())
    rows = read_csv(ROOT / "benchmarks" / "results" / "distill.csv")
    digest = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
    own = {row["pictures"]: row for row in rows if row["weights_sha256"] == digest}
    assert set(own) == {"pasted objects", "photos with boxes"}, "distill.csv is of other weights"
    assert digest in card
    assert {row["method"] for row in own.values()} == {f"conv from {DEFAULT_RANKER}"}
    best = own["pasted objects"]
    assert float(best["above_contrast_low"]) > 0
    assert f"{best['images']} random squares of 13 photos" in card
    assert f"**Seed:** {best['seed']}" in card
    assert f"{EPOCHS} epochs of {CROPS} crops" in card
    assert "python benchmarks/studies/distill.py --ship ltrp_timm/weights" in card
    with safe_open(WEIGHTS, framework="pt") as file:
        assert file.metadata()["format"] == "pt"


def test_wheel_and_sdist_hold_them(tmp_path: Path) -> None:
    wheel = next(WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"]))
    with zipfile.ZipFile(wheel) as archive:
        inside = {name: archive.read(name) for name in archive.namelist() if "weights/" in name}
    inside = {name: content for name, content in inside.items() if not name.endswith(".py")}
    expected = {f"ltrp_timm/weights/{path.name}": path.read_bytes() for path in (WEIGHTS, CARD)}
    assert inside == expected
    sdist = next(SdistBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"]))
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert set(expected) <= names
