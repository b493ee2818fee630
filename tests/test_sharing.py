"""Folders in timm's layout: what is written, what comes back, what is refused."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from conftest import records_arguments
from torch import nn

from ltrp_timm import LTRPModel, create_ranker, drop_patches, num_keep, save_pretrained
from ltrp_timm.share.save import check_card

TINY = {"img_size": 64, "depth": 1, "num_classes": 10}


def images(channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, 64, 64, generator=torch.Generator().manual_seed(1))


def trained_conv() -> Any:
    ranker = create_ranker("conv", width=8, depth=1)
    ranker.trained = True
    return ranker


def pruned(kind: str) -> LTRPModel:
    """A model of every making, with options that a save must keep."""
    if kind == "registered":
        return timm.create_model("ltrp_vit_tiny", **TINY, ranker=trained_conv(), keep_ratio=0.3)
    if kind == "generic":
        more = {"selection": "mixed", "selection_args": {"ratio": 0.5}, "in_chans": 1}
        return timm.create_model("ltrp", backbone="vit_tiny_patch16_224", **TINY, **more)
    vit = timm.create_model("vit_small_patch16_dinov3", **TINY, embed_dim=64, num_heads=2)
    return drop_patches(vit, ranker="random", keep_ratio=0.4, ranker_args={"seed": 5})


@records_arguments
@torch.no_grad()
@pytest.mark.parametrize("kind", ["registered", "generic", "drop_patches"])
def test_a_model_with_a_new_head_comes_back(tmp_path: Path, kind: str) -> None:
    model = pruned(kind).eval()
    model.reset_classifier(4, "avg")
    save_pretrained(model, tmp_path)
    twin = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert (twin.num_classes, twin.global_pool) == (4, "avg")
    pixels = images(model.in_chans)
    assert torch.equal(twin(pixels), model(pixels))


@records_arguments
@torch.no_grad()
@pytest.mark.parametrize("kind", ["registered", "generic", "drop_patches"])
def test_a_model_comes_back_bit_for_bit(tmp_path: Path, kind: str) -> None:
    model = pruned(kind).eval()
    pixels = images(model.in_chans)
    assert save_pretrained(model, tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    source = f"local-dir:{tmp_path / 'new' / 'folder'}"
    twin = timm.create_model(source, pretrained=True).eval()
    assert torch.equal(twin(pixels), model(pixels))
    assert (twin.keep_ratio, twin.selection) == (model.keep_ratio, model.selection)
    assert twin.selection_args == model.selection_args
    other = timm.create_model(source, pretrained=True, keep_ratio=0.9).eval()
    assert not torch.equal(other(pixels), model(pixels))
    model.keep_ratio = 0.9
    assert torch.equal(other(pixels), model(pixels))
    changed = timm.create_model(source, pretrained=True, num_classes=3, in_chans=2)
    assert changed(images(2)).shape == (2, 3)
    assert torch.equal(changed.backbone.norm.weight, model.backbone.norm.weight)
    assert not list((tmp_path / "new" / "folder").glob(".*"))


def test_a_ranker_comes_back(tmp_path: Path) -> None:
    ranker = trained_conv()
    save_pretrained(ranker, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("README.md", "config.json", "model.safetensors")
    ]
    twin = create_ranker("conv", pretrained=tmp_path)
    assert torch.equal(twin(images()), ranker(images()))
    with pytest.raises(ValueError, match=r"holds a 'conv' ranker, not 'vit_tiny'"):
        create_ranker("vit_tiny", pretrained=tmp_path)


def test_the_card_states_what_was_told_and_no_more(tmp_path: Path) -> None:
    model = pruned("registered")
    told = {
        "license": "cc-by-4.0",
        "training_data": "photos: of\nmy garden",
        "ranker": "trained at home",
        "base_model": 'me/"x"',
        "description": "Finds plants.",
        "measured": {0.3: {"top-1 | %": 71.5}, 1: {"top-1 | %": 80, "images/s": 12}},
    }
    save_pretrained(model, tmp_path / "told", told)
    text = (tmp_path / "told" / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert head["license"] == "cc-by-4.0"
    assert head["base_model"] == 'me/"x"'
    assert head["library_name"] == "timm"
    assert "- **Training data:** photos: of my garden\n" in text
    rows = dict(re.findall(r"^\| ([\d.]+)(?: \(as saved\))? \| (\d+) \|", text, re.M))
    assert {float(ratio): int(k) for ratio, k in rows.items()} == {
        ratio: num_keep(16, ratio) for ratio in (1, 0.75, 0.5, 0.3, 0.25)
    }
    assert "| 0.3 (as saved) | 5 | 71.5 |  |" in text
    assert "| 1 | 16 | 80 | 12 |" in text
    assert "top-1 \\| %" in text
    assert "model-index" not in head  # no data set is stated
    save_pretrained(model, tmp_path / "results", {**told, "evaluation_data": "My garden, June"})
    text = (tmp_path / "results" / "README.md").read_text()
    results = yaml.safe_load(text.split("---")[1])["model-index"][0]["results"]
    found = [(r["dataset"]["name"], m["name"], m["value"]) for r in results for m in r["metrics"]]
    assert sorted(found, key=str) == [
        ("My garden, June", "images/s at keep_ratio 1", 12),
        ("My garden, June", "top-1 | % at keep_ratio 0.3", 71.5),
        ("My garden, June", "top-1 | % at keep_ratio 1", 80),
    ]
    save_pretrained(model, tmp_path / "silent")
    text = (tmp_path / "silent" / "README.md").read_text()
    assert text.count("not stated") == 3
    assert "No measurements at these ratios." in text
    assert set(yaml.safe_load(text.split("---")[1])) == {"library_name", "tags"}
    save_pretrained(trained_conv(), tmp_path / "ranker")
    assert "create_model" in (tmp_path / "ranker" / "README.md").read_text()


@pytest.mark.parametrize(
    ("card", "message"),
    [
        ({"author": "me"}, "model_card knows license, training_data, .*; got 'author'"),
        ({"license": "free\nbase_model: x"}, "must be an identifier, got 'free"),
        ({"training_data": 3}, r"model_card\['training_data'\] must be a text, got 3"),
        ({"measured": {0.5: 81}}, r"must be {keep_ratio: {what: value}}, got {0.5: 81}"),
        ({"measured": {1.5: {}}}, r"keep_ratio must be in \(0, 1\], got 1.5"),
    ],
)
def test_wrong_cards(card: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_card(card)
    with pytest.raises(TypeError, match="model_card must be a mapping, got str"):
        check_card("text")  # type: ignore[arg-type]


def test_nothing_is_overwritten_unless_asked(tmp_path: Path) -> None:
    save_pretrained(trained_conv(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        save_pretrained(trained_conv(), tmp_path)
    for name in before:
        folder = tmp_path / f"only {name}"
        folder.mkdir()
        (folder / name).write_text("mine")
        with pytest.raises(FileExistsError, match=re.escape(name)):
            save_pretrained(trained_conv(), folder)
        assert [path.name for path in folder.iterdir()] == [name]
        assert (folder / name).read_text() == "mine"
    assert all((tmp_path / name).read_bytes() == content for name, content in before.items())
    (tmp_path / "notes.txt").write_text("mine")
    save_pretrained(trained_conv(), tmp_path, overwrite=True)
    assert (tmp_path / "model.safetensors").read_bytes() != before["model.safetensors"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.filterwarnings("error")
def test_what_cannot_be_shared(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    vit = timm.create_model("vit_tiny_patch16_224", **TINY)
    with pytest.raises(TypeError, match=r"expected an LTRPModel or a ranker .* got VisionTr"):
        save_pretrained(vit, folder)
    with pytest.raises(ValueError, match="the contrast ranker has no weights"):
        save_pretrained(create_ranker("contrast"), folder)
    with pytest.raises(ValueError, match="the conv ranker has no trained weights"):
        save_pretrained(create_ranker("conv"), folder)
    stranger = nn.AvgPool2d(16)
    with pytest.raises(ValueError, match="the ranker AvgPool2d cannot be saved: it is none of"):
        save_pretrained(drop_patches(vit, ranker=stranger), folder)
    assert not folder.exists()


def test_a_config_is_plain_json(tmp_path: Path) -> None:
    save_pretrained(pruned("drop_patches"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "ltrp"
    assert config["model_args"]["backbone"] == "vit_small_patch16_dinov3"
    assert config["model_args"]["ranker_args"] == {"patch_size": [16, 16], "seed": 5}
    assert str(tmp_path) not in json.dumps(config)


def calibrated() -> LTRPModel:
    vit = timm.create_model("vit_tiny_patch16_224", **TINY)
    model = drop_patches(vit, ranker="pixel_std").eval()
    pixels = torch.rand(16, *images(3).shape[1:]) * torch.arange(1, 17).reshape(-1, 1, 1, 1)
    model.calibrate(pixels, mean_keep_ratio=0.4)
    return model


@records_arguments
@torch.no_grad()
def test_a_budget_comes_back(tmp_path: Path) -> None:
    model = calibrated()
    pixels = images() * torch.tensor([0.1, 30.0]).reshape(-1, 1, 1, 1)
    save_pretrained(model, tmp_path)
    assert "adaptive with" in (tmp_path / "README.md").read_text()
    twin = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert twin.budget == model.budget
    assert twin.keep_ratio == 0.4
    assert len(model.keep_counts(pixels).unique()) > 1
    assert torch.equal(twin(pixels), model(pixels))
    fixed = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, keep_ratio=0.7)
    assert (fixed.budget, fixed.keep_ratio) == (None, 0.7)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_args"]["budget"] = {"rule": "mass", "level": 0.5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="a saved budget must have rule, level, buckets, mean"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)


@records_arguments
@torch.no_grad()
@pytest.mark.parametrize("rule", ["mass", "threshold"])
def test_a_folder_saved_with_adaptive_as_a_selection_loads(tmp_path: Path, rule: str) -> None:
    model = calibrated()
    model.budget = dataclasses.replace(model.budget, rule=rule, level=0.25)
    save_pretrained(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    budget = config["model_args"].pop("budget")
    other = {"mass": "threshold", "threshold": "mass"}[rule]
    args = {rule: budget["level"], other: 0.0, "buckets": budget["buckets"]}
    config["model_args"].update(selection="adaptive", selection_args=args)
    (tmp_path / "config.json").write_text(json.dumps(config))
    source = f"local-dir:{tmp_path}"
    twin = timm.create_model(source, pretrained=True).eval()
    assert (twin.budget, twin.selection) == (model.budget, "top")
    assert torch.equal(twin(images(3)), model(images(3)))
    plain = timm.create_model(source, pretrained=True, selection="random")
    assert (plain.budget, plain.selection, plain.keep_ratio) == (None, "random", 0.4)
    with pytest.raises(ValueError, match="'adaptive' needs a budget"):
        timm.create_model("ltrp_vit_tiny", selection="adaptive")
