"""timm.create_model: the registered names, the generic one, and weights from local files."""

import copy
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import records_arguments
from safetensors.torch import save_file
from timm.models import get_pretrained_cfg
from timm.models._hub import save_for_hf
from torch import nn

from ltrp_timm import AdaptiveBudget, create_ranker, drop_patches
from ltrp_timm.models.ltrp import LTRPModel

TINY = {"img_size": 64, "depth": 2, "num_classes": 10}
NAMES = {
    "ltrp_vit_tiny": ["augreg_in21k_ft_in1k"],
    "ltrp_vit_small": ["augreg_in21k_ft_in1k", "dino"],
    "ltrp_vit_base": ["augreg2_in21k_ft_in1k", "mae", "dino"],
    "ltrp_vit_large": ["augreg_in21k_ft_in1k", "mae"],
    "ltrp_vit_huge": ["mae"],
    "ltrp_deit3_small": ["fb_in22k_ft_in1k", "fb_in1k"],
    "ltrp_deit3_base": ["fb_in22k_ft_in1k", "fb_in1k"],
    "ltrp_dinov2_small": ["lvd142m"],
    "ltrp_dinov2_base": ["lvd142m"],
    "ltrp_dinov3_small": ["lvd1689m"],
    "ltrp_dinov3_base": ["lvd1689m"],
    "ltrp_dinov3_large": ["lvd1689m", "sat493m"],
    "ltrp_clip_base": ["laion2b_ft_in12k_in1k", "openai"],
    "ltrp_siglip2_base": ["v2_webli"],
    "ltrp_beitv2_base": ["in1k_ft_in22k_in1k"],
    "ltrp_eva02_tiny": ["mim_in22k", "mim_in22k_ft_in1k"],
    "ltrp_eva02_base": ["mim_in22k", "mim_in22k_ft_in22k_in1k"],
}


def images(side: int = 64, channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(1))


def plain_file(folder: Path, name: str = "vit_tiny_patch16_224", **args: Any) -> tuple[Any, Path]:
    """A plain timm ViT with random weights, and its file."""
    model = timm.create_model(name, **{**TINY, **args}).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    path = folder / "plain.safetensors"
    save_file(model.state_dict(), path)
    return model, path


def test_list_models_tells_the_truth() -> None:
    assert timm.list_models("ltrp*") == sorted([*NAMES, "ltrp"])
    tagged = {f"{name}.{tag}" for name, tags in NAMES.items() for tag in tags}
    assert set(timm.list_pretrained("ltrp*")) == tagged
    for name, tags in NAMES.items():
        assert get_pretrained_cfg(name).tag == tags[0]  # the default
        for tag in tags:
            cfg = get_pretrained_cfg(f"{name}.{tag}")
            source = get_pretrained_cfg(cfg.hf_hub_id.removeprefix("timm/"))
            assert cfg.hf_hub_id == source.hf_hub_id
            for field in ("mean", "std", "input_size", "num_classes", "interpolation", "crop_pct"):
                assert getattr(cfg, field) == getattr(source, field)
            assert cfg.first_conv == "backbone.patch_embed.proj"
            assert cfg.classifier == "backbone.head"
            assert not cfg.custom_load


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_name_builds(name: str) -> None:
    for tag in NAMES[name]:
        with torch.device("meta"):
            model = timm.create_model(f"{name}.{tag}", keep_ratio=0.25)
        cfg = get_pretrained_cfg(f"{name}.{tag}")
        side = cfg.input_size[-1]
        assert isinstance(model, LTRPModel)
        assert model.num_classes == cfg.num_classes
        assert model.pretrained_cfg["architecture"] == name
        assert model.pretrained_cfg["tag"] == tag
        assert model.backbone.pretrained_cfg["mean"] == cfg.mean
        config = timm.data.resolve_model_data_config(model)
        assert config["input_size"] == cfg.input_size
        assert config["mean"] == cfg.mean
        with torch.device("meta"):
            keep = model.keep_indices(torch.empty(1, 3, side, side))
        n = model.grid_size(torch.empty(1, 3, side, side))
        assert keep.shape[1] == round(n[0] * n[1] * 0.25)


def test_arguments_reach_the_backbone() -> None:
    model = timm.create_model(
        "ltrp_vit_tiny", **TINY, in_chans=1, global_pool="avg", drop_path_rate=0.3, keep_ratio=0.3
    )
    assert model.backbone.global_pool == "avg"
    assert model.backbone.blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)
    assert model.in_chans == 1
    assert model(images(channels=1)).shape == (2, 10)
    assert model.keep_ratio == 0.3
    model = timm.create_model("ltrp_vit_tiny", **TINY, dtype=torch.bfloat16, ranker="conv")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with pytest.raises(TypeError, match="not_an_argument"):
        timm.create_model("ltrp_vit_tiny", not_an_argument=1)
    with pytest.raises(ValueError, match="keep_ratio must be in"):
        timm.create_model("ltrp_vit_tiny", keep_ratio=1.2)
    with pytest.raises(TypeError, match="the backbone of ltrp_vit_tiny is fixed"):
        timm.create_model("ltrp_vit_tiny", backbone="vit_base_patch16_224")
    with pytest.raises(TypeError, match="ranker_args must be a mapping, got str"):
        timm.create_model("ltrp_vit_tiny", ranker_args="x")


def test_features_only() -> None:
    net = timm.create_model("ltrp_vit_tiny", **TINY, features_only=True, out_indices=(0, 1))
    features = net(images())
    assert [feature.shape for feature in features] == [(2, 192, 4, 4)] * 2
    assert ((features[0] == 0).all(1).flatten(1).sum(1) == 8).all()
    assert net.feature_info.reduction() == [16, 16]
    net = timm.create_model("ltrp_vit_tiny", img_size=64, features_only=True)
    assert len(net.feature_info.channels()) == 3
    for kind in ("hook", "fx"):
        for name, more in (("ltrp_vit_tiny", {}), ("ltrp", {"backbone": "vit_tiny_patch16_224"})):
            with pytest.raises(ValueError, match=f"need feature_cls='getter', got '{kind}'"):
                timm.create_model(name, features_only=True, feature_cls=kind, **more)


@pytest.mark.parametrize("ranker", ["contrast", "conv"])
@torch.no_grad()
def test_overlay_file_of_a_plain_vit(tmp_path: Path, ranker: str) -> None:
    plain, path = plain_file(tmp_path)
    overlay = {"file": str(path), "num_classes": 10}
    model = timm.create_model(
        "ltrp_vit_tiny", pretrained=True, pretrained_cfg_overlay=overlay, ranker=ranker, **TINY
    ).eval()
    every = torch.arange(16).expand(2, -1)
    assert torch.equal(model(images(), keep_indices=every), plain(images()))
    if ranker == "conv":
        assert not model.ranker.trained


@records_arguments
@torch.no_grad()
def test_plain_weights_are_adapted_as_timm_does(tmp_path: Path) -> None:
    _, path = plain_file(tmp_path)
    for changes in (
        {"num_classes": 3},
        {"in_chans": 1},
        {"img_size": 96},
        {"num_classes": 0},
        {"num_classes": 3, "in_chans": 5, "img_size": 128},
    ):
        args = {**TINY, **changes}
        overlay = {"file": str(path), "num_classes": 10, "input_size": (3, 64, 64)}
        reference, model = (
            timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **args).eval()
            for name in ("vit_tiny_patch16_224", "ltrp_vit_tiny")
        )
        for name, tensor in reference.state_dict().items():
            if not name.startswith("head"):
                assert torch.equal(model.backbone.state_dict()[name], tensor), (changes, name)
        assert model.num_classes == args["num_classes"]


@torch.no_grad()
def test_checkpoint_path_plain_and_own(tmp_path: Path) -> None:
    plain, path = plain_file(tmp_path)
    model = timm.create_model("ltrp_vit_tiny", checkpoint_path=str(path), **TINY).eval()
    every = torch.arange(16).expand(2, -1)
    assert torch.equal(model(images(), keep_indices=every), plain(images()))
    own = timm.create_model("ltrp_vit_tiny", ranker="conv", **TINY).eval()
    own.ranker.trained = True
    for suffix in ("pth", "safetensors"):
        target = tmp_path / f"own.{suffix}"
        if suffix == "pth":
            torch.save({"state_dict": own.state_dict()}, target)
        else:
            save_file(own.state_dict(), target)
        twin = timm.create_model(
            "ltrp_vit_tiny", ranker="conv", checkpoint_path=str(target), **TINY
        ).eval()
        assert torch.equal(twin(images()), own(images()))
        assert twin.ranker.trained


@pytest.mark.parametrize("name", ["ltrp_deit3_small", "ltrp_dinov2_small", "ltrp_dinov3_small"])
@torch.no_grad()
def test_other_families_load_plain_files(tmp_path: Path, name: str) -> None:
    source = timm.create_model(name).backbone.pretrained_cfg["architecture"]
    args = {"depth": 1, "num_classes": 0, "img_size": 84 if "dinov2" in name else 96}
    plain, path = plain_file(tmp_path, source, **args)
    overlay = {"file": str(path), "num_classes": 0}
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **args).eval()
    model.keep_ratio = 1.0
    assert torch.equal(model(images(args["img_size"])), plain(images(args["img_size"])))


def test_published_deit3_names_load(tmp_path: Path) -> None:
    plain, _ = plain_file(tmp_path, "deit3_small_patch16_224")
    published = {
        name.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): tensor
        for name, tensor in plain.state_dict().items()
    }
    save_file(published, tmp_path / "published.safetensors")
    overlay = {"file": str(tmp_path / "published.safetensors"), "num_classes": 10}
    model = timm.create_model(
        "ltrp_deit3_small", pretrained=True, pretrained_cfg_overlay=overlay, **TINY
    )
    weights = model.backbone.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in plain.state_dict().items())


def test_never_half_a_model(tmp_path: Path) -> None:
    plain, _ = plain_file(tmp_path)
    weights = plain.state_dict()
    weights["blocks.0.attn.extra"] = weights.pop("blocks.0.attn.proj.bias")
    weights["norm.weight"] = torch.zeros(5)
    save_file(weights, tmp_path / "half.safetensors")
    # also with another number of classes, where timm would load what fits in silence
    for num_classes in (10, 3):
        with pytest.raises(RuntimeError) as error:
            timm.create_model(
                "ltrp_vit_tiny",
                pretrained=True,
                pretrained_cfg_overlay={
                    "file": str(tmp_path / "half.safetensors"),
                    "num_classes": 10,
                },
                **{**TINY, "num_classes": num_classes},
            )
        for line in (
            "missing     backbone.blocks.0.attn.proj.bias",
            "unexpected  backbone.blocks.0.attn.extra",
            "mismatched  backbone.norm.weight: [5], the model has [192]",
        ):
            assert line in str(error.value)


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_missing_stem_is_named(tmp_path: Path, part: str) -> None:
    plain, _ = plain_file(tmp_path)
    weights = plain.state_dict()
    weights.pop(f"patch_embed.proj.{part}")
    save_file(weights, tmp_path / "half.safetensors")
    overlay = {"file": str(tmp_path / "half.safetensors"), "num_classes": 10}
    for changes in ({}, {"num_classes": 3}, {"features_only": True}, {"in_chans": 1}):
        with pytest.raises(RuntimeError, match=rf"missing     backbone\.patch_embed\.proj\.{part}"):
            timm.create_model(
                "ltrp_vit_tiny",
                pretrained=True,
                pretrained_cfg_overlay=overlay,
                **{**TINY, **changes},
            )


def test_unknown_names_of_a_whole_file_are_named(tmp_path: Path) -> None:
    own = timm.create_model("ltrp_vit_tiny", **TINY)
    save_file({**own.state_dict(), "optimizer.x": torch.zeros(1)}, tmp_path / "own.safetensors")
    overlay = {"file": str(tmp_path / "own.safetensors"), "num_classes": 10}
    with pytest.raises(RuntimeError, match=r"unexpected  optimizer\.x"):
        timm.create_model("ltrp_vit_tiny", pretrained=True, pretrained_cfg_overlay=overlay, **TINY)


def test_a_file_with_another_ranker_is_refused(tmp_path: Path) -> None:
    own = timm.create_model("ltrp_vit_tiny", **TINY)  # contrast: no ranker weights
    save_file(own.state_dict(), tmp_path / "own.safetensors")
    overlay = {"file": str(tmp_path / "own.safetensors"), "num_classes": 10}
    with pytest.raises(RuntimeError, match=r"missing     ranker\.stem\.weight"):
        timm.create_model(
            "ltrp_vit_tiny", pretrained=True, pretrained_cfg_overlay=overlay, ranker="conv", **TINY
        )


def test_another_pooling_is_followed_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain, path = plain_file(tmp_path)
    overlay = {"file": str(path), "num_classes": 10}
    with caplog.at_level(logging.WARNING):
        model = timm.create_model(
            "ltrp_vit_tiny",
            pretrained=True,
            pretrained_cfg_overlay=overlay,
            global_pool="avg",
            **TINY,
        )
    assert torch.equal(model.backbone.fc_norm.weight, plain.norm.weight)
    assert "Loading norm.weight of the checkpoint as fc_norm.weight" in caplog.text
    plain, path = plain_file(tmp_path, "vit_base_patch16_siglip_224", embed_dim=64, num_heads=2)
    args = {**TINY, "embed_dim": 64, "num_heads": 2, "global_pool": "avg"}
    with caplog.at_level(logging.WARNING):
        timm.create_model(
            "ltrp_siglip2_base",
            pretrained=True,
            pretrained_cfg_overlay={"file": str(path), "num_classes": 10},
            **args,
        )
    assert "Ignoring the checkpoint's attention pool" in caplog.text


@records_arguments
@torch.no_grad()
def test_generic_entry(tmp_path: Path) -> None:
    model = timm.create_model("ltrp", backbone="vit_small_patch16_dinov3.lvd1689m", depth=1)
    assert model.pretrained_cfg["hf_hub_id"] == "timm/vit_small_patch16_dinov3.lvd1689m"
    assert model.pretrained_cfg["architecture"] == "ltrp"
    plain, path = plain_file(tmp_path, "vit_tiny_patch16_224")
    folder = tmp_path / "plain"
    save_for_hf(plain, folder, safe_serialization=True)
    model = timm.create_model("ltrp", backbone=f"local-dir:{folder}", pretrained=True).eval()
    model.keep_ratio = 1.0
    assert torch.equal(model(images()), plain(images()))
    model = timm.create_model(
        "ltrp",
        backbone="vit_tiny_patch16_224",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(path), "num_classes": 10},
        **TINY,
    ).eval()
    model.keep_ratio = 1.0
    assert torch.equal(model(images()), plain(images()))
    with pytest.raises(TypeError, match="cannot drop patches from ResNet"):
        timm.create_model("ltrp", backbone="resnet18")
    with pytest.raises(ValueError, match="append the tag to the backbone's name"):
        timm.create_model("ltrp.augreg_in21k", backbone="vit_tiny_patch16_224")


@records_arguments
@pytest.mark.parametrize("ranker", ["contrast", "conv", "vit_tiny"])
@pytest.mark.parametrize("made_by", ["registered", "generic", "drop_patches"])
@torch.no_grad()
def test_saving_in_timms_layout_and_back(tmp_path: Path, ranker: str, made_by: str) -> None:
    ranker_args = {"img_size": 32, "depth": 1} if ranker.startswith("vit") else {}
    front = {"ranker": ranker, "ranker_args": ranker_args, "keep_ratio": 0.4, "fill": "nearest"}
    if made_by == "registered":
        model = timm.create_model("ltrp_vit_tiny", **TINY, **front)
    elif made_by == "generic":
        model = timm.create_model("ltrp", backbone="vit_tiny_patch16_224", **TINY, **front)
    else:
        model = drop_patches(timm.create_model("vit_tiny_patch16_224", **TINY), **front)
    model.eval()
    if ranker != "contrast":
        model.ranker.trained = True
    model.keep_ratio, model.selection, model.selection_args = 0.3, "mixed", {"ratio": 0.5}
    save_for_hf(model, tmp_path, safe_serialization=True)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["architecture"] == ("ltrp_vit_tiny" if made_by == "registered" else "ltrp")
    twin = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert twin.keep_ratio == 0.3
    assert twin.fill == "nearest"
    assert (twin.selection, twin.selection_args) == ("mixed", model.selection_args)
    assert twin.selection_args["ratio"] == 0.5
    assert torch.equal(twin(images()), model(images()))
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, keep_ratio=0.9).eval()
    model.keep_ratio = 0.9
    assert torch.equal(other(images()), model(images()))
    heads = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=4, in_chans=1)
    assert heads(images(channels=1)).shape == (2, 4)
    for pretrained in (False, True):
        swapped = timm.create_model(f"local-dir:{tmp_path}", ranker="random", pretrained=pretrained)
        assert type(swapped.ranker).__name__ == "RandomRanker"
    plain = timm.create_model(f"local-dir:{tmp_path}", selection="stratified")
    assert plain.selection_args == {"cell": 2}  # the saved options were those of another rule


@records_arguments
def test_ranker_weights(tmp_path: Path) -> None:
    ranker = create_ranker("conv")
    ranker.save(tmp_path / "ranker")
    model = timm.create_model(
        "ltrp_vit_tiny", ranker="conv", ranker_weights=str(tmp_path / "ranker"), **TINY
    ).eval()
    assert torch.equal(model.ranker.stem.weight, ranker.stem.weight)
    expected = model(images())  # trained: no warning
    save_for_hf(model, tmp_path / "model", safe_serialization=True)
    (tmp_path / "ranker" / "config.json").unlink()  # the saved model needs it no more
    twin = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    assert torch.equal(twin(images()), expected)


@records_arguments
def test_a_given_ranker_is_not_overwritten_by_a_saved_one(tmp_path: Path) -> None:
    rankers = {}
    for name in ("saved", "other"):
        rankers[name] = create_ranker("conv", width=16)
        rankers[name].save(tmp_path / name)
    weights = str(tmp_path / "saved")
    model = timm.create_model("ltrp_vit_tiny", ranker="conv", ranker_weights=weights, **TINY)
    save_for_hf(model, tmp_path / "model", safe_serialization=True)
    source, own = f"local-dir:{tmp_path / 'model'}", rankers["other"].stem.weight.clone()
    overlay = {"file": str(tmp_path / "model" / "model.safetensors"), "num_classes": 10}
    for name, given in (
        (source, {"ranker_weights": str(tmp_path / "other")}),
        (source, {"ranker": rankers["other"]}),
        ("ltrp_vit_tiny", {"ranker": rankers["other"], "pretrained_cfg_overlay": overlay, **TINY}),
    ):
        found = timm.create_model(name, pretrained=True, **given)
        assert torch.equal(found.ranker.stem.weight, own)
        assert torch.equal(found.backbone.head.weight, model.backbone.head.weight)
        assert found.ranker.trained is isinstance(given.get("ranker_weights"), str)
    found = timm.create_model(source, pretrained=True)
    assert torch.equal(found.ranker.stem.weight, model.ranker.stem.weight)


@records_arguments
def test_options_that_contradict_a_saved_model_or_each_other(tmp_path: Path) -> None:
    model = timm.create_model("ltrp_vit_tiny", ranker="conv", ranker_weights=True, **TINY)
    save_for_hf(model, tmp_path, safe_serialization=True)
    budget = AdaptiveBudget("threshold", 0.1, 4, 0.3)
    found = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, budget=budget)
    assert found.budget == budget  # the saved keep ratio was another one
    grey = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, in_chans=1)
    assert grey.ranker.in_chans == 1
    vit = timm.create_model("vit_tiny_patch16_224", **TINY)
    with pytest.raises(ValueError, match=r"in_chans of the ranker must be 3, .* got 1: leave it"):
        drop_patches(vit, "conv", ranker_args={"in_chans": 1})
    with pytest.raises(FileNotFoundError, match="holds no model"):
        drop_patches(vit, "conv", ranker_weights="")


def test_creation_on_the_meta_device() -> None:
    for ranker in ("contrast", "conv", "vit_tiny"):
        model = timm.create_model("ltrp_vit_tiny", device="meta", ranker=ranker)
        tensors = [*model.parameters(), *model.buffers()]
        assert {tensor.device.type for tensor in tensors} == {"meta"}
    twin = copy.deepcopy(timm.create_model("ltrp_vit_tiny", **TINY))
    assert twin(images()).shape == (2, 10)


@records_arguments
@torch.no_grad()
def test_what_was_changed_after_building_is_saved(tmp_path: Path) -> None:
    ranker = create_ranker("vit_tiny", img_size=32, embed_dim=48, depth=1, num_heads=2)
    ranker.trained = True
    model = timm.create_model("ltrp_vit_tiny", ranker=ranker, **TINY).eval()
    model.set_input_size(img_size=96)
    model.reset_classifier(3)
    model.selection, model.fill = "random", "nearest"
    save_for_hf(model, tmp_path, safe_serialization=True)
    twin = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert (twin.num_classes, twin.selection, twin.fill) == (3, "random", "nearest")
    assert torch.equal(twin(images(96)), model(images(96)))
    twin.selection = model.selection = "top"
    assert torch.equal(twin(images(96)), model(images(96)))


@records_arguments
def test_saving_does_not_depend_on_where_parts_came_from(tmp_path: Path) -> None:
    plain, _ = plain_file(tmp_path)
    save_for_hf(plain, tmp_path / "plain", safe_serialization=True)
    model = timm.create_model("ltrp", backbone=f"local-dir:{tmp_path / 'plain'}", pretrained=True)
    save_for_hf(model, tmp_path / "own", safe_serialization=True)
    shutil.rmtree(tmp_path / "plain")
    assert str(tmp_path) not in (tmp_path / "own" / "config.json").read_text()
    twin = timm.create_model(f"local-dir:{tmp_path / 'own'}", pretrained=True).eval()
    assert torch.equal(twin(images()), model.eval()(images()))
    stranger = nn.Module()
    stranger.forward = lambda x: x[:, 0, ::16, ::16]
    model = drop_patches(model.restore(), ranker=stranger)
    with pytest.raises(ValueError, match="'ranker' is not serializable"):
        save_for_hf(model, tmp_path / "stranger", safe_serialization=True)
