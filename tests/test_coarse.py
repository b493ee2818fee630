"""rest="coarse": weak cells as one token of a smaller image, against a plain loop over tokens."""

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from common import host_syncs, operators
from conftest import FAMILIES, awaken, grid_of
from PIL import Image
from timm.models.eva import Eva
from torch import Tensor, nn

import ltrp_timm
from ltrp_timm import drop_patches, num_keep
from ltrp_timm.commands import main
from ltrp_timm.models.ltrp import LTRPModel
from ltrp_timm.models.open_model import open_model, with_front_end
from ltrp_timm.selection.cells import CellGrid, TokenLayout
from ltrp_timm.train.recipe import Recipe as FinetuneRecipe
from ltrp_timm.visualize import token_picture

TABLES = ["vit", "registers", "dinov2", "clip", "siglip", "distilled", "deit3", "flexivit"]
TABLES += ["aimv2", "dinov3"]  # DINOv3's RoPE depends on the size of the grid too
COUNTING = ["eva02", "rope_axial", "rope_mixed", "rope_ape", "pe_core"]
CONVOLUTIONS = ["hybrid", "vitamin"]


def backbone_at(family: str, grid: tuple[int, int], **changes: Any) -> tuple[Any, Tensor]:
    """A small backbone with a given patch grid, and two images."""
    name, defaults, side = FAMILIES[family]
    patch = side // 6
    size = (grid[0] * patch, grid[1] * patch)
    torch.manual_seed(0)
    args = {"depth": 2, "num_classes": 7, **defaults, "img_size": size, **changes}
    model = awaken(timm.create_model(name, **args)).eval()
    images = torch.randn(2, 3, *size)
    assert grid_of(model, images) == grid
    return model, images


def dynamic_twin(family: str, model: Any, grid: tuple[int, int]) -> Any:
    """The same model for images of any size."""
    twin, _ = backbone_at(family, grid, dynamic_img_size=True)
    twin.load_state_dict(model.state_dict())
    return twin


def mean_of_angles(rope: Tensor, rows: range, cols: range, width: int) -> Tensor:
    """(…, N, 2d) -> (…, 2d): sine and cosine of the mean angle of some patches, one by one."""
    sin, cos = rope.double().chunk(2, dim=-1)
    wrapped, angle = torch.atan2(sin, cos), {}
    for row in rows:  # unwrap from a neighbour whose angle is known
        for col in cols:
            here = wrapped[..., row * width + col, :]
            near = angle.get((row, col - 1), angle.get((row - 1, col), here))
            angle[row, col] = near + torch.remainder(here - near + math.pi, 2 * math.pi) - math.pi
    mean = torch.stack(list(angle.values())).mean(dim=0)
    return torch.cat([mean.sin(), mean.cos()], dim=-1).to(rope.dtype)


def positions_of(model: Any, twin: Any, layout: TokenLayout, image: int) -> tuple[Any, Any]:
    """The position of each token of an image (T, D), and its rotary embedding (…, T, 2d)."""
    h, w = layout.grid_size
    prefix = model.num_prefix_tokens
    width = model.embed_dim
    tables, ropes = {}, {}
    for scale in layout.scales:
        found = twin._pos_embed(torch.zeros(1, h // scale, w // scale, width))
        tables[scale], ropes[scale] = found if isinstance(model, Eva) else (found, None)
    own, rope = [], []
    places = zip(layout.scale.tolist(), layout.row[image].tolist(), layout.column[image].tolist())
    for scale, row, col in places:
        index = (row // scale) * (w // scale) + col // scale
        own.append(tables[scale][0, prefix + index])
        if ropes[1] is None:
            continue
        if type(model.rope).__name__ == "RotaryEmbeddingDinoV3":
            rope.append(ropes[scale][..., index, :])
        else:
            inside = (range(row, row + scale), range(col, col + scale))
            rope.append(mean_of_angles(ropes[1], *inside, w))
    return torch.stack(own), torch.stack(rope, dim=-2) if rope else None


def reference(
    family: str, model: Any, images: Tensor, layout: TokenLayout, bias: float
) -> tuple[Tensor, Tensor]:
    """Tokens (B, P + T, D) and logits of a plain model whose tokens are built one by one."""
    twin = dynamic_twin(family, model, layout.grid_size)
    prefix, rows = model.num_prefix_tokens, model.patch_embed.feat_ratio(as_scalar=False)[0]
    start = model._pos_embed(model.patch_embed(images))
    start = (start[0] if isinstance(model, Eva) else start)[:, :prefix]
    areas = torch.cat([torch.ones(prefix), layout.scale.float() ** 2])
    mask = (bias * areas.log()).view(1, 1, 1, -1)
    outs = []
    for image in range(len(images)):
        position, rope = positions_of(model, twin, layout, image)
        tokens = []
        for number in range(layout.num_tokens):
            scale = int(layout.scale[number])
            row, col = int(layout.row[image, number]), int(layout.column[image, number])
            if family in CONVOLUTIONS:
                whole = twin.patch_embed(F.avg_pool2d(images[image : image + 1], scale))
                tokens.append(whole[0, row // scale, col // scale])
                continue
            crop = images[image, :, row * rows :, col * rows :][..., : scale * rows, : scale * rows]
            crop = crop.reshape(3, rows, scale, rows, scale).mean(dim=(2, 4))
            token = model.patch_embed.proj(crop[None]).flatten()
            tokens.append(model.patch_embed.norm(token))
        x = torch.cat([start[image], torch.stack(tokens) + position])[None]
        x = model.norm_pre(x)
        for depth, block in enumerate(model.blocks):
            if rope is None:
                x = block(x, attn_mask=mask)
            else:
                own = rope[depth] if model.rope_mixed else rope
                x = block(x, rope=own, attn_mask=mask)
        outs.append(model.norm(x))
    found = torch.cat(outs)
    return found, model.forward_head(found)


@pytest.mark.parametrize("family", [*TABLES, *CONVOLUTIONS])
@torch.no_grad()
def test_all_coarse_is_the_smaller_image(family: str) -> None:
    model, images = backbone_at(family, (8, 8))
    twin = dynamic_twin(family, model, (8, 8))
    half, quarter = twin(F.avg_pool2d(images, 2)), twin(F.avg_pool2d(images, 4))
    full = model(images)
    pruned = drop_patches(model, keep_ratio=0.25, rest="coarse")
    assert (pruned(images) - half).abs().max() <= 1e-5
    pruned.restore()
    pruned = drop_patches(model, keep_ratio=1 / 16, rest="coarse", scales=(1, 2, 4))
    assert (pruned(images) - quarter).abs().max() <= 1e-5
    assert (half - full).abs().max() > 1e-3
    assert (half - quarter).abs().max() > 1e-3


GRIDS = [("vit", grid) for grid in ((5, 5), (4, 7), (9, 5))]
GRIDS += [("dinov3", (4, 6)), ("rope_mixed", (5, 4)), ("eva02", (7, 5)), ("siglip", (6, 10))]


@pytest.mark.parametrize(
    ("family", "grid"),
    [*((family, (6, 6)) for family in [*TABLES, *COUNTING, *CONVOLUTIONS]), *GRIDS],
)
@torch.no_grad()
def test_tokens_are_those_of_a_plain_loop(family: str, grid: tuple[int, int]) -> None:
    model, images = backbone_at(family, grid)
    plain = copy.deepcopy(model)
    full = plain.forward_features(images)
    pruned = drop_patches(model, keep_ratio=0.6, rest="coarse", size_bias=0.75)
    layout = pruned.token_layout(images)
    assert layout.num_tokens <= num_keep(grid[0] * grid[1], 0.6)
    assert min(index.shape[1] for index in layout.indices) > 0
    if grid[0] % 2 or grid[1] % 2:
        tokens, logits = loop_on_odd_grid(family, plain, images, layout)
    else:
        tokens, logits = reference(family, plain, images, layout, 0.75)
    assert (pruned.forward_features(images) - tokens).abs().max() <= 1e-5
    assert (pruned(images) - logits).abs().max() <= 1e-5
    assert (pruned.forward_features(images)[:, 0] - full[:, 0]).abs().max() > 1e-3


def loop_on_odd_grid(
    family: str, model: Any, images: Tensor, layout: TokenLayout
) -> tuple[Tensor, Tensor]:
    """Whole cells have the positions of a model whose grid ends with them."""
    h, w = (side // 2 * 2 for side in layout.grid_size)
    even, _ = backbone_at(family, (h, w))
    state = model.state_dict()
    if "pos_embed" in state:
        prefix = 0 if model.no_embed_class else model.num_prefix_tokens
        table = state["pos_embed"]
        own = table[:, prefix:].unflatten(1, layout.grid_size)[:, :h, :w].flatten(1, 2)
        state["pos_embed"] = torch.cat([table[:, :prefix], own], dim=1)
    even.load_state_dict(state)
    twin = dynamic_twin(family, even, (h, w))
    fine = dynamic_twin(family, model, layout.grid_size)
    real = twin._pos_embed

    def by_scale(x: Tensor) -> Any:  # the fine grid is odd, the coarse ones are of the even part
        return fine._pos_embed(x) if tuple(x.shape[1:3]) == layout.grid_size else real(x)

    twin._pos_embed = by_scale
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "dynamic_twin", lambda *_: twin)
        return reference(family, model, images, layout, 0.75)


@pytest.mark.parametrize("family", ["vit", "dinov3", "rope_mixed", "hybrid"])
@torch.no_grad()
def test_three_scales_are_those_of_a_plain_loop(family: str) -> None:
    model, images = backbone_at(family, (8, 8))
    plain = copy.deepcopy(model)
    options: dict[str, Any] = {"scales": (1, 2, 4), "size_bias": 0.5}
    pruned = drop_patches(model, keep_ratio=0.35, rest="coarse", **options)
    layout = pruned.token_layout(images)
    assert min(index.shape[1] for index in layout.indices) > 0
    assert layout.num_tokens <= num_keep(64, 0.35)
    tokens, logits = reference(family, plain, images, layout, 0.5)
    assert (pruned.forward_features(images) - tokens).abs().max() <= 1e-5
    assert (pruned(images) - logits).abs().max() <= 1e-5


@pytest.mark.parametrize("scales", [(1, 2), (1, 2, 4)])
@pytest.mark.parametrize("grid", [(14, 14), (16, 16), (5, 8), (37, 37), (2, 2), (4, 9)])
def test_each_patch_is_covered_once_within_the_budget(
    grid: tuple[int, int], scales: tuple[int, ...]
) -> None:
    cells, n = CellGrid(grid, scales), grid[0] * grid[1]
    seen = 0
    for budget in range(1, n + 1):
        try:
            refined, coarsest = cells.counts(budget / n)
        except ValueError:
            continue
        seen += 1
        layout = cells.layout(torch.randn(2, cells.num_cells), refined, coarsest)
        assert layout.num_tokens <= budget
        assert layout.num_tokens > budget - 3  # nothing is left that would pay for another cell
        owner = layout.token_of_patch()
        for image in owner:
            assert torch.equal(image.bincount(minlength=layout.num_tokens), layout.scale**2)
    assert seen >= n - n // 2


@pytest.mark.parametrize("family", ["vit", "eva02", "dinov3", "hybrid"])
@torch.no_grad()
def test_all_fine_is_the_plain_model(backbone_of: Callable[..., Any], family: str) -> None:
    backbone, images = backbone_of(family)
    full, modules = backbone(images), dict(backbone.named_modules())
    model = drop_patches(backbone, keep_ratio=1.0, rest="coarse")
    assert torch.equal(model(images), full)
    assert model.token_layout(images).num_tokens == 36
    model.keep_ratio = 0.5
    assert not torch.equal(model(images), full)
    assert torch.equal(model(images, keep_indices=torch.arange(36).expand(3, -1)), full)
    assert torch.equal(model.backbone(images), full)  # the bare backbone is always the plain model
    assert model.restore() is backbone
    assert dict(backbone.named_modules()) == modules
    assert torch.equal(backbone(images), full)


@pytest.mark.parametrize("scales", [(1, 2), (1, 2, 4)])
@pytest.mark.parametrize("family", ["vit", "dinov3"])
@torch.no_grad()
def test_given_patches(family: str, scales: tuple[int, ...]) -> None:
    model, images = backbone_at(family, (8, 8))
    pruned = drop_patches(model, keep_ratio=0.4, rest="coarse", scales=scales)
    keep, out = pruned.keep_indices(images), pruned(images)
    assert torch.equal(keep, pruned.token_layout(images).indices[0])
    assert torch.equal(pruned(images, keep_indices=keep), out)
    order = torch.randperm(keep.shape[1])
    assert torch.equal(pruned(images, keep_indices=keep[:, order]), out)
    assert torch.allclose(pruned(images.flip(0), keep_indices=keep.flip(0)), out.flip(0), atol=1e-5)
    other = CellGrid((8, 8)).fine_patches(torch.tensor([[0, 5, 9], [1, 2, 3]]))
    changed = pruned.token_layout(images, keep_indices=other)
    assert torch.equal(changed.indices[0], other)
    assert changed.num_tokens == (12 + 13 if scales == (1, 2) else changed.num_tokens)
    none = pruned.token_layout(images, keep_indices=other[:, :0])
    assert none.indices[0].shape == (2, 0)


@torch.no_grad()
def test_pixels_that_no_token_sees_change_nothing() -> None:
    model, images = backbone_at("vit", (8, 8))
    pruned = drop_patches(model, keep_ratio=0.4, rest="coarse")
    keep = pruned.keep_indices(images)
    out = pruned(images, keep_indices=keep)
    # within a coarse cell, only the mean of 2 x 2 pixels is seen
    checks = torch.ones(2, 2)
    checks[0, 1] = checks[1, 0] = -1
    layout = pruned.token_layout(images, keep_indices=keep)
    owner = layout.scale[layout.token_of_patch()].view(2, 1, 8, 8)
    coarse = (owner == 2).float().repeat_interleave(16, 2).repeat_interleave(16, 3)
    changed = images + 3 * coarse * checks.repeat(64, 64)
    assert (pruned(changed, keep_indices=keep) - out).abs().max() <= 1e-5
    changed = images + 3 * (1 - coarse) * checks.repeat(64, 64)
    assert (pruned(changed, keep_indices=keep) - out).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["vit", "rope_mixed"])
@torch.no_grad()
def test_dense_features_have_no_holes(family: str) -> None:
    model, images = backbone_at(family, (6, 6))
    pruned = drop_patches(model, keep_ratio=0.5, rest="coarse")
    prefix = pruned.num_prefix_tokens
    layout = pruned.token_layout(images)
    final, (last,) = pruned.forward_intermediates(images, indices=1, norm=True)
    assert last.shape == (2, pruned.embed_dim, 6, 6)
    for image in range(2):
        places = zip(layout.scale.tolist(), layout.row[image], layout.column[image])
        for number, (scale, row, col) in enumerate(places):
            square = last[image, :, row : row + scale, col : col + scale].flatten(1)
            token = final[image, prefix + number]
            assert torch.equal(square, token[:, None].expand_as(square))
    wrapped = timm.create_model(
        *("ltrp_vit_tiny",), features_only=True, out_indices=(0, 1), depth=2, rest="coarse"
    ).eval()
    assert [each.shape[-2:] for each in wrapped(torch.randn(1, 3, 224, 224))] == [(14, 14)] * 2


@pytest.mark.parametrize("family", ["vit", "dinov3", "rope_mixed"])
def test_gradients_with_checkpointing(backbone_of: Callable[..., Any], family: str) -> None:
    backbone, images = backbone_of(family)
    model = drop_patches(backbone, keep_ratio=0.5, rest="coarse").train()
    blocks, runs = model.backbone.blocks, []
    hook = blocks[0].register_forward_pre_hook(lambda *_: runs.append(1))
    found = {}
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images).square().sum().backward()
        found[enable] = {name: p.grad for name, p in backbone.named_parameters()}
        assert model.backbone.blocks is blocks
    hook.remove()
    assert len(runs) == 3  # once, then once and again in the backward pass
    for name, grad in found[False].items():
        assert grad is not None, name
        torch.testing.assert_close(found[True][name], grad)


@pytest.mark.parametrize(
    ("family", "scales"),
    [
        ("vit", (1, 2)),
        pytest.param("vit", (1, 2, 4), marks=pytest.mark.slow),
        pytest.param("dinov3", (1, 2, 4), marks=pytest.mark.slow),
        pytest.param("rope_mixed", (1, 2), marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_compile_and_export(family: str, scales: tuple[int, ...]) -> None:
    model, images = backbone_at(family, (8, 8))
    pruned = drop_patches(model, keep_ratio=0.4, rest="coarse", scales=scales)
    out = pruned(images)
    compiled = torch.compile(copy.deepcopy(pruned), fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(images), out, atol=1e-5)
    exported = torch.export.export(pruned, (images,)).module()
    assert torch.allclose(exported(images), out, atol=1e-5)
    torch._dynamo.reset()


@torch.no_grad()
def test_half_precision_copies_and_repeats(backbone_of: Callable[..., Any]) -> None:
    for family in ("vit", "dinov3"):
        backbone, images = backbone_of(family)
        model = drop_patches(backbone, keep_ratio=0.5, rest="coarse")
        out = model(images)
        assert torch.equal(model(images), out)
        assert torch.equal(pickle.loads(pickle.dumps(model))(images), out)  # noqa: S301
        assert torch.equal(copy.deepcopy(model)(images), out)
        with torch.autocast("cpu", torch.bfloat16):
            keep = model.keep_indices(images)
            low = model(images, keep_indices=keep).float()
        assert torch.allclose(low, model(images, keep_indices=keep), atol=0.2)
        half = copy.deepcopy(model).bfloat16()
        assert half(images.bfloat16()).isfinite().all()


@torch.no_grad()
def test_saved_models_keep_the_mode(tmp_path: Any) -> None:
    args = {"rest": "coarse", "scales": (1, 2, 4), "size_bias": 1.0, "keep_ratio": 0.3}
    model = timm.create_model("ltrp_vit_tiny", depth=2, num_classes=3, **args).eval()
    images = torch.randn(2, 3, 224, 224)
    ltrp_timm.save_pretrained(model, tmp_path / "model")
    again = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    assert isinstance(again, LTRPModel)
    assert again.settings() == model.settings()
    assert torch.equal(again(images), model(images))


def test_size_bias() -> None:
    model, images = backbone_at("vit", (6, 6))
    outs = {}
    for bias in (0, 0.5, 1.0):
        pruned = drop_patches(copy.deepcopy(model), keep_ratio=0.5, rest="coarse", size_bias=bias)
        outs[bias] = pruned(images)
    assert not torch.equal(outs[0], outs[0.5])
    assert not torch.equal(outs[0.5], outs[1.0])
    default = drop_patches(model, keep_ratio=0.5, rest="coarse")
    assert torch.equal(default(images), outs[default.settings()["size_bias"]])


def test_random_cells_need_no_ranker() -> None:
    class Refuses(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError

    model, images = backbone_at("vit", (6, 6))
    pruned = drop_patches(model, Refuses(), 0.5, "random", rest="coarse")
    one = pruned.keep_indices(images)
    pruned.selection_args = {"seed": 1}
    assert not torch.equal(one, pruned.keep_indices(images))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"rest": "blur"}, "rest must be one of drop, coarse, got 'blur'"),
    ({"scales": (1, 2)}, "scales goes with rest='coarse'"),
    ({"size_bias": 0.5}, "size_bias goes with rest='coarse'"),
    ({"rest": "coarse", "scales": (1, 4)}, r"scales must be \(1, 2\) or \(1, 2, 4\)"),
    ({"rest": "coarse", "scales": 2}, r"scales must be .* got 2"),
    ({"rest": "coarse", "size_bias": -1}, "size_bias must be a number from 0 to 4, got -1"),
    ({"rest": "coarse", "size_bias": math.nan}, "size_bias must be a number"),
    ({"rest": "coarse", "selection": "mixed"}, "selection must be top or random with rest"),
    ({"rest": "coarse", "fill": "nearest"}, "fill goes with rest='drop'"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_wrong_options(
    backbone_of: Callable[..., Any], options: dict[str, Any], message: str
) -> None:
    backbone, images = backbone_of("vit")
    modules, full = dict(backbone.named_modules()), backbone(images)
    with pytest.raises(ValueError, match=message):
        drop_patches(backbone, **options)
    assert dict(backbone.named_modules()) == modules
    assert torch.equal(backbone(images), full)


def test_budgets_and_patches_that_make_no_cells(backbone_of: Callable[..., Any]) -> None:
    backbone, images = backbone_of("vit")
    model = drop_patches(backbone, keep_ratio=0.5, rest="coarse")
    model.keep_ratio = 0.2
    with pytest.raises(ValueError, match=r"0\.2 is too small for a 6x6 grid.*use at least 0\.25"):
        model(images)
    model.keep_ratio = 0.5
    wrong = [torch.tensor([[0, 1, 6]]), torch.tensor([[0, 1, 2, 6]])]
    for keep in wrong:
        with pytest.raises(ValueError, match="keep_indices must be whole cells of 2x2 patches"):
            model(images, keep_indices=keep.expand(3, -1))
    with pytest.raises(ValueError, match="keep_indices must lie in 0 … 35"):
        model(images, keep_indices=torch.tensor([[0, 1, 6, 99]]).expand(3, -1))
    with pytest.raises(ValueError, match="holds the same patch twice"):
        model(images, keep_indices=torch.tensor([[0, 1, 6, 6]]).expand(3, -1))
    with pytest.raises(TypeError, match="must be int64"):
        model(images, keep_indices=torch.zeros(3, 4))
    with pytest.raises(ValueError, match="budget"):
        model.calibrate(images, 0.5)
    with pytest.raises(ValueError, match="selection must be top or random"):
        model.selection = "mixed"
    with pytest.raises(ValueError, match="fill goes with rest='drop'"):
        model.fill = "nearest"
    assert model(images).isfinite().all()
    with pytest.raises(ValueError, match="token_layout needs a model with rest='coarse'"):
        drop_patches(backbone_of("registers")[0]).token_layout(images)
    small, pictures = backbone_at("vit", (1, 6))
    with pytest.raises(ValueError, match="grid of 1x6 patches is too small for cells"):
        drop_patches(small, rest="coarse")(pictures)


@pytest.mark.parametrize("family", ["vit", "beit"])
def test_an_unknown_rest_is_named_for_every_family(
    backbone_of: Callable[..., Any], family: str
) -> None:
    with pytest.raises(ValueError, match="rest must be one of drop, coarse, got 'blur'"):
        drop_patches(backbone_of(family)[0], rest="blur")


def test_wrong_shapes_and_types(backbone_of: Callable[..., Any]) -> None:
    backbone, images = backbone_of("vit")
    with pytest.raises(ValueError, match=r"scales must be \(1, 2\)"):
        drop_patches(backbone, rest="coarse", scales=np.array([1, 2]))  # type: ignore[arg-type]
    model = drop_patches(backbone, keep_ratio=0.5, rest="coarse")
    with pytest.raises(ValueError, match=r"keep_indices must be .*B = 3 and 0 <= K .*got \[5, 0\]"):
        model(images, keep_indices=torch.zeros(5, 0, dtype=torch.int64))
    with pytest.raises(TypeError, match="must be int64"):
        model(images, keep_indices=torch.zeros(3, 0))
    with pytest.raises(ValueError, match=r"scores must be \(B, N\) with N = 36, got \[3, 30\]"):
        model.select(torch.zeros(3, 30), images)
    with pytest.raises(ValueError, match=r"rest='coarse' cannot be scripted: .*torch.export"):
        torch.jit.script(model)


def test_three_scales_are_advised_only_where_they_help() -> None:
    with pytest.raises(ValueError, match=r"0\.2 .* 7 tokens, .* are 9; .* or scales=\(1, 2, 4\)\."):
        CellGrid((6, 6)).counts(0.2)
    for grid in ((6, 6), (3, 9)):
        with pytest.raises(ValueError, match=r"use at least 0\.\d+\.$"):
            CellGrid(grid).counts(0.05)


class Wrapper(nn.Module):
    """Reads attributes through, as PEFT's wrapper of a trained copy does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args: Any) -> Any:
        return self.inner(*args)


@torch.no_grad()
def test_a_wrapped_patch_embedding(backbone_of: Callable[..., Any]) -> None:
    backbone, images = backbone_of("vit")
    model = drop_patches(backbone, keep_ratio=0.5, rest="coarse")
    out, embed = model(images), backbone.patch_embed
    backbone.patch_embed = Wrapper(embed)
    assert torch.allclose(model(images), out, atol=1e-6)
    assert embed.strict_img_size


def test_a_refused_call_leaves_checkpointed_blocks_alone(
    backbone_of: Callable[..., Any],
) -> None:
    backbone, images = backbone_of("vit")
    model = drop_patches(backbone, keep_ratio=0.5, rest="coarse")
    model.set_grad_checkpointing()
    plain, during = backbone.blocks, []

    def call_again(*_: Any) -> None:
        before = backbone.blocks
        keep = model.keep_indices(images)
        with pytest.raises(RuntimeError, match="VisionTransformer is running already"):
            model(images, keep_indices=keep)
        during.append(backbone.blocks is before)

    hook = backbone.norm.register_forward_pre_hook(call_again)
    place = type(backbone).__setattr__
    with pytest.MonkeyPatch.context() as patch:
        changes: list[str] = []

        def noted(self: Any, name: str, value: Any) -> None:
            changes.append(name)
            place(self, name, value)

        patch.setattr(type(backbone), "__setattr__", noted)
        model(images)
    hook.remove()
    assert during == [True]
    assert changes.count("blocks") == 2  # the refused call has not changed them
    assert backbone.blocks is plain


REFUSED = {"beit": "position bias", "relpos": "position bias"}
REFUSED |= {"cait": "no mask", "naflex": "use_naflex"}


@pytest.mark.parametrize("family", REFUSED)
def test_families_without_coarse_tokens(backbone_of: Callable[..., Any], family: str) -> None:
    backbone, images = backbone_of(family)
    full = backbone(images)
    with pytest.raises(TypeError, match=f"rest='coarse' does not work with .*{REFUSED[family]}"):
        drop_patches(backbone, rest="coarse")
    assert torch.equal(backbone(images), full)


def test_an_unknown_rope_can_be_dropped_from_but_not_coarse(
    backbone_of: Callable[..., Any],
) -> None:
    backbone, _ = backbone_of("eva02")
    backbone.rope = nn.Identity()
    with pytest.raises(TypeError, match="from Eva with rest='coarse': its rope is a Identity, not"):
        drop_patches(backbone, rest="coarse")
    drop_patches(backbone)


def test_pictures_show_tokens_in_their_resolution() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1)
    model = drop_patches(vit, keep_ratio=0.5, rest="coarse").eval()
    noise = torch.randint(256, (64, 64, 3), dtype=torch.uint8)
    picture, layout = Image.fromarray(noise.numpy()), model.token_layout(torch.randn(1, 3, 64, 64))
    shown = torch.from_numpy(np.array(token_picture(picture, layout))).int()
    for scale, row, col in zip(layout.scale.tolist(), layout.row[0], layout.column[0]):
        y, x, side = int(row) * 16, int(col) * 16, scale * 16
        inside = slice(y + 2, y + side), slice(x + 2, x + side)  # without the outline
        square, own = shown[inside], noise[inside].int()
        if scale == 1:
            assert torch.equal(square, own)
        else:
            means = own.float().unflatten(1, (-1, 2)).unflatten(0, (-1, 2)).mean((1, 3))
            assert (square[::2, ::2] - means).abs().max() <= 1
            assert torch.equal(square[::2, ::2], square[1::2, 1::2])
    with pytest.raises(ValueError, match="layout of one image, got 2"):
        token_picture(picture, model.token_layout(torch.randn(2, 3, 64, 64)))


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(2):
        noise = torch.randint(256, (64, 64, 3), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(pictures / f"{number}.png")
    out = tmp_path / "ranked"
    options = ["--rest", "coarse", "--keep-ratio", "0.5", "--img-size", "64", "--overlays"]
    assert main(["rank", str(pictures), "-o", str(out), *options]) == 0
    assert np.load(out / "keep_indices.npy").shape == (2, 4)  # of 16: 4 + 3 coarse, 7 <= 8
    assert len(list((out / "overlays").glob("*.png"))) == 2
    vit = ["vit_tiny_patch16_224", "--rest", "coarse", "--scales", "1", "2", "4"]
    timed = ["--keep-ratio", "0.4", "--batch-size", "1", "--repeats", "1", "--warmup", "0"]
    assert main(["benchmark", *vit, *timed, "--ranker", "pixel_std", "--no-memory"]) == 0
    assert "of 196 patch tokens" in capsys.readouterr().out
    target = str(tmp_path / "model.ts")
    assert main(["export", *vit, "-o", target, "--format", "torchscript"]) == 2
    assert "cannot be scripted" in capsys.readouterr().err


@torch.no_grad()
def test_another_rest_for_a_model(tmp_path: Path) -> None:
    model = timm.create_model("ltrp_vit_tiny", depth=1, num_classes=2, ranker="contrast").eval()
    ltrp_timm.save_pretrained(model, tmp_path / "model")
    name = f"local-dir:{tmp_path / 'model'}"
    coarse, _ = open_model(name, rest="coarse", size_bias=0.0)
    images = torch.randn(1, 3, 224, 224)
    assert coarse.rest == "coarse"
    assert coarse.ranker.name == "contrast"
    fresh = drop_patches(copy.deepcopy(model).restore(), "contrast", rest="coarse", size_bias=0)
    assert torch.equal(coarse(images), fresh(images))
    ltrp_timm.save_pretrained(coarse, tmp_path / "coarse")
    back, _ = open_model(f"local-dir:{tmp_path / 'coarse'}", rest="drop")
    assert torch.equal(back(images), model(images))


def test_other_settings_of_a_model_stay() -> None:
    def settings(front: dict[str, Any], **args: Any) -> dict[str, Any]:
        backbone = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=64)
        model = drop_patches(backbone, "pixel_std", 0.5, **args)
        if model.rest == "drop":
            model.calibrate(torch.rand(4, 3, 64, 64), 0.4)
        return with_front_end(model, front).settings()

    coarse = {"rest": "coarse", "scales": (1, 2, 4), "size_bias": 0.25}
    for front in ({"size_bias": 1.0}, {"scales": (1, 2)}, {"rest": "coarse"}):
        found = settings(front, **coarse)
        assert {name: found[name] for name in coarse} == {**coarse, **front}
    dropping = settings({"rest": "drop"}, fill="nearest")
    assert (dropping["fill"], dropping["budget"]["mean_keep_ratio"]) == ("nearest", 0.4)
    other = settings({"rest": "coarse"}, fill="nearest")
    assert (other["fill"], other["keep_ratio"], "budget" in other) == ("zeros", 0.4, False)
    other = settings({"rest": "drop"}, **coarse)
    assert not {"rest", "scales", "size_bias"} & set(other)


def test_fine_tuning_and_scores_of_an_index_cache() -> None:
    model, images = backbone_at("vit", (6, 6))
    pruned = drop_patches(model, keep_ratio=0.5, rest="coarse")
    scores = pruned.patch_scores(images)
    assert torch.equal(pruned.select(scores, images), pruned.keep_indices(images))
    assert pruned.num_tokens() == pruned.token_layout(images).num_tokens == 18
    assert pruned.num_tokens(1.0) == 36
    assert FinetuneRecipe(rest="coarse", keep_ratio=0.5).front["rest"] == "coarse"
    with pytest.raises(ValueError, match="go with rest='drop'"):
        FinetuneRecipe(rest="coarse", distill="self", distill_features=1.0)


@pytest.mark.parametrize(("ranker", "limit"), [("random", 1.4), ("border", 1.5)])
def test_operators_of_a_coarse_rest(ranker: str, limit: float) -> None:
    """Operators beside those of the plain ViT-B; none waits for the device."""
    backbone = timm.create_model("vit_base_patch16_224", embed_dim=48, num_heads=2).eval()
    images = torch.randn(1, 3, 224, 224)
    selection = "random" if ranker == "random" else "top"
    with torch.inference_mode():
        plain = operators(lambda: backbone(images))
        model = drop_patches(backbone, ranker, 0.5, selection, rest="coarse")
        pruned = operators(lambda: model(images))
    assert len(pruned) <= limit * len(plain)
    assert not host_syncs(pruned)
