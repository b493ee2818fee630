"""The attention ranker equals the attention that the plain model computes in the chosen block."""

import copy
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import make_backbone, records_arguments
from safetensors.torch import save_file
from timm.models._hub import save_for_hf
from torch import Tensor, nn

from ltrp_timm import create_ranker, drop_patches
from ltrp_timm.rankers import AttentionRanker

NARROW = {"embed_dim": 64, "num_heads": 2}
FAMILIES = ["vit", "registers", "dinov2", "distilled", "deit3", "clip", "flexivit", "hybrid"]
FAMILIES += ["dynamic", "eva02", "dinov3", "rope_axial", "rope_mixed", "rope_ape", "pe_core"]

# what no family above has: name, arguments, image side
FORMS: dict[str, tuple[str, dict[str, Any], int]] = {
    "qk_norm": ("vit_tiny_patch16_224", {"qk_norm": True, "qkv_bias": False}, 96),
    "eva_separate": ("eva02_tiny_patch14_224", {"qkv_fused": False, **NARROW}, 84),
    "eva_post_norm": ("eva02_tiny_patch14_224", {"use_post_norm": True, **NARROW}, 84),
    "eva_plain": ("eva02_tiny_patch14_224", {"qkv_bias": False, **NARROW}, 84),
    "parallel": ("vit_base_patch16_xp_224", NARROW, 96),
}


def sharpen(model: nn.Module) -> nn.Module:
    """Weights by which heads and places differ: those of a fresh model attend alike to all."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name.endswith(("norm1.weight", "q_norm.weight", "k_norm.weight", "gamma_1")):
            parameter.data.uniform_(0.5, 2.0, generator=generator)
        elif any(part in name for part in ("qkv", "q_proj", "k_proj", "in_proj", "q_bias")):
            std = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5
            parameter.data.normal_(std=std, generator=generator)
        elif name.endswith(("cls_token", "reg_token", "dist_token")):
            parameter.data.normal_(generator=generator)
    return model


def backbone_for(kind: str, **changes: Any) -> tuple[Any, Tensor]:
    if kind not in FORMS:
        net, images = make_backbone(kind, **changes)
    else:
        name, args, side = FORMS[kind]
        torch.manual_seed(0)
        args = {"img_size": side, "depth": 2, "num_classes": 7, **args, **changes}
        net, images = timm.create_model(name, **args).eval(), torch.randn(3, 3, side, side)
    return sharpen(net), images


def attention_of(model: Any, images: Tensor, block: int) -> Tensor:
    """(B, heads, L, L) of a block of the plain model, caught where timm drops attention."""
    caught: list[Tensor] = []
    attn = getattr(model.blocks[block], "attn", model.blocks[block])
    attn.fused_attn = False
    handle = attn.attn_drop.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    model(images)
    handle.remove()
    return caught[0]


@pytest.mark.parametrize("block", [0, 1, -1])
@pytest.mark.parametrize("kind", [*FAMILIES, *FORMS])
@torch.no_grad()
def test_it_is_the_plain_models_attention(kind: str, block: int) -> None:
    net, images = backbone_for(kind)
    p, grid = net.num_prefix_tokens, net.patch_embed.grid_size
    rows = attention_of(copy.deepcopy(net), images, block)[:, :, 0]
    ranker = AttentionRanker(net, block=block).eval()
    scores = ranker(images)
    assert scores.shape == (3, *grid)
    assert scores.dtype == torch.float32
    assert (scores.flatten(1) - rows.mean(1)[:, p:]).abs().max() <= 1e-6
    for heads in (0, [1], (1, 0)):
        some = AttentionRanker(net, block=block, heads=heads).eval()
        chosen = [heads] if isinstance(heads, int) else list(heads)
        wanted = rows[:, chosen].mean(1)[:, p:]
        assert (some(images).flatten(1) - wanted).abs().max() <= 1e-6
    # what a wrong head, block, row or column would give is far from it
    others = [rows[:, 0], rows[:, 1], rows.mean(1).flip(1)]
    others += [attention_of(net, images, 1 - block % 2)[:, :, 0].mean(1)]
    for other in others:
        assert (scores.flatten(1) - other[:, p:]).abs().max() > 1e-4
    if p > 1:
        shifted = rows.mean(1)[:, 1 : 1 - p]
        assert (scores.flatten(1) - shifted).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["eva02", "dinov3", "rope_mixed", "eva_separate"])
@torch.no_grad()
def test_rotary_embeddings_count(kind: str) -> None:
    net, images = backbone_for(kind)
    ranker = AttentionRanker(net, block=0).eval()
    end = ranker.backbone.blocks[0]
    scores, forward = ranker(images), end.forward
    end.forward = lambda x, rope=None, **kwargs: forward(x, None, **kwargs)
    assert (ranker(images) - scores).abs().max() > 1e-4


@torch.no_grad()
def test_grouped_queries() -> None:
    if "num_kv_heads" not in timm.models.eva.Eva.__init__.__code__.co_varnames:
        pytest.skip(f"timm {timm.__version__} has no grouped-query attention")
    torch.manual_seed(0)
    args = {"img_size": 64, "depth": 2, "embed_dim": 64, "num_heads": 4, "num_kv_heads": (4, 2)}
    net = sharpen(timm.create_model("vit_base_patch16_sapiens2", **args)).eval()
    images = torch.randn(2, 3, 64, 64)
    for block in (0, 1):
        rows = attention_of(copy.deepcopy(net), images, block)[:, :, 0, net.num_prefix_tokens :]
        scores = AttentionRanker(net, block=block, heads=[1, 2]).eval()(images)
        assert (scores.flatten(1) - rows[:, 1:3].mean(1)).abs().max() <= 1e-6


def test_nothing_behind_the_queries_runs_or_is_stored(backbone_of: Callable[..., Any]) -> None:
    net, images = backbone_of("vit", depth=4)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    ranker = AttentionRanker(net, block=1)
    names = ranker.state_dict().keys()
    assert not [name for name in names if ".blocks.2" in name or ".head." in name]
    left = {name.split(".")[3] for name in names if name.startswith("backbone.blocks.1.")}
    assert left == {"norm", "q", "k"}
    one = sum(p.numel() for p in net.blocks[0].parameters())
    stem = sum(p.numel() for n, p in net.named_parameters() if not n.startswith(("b", "n", "h")))
    width = net.embed_dim
    expected = stem + one + 2 * (width * width + width) + 2 * width
    assert sum(p.numel() for p in ranker.parameters()) == expected
    # the model it was made from is as it was, and shares nothing with it
    assert len(net.blocks) == 4
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    theirs = {tensor.data_ptr() for tensor in net.state_dict().values()}
    assert not theirs & {tensor.data_ptr() for tensor in ranker.state_dict().values()}
    model = drop_patches(net, ranker=ranker, keep_ratio=0.3)  # its own backbone's attention
    assert model(images).shape == (3, 7)


def test_what_has_no_class_token_is_refused_with_the_reason() -> None:
    for name, args, text in (
        ("vit_base_patch16_gap_224", NARROW, r"no class token \(it pools .* global_pool='avg'\)"),
        ("vit_base_patch16_siglip_224", NARROW, r"no class token \(.* global_pool='map'\)"),
        ("swin_tiny_patch4_window7_224", {}, "SwinTransformer: it is no .* no class token"),
        ("resnet10t", {}, "ResNet: it is no VisionTransformer or Eva of timm, and it has no class"),
        ("beit_base_patch16_224", NARROW, r"Beit: it is no VisionTransformer or Eva of timm\."),
        ("vit_small_patch16_18x2_224", NARROW, "its ParallelThingsBlock is not a single softmax"),
        ("vit_tiny_patch16_224", {"attn_layer": "diff"}, "its DiffAttention is not a single"),
        ("ltrp_vit_tiny", {}, "LTRPModel: it is no VisionTransformer or Eva"),
    ):
        if args.get("attn_layer") and not hasattr(timm.layers, "DiffAttention"):
            continue
        small = {"depth": 1, **args} if "vit" in name or "beit" in name else args
        with pytest.raises(TypeError, match=f"cannot rank by the class token of .*{text}"):
            create_ranker("attention", backbone=name, img_size=64, **small)
        with pytest.raises(TypeError, match=text):
            create_ranker("attention", backbone=timm.create_model(name, **small))
    with pytest.raises(TypeError, match="not_an_argument"):
        create_ranker("attention", backbone="vit_tiny_patch16_224", not_an_argument=1)


def test_arguments_out_of_range(backbone_of: Callable[..., Any]) -> None:
    net, _ = backbone_of("vit")
    for args, text in (
        ({"block": 2}, r"block must lie in -2 … 1, got 2"),
        ({"block": -3}, r"block must lie in -2 … 1, got -3"),
        ({"block": "last"}, r"block must lie in -2 … 1, got 'last'"),
        ({"heads": 3}, r"heads must be different ones of 0 … 2, got 3"),
        ({"heads": [-1]}, r"heads must be different ones of 0 … 2, got \[-1\]"),
        ({"heads": []}, r"heads must be different ones of 0 … 2, got \[\]"),
        ({"heads": 1.5}, r"heads must be different ones of 0 … 2, got 1\.5"),
        ({"heads": "0"}, r"heads must be different ones of 0 … 2, got '0'"),
        ({"block": True}, r"block must lie in -2 … 1, got True"),
        ({"heads": [0, 0]}, r"heads must be different ones of 0 … 2, got \[0, 0\]"),
        ({"in_chans": 1}, "takes 3 channels, the images have 1"),
        ({"pretrained": True}, "go with a backbone's name; this one is a VisionTransformer"),
        ({"depth": 3}, "go with a backbone's name"),
        ({"img_size": 0}, "expected a positive size"),
    ):
        with pytest.raises(ValueError, match=text):
            AttentionRanker(net, **args)
    with pytest.raises(
        TypeError, match="must be the name of a timm model or such a model, got int"
    ):
        AttentionRanker(3)
    grey, _ = backbone_of("vit", in_chans=1)
    with pytest.raises(ValueError, match="takes 3 channels, the images have 1"):
        drop_patches(grey, ranker="attention", ranker_args={"backbone": net})


@torch.no_grad()
def test_a_lower_resolution(backbone_of: Callable[..., Any]) -> None:
    net, images = backbone_of("dinov3")
    seen: list[Tensor] = []
    for source in (net, "vit_small_patch16_dinov3"):
        more = {"depth": 2, **NARROW} if isinstance(source, str) else {}
        ranker = create_ranker("attention", backbone=source, img_size=48, **more)
        assert ranker.img_size == (48, 48)
        ranker.trained = True
        ranker.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        twin, _ = backbone_of("dinov3")
        model = drop_patches(twin, ranker=ranker, keep_ratio=0.5)
        assert model.patch_scores(images).shape == (3, 36)
        assert seen[-1].shape == (3, 3, 48, 48)
        assert ranker(seen[-1]).shape == (3, 3, 3)
        assert model(images).shape == (3, 7)
        model.set_input_size(img_size=192)
        assert model(torch.randn(1, 3, 192, 192)).shape == (1, 7)
        assert seen[-1].shape == (1, 3, 48, 48)


def saved_backbone(folder: Path) -> tuple[Any, Path]:
    """A narrow ViT with weights of its own in timm's layout."""
    torch.manual_seed(5)
    net = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=5)
    save_for_hf(sharpen(net), folder, safe_serialization=True)
    return net.eval(), folder


@records_arguments
@torch.no_grad()
def test_pretrained_pulls_the_backbones_weights_through_timm(tmp_path: Path) -> None:
    net, folder = saved_backbone(tmp_path)
    images = torch.randn(2, 3, 64, 64)
    expected = AttentionRanker(net, block=-2).eval()(images)
    source = f"local-dir:{folder}"
    ranker = create_ranker("attention", pretrained=True, backbone=source, block=-2).eval()
    assert torch.equal(ranker(images), expected)
    assert ranker.trained
    assert not create_ranker("attention", backbone=source).trained
    assert str(folder) not in json.dumps(ranker.config())
    backbone = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1)
    model = drop_patches(
        backbone,
        ranker="attention",
        ranker_weights=True,
        ranker_args={"backbone": source, "block": -2},
    ).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.allclose(model.patch_scores(images), expected.flatten(1), atol=1e-5)
    # timm adapts what is asked of another size, and a plain file of all blocks loads too
    grey = create_ranker("attention", pretrained=True, backbone=source, in_chans=1, img_size=96)
    assert grey.eval()(torch.randn(2, 1, 96, 96)).shape == (2, 6, 6)
    save_file(net.state_dict(), tmp_path / "plain.safetensors")
    plain = {"checkpoint_path": str(tmp_path / "plain.safetensors"), "img_size": 64, "depth": 3}
    ranker = create_ranker(
        "attention", backbone="vit_tiny_patch16_224", block=1, num_classes=5, **plain
    )
    assert torch.equal(ranker.eval()(images), expected)
    assert ranker.trained
    assert "checkpoint_path" not in ranker.config()
    overlay = {"file": str(tmp_path / "plain.safetensors"), "num_classes": 5}
    ranker = create_ranker(
        "attention",
        pretrained=True,
        backbone="vit_tiny_patch16_224",
        block=1,
        pretrained_cfg_overlay=overlay,
        img_size=64,
        depth=3,
    )
    assert torch.equal(ranker.eval()(images), expected)


@pytest.mark.parametrize("kind", ["vit", "eva02", "registers"])
@torch.no_grad()
def test_save_and_load(kind: str, tmp_path: Path) -> None:
    name = {"vit": "vit_tiny_patch16_224.augreg_in21k", "eva02": "eva02_tiny_patch14_224.mim_in22k"}
    args = {"img_size": 56, "depth": 3, **NARROW}
    name = name.get(kind, "vit_small_patch14_reg4_dinov2.lvd142m")
    ranker = create_ranker("attention", backbone=name, block=-2, heads=1, **args).eval()
    ranker.mean = [0.1, 0.2, 0.3]
    images = torch.randn(2, 3, 56, 56)
    ranker.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["ranker"] == "attention"
    assert config["args"]["backbone"] == name
    assert config["args"]["block"] == 1
    for source in (tmp_path, tmp_path / "model.safetensors"):
        loaded = create_ranker("attention", pretrained=source).eval()
        assert torch.equal(loaded(images), ranker(images))
        assert loaded.config() == ranker.config()
        assert loaded.trained
    assert not torch.equal(
        create_ranker("attention", backbone=name, block=-2, heads=1, **args).eval()(images),
        ranker(images),
    )
    grey = create_ranker("attention", pretrained=tmp_path, in_chans=1).eval()
    assert grey(images[:, :1]).shape == ranker(images).shape


def test_a_backbone_without_a_name_is_not_saved(tmp_path: Path) -> None:
    net = timm.models.VisionTransformer(img_size=64, depth=1, embed_dim=64, num_heads=2)
    ranker = AttentionRanker(net)
    assert ranker.mean is None
    assert ranker(torch.randn(1, 3, 64, 64)).shape == (1, 4, 4)
    with pytest.raises(ValueError, match="cannot save an attention ranker on a VisionTransformer"):
        ranker.save(tmp_path)
    assert not list(tmp_path.iterdir())


@records_arguments
@pytest.mark.parametrize("by_name", [True, False])
@torch.no_grad()
def test_with_timms_create_model_and_saving(by_name: bool, tmp_path: Path) -> None:
    source: Any = "eva02_tiny_patch14_224"
    args: dict[str, Any] = {"img_size": 42, "depth": 2, **NARROW}
    if not by_name:
        source, args = timm.create_model(source, **args), {}
    model = timm.create_model(
        "ltrp_vit_tiny",
        ranker="attention",
        ranker_args={"backbone": source, "block": 1, "heads": [0], **args},
        img_size=64,
        depth=1,
        in_chans=3,
    ).eval()
    images = torch.randn(2, 3, 64, 64)
    if by_name:
        with pytest.warns(UserWarning, match="attention ranker has no trained weights"):
            expected = model(images)
    expected = model(images)
    save_for_hf(model, tmp_path, safe_serialization=True)
    twin = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(twin(images), expected)
    assert torch.equal(twin.patch_scores(images), model.patch_scores(images))
    assert twin.ranker.config() == model.ranker.config()
    grey = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, in_chans=1).eval()
    assert grey(images[:, :1]).shape == (2, 1000)


@torch.no_grad()
def test_dtypes_and_devices() -> None:
    args = {"backbone": "vit_tiny_patch16_224", "img_size": 64, "depth": 2}
    ranker = create_ranker("attention", dtype=torch.bfloat16, **args).eval()
    assert {p.dtype for p in ranker.parameters()} == {torch.bfloat16}
    scores = ranker(torch.randn(1, 3, 64, 64, dtype=torch.bfloat16))
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()
    meta = create_ranker("attention", device="meta", **args)
    assert {p.device.type for p in meta.parameters()} == {"meta"}
    model = timm.create_model(
        "ltrp_vit_tiny", ranker="attention", ranker_args=args, dtype=torch.bfloat16, device="meta"
    )
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.bfloat16, "meta")}


def formats(kind: str) -> tuple[AttentionRanker, Tensor, Tensor]:
    net, images = backbone_for(kind)
    heads = [1] if kind in ("vit", "dinov3") else None
    ranker = AttentionRanker(net, block=1, heads=heads).eval()
    return ranker, images, ranker(images)


KINDS = ["vit", "distilled", "eva02", "dinov3", "rope_mixed", "eva_separate", "parallel"]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_ranker_alone_in_every_format(kind: str) -> None:
    ranker, images, eager = formats(kind)
    assert eager.std() > 1e-4
    other = torch.randn_like(images)
    runs = {
        "script": torch.jit.script(ranker),
        "fx": torch.fx.symbolic_trace(ranker),
        "compile": torch.compile(ranker, fullgraph=True, backend="aot_eager"),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        runs["trace"] = torch.jit.trace(ranker, images)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(ranker, (images,), dynamic_shapes={"images": {0: batch}})
    runs["export"] = program.module()
    for name, run in runs.items():
        for pixels in (images, other):
            assert (run(pixels) - ranker(pixels)).abs().max() <= 1e-6, name
    assert (runs["export"](images[:1]) - eager[:1]).abs().max() <= 1e-6


@pytest.mark.parametrize("kind", ["vit", "rope_mixed"])
@torch.no_grad()
def test_the_ranker_alone_in_onnx(kind: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    ranker, images, eager = formats(kind)
    file = io.BytesIO()
    torch.onnx.export(ranker, (images,), dynamo=True, verbose=False).save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    out = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
    assert (torch.from_numpy(out) - eager).abs().max() <= 1e-5
