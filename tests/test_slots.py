"""drop ≡ mask: dropping patches equals masking them as attention keys in the full-length run."""

import copy
import math
import re
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import FAMILIES, grid_of
from families import REFUSED_EXAMPLES, SUPPORTED
from timm.layers import HybridEmbed, PatchDropoutWithIndices, RelPosBiasTf
from timm.models.beit import Attention as BeitAttention
from timm.models.cait import Cait
from timm.models.naflexvit import NaFlexVit
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper,
    offload_wrapper,
)

from ltrp_timm import drop_patches, gather_patches, num_keep
from ltrp_timm.models.ltrp import LTRPModel
from ltrp_timm.rankers.base import Ranker
from ltrp_timm.slots import ADAPTERS, REFUSED, REFUSED_MODELS, find_adapter
from ltrp_timm.slots.base import SlotAdapter, TokenSlot


def masked_reference(model: Any, images: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """The plain model with dropped patches masked as keys: kept tokens (B, P + K, D), logits."""
    if isinstance(model, Cait):
        return gathered_reference(model, images, keep)
    prefix, n = model.num_prefix_tokens, math.prod(grid_of(model, images))
    visible = torch.zeros(images.shape[0], n, dtype=torch.bool, device=keep.device)
    visible = F.pad(visible.scatter(1, keep, True), (prefix, 0), value=True)
    mask = visible[:, None, None, :]
    column = torch.zeros_like(mask, dtype=torch.float).masked_fill(~mask, -torch.inf)

    def with_mask(attention: nn.Module, args: Any, kwargs: Any) -> Any:
        if not isinstance(attention, BeitAttention):
            return args, {**kwargs, "attn_mask": mask}
        bias = kwargs["shared_rel_pos_bias"]  # a key column of -inf on top of the bias
        return args, {"shared_rel_pos_bias": column if bias is None else bias + column}

    if isinstance(model, NaFlexVit):  # it takes a mask itself
        tokens = model.forward_features(images, attn_mask=column)
    elif isinstance(model, VisionTransformerRelPos):
        tokens = with_masked_bias(model, images, column)
    else:
        hooks = [
            block.attn.register_forward_pre_hook(with_mask, with_kwargs=True)
            for block in model.blocks
        ]
        tokens = model.forward_features(images)
        for hook in hooks:
            hook.remove()
    kept = torch.cat([tokens[:, :prefix], gather_patches(tokens[:, prefix:], keep)], dim=1)
    return kept, model.forward_head(kept)


def with_masked_bias(model: Any, images: Tensor, column: Tensor) -> Tensor:
    """ViT-RelPos with a key column of -inf on top of every full-length bias."""
    own = [block.attn.rel_pos for block in model.blocks]
    biases = own if model.shared_rel_pos is None else [model.shared_rel_pos]
    for bias in biases:
        bias.get_bias = lambda make=bias.get_bias: make() + column
    tokens: Tensor = model.forward_features(images)
    for bias in biases:
        del bias.get_bias
    return tokens


def gathered_reference(model: Cait, images: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """CaiT's attention takes no mask: gather by hand behind the position embedding."""
    tokens = model.patch_embed(images) + model.pos_embed
    tokens = torch.stack([row[index] for row, index in zip(tokens, keep)])
    classes = model.cls_token.expand(len(tokens), -1, -1)
    tokens = model.blocks(tokens)
    for block in model.blocks_token_only:
        classes = block(tokens, classes)
    tokens = model.norm(torch.cat([classes, tokens], dim=1))
    return tokens, model.forward_head(tokens)


@pytest.mark.parametrize("ratio", [0.5, 0.2])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_drop_equals_mask(backbone_of: Callable[..., Any], family: str, ratio: float) -> None:
    backbone, images = backbone_of(family)
    full_tokens, full = backbone.forward_features(images), backbone(images)
    n = math.prod(grid_of(backbone, images))
    k = num_keep(n, ratio)
    keep = torch.stack([torch.randperm(n)[:k].sort().values for _ in images])
    tokens, logits = masked_reference(backbone, images, keep)

    model = drop_patches(backbone, keep_ratio=ratio)
    prefix = model.num_prefix_tokens
    dropped = model.forward_features(images, keep_indices=keep)
    assert (dropped - tokens).abs().max() <= 1e-5
    assert (model(images, keep_indices=keep) - logits).abs().max() <= 1e-5
    # the proof that this test can fail
    plain = torch.cat([full_tokens[:, :prefix], gather_patches(full_tokens[:, prefix:], keep)], 1)
    assert (dropped - plain).abs().max() > 1e-2
    assert (logits - full).abs().max() > 1e-3


@pytest.mark.parametrize("family", [name for name in FAMILIES if name.startswith("relpos")])
@torch.no_grad()
def test_drop_equals_mask_without_fused_attention(
    backbone_of: Callable[..., Any], family: str
) -> None:
    backbone, images = backbone_of(family)
    full = backbone(images)
    for block in backbone.blocks:
        block.attn.fused_attn = False
    keep = torch.stack([torch.randperm(36)[:12] for _ in images])  # in any order
    _, logits = masked_reference(backbone, images, keep)
    out = drop_patches(backbone)(images, keep_indices=keep)
    assert (out - logits).abs().max() <= 1e-5
    assert (out - full).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_keeping_all_is_the_plain_model(backbone_of: Callable[..., Any], family: str) -> None:
    backbone, images = backbone_of(family)
    full, features = backbone(images), backbone.forward_features(images)
    model = drop_patches(backbone, keep_ratio=1.0)
    assert torch.equal(model(images), full)
    assert torch.equal(model.forward_features(images), features)
    every = torch.arange(math.prod(grid_of(backbone, images))).expand(3, -1)
    assert torch.equal(model.keep_indices(images), every)
    model.keep_ratio = 0.5
    assert torch.equal(model(images, keep_indices=every), full)
    assert not torch.equal(model(images), full)
    assert torch.equal(model.backbone(images), full)  # the bare backbone is always the plain model


@pytest.mark.parametrize("family", ["vit", "eva02", "beit", "relpos", "cait", "naflex"])
@torch.no_grad()
def test_all_patches_in_another_order(backbone_of: Callable[..., Any], family: str) -> None:
    backbone, images = backbone_of(family)
    full, features = backbone(images), backbone.forward_features(images)
    model = drop_patches(backbone, keep_ratio=0.5)
    n, prefix = math.prod(grid_of(backbone, images)), model.num_prefix_tokens
    order = torch.stack([torch.randperm(n) for _ in images])
    found = model.forward_features(images, keep_indices=order)
    expected = gather_patches(features[:, prefix:], order)
    assert torch.allclose(found[:, prefix:], expected, atol=1e-4)
    assert torch.allclose(found[:, :prefix], features[:, :prefix], atol=1e-4)
    assert torch.allclose(model(images, keep_indices=order), full, atol=1e-4)
    twice = torch.arange(n).expand(3, -1).clone()
    twice[:, 1] = 0  # N indices that are not all patches
    assert not torch.allclose(model(images, keep_indices=twice), full, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_restore_gives_the_same_object_back(backbone_of: Callable[..., Any], family: str) -> None:
    backbone, images = backbone_of(family)
    modules, keys, full = (
        dict(backbone.named_modules()),
        list(backbone.state_dict()),
        backbone(images),
    )
    model = drop_patches(backbone)
    assert model.backbone is backbone
    assert list(backbone.state_dict()) == keys
    for head in {backbone.head, getattr(backbone, "head_dist", backbone.head)}:
        head.bias.add_(1.0)  # weights as they are now, not as they were
    assert model.restore() is backbone
    assert dict(backbone.named_modules()) == modules  # the very same objects
    torch.testing.assert_close(backbone(images), full + 1.0)
    assert model.restore() is backbone  # twice does no harm
    with pytest.raises(RuntimeError, match="gave its backbone back"):
        model(images)
    drop_patches(backbone)(images)  # and it can be wrapped again


MODELS = [(kind, REFUSED_EXAMPLES[kind], why) for why, of in REFUSED_MODELS.items() for kind in of]
UNKNOWN = "not one of the supported timm families"
MODELS += [
    ("ResNet of timm.models.resnet", "resnet18", UNKNOWN),
    ("VGG of timm.models.vgg", "vgg11", UNKNOWN),
]


@pytest.mark.parametrize(("kind", "name", "reason"), MODELS)
def test_other_families_are_refused_unchanged(kind: str, name: str, reason: str) -> None:
    if name not in timm.list_models():
        pytest.skip(f"timm {timm.__version__} has no {name}")
    with torch.device("cpu" if name == "csatv2" else "meta"):  # an older timm cannot build it there
        model = timm.create_model(name)
    before, keys = repr(model), list(model.state_dict())
    with pytest.raises(TypeError, match=f"^cannot drop patches from {kind}: .*{re.escape(reason)}"):
        drop_patches(model)
    assert repr(model) == before
    assert list(model.state_dict()) == keys
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_class_of_the_same_name_is_told_apart_by_its_module() -> None:
    of_others = type("VisionTransformer", (nn.Module,), {"__module__": "towers.vit"})
    message = "from VisionTransformer of towers.vit: it is not one of the supported timm"
    with pytest.raises(TypeError, match=re.escape(message)):
        drop_patches(of_others())


def test_subclasses_are_refused_for_the_same_reason() -> None:
    with torch.device("meta"):
        model = timm.create_model("levit_128s")
    with pytest.raises(TypeError, match="from LevitDistilled: it pools the patch grid"):
        drop_patches(model)


@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.family)
def test_every_example_of_the_table_drops_patches(adapter: SlotAdapter) -> None:
    for name in (name for names in SUPPORTED[adapter.family][1].values() for name in names):
        with torch.device("meta"):
            model = drop_patches(timm.create_model(name, depth=1), keep_ratio=0.25)
            side = model.pretrained_cfg["input_size"][-1]
            keep = torch.arange(9).expand(2, -1)
            tokens = model.forward_features(torch.zeros(2, 3, side, side), keep_indices=keep)
        assert isinstance(model.backbone, adapter.host)
        assert tokens.shape[:2] == (2, model.num_prefix_tokens + 9)


def test_no_vit_of_timm_is_without_an_answer() -> None:
    unknown = set()
    for name, module in sys.modules.items():
        if not name.startswith("timm.models."):
            continue
        for kind in vars(module).values():
            if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
                continue
            vit = re.search("vit|former|mixer|hiera", kind.__name__.lower())
            if vit and hasattr(kind, "forward_features") and kind.__module__ == name:
                bases = {base.__name__ for base in kind.__mro__}
                if not bases & {*REFUSED, *(adapter.host.__name__ for adapter in ADAPTERS)}:
                    unknown.add(kind.__name__)
    assert unknown == set()


def test_wrapped_models_are_refused() -> None:
    model = drop_patches(timm.create_model("vit_tiny_patch16_224", depth=1))
    with pytest.raises(TypeError, match="LTRPModel: it drops patches already"):
        drop_patches(model)
    with pytest.raises(TypeError, match="LTRPModel: it drops patches already"):
        LTRPModel(nn.Identity(), model)
    for kind in ("getter", "fx", "hook"):
        features = timm.create_model(
            "vit_tiny_patch16_224", depth=1, features_only=True, out_indices=[0], feature_cls=kind
        )
        with pytest.raises(TypeError, match="features_only wrapper"):
            drop_patches(features)
    with pytest.raises(TypeError, match="cannot drop patches from int"):
        drop_patches(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_live_patch_dropout_is_refused(name: str) -> None:
    model = timm.create_model(name, depth=1, patch_drop_rate=0.5)
    slot = model.patch_drop
    with pytest.raises(TypeError, match=r"live PatchDropout.*without patch_drop_rate"):
        drop_patches(model)
    assert model.patch_drop is slot
    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    model.patch_drop = nn.Dropout()
    with pytest.raises(TypeError, match="already in use"):
        find_adapter(model)


def test_patches_of_a_vit_are_dropped_once() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    pruned = drop_patches(model)
    with pytest.raises(TypeError, match="drops patches already: use the model that drop_patches"):
        drop_patches(model)
    drop_patches(pruned.restore())


def test_a_share_in_place_of_a_ranker() -> None:
    with pytest.raises(TypeError, match="got float: pass the share of patches as keep_ratio"):
        drop_patches(timm.create_model("vit_tiny_patch16_224", depth=1), 0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("family", "place", "module", "reason"),
    [
        ("naflex", "patch_drop", PatchDropoutWithIndices(0.5), "patch_drop is a live PatchDropout"),
        ("naflex", "norm_pre", nn.RMSNorm(64), r"norm_pre is already in use \(RMSNorm\)"),
        ("naflex_eva02", "rope", nn.Identity(), "its rope is a Identity, not one of Rotary"),
        ("relpos", "patch_embed", HybridEmbed(nn.Conv2d(3, 4, 8, 8), 96), "patch_embed is a Hyb"),
        ("relpos", "patch_embed.norm", nn.LayerNorm(64), "patch_embed.norm is already in use"),
        ("relpos_shared", "shared_rel_pos", RelPosBiasTf((6, 6), 2), "position is a RelPosBiasTf"),
        ("relpos", "blocks.1.attn.rel_pos", RelPosBiasTf((6, 6), 2), "position is a RelPosBiasTf"),
    ],
)
def test_parts_that_no_slot_knows_are_refused_unchanged(
    backbone_of: Callable[..., Any], family: str, place: str, module: nn.Module, reason: str
) -> None:
    backbone, _ = backbone_of(family)
    parent, _, name = place.rpartition(".")
    setattr(backbone.get_submodule(parent), name, module)
    modules = dict(backbone.named_modules())
    with pytest.raises(
        TypeError, match=f"cannot drop patches from {type(backbone).__name__}.*{reason}"
    ):
        drop_patches(backbone)
    assert dict(backbone.named_modules()) == modules


def test_an_error_inside_attention_does_no_harm_later(backbone_of: Callable[..., Any]) -> None:
    backbone, images = backbone_of("relpos")
    full = backbone(images)
    model = drop_patches(backbone)
    expected = model(images)

    def fail(*_: object) -> None:
        raise ArithmeticError

    hook = backbone.blocks[1].attn.qkv.register_forward_hook(fail)
    with pytest.raises(ArithmeticError):
        model(images)
    hook.remove()
    assert torch.equal(backbone(images), full)
    assert torch.equal(model(images), expected)
    assert torch.equal(model.restore()(images), full)


@pytest.mark.parametrize(
    "bad", [{"keep_ratio": 0.0}, {"selection": "best"}, {"fill": "x"}, {"ranker": "nobody"}]
)
def test_a_bad_argument_changes_nothing(bad: dict[str, Any]) -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    slot = model.patch_drop
    with pytest.raises(ValueError, match=re.escape(str(next(iter(bad.values()))))):
        drop_patches(model, **bad)
    assert model.patch_drop is slot
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_slot_is_empty_after_an_error(backbone_of: Callable[..., Any]) -> None:
    backbone, images = backbone_of("vit")
    full = backbone(images)
    model = drop_patches(backbone)

    def fail(*_: object) -> None:
        raise ArithmeticError

    hook = backbone.patch_embed.register_forward_hook(fail)  # before the slot is reached
    with pytest.raises(ArithmeticError):
        model(images)
    hook.remove()
    assert backbone.patch_drop.keep_indices is None
    assert torch.equal(backbone(images), full)


def test_a_backbone_that_misses_its_slot_is_an_error(backbone_of: Callable[..., Any]) -> None:
    backbone, images = backbone_of("vit")
    model = drop_patches(backbone)
    backbone.forward_features = lambda x, **_: backbone.blocks(
        backbone._pos_embed(backbone.patch_embed(x))
    )
    with pytest.raises(RuntimeError, match="ran without visiting the place"):
        model(images)


def test_an_empty_slot_is_the_identity() -> None:
    tokens = torch.randn(2, 5, 3)
    assert TokenSlot(1)(tokens) is tokens


class Careless(Ranker, nn.Module):
    """Somebody's ranker whose own code fails."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean(1)[:, ::16, ::16]

    @property
    def img_size(self) -> int:  # type: ignore[override]
        raise ArithmeticError


def test_a_failing_ranker_leaves_the_backbone_as_it_was(backbone_of: Callable[..., Any]) -> None:
    backbone, images = backbone_of("vit")
    full, slot = backbone(images), backbone.patch_drop
    with pytest.raises(ArithmeticError):
        drop_patches(backbone, ranker=Careless())
    assert backbone.patch_drop is slot
    sharing = nn.Module()
    sharing.vit = backbone
    with pytest.raises(ValueError, match="shares parameters with the backbone"):
        drop_patches(backbone, ranker=sharing)
    assert backbone.patch_drop is slot
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    assert torch.equal(backbone(images), full)


def test_beit_with_two_kinds_of_bias_is_refused() -> None:
    model = timm.create_model("beit_base_patch16_224", depth=1, use_shared_rel_pos_bias=True)
    modules = dict(model.named_modules())
    with pytest.raises(TypeError, match="a shared and an own relative position bias"):
        drop_patches(model)
    assert dict(model.named_modules()) == modules


def test_training_flags_of_parts_survive(backbone_of: Callable[..., Any]) -> None:
    backbone, _ = backbone_of("hybrid")
    backbone.train()
    backbone.patch_embed.eval()  # frozen batch norms
    model = drop_patches(backbone)
    assert model.training
    assert backbone.blocks.training
    assert not any(module.training for module in backbone.patch_embed.modules())


def test_an_old_wrapper_cannot_undo_a_new_one(backbone_of: Callable[..., Any]) -> None:
    backbone, images = backbone_of("vit")
    old = drop_patches(backbone)
    old.restore()
    new = drop_patches(backbone)
    expected = new(images)
    old.restore()
    assert torch.equal(new(images), expected)


def test_compiled_and_wrapped_models_are_refused_with_a_hint() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    for wrapped, hint in (
        (torch.compile(model), "drop patches first, then compile"),
        (nn.DataParallel(model), "from the model inside"),
        (torch.fx.symbolic_trace(model), "drop first, then trace"),
    ):
        with pytest.raises(TypeError, match=hint):
            drop_patches(wrapped)


@torch.no_grad()
def test_one_image_never_sees_another(backbone_of: Callable[..., Any]) -> None:
    """Also with indices out of range: they are an error, not a neighbour's patch."""
    backbone, images = backbone_of("vit")
    model = drop_patches(backbone)
    keep = torch.tensor([[0, 1, 2]] * 3)
    keep[1, 0] = 36
    with pytest.raises(IndexError):
        model(images, keep_indices=keep)
    assert backbone.patch_drop.keep_indices is None
    other = images.clone()
    other[0] = 0
    keep[1, 0] = 35
    outputs = [model(batch, keep_indices=keep)[1:] for batch in (images, other)]
    assert torch.equal(*outputs)


@torch.no_grad()
@pytest.mark.parametrize("family", ["vit", "eva02", "beit", "relpos", "cait", "naflex"])
def test_a_second_call_while_one_runs_is_refused(
    backbone_of: Callable[..., tuple[Any, Tensor]], family: str
) -> None:
    backbone, images = backbone_of(family)
    model = drop_patches(backbone, keep_ratio=0.5)
    expected, found, refused = model(images), [], []

    def call_meanwhile(*_: Any) -> None:
        hook.remove()
        inner = threading.Thread(target=second)
        inner.start()
        inner.join()

    def second() -> None:
        for call in (model, model.forward_features, model.backbone):
            try:
                found.append(call(images))
            except RuntimeError as error:
                refused.append(str(error))

    embed = model._adapter.embed_of(backbone)
    hook = embed.register_forward_pre_hook(call_meanwhile)
    assert torch.allclose(model(images), expected, atol=1e-5)
    assert not found
    assert len(refused) == 3
    assert all("is running already, in another thread" in text for text in refused)
    assert torch.equal(model(images), expected)


class TrainsACopy(nn.Module):
    """A wrapper as adapters use it: reads attributes through, sets its own, runs a copy."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.original, self.trained = module, copy.deepcopy(module)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["trained"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.trained(*args, **kwargs)


@pytest.mark.parametrize("wrapper", [checkpoint_wrapper, offload_wrapper, TrainsACopy])
@pytest.mark.parametrize("family", ["vit", "eva02", "beit", "cait", "naflex", "relpos"])
def test_a_wrapped_patch_embedding(
    backbone_of: Callable[..., tuple[Any, Tensor]],
    family: str,
    wrapper: Callable[[nn.Module], nn.Module],
) -> None:
    backbone, images = backbone_of(family)
    model = drop_patches(backbone, keep_ratio=0.5)
    expected, name = model(images).detach(), model._adapter.patch_embed
    setattr(backbone, name, wrapper(getattr(backbone, name)))
    if family == "relpos" and wrapper is checkpoint_wrapper:
        with pytest.raises(RuntimeError, match="its patch_embed is checkpointed, and its second"):
            model(images)
        return
    found = model(images)
    assert torch.allclose(found, expected, atol=1e-4)
    found.sum().backward()
    trained = getattr(backbone, name)
    trained = trained.trained if wrapper is TrainsACopy else trained
    assert all(p.grad is not None for p in trained.parameters())


@torch.no_grad()
@pytest.mark.parametrize("family", ["relpos", "relpos_shared", "beit_shared"])
def test_a_wrapped_position_bias(
    backbone_of: Callable[..., tuple[Any, Tensor]], family: str
) -> None:
    backbone, images = backbone_of(family)
    model = drop_patches(backbone, keep_ratio=0.5)
    expected = model(images)
    if family == "relpos":
        for block in backbone.blocks:
            block.attn.rel_pos = TrainsACopy(block.attn.rel_pos)
    else:
        place = model._adapter.places[1]
        setattr(backbone, place, TrainsACopy(getattr(backbone, place)))
    assert torch.equal(model(images), expected)


@pytest.mark.parametrize(
    ("module", "name", "message"),
    [
        (
            "open_clip.transformer",
            "VisionTransformer",
            "of open_clip.transformer: .* as ViT-B-16",
        ),
        ("open_clip.model", "CustomTextCLIP", r"clip\.visual\.trunk = drop_patches\(clip\.visual"),
        ("transformers", "TimmWrapperModel", r"wrapper\.timm_model = drop_patches\(wrapper"),
        ("torchvision.models", "VisionTransformer", "of torchvision.models: it is not one of the"),
    ],
)
def test_models_of_other_libraries_are_refused_with_what_to_do(
    module: str, name: str, message: str
) -> None:
    kind = type(name, (nn.Module,), {"__module__": module})
    with pytest.raises(TypeError, match=message):
        drop_patches(kind())
