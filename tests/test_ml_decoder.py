"""The ML-Decoder head: its arithmetic, and that it is a classifier like any other."""

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import FAMILIES, make_backbone, records_arguments
from safetensors.torch import load_file
from timm.layers.ml_decoder import MLDecoder as TimmDecoder
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import Tensor, nn

import ltrp_timm
from ltrp_timm import drop_patches, save_pretrained
from ltrp_timm.layers.ml_decoder import MLDecoder, make_head

SHARED = Path(__file__).parents[2] / "shared" / "parity"  # reference vectors, where they lie beside
VECTORS = SHARED / "f_ml_decoder.safetensors"
ARGS = {"embed_dim": 32, "num_heads": 4, "mlp_dim": 48}
TINY: dict[str, Any] = {
    **{"img_size": 64, "depth": 1, "embed_dim": 32, "num_heads": 2},
    **{"num_classes": 7, "head": "ml_decoder", "head_args": ARGS},
}


def tiny(name: str = "ltrp_vit_tiny", **changes: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, **{**TINY, **changes}).eval()


def decoder_of(model: Any) -> MLDecoder:
    head = model.get_classifier()
    assert isinstance(head, MLDecoder)
    return head


def images() -> Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.skipif(not VECTORS.exists(), reason="the reference vectors are not here")
@torch.no_grad()
def test_reference_vectors() -> None:
    tensors = load_file(VECTORS)
    # the published names, but for the module that holds them
    prefix = "w:decoder."
    weights = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    head = MLDecoder(7, 24, embed_dim=32).eval()
    head.load_state_dict(weights)
    assert (head(tensors["tokens"]) - tensors["logits"]).abs().max() <= 1e-5
    swapped = dict(weights, **{"query_embed.weight": weights["query_embed.weight"].flip(0)})
    head.load_state_dict(swapped)
    assert (head(tensors["tokens"]) - tensors["logits"]).abs().max() > 1e-1


@pytest.mark.parametrize("groups", [11, 4, 1])
@torch.no_grad()
def test_against_the_layers_of_timm(groups: int) -> None:
    """timm's class itself does not run on this torch; its layer does, and its weights fit."""
    theirs = TimmDecoder(11, groups, decoder_embedding=32, initial_num_features=24).eval()
    layer = theirs.decoder.layers[0]
    for parameter in layer.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    theirs.duplicate_pooling_bias.normal_()
    ours = MLDecoder(11, 24, embed_dim=32, num_groups=groups).eval()
    state = theirs.state_dict()
    ours.load_state_dict({n.removeprefix("decoder."): t for n, t in state.items()})
    tokens = torch.randn(3, 9, 24)
    memory = F.relu(theirs.embed_standart(tokens)).transpose(0, 1)
    queries = theirs.query_embed.weight.unsqueeze(1).expand(-1, 3, -1)
    h = layer(queries, memory).transpose(0, 1)  # (B, G, E)
    in_group = theirs.duplicate_pooling.shape[2]
    expected = [
        h[:, c // in_group] @ theirs.duplicate_pooling[c // in_group, :, c % in_group]
        for c in range(11)
    ]
    logits = torch.stack(expected, 1) + theirs.duplicate_pooling_bias
    assert (ours(tokens) - logits).abs().max() <= 1e-5
    assert logits.std() > 0.1


@torch.no_grad()
def test_the_order_of_tokens_does_not_matter_but_each_does() -> None:
    head, tokens = MLDecoder(5, 16, **ARGS).eval(), torch.randn(2, 6, 16)
    logits = head(tokens)
    assert (head(tokens.flip(1)) - logits).abs().max() <= 1e-6
    for place in range(6):
        others = [i for i in range(6) if i != place]
        assert (head(tokens[:, others]) - logits).abs().max() > 1e-4


@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.no_grad()
def test_every_family_hands_on_its_tokens_or_refuses(family: str) -> None:
    backbone, batch = make_backbone(family, depth=1)
    before = copy.deepcopy(backbone)
    if family == "distilled":
        with pytest.raises(TypeError, match="VisionTransformerDistilled cannot have an ml_decoder"):
            drop_patches(backbone, head="ml_decoder", head_args=ARGS)
        assert torch.equal(backbone(batch), before(batch))
        return
    state = torch.get_rng_state()
    make_head("ml_decoder", backbone.train(), ARGS)
    assert backbone.global_pool == before.global_pool
    assert [n for n, _ in backbone.named_modules()] == [n for n, _ in before.named_modules()]
    backbone.eval()
    assert torch.equal(backbone(batch), before(batch))
    torch.set_rng_state(state)
    model = drop_patches(backbone, keep_ratio=0.5, head="ml_decoder", head_args=ARGS)
    head, counts = decoder_of(model), []
    handle = head.register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[1]))
    logits, kept = model(batch), model.keep_indices(batch).shape[1]
    full = model.backbone(batch)
    handle.remove()
    assert logits.shape == (3, 7)
    assert (logits - full).abs().max() > 1e-6
    n = model.patch_scores(batch).shape[1]
    assert counts[1] - counts[0] == n - kept  # all of them, and nothing pooled


@torch.no_grad()
def test_the_head_is_as_the_backbone_is() -> None:
    backbone = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=7).double().train()
    model = drop_patches(backbone, head="ml_decoder", head_args=ARGS)
    head = decoder_of(model)
    assert head.training
    assert {p.dtype for p in head.parameters()} == {torch.float64}
    assert model.global_pool == ""
    assert model.restore().get_classifier() is head  # a classifier of the backbone's, from here on


def test_reset_classifier() -> None:
    model = tiny().double().train()
    model.requires_grad_(False)
    model.reset_classifier(5)
    head = decoder_of(model)
    assert model(images().double()).shape == (3, 5)
    assert (model.num_classes, head.num_classes, head.config()) == (5, 5, {**head.config(), **ARGS})
    assert head.training
    assert head.duplicate_pooling.dtype == torch.float64
    model.reset_classifier(0)
    assert model(images().double()).shape == (3, 9, 32)  # tokens: nobody pools any more
    model.reset_classifier(4, "token")
    assert isinstance(model.get_classifier(), nn.Linear)
    assert model(images().double()).shape == (3, 4)
    assert "head" not in model._model_args


@records_arguments
@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("ltrp_vit_tiny", {}),
        ("ltrp", {"backbone": "vit_small_patch16_dinov3"}),
        ("ltrp", {"backbone": "vit_base_patch16_siglip_224"}),  # its attention pool goes
        ("ltrp", {"backbone": "vit_base_patch16_gap_224"}),  # its norm stays where it was
        ("ltrp", {"backbone": "beit_base_patch16_224"}),
    ],
)
@torch.no_grad()
def test_saved_and_loaded(name: str, extra: dict[str, Any], tmp_path: Path) -> None:
    model = tiny(name, **extra)
    model.reset_classifier(12)
    wanted = model(images())
    source = f"local-dir:{save_pretrained(model, tmp_path / 'model')}"
    again = timm.create_model(source, pretrained=True).eval()
    assert decoder_of(again).config() == decoder_of(model).config()
    assert torch.equal(again(images()), wanted)
    assert again.state_dict().keys() == model.state_dict().keys()
    fewer = timm.create_model(source, pretrained=True, num_classes=3).eval()
    assert fewer(images()).shape == (3, 3)
    own, old = decoder_of(fewer), decoder_of(model)
    assert torch.equal(own.layers[0].linear1.weight, old.layers[0].linear1.weight)


@torch.no_grad()
def test_a_plain_checkpoint_leaves_the_head_new(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=1000, **_sizes())
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    overlay = {"file": str(tmp_path / "plain.pth")}
    for classes in (7, 1000):  # another number of classes than the file's, and the same
        caplog.clear()
        model = tiny(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=classes)
        blocks = model.backbone.blocks.state_dict()
        assert all(torch.equal(t, blocks[n]) for n, t in plain.blocks.state_dict().items())
        assert model(images()).shape == (3, classes)
        assert "Ignoring the checkpoint's classifier" in caplog.text
    torch.save(tiny().state_dict(), tmp_path / "plain.pth")
    with pytest.raises(RuntimeError, match=r"unexpected  backbone\.head\.query_embed"):
        tiny(pretrained=True, pretrained_cfg_overlay=overlay, head=None, head_args=None)


@records_arguments
@torch.no_grad()
def test_a_changed_linear_classifier_is_saved_too(tmp_path: Path) -> None:
    model = tiny(head=None, head_args=None)
    model.reset_classifier(12, "avg")
    source = f"local-dir:{save_pretrained(model, tmp_path / 'model')}"
    again = timm.create_model(source, pretrained=True).eval()
    assert again.global_pool == "avg"
    assert torch.equal(again(images()), model(images()))


def _sizes() -> dict[str, Any]:
    return {name: TINY[name] for name in ("img_size", "depth", "embed_dim", "num_heads")}


def test_layer_decay_and_gradients() -> None:
    model = tiny().train()
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    names = {id(p): n for n, p in model.named_parameters()}
    scales = {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}
    head = {n for n in scales if n.startswith("backbone.head.")}
    assert {scales[name] for name in head} == {1.0}
    assert scales["backbone.patch_embed.proj.weight"] < 1.0
    assert not any("query_embed" in name for name in scales)  # drawn once, not trained
    optimizer = create_optimizer_v2(model, "sgd", 0.1, layer_decay=0.5)
    queries = decoder_of(model).query_embed.weight.clone()
    before = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    model(images()).square().sum().backward()
    optimizer.step()
    after = dict(model.named_parameters())
    assert not [n for n, p in before.items() if torch.equal(p, after[n])]
    assert torch.equal(decoder_of(model).query_embed.weight, queries)


@torch.no_grad()
def test_other_forms_give_the_eager_pruned_logits(tmp_path: Path) -> None:
    model, batch = tiny(), images()
    wanted, full = model(batch), model.backbone(batch)
    assert (wanted - full).abs().max() > 1e-4
    forms: dict[str, Any] = {
        "script": torch.jit.script(model),
        "fx": torch.fx.symbolic_trace(model),
        "compile": torch.compile(model, backend="aot_eager", fullgraph=True),
        "export": torch.export.export(model, (batch,)).module(),
    }
    for name, form in forms.items():
        assert (form(batch) - wanted).abs().max() <= 1e-5, name


@pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="needs onnxscript")
def test_onnx(tmp_path: Path) -> None:
    done = ltrp_timm.export_model(tiny(), tmp_path / "model.onnx", dynamic_batch=True)
    assert done.parity.error <= 1e-4
    assert done.parity.from_full is not None
    assert done.parity.from_full > 1e-3


def test_wrong_arguments() -> None:
    backbone = timm.create_model("vit_tiny_patch16_224", depth=1)
    classifier = backbone.get_classifier()
    for wanted, error, arguments in (
        ("head must be one of ml_decoder, got 'mlp'", ValueError, {"head": "mlp"}),
        ("head_args go with a head", ValueError, {"head_args": {"embed_dim": 32}}),
        (
            "head_args may be embed_dim, .*, drop, got width",
            TypeError,
            {"head_args": {"width": 32}},
        ),
        ("head_args must be a mapping, got int", TypeError, {"head_args": 3}),
        ("multiple of 8 heads, got 30", ValueError, {"head_args": {"embed_dim": 30}}),
        ("num_groups must be at least 1, got 0", ValueError, {"head_args": {"num_groups": 0}}),
        (r"drop must be in \[0, 1\), got 1.0", ValueError, {"head_args": {"drop": 1.0}}),
        ("keep_ratio must be in", ValueError, {"keep_ratio": 2.0}),
    ):
        given = arguments if "head args" in wanted or "head_args go" in wanted else None
        kwargs = given or {"head": "ml_decoder", **arguments}
        with pytest.raises(error, match=wanted):
            drop_patches(backbone, **kwargs)
        assert backbone.get_classifier() is classifier
        assert backbone.global_pool == "token"
    bare = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0)
    with pytest.raises(ValueError, match="an ml_decoder head needs classes"):
        drop_patches(bare, head="ml_decoder")
