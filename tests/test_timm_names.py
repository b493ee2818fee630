"""timm's private names, and what differs between its versions: the tests of ltrp_timm._timm."""

import ast
import copy
import re
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from conftest import records_arguments
from timm.data import resolve_model_data_config
from torch import nn

from ltrp_timm import _timm

PACKAGE = Path(_timm.__file__).parent
TINY = {"img_size": 64, "depth": 1, "num_classes": 5}


def vit(**kwargs: object) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", **{**TINY, **kwargs})


def test_only_one_file_uses_private_names() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.name == "_timm.py":
            continue
        text = path.read_text(encoding="utf-8")
        assert "older timm" not in text, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("timm"):
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                assert not [name for name in names if name.startswith("_")], f"{path}: {names}"
            if isinstance(node, ast.Attribute):
                name = ast.unparse(node)
                assert not re.match(r"timm\.(\w+\.)*_[a-z]", name), f"{path}: {name}"


def test_feature_wrappers() -> None:
    resnet = partial(timm.create_model, "resnet10t", features_only=True)
    kinds = {type(resnet()), type(vit(depth=3, features_only=True))}
    kinds |= {type(resnet(feature_cls=kind)) for kind in ("hook", "fx")}
    assert kinds == set(_timm.FEATURE_WRAPPERS)


def test_rotary_embeddings() -> None:
    for name in (
        "eva02_tiny_patch14_224",
        "vit_small_patch16_dinov3",
        "vit_small_patch16_rope_mixed_224",
    ):
        assert type(timm.create_model(name, depth=1).rope) in _timm.ROTARY_EMBEDDINGS
    assert all(hasattr(kind, "get_embed") for kind in _timm.ROTARY_EMBEDDINGS)


@records_arguments
def test_recorded_args_and_traits() -> None:
    model = vit()
    args = _timm.recorded_args(model)
    assert args.items() >= TINY.items()
    args.clear()
    assert _timm.recorded_args(model)
    traits = _timm.traits(model)
    assert traits is not None
    assert traits["first_conv"] == "patch_embed.proj"
    model.set_input_size(img_size=96)
    assert (_timm.traits(model) or {})["img_size"] == (96, 96)


def test_what_a_module_without_records_gives() -> None:
    assert _timm.recorded_args(nn.Linear(1, 1)) == {}
    assert _timm.traits(nn.Linear(1, 1)) is None


def test_num_prefix_tokens() -> None:
    cait = timm.create_model("cait_xxs24_224", depth=1, embed_dim=48)
    assert _timm.num_prefix_tokens(cait) == 1
    vars(cait).pop("num_prefix_tokens", None)  # as in versions that do not set it
    assert _timm.num_prefix_tokens(cait) == 1
    assert _timm.num_prefix_tokens(vit(class_token=False, global_pool="avg")) == 0
    assert _timm.num_prefix_tokens(vit(reg_tokens=4)) == 5


def test_reset_to_tokens() -> None:
    for name in ("vit_base_patch16_siglip_224", "vit_pe_core_tiny_patch16_384"):
        model = timm.create_model(name, **TINY)
        assert model.attn_pool is not None
        _timm.reset_to_tokens(model, 3)
        assert model.attn_pool is None
        assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 16 + model.num_prefix_tokens, 3)


def test_backbone_filter() -> None:
    large, small = vit(img_size=128), vit()
    found = _timm.backbone_filter(large.state_dict(), small)
    assert found["pos_embed"].shape == small.pos_embed.shape
    deit3 = timm.create_model("deit3_small_patch16_224", **TINY)
    original = {
        name.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2"): tensor
        for name, tensor in deit3.state_dict().items()
    }
    assert "blocks.0.gamma_1" in original
    deit3.load_state_dict(_timm.backbone_filter(original, deit3))
    plain = {"weight": torch.zeros(1)}
    assert _timm.backbone_filter(plain, nn.Linear(1, 1)) is plain


def test_resolve_pretrained_cfg() -> None:
    cfg = _timm.resolve_pretrained_cfg("vit_tiny_patch16_224", None, {"mean": (0.1, 0.2, 0.3)})
    assert cfg.to_dict()["mean"] == (0.1, 0.2, 0.3)


def test_save_config_for_hf(tmp_path: Path) -> None:
    _timm.save_config_for_hf(vit(), str(tmp_path / "config.json"), model_args={"depth": 1})
    text = (tmp_path / "config.json").read_text()
    assert '"architecture": "vit_tiny_patch16_224"' in text
    assert '"depth": 1' in text


def test_eva_can_be_traced_with_indices() -> None:
    class WithIndices(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            keep = torch.arange(4).expand(2, -1)
            return x[:, :5], keep

    model = timm.create_model("eva02_tiny_patch14_224", img_size=56, depth=1, num_classes=3).eval()
    model.patch_drop = WithIndices()
    _timm.make_rope_gather_a_leaf()
    graph = torch.fx.symbolic_trace(copy.deepcopy(model))
    images = torch.randn(2, *resolve_model_data_config(model)["input_size"][:1], 56, 56)
    torch.testing.assert_close(graph(images), model(images))
    assert any("apply_keep_indices_nlc" in str(node.target) for node in graph.graph.nodes)


def test_init_distributed_device_on_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    found = _timm.init_distributed_device_so("cpu")
    assert (found["device"], found["world_size"], found["distributed"]) == ("cpu", 1, False)
