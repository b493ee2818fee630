import copy
import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import FAMILIES, awaken, grid_of, make_backbone, records_arguments
from timm.models import group_modules, group_parameters, save_for_hf
from timm.models._features import FeatureGetterNet
from timm.optim import create_optimizer_v2
from torch import nn

from ltrp_timm import AdaptiveBudget, drop_patches, gather_patches, list_rankers, num_keep
from ltrp_timm.selection.registry import SELECTIONS

KINDS = ["vit", "distilled", "siglip", "eva02", "rope_mixed", "beit", "beit_shared", "cait"]
RELPOS = ["relpos", "relpos_shared", "relpos_cls", "relpos_bias_cls"]
NAFLEX = ["naflex", "naflex_siglip", "naflex_clip", "naflex_eva02", "naflex_mixed"]
KINDS += RELPOS + NAFLEX


@pytest.mark.parametrize("family", KINDS)
def test_indices_scores_and_forward_agree(backbone_of: Callable[..., Any], family: str) -> None:
    backbone, images = backbone_of(family)
    model = drop_patches(backbone, keep_ratio=0.3)
    n = math.prod(grid_of(backbone, images))
    scores, keep = model.patch_scores(images), model.keep_indices(images)
    assert scores.shape == (3, n)
    assert scores.dtype == torch.float32
    assert keep.shape == (3, num_keep(n, 0.3))
    assert keep.dtype == torch.int64
    assert (keep[:, 1:] > keep[:, :-1]).all()
    kept = torch.zeros(3, n, dtype=torch.bool).scatter(1, keep, True)
    assert all(s[k].min() >= s[~k].max() for s, k in zip(scores, kept))
    assert torch.equal(model(images), model(images, keep_indices=keep))
    assert torch.equal(model(images), model.forward_head(model.forward_features(images)))
    assert model.forward_features(images).shape[1] == model.num_prefix_tokens + keep.shape[1]


def test_keep_ratio_may_change_between_calls(backbone_of: Callable[..., Any]) -> None:
    backbone, images = backbone_of("vit")
    model = drop_patches(backbone)
    for ratio, k in ((0.5, 18), (0.25, 9), (1.0, 36), (1e-6, 1)):
        model.keep_ratio = ratio
        assert model.keep_indices(images).shape == (3, k)
        model(images)
    for bad in (0.0, -1.0, 1.5, math.nan):
        with pytest.raises(ValueError, match="keep_ratio must be in"):
            model.keep_ratio = bad
    assert model.keep_ratio == 1e-6
    model.selection = "random"
    assert torch.equal(model.keep_indices(images)[0], model.keep_indices(images)[1])
    with pytest.raises(ValueError, match="selection must be one of"):
        model.selection = "best"
    with pytest.raises(ValueError, match="fill must be one of"):
        model.fill = "mean"


def test_bad_images_and_indices(backbone_of: Callable[..., Any]) -> None:
    backbone, images = backbone_of("vit")
    model = drop_patches(backbone, validate=True)
    full = backbone(images)
    for bad, text in (
        (torch.zeros(3, 1, 96, 96), r"images must be \(B, 3, H, W\), got \[3, 1, 96, 96\]"),
        (torch.zeros(3, 96, 96), r"images must be \(B, 3, H, W\)"),
        (torch.zeros(3, 3, 96, 80), "images must be 96x96, got 96x80"),
        (
            torch.zeros(3, 3, 96, 96, dtype=torch.uint8),
            r"floating point, got torch\.uint8; normalise",
        ),
    ):
        for call in (model, model.patch_scores, model.keep_indices, model.forward_intermediates):
            with pytest.raises(ValueError, match=text):
                call(bad)
    keep = torch.arange(9).expand(3, -1)
    for bad_keep, error, text in (
        (keep[:2], ValueError, r"keep_indices must be \(B, K\)"),
        (keep.int(), TypeError, "must be int64"),
        (keep.float(), TypeError, "must be int64"),
        (keep.tolist(), TypeError, "must be an int64 tensor, got list"),
        (keep.numpy(), TypeError, "must be an int64 tensor, got ndarray"),
        (keep + 30, ValueError, "must lie in 0 … 35, got 30 … 38"),
        (keep * 0, ValueError, "same patch twice"),
    ):
        with pytest.raises(error, match=text):
            model(images, keep_indices=bad_keep)
    assert torch.equal(backbone(images), full)
    model.ranker.forward = lambda x: torch.full((3, 6, 6), torch.nan)
    with pytest.raises(ValueError, match="scores that are not finite"):
        model(images)
    model.validate = False
    assert model.keep_indices(images).tolist() == [list(range(18))] * 3  # all tie


@pytest.mark.parametrize("family", [*KINDS, "registers", "dynamic"])
@pytest.mark.parametrize("fill", ["zeros", "nearest"])
def test_dense_features_stand_at_their_places(
    backbone_of: Callable[..., Any], family: str, fill: str
) -> None:
    backbone, images = backbone_of(family)
    h, w = grid_of(backbone, images)
    model = drop_patches(backbone, keep_ratio=0.25, fill=fill)
    keep = model.keep_indices(images)
    final, (first, last) = model.forward_intermediates(images, indices=[0, 1], norm=True)
    assert torch.equal(final, model.forward_features(images))
    assert first.shape == last.shape == (3, backbone.embed_dim, h, w)
    kept = gather_patches(last.flatten(2).transpose(1, 2), keep)
    normed = backbone.norm(final) if isinstance(backbone.norm, torch.nn.Identity) else final
    assert torch.allclose(kept, normed[:, model.num_prefix_tokens :], atol=1e-6)
    dropped = torch.ones(3, h * w, dtype=torch.bool).scatter(1, keep, False).reshape(3, h, w)
    zero = (last == 0).all(1)
    assert torch.equal(zero, dropped) if fill == "zeros" else not zero.any()


@pytest.mark.parametrize("family", ["vit", "siglip", "eva02", "aimv2"])
def test_forward_intermediates_options_equal_the_plain_models(
    backbone_of: Callable[..., Any], family: str
) -> None:
    """With all patches kept every option gives what timm gives."""
    plain, images = backbone_of(family)
    model = drop_patches(copy.deepcopy(plain), keep_ratio=1.0)
    prefix = plain.num_prefix_tokens > 0
    options: list[dict[str, Any]] = [
        {},
        {"indices": 1},
        {"indices": [0], "stop_early": True},
        {"norm": True, "output_fmt": "NLC"},
        {"intermediates_only": True},
        {"intermediates_only": True, "return_prefix_tokens": prefix, "output_fmt": "NLC"},
    ]
    for option in options:
        torch.testing.assert_close(
            model.forward_intermediates(images, **option),
            plain.forward_intermediates(images, **option),
            rtol=0,
            atol=0,
        )
    if "output_dict" in plain.forward_intermediates.__code__.co_varnames:
        for option in ({}, {"return_prefix_tokens": True}, {"intermediates_only": True}):
            torch.testing.assert_close(
                model.forward_intermediates(images, output_dict=True, **option),
                plain.forward_intermediates(images, output_dict=True, **option),
            )
    with pytest.raises(ValueError, match="output_fmt must be NCHW or NLC"):
        model.forward_intermediates(images, output_fmt="NHWC")


def test_prefix_tokens_of_dense_features(backbone_of: Callable[..., Any]) -> None:
    backbone, images = backbone_of("registers")
    model = drop_patches(backbone, keep_ratio=0.25)
    final, pairs = model.forward_intermediates(images, return_prefix_tokens=True, norm=True)
    assert pairs[-1][1].shape == (3, 5, 64)
    assert torch.equal(pairs[-1][1], final[:, :5])
    out = model.forward_intermediates(images, output_dict=True, return_prefix_tokens=True)
    assert sorted(out) == ["image_features", "image_intermediates", "image_intermediates_prefix"]


def test_feature_getter(backbone_of: Callable[..., Any]) -> None:
    backbone, images = backbone_of("vit")
    model = drop_patches(backbone, keep_ratio=0.25)
    expected = model.forward_intermediates(images, indices=[0], intermediates_only=True)
    net = FeatureGetterNet(model, out_indices=[0])
    assert torch.equal(net(images)[0], expected[0])
    assert net.feature_info.module_name() == ["backbone.blocks.0"]
    assert net.feature_info.channels() == [192]
    assert model.num_classes == 0
    assert len(model.backbone.blocks) == 1


def test_dynamic_image_sizes(backbone_of: Callable[..., Any]) -> None:
    backbone, _ = backbone_of("dynamic")
    plain = copy.deepcopy(backbone)
    model = drop_patches(backbone, keep_ratio=0.5)
    for height, width in ((96, 96), (64, 128), (160, 48)):
        images = torch.randn(2, 3, height, width)
        grid = (height // 16, width // 16)
        assert model.patch_scores(images).shape == (2, grid[0] * grid[1])
        assert model.forward_intermediates(images)[1][-1].shape == (2, 192, *grid)
        every = torch.arange(grid[0] * grid[1]).expand(2, -1)
        assert torch.equal(model(images, keep_indices=every), plain(images))
        assert not torch.equal(model(images), plain(images))
    for call in (model, model.keep_indices, model.patch_scores):
        with pytest.raises(ValueError, match="must divide into patches of 16x16, got 70x64"):
            call(torch.randn(1, 3, 70, 64))


def test_padded_images_are_ranked_where_they_are_encoded() -> None:
    padded = timm.create_model(
        "vit_tiny_patch16_224", depth=1, dynamic_img_size=True, dynamic_img_pad=True
    )

    class Brightness(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), 16).squeeze(1)

    model = drop_patches(padded.eval(), ranker=Brightness(), keep_ratio=1 / 16)
    images = torch.zeros(1, 3, 52, 52)
    images[..., 32:48, 32:48] = 1.0
    assert model.keep_indices(images).tolist() == [[10]]
    assert model.forward_intermediates(images)[1][0].shape[-2:] == (4, 4)
    assert model(torch.randn(1, 3, 8, 8)).shape == (1, 1000)  # smaller than a patch


@pytest.mark.parametrize(
    "family", ["vit", "eva02", "rope_mixed", "dinov3", "beit", "beit_shared", *RELPOS]
)
def test_set_input_size(backbone_of: Callable[..., Any], family: str) -> None:
    backbone, images = backbone_of(family)
    if not hasattr(backbone, "set_input_size"):
        pytest.skip(f"the plain model of timm {timm.__version__} cannot either")
    side = images.shape[-1]
    model = drop_patches(backbone, keep_ratio=0.5)
    model.set_input_size(img_size=2 * side)
    large = torch.randn(2, 3, 2 * side, 2 * side)
    n = 4 * (side // backbone.patch_embed.patch_size[0]) ** 2
    assert model.patch_scores(large).shape == (2, n)
    assert model(large).shape == (2, 7)
    if hasattr(backbone, "_traits"):
        assert model._traits["img_size"] == (2 * side, 2 * side)
    config = timm.data.resolve_model_data_config(model)
    assert config["mean"] == backbone.pretrained_cfg["mean"]
    model.set_input_size(patch_size=(8, 8), img_size=(64, 64))
    assert model.ranker.patch_size == (8, 8)
    assert model.patch_scores(torch.randn(1, 3, 64, 64)).shape == (1, 64)
    if backbone.patch_embed.strict_img_size:
        with pytest.raises(ValueError, match="images must be 64x64"):
            model(images)


@pytest.mark.parametrize("family", KINDS)
def test_reset_classifier(backbone_of: Callable[..., Any], family: str) -> None:
    backbone, images = backbone_of(family)
    model = drop_patches(backbone)
    model.requires_grad_(False)
    model.reset_classifier(4)
    assert model.num_classes == 4
    assert model(images).shape == (3, 4)
    model.reset_classifier(0)
    assert model(images).shape == (3, model.head_hidden_size)
    if family != "distilled":
        model.reset_classifier(5, "avg")
        assert model.global_pool == "avg"
        assert model(images).shape == (3, 5)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(name.startswith("backbone.head") for name in trainable)


def test_frozen_means_frozen(backbone_of: Callable[..., Any]) -> None:
    backbone, images = backbone_of("vit", drop_path_rate=0.1)
    model = drop_patches(backbone, ranker="conv")
    model.ranker.trained = True
    for mode in (True, False, True):
        model.train(mode)
        assert model.backbone.training is mode
        assert not any(module.training for module in model.ranker.modules())
    before = copy.deepcopy(model.ranker.state_dict())
    model(images).square().mean().backward()
    assert all(p.grad is None for p in model.ranker.parameters())
    assert all(p.grad is not None for p in model.backbone.parameters())
    optimizer = create_optimizer_v2(model, "sgd", lr=1.0, weight_decay=0.1)
    optimizer.step()
    assert all(
        torch.equal(before[name], tensor) for name, tensor in model.ranker.state_dict().items()
    )


def test_unfreezing_everything_leaves_the_ranker_frozen(backbone_of: Callable[..., Any]) -> None:
    backbone, images = backbone_of("vit")
    model = drop_patches(backbone, ranker="conv").requires_grad_(False).requires_grad_(True)
    model.ranker.trained = True
    assert all(p.requires_grad for p in model.backbone.parameters())
    assert not any(p.requires_grad for p in model.ranker.parameters())
    model.ranker.requires_grad_(True)  # by hand: still no gradient through the scores
    assert not model.patch_scores(images).requires_grad


def test_random_selection_does_not_rank(backbone_of: Callable[..., Any]) -> None:
    backbone, images = backbone_of("vit")
    model = drop_patches(backbone, ranker="conv", selection="random")
    model(images)  # an untrained ranker at work would warn
    model.ranker.forward = None
    assert model.keep_indices(images).shape == (3, 18)


@torch.no_grad()
def test_a_model_filled_from_the_meta_device(backbone_of: Callable[..., Any]) -> None:
    for ranker in ("contrast", "conv"):
        backbone, images = backbone_of("clip")
        model = drop_patches(backbone, ranker=ranker)
        getattr(model.ranker, "__dict__", {})["trained"] = True
        expected = model.patch_scores(images)
        for assign in (False, True):
            empty = copy.deepcopy(model).to("meta")
            empty = empty if assign else empty.to_empty(device="cpu")
            empty.load_state_dict(model.state_dict(), assign=assign)
            assert torch.equal(empty.patch_scores(images), expected)


@torch.no_grad()
@pytest.mark.parametrize(
    "family", ["beit", "beit_shared", "relpos", "eva02", "dinov3", "rope_mixed"]
)
def test_loading_computes_what_no_checkpoint_holds(
    family: str, backbone_of: Callable[..., Any]
) -> None:
    backbone, images = backbone_of(family)
    model = drop_patches(awaken(backbone))
    empty = copy.deepcopy(model)
    held = set(empty.state_dict())
    for name, buffer in empty.named_buffers():
        if name not in held:  # as empty memory may be
            buffer.zero_()
    assert not torch.equal(empty(images), model(images))
    assigned = copy.deepcopy(model).to("meta")
    for filled, assign in ((empty, False), (assigned, True)):
        filled.load_state_dict(model.state_dict(), assign=assign)
        for ratio in (0.5, 1.0):
            filled.keep_ratio = model.keep_ratio = ratio
            assert torch.equal(filled(images), model(images))


@records_arguments
@torch.no_grad()
@pytest.mark.parametrize("family", ["vit", "beit", "beit_shared", "relpos", "dinov3"])
def test_transformers_fills_a_model_from_the_meta_device(family: str, tmp_path: Path) -> None:
    name, changes, side = FAMILIES[family]
    args = {"img_size": side, "depth": 2, "backbone": name, **changes}
    model = awaken(timm.create_model("ltrp", ranker="contrast", **args)).eval()
    save_for_hf(model, tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_args"].pop("num_classes")  # transformers passes it too
    (tmp_path / "config.json").write_text(json.dumps(config))
    wrapper = pytest.importorskip("transformers").TimmWrapperModel
    loaded = wrapper.from_pretrained(tmp_path).timm_model
    images = torch.randn(2, 3, side, side)
    assert torch.equal(loaded.forward_features(images), model.forward_features(images))


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "ranker", "args"),
    [
        ("vit", "contrast", {}),
        ("beit", "contrast", {}),
        ("vit", "attention", {"backbone": "vit_small_patch16_dinov3", "depth": 1}),
    ],
)
def test_a_model_built_without_memory_for_its_weights(
    monkeypatch: pytest.MonkeyPatch, family: str, ranker: str, args: dict[str, Any]
) -> None:
    """As accelerate's ``init_empty_weights`` builds it: parameters are meta, buffers are real."""
    model, images = make_backbone(family)
    model = drop_patches(model, ranker, ranker_args=args)
    with monkeypatch.context() as patch:
        register = nn.Module.register_parameter

        def register_empty(self: nn.Module, name: str, value: nn.Parameter | None) -> None:
            register(self, name, None if value is None else nn.Parameter(value.to("meta")))

        patch.setattr(nn.Module, "register_parameter", register_empty)
        empty = drop_patches(make_backbone(family)[0], ranker, ranker_args=args)
    assert all(parameter.is_meta for parameter in empty.parameters())
    for name, value in model.state_dict().items():  # no load_state_dict of the model's own
        parent, _, last = name.rpartition(".")
        setattr(empty.get_submodule(parent), last, nn.Parameter(value))
    empty.ranker.trained = model.ranker.trained = True
    assert torch.equal(empty(images), model(images))


def test_scores_carry_no_gradient(backbone_of: Callable[..., Any]) -> None:
    backbone, images = backbone_of("vit")
    model = drop_patches(backbone)
    images.requires_grad_()
    assert not model.patch_scores(images).requires_grad
    (gradient,) = torch.autograd.grad(model(images).sum(), images)
    kept = torch.zeros(3, 36).scatter(1, model.keep_indices(images), 1.0).reshape(3, 1, 6, 6)
    kept = kept.repeat_interleave(16, 2).repeat_interleave(16, 3).bool().expand_as(gradient)
    assert (gradient[~kept] == 0).all()
    assert (gradient[kept] != 0).any()


@pytest.mark.parametrize("family", [*KINDS, "hybrid", "dinov3"])
def test_optimizer_groups(backbone_of: Callable[..., Any], family: str) -> None:
    plain, _ = backbone_of(family)
    model = drop_patches(copy.deepcopy(plain), ranker="conv")
    expected = group_parameters(plain, plain.group_matcher(), reverse=True)
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    modules = group_modules(model, model.group_matcher(), reverse=True)
    assert modules["backbone.blocks.1.norm1"] == groups["backbone.blocks.1.norm1.weight"]
    ranker = {groups.pop(name) for name in list(groups) if name.startswith("ranker.")}
    assert ranker == {max(expected.values())}  # the head's
    assert groups == {f"backbone.{name}": group for name, group in expected.items()}
    assert model.no_weight_decay() == {f"backbone.{name}" for name in plain.no_weight_decay()}
    create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    assert list(model.parameters())[-1].shape == list(plain.parameters())[-1].shape
    plain.reset_classifier(0)
    model.reset_classifier(0)
    expected = group_parameters(plain, plain.group_matcher(), reverse=True)
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert all(groups[f"backbone.{name}"] == group for name, group in expected.items())
    assert max(groups.values()) == max(expected.values())


@pytest.mark.parametrize(
    "family",
    ["vit", "eva02", "rope_mixed", "dinov3", "beit", "beit_shared", "cait", *RELPOS, *NAFLEX],
)
def test_gradient_checkpointing(backbone_of: Callable[..., Any], family: str) -> None:
    gradients = []
    for enable in (False, True):
        backbone, images = backbone_of(family)
        model = drop_patches(backbone, keep_ratio=0.3).train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(0)  # ViT-RelPos drops out parts of its biases
        model(images).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.allclose(gradients[0][n], gradients[1][n], atol=1e-6) for n in gradients[0])
    assert any(g.abs().max() > 0 for g in gradients[0].values())


def test_distilled_training_gives_both_logits(backbone_of: Callable[..., Any]) -> None:
    backbone, images = backbone_of("distilled")
    model = drop_patches(backbone)
    model.backbone.set_distilled_training(True)
    model.train()
    one, two = model(images)
    assert one.shape == two.shape == (3, 7)
    assert isinstance(model.get_classifier(), tuple)


@pytest.mark.parametrize(
    "family", ["vit", "eva02", "beit", "beit_shared", "cait", *RELPOS, *NAFLEX]
)
def test_copies_are_independent(backbone_of: Callable[..., Any], family: str) -> None:
    backbone, images = backbone_of(family)
    model = drop_patches(backbone)
    expected = model(images)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        twin.keep_ratio = 0.2
        assert not torch.equal(twin(images), expected)
        assert torch.equal(model(images), expected)
        twin.restore()
        assert torch.equal(model(images), expected)


@pytest.mark.parametrize("ranker", ["contrast", "conv"])
def test_other_channel_counts(backbone_of: Callable[..., Any], ranker: str) -> None:
    backbone, images = backbone_of("vit", in_chans=1)
    model = drop_patches(backbone, ranker=ranker)
    if ranker == "conv":
        model.ranker.trained = True
    assert images.shape == (3, 1, 96, 96)
    assert model(images).shape == (3, 7)
    backbone, images = backbone_of("vit", in_chans=5)
    assert drop_patches(backbone)(images).shape == (3, 7)


def test_a_plain_checkpoint_loads(backbone_of: Callable[..., Any], tmp_path: Path) -> None:
    plain, _ = backbone_of("vit")
    weights = {name: torch.randn_like(tensor) for name, tensor in plain.state_dict().items()}
    model = drop_patches(copy.deepcopy(plain), ranker="conv")
    ranker = copy.deepcopy(model.ranker.state_dict())
    result = model.load_state_dict(weights)
    assert not result.missing_keys
    assert all(torch.equal(model.backbone.state_dict()[name], weights[name]) for name in weights)
    assert all(torch.equal(model.ranker.state_dict()[name], ranker[name]) for name in ranker)
    assert not model.ranker.trained
    model.load_state_dict(model.state_dict())
    assert not model.ranker.trained  # its own weights tell nothing new
    other = copy.deepcopy(model.state_dict())
    model.load_state_dict(other)
    assert not model.ranker.trained  # those of an untrained ranker
    torch.save(other, tmp_path / "untrained.pth")
    model.load_state_dict(torch.load(tmp_path / "untrained.pth"))
    assert not model.ranker.trained
    model.load_state_dict(dict(other))  # weights that do not say what they are
    assert model.ranker.trained
    model.load_state_dict(other)
    assert not model.ranker.trained
    weights.pop("norm.weight")
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*backbone\.norm\.weight"):
        model.load_state_dict(weights)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["vit", "eva02", "clip"])
@torch.no_grad()
def test_half_precision(backbone_of: Callable[..., Any], family: str, dtype: torch.dtype) -> None:
    backbone, images = backbone_of(family)
    model = drop_patches(backbone)
    expected, keep = model(images), model.keep_indices(images)
    full = backbone(images)
    with torch.autocast("cpu", dtype):
        out, scores = model(images, keep_indices=keep), model.patch_scores(images)
        assert torch.equal(model.keep_indices(images), keep)  # contrast ranks in float32
    assert scores.dtype == torch.float32
    assert (out - expected).abs().max() < 0.05 * expected.abs().max()
    assert (out - expected).abs().max() < (out - full).abs().max()
    model.to(dtype)
    out = model(images.to(dtype), keep_indices=keep)
    assert out.dtype == dtype
    assert (out.float() - expected).abs().max() < 0.1 * expected.abs().max()
    assert model.patch_scores(images.to(dtype)).dtype == torch.float32


SMALL_RANKERS: dict[str, dict[str, Any]] = {
    "attention": {"backbone": "vit_tiny_patch16_224", "depth": 1},
    "grad_cam": {"backbone": "vit_tiny_patch16_224", "depth": 1},
    "cam": {"backbone": "resnet10t"},
}


@pytest.mark.filterwarnings("ignore:the .* ranker has no trained weights")
@pytest.mark.filterwarnings("ignore:std\\(\\)")  # of no images
@pytest.mark.parametrize("name", [name for name in list_rankers() if name[:4] != "vit_"])
def test_every_ranker_takes_an_empty_batch(backbone_of: Callable[..., Any], name: str) -> None:
    backbone, images = backbone_of("vit")
    args = {"img_size": 96, **SMALL_RANKERS[name]} if name in SMALL_RANKERS else {}
    model = drop_patches(backbone, name, ranker_args=args)
    assert model(images[:0]).shape == (0, 7)


@pytest.mark.parametrize("selection", list(SELECTIONS))
@pytest.mark.parametrize("budget", [None, "threshold", "mass"])
def test_every_selection_takes_an_empty_batch(
    backbone_of: Callable[..., Any], selection: str, budget: str | None
) -> None:
    backbone, images = backbone_of("vit")
    found = None if budget is None else AdaptiveBudget(budget, 0.5, 4, 0.5)
    model = drop_patches(backbone, "pixel_std", selection=selection, budget=found)
    none = images[:0]
    assert model(none).shape == (0, 7)
    assert model.keep_indices(none).shape[0] == 0
    for fill in ("zeros", "nearest"):
        maps = model.forward_intermediates(none, intermediates_only=True, fill=fill)
        assert [tuple(each.shape) for each in maps] == [(0, 192, 6, 6)] * 2


def test_a_shared_position_bias_takes_an_empty_batch(backbone_of: Callable[..., Any]) -> None:
    for family in ("relpos", "relpos_shared"):
        backbone, images = backbone_of(family)
        assert drop_patches(backbone, "contrast")(images[:0]).shape == (0, 7)
