"""Pseudo-scores: all removals in one batch equal a plain loop that masks one after another."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import small_teacher
from safetensors.torch import load_file
from torch import Tensor, nn

from ltrp_timm import FeatureTeacher, create_ranker, drop_patches, semantic_density
from ltrp_timm.losses import list_mle
from ltrp_timm.metrics import spearman
from ltrp_timm.teacher import MAETeacher, masked_indices, random_visible_indices
from ltrp_timm.teacher import density as pseudo_scores
from ltrp_timm.teacher.density import METRICS, REMOVALS, psnr_change, ssim_change

PARITY = Path(__file__).parents[2] / "shared" / "parity"  # the larger vectors, where they lie there
with_parity = pytest.mark.skipif(
    not PARITY.is_dir(), reason="the larger reference vectors are not here"
)
every_removal = pytest.mark.parametrize("removal", REMOVALS)


def run_block(block: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """A plain block; mask (L, L) says who may look at whom, who may look at nobody gets zeros."""
    attn = block.attn
    batch, length, width = x.shape
    qkv = attn.qkv(block.norm1(x)).reshape(batch, length, 3, attn.num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
    if mask is not None:
        weights = weights.masked_fill(~mask, -math.inf)
    weights = weights.softmax(dim=-1).nan_to_num(0.0)
    x = x + attn.proj((weights @ v).transpose(1, 2).reshape(batch, length, width))
    return x + block.mlp(block.norm2(x))


def masked_reconstruction(
    teacher: MAETeacher, image: Tensor, visible: Tensor, removed: int | None, removal: str
) -> Tensor:
    """One image (1, 3, H, W), one removal, attention masks, the whole grid: (N, C)."""
    v, n = len(visible), teacher.num_patches
    gone = None if removed is None else removed + 1
    x = teacher.patch_embed(image) + teacher.pos_embed[:, 1:]
    x = torch.cat([teacher.cls_token + teacher.pos_embed[:, :1], x[:, visible]], dim=1)
    mask = torch.ones(v + 1, v + 1, dtype=torch.bool)
    if gone is not None and removal != "decoder":
        mask[:, gone] = mask[gone, :] = False
    for block in teacher.blocks:
        x = run_block(block, x, mask)
    x = teacher.decoder_embed(teacher.norm(x))
    full = teacher.mask_token.repeat(1, n + 1, 1)
    full[:, 0], full[:, 1 + visible] = x[:, 0], x[:, 1:]
    mask = torch.ones(n + 1, n + 1, dtype=torch.bool)
    if removed is not None and removal == "full":
        full[:, 1 + visible[removed]] = teacher.mask_token[0]
    if removed is not None and removal == "decoder":
        mask[:, 1 + visible[removed]] = False
    x = full + teacher.decoder_pos_embed
    for block in teacher.decoder_blocks:
        x = run_block(block, x, mask)
    return teacher.decoder_pred(teacher.decoder_norm(x))[0, 1:]


@torch.no_grad()
def plain_loop(
    teacher: MAETeacher, images: Tensor, visible: Tensor, removal: str, change: Any
) -> Tensor:
    """change(reconstruction, anchor) of the masked patches (M, C), one after another: (B, V)."""
    rows = []
    for image, seen in zip(images, visible):
        hidden = [i for i in range(teacher.num_patches) if i not in seen.tolist()]

        def paint(
            removed: int | None, image: Tensor = image, seen: Tensor = seen, hidden: Any = hidden
        ) -> Tensor:
            return masked_reconstruction(teacher, image[None], seen, removed, removal)[hidden]

        rows.append([float(change(paint(i), paint(None))) for i in range(len(seen))])
    return torch.tensor(rows)


def case(**changes: Any) -> tuple[MAETeacher, Tensor, Tensor]:
    teacher = small_teacher(**changes)
    images = torch.randn(2, teacher.in_chans, *teacher.img_size)
    return teacher, images, random_visible_indices(2, teacher.num_patches, 0.6)


CHANGES: dict[tuple[str, str], Callable[[Tensor, Tensor], Tensor]] = {
    ("l1", "mean"): lambda a, b: (a - b).abs().mean(),
    ("l1", "max"): lambda a, b: (a - b).abs().mean(1).max(),
    ("mse", "mean"): F.mse_loss,
    ("mse", "max"): lambda a, b: (a - b).square().mean(1).max(),
}


@every_removal
@pytest.mark.parametrize(("metric", "aggregate"), list(CHANGES))
def test_equals_the_plain_loop(removal: str, metric: str, aggregate: str) -> None:
    teacher, images, visible = case()
    expected = plain_loop(teacher, images, visible, removal, CHANGES[metric, aggregate])
    scores, indices = semantic_density(
        teacher, images, visible, removal=removal, metric=metric, aggregate=aggregate
    )
    assert torch.equal(indices, visible)
    assert (scores - expected).abs().max() <= 1e-5
    assert torch.equal(scores.argsort(dim=1), expected.argsort(dim=1))
    assert scores.std(dim=1).min() > 1e-3  # there is an order


def test_the_removals_differ() -> None:
    teacher, images, visible = case()
    scores = [semantic_density(teacher, images, visible, removal=name)[0] for name in REMOVALS]
    for i in range(3):
        assert (scores[i] - scores[i - 1]).abs().max() > 1e-3


@with_parity
@pytest.mark.parametrize(("removal", "column"), [("decoder", "decoder"), ("encoder", "all")])
@torch.no_grad()
def test_reference_vectors(removal: str, column: str) -> None:
    arrays = load_file(PARITY / "a_small_p16.safetensors")
    config = json.loads((PARITY / "a_small_p16.json").read_text())
    teacher = MAETeacher(**config["mae"])
    teacher.load_state_dict({name[2:]: t for name, t in arrays.items() if name.startswith("w:")})
    images, visible = arrays["images"], arrays["visible_ids"]
    assert (teacher(images, visible)[0] - arrays["anchor"]).abs().max() <= 1e-5
    expected = arrays[f"score_{column}"]
    for chunk in (1, 7, 24, None):
        scores, _ = semantic_density(teacher, images, visible, removal=removal, chunk=chunk)
        assert (scores - expected).abs().max() <= 1e-5
        assert torch.equal(scores.argsort(dim=1), expected.argsort(dim=1))
    full, _ = semantic_density(teacher, images, visible)
    assert (full - expected).abs().max() > 1e-3
    if removal == "decoder":
        masked = arrays["mask"].nonzero()[:, 1].reshape(3, -1)
        variants = pseudo_scores._Variants(teacher, images, visible, removal)
        for row, column in itertools.product(range(3), range(8)):
            at = torch.tensor([row]), torch.tensor([column])
            found = variants.predict(variants.show(*at), at[0])[0]
            published = arrays["rm_pred_decoder"][row, column, masked[row]]
            assert (found - published).abs().max() <= 1e-5


@with_parity
@pytest.mark.parametrize("visible_only", [False, True])
def test_a_training_step(visible_only: bool) -> None:
    """Teacher, scores, ranker and loss together: the published step's loss and gradients."""
    arrays = load_file(PARITY / "f_stage1_step.safetensors")
    files = [
        load_file(PARITY / f"{name}.safetensors") for name in ("a_small_p16", "c_ranker_small")
    ]
    weights = [{k[2:]: t for k, t in file.items() if k.startswith("w:")} for file in files]
    teacher = MAETeacher(**json.loads((PARITY / "a_small_p16.json").read_text())["mae"])
    teacher.load_state_dict(weights[0])
    ranker = create_ranker("vit_small", img_size=64, embed_dim=48, depth=3, num_heads=4)
    ranker.load_state_dict(weights[1])
    images = arrays["images"]
    visible = arrays["mask_noise"].argsort(dim=1)[:, :8].sort(dim=1)[0]
    target, _ = semantic_density(teacher, images, visible, removal="decoder")
    seen = visible if visible_only else None
    pred = ranker(images, visible_indices=seen).flatten(1).gather(1, visible)
    items = arrays["loss_noise"].argsort(dim=1)[:, :20]  # the published subset: here all 8
    loss = list_mle(pred.gather(1, items), target.gather(1, items))
    loss.backward()
    kind = "asym" if visible_only else "full"
    assert (loss - arrays[f"{kind}_loss"]).abs().max() <= 1e-4
    for name, parameter in ranker.named_parameters():
        expected = arrays.get(f"{kind}_grad_{name}")
        if expected is not None:
            assert (parameter.grad - expected).abs().max() <= 1e-4, name
    assert all(parameter.grad is None for parameter in teacher.parameters())


@every_removal
def test_the_chunk_does_not_matter(removal: str) -> None:
    teacher, images, visible = case()
    expected, _ = semantic_density(teacher, images, visible, removal=removal)
    for chunk in (1, 4, 5, 12, 1000):
        scores, _ = semantic_density(teacher, images, visible, removal=removal, chunk=chunk)
        assert (scores - expected).abs().max() <= 1e-6
        assert torch.equal(scores.argsort(dim=1), expected.argsort(dim=1))


def test_chunks_are_fitted_to_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, images, visible = case()  # 12 variants
    encoder, decoder = Shapes(teacher.blocks[0]).seen, Shapes(teacher.decoder_blocks[0]).seen
    expected, _ = semantic_density(teacher, images, visible)
    assert [shape[0] for shape in encoder] == [shape[0] for shape in decoder] == [2, 12]
    for budget, encoded, decoded in (
        (900_000, [2, 12], [2, 6, 6]),
        (130_000, [2, 6, 6], [2] + 12 * [1]),
        (1, [2] + 12 * [1], [2] + 12 * [1]),
    ):
        monkeypatch.setattr(pseudo_scores, "_CPU_BYTES", budget)
        encoder.clear()
        decoder.clear()
        scores, _ = semantic_density(teacher, images, visible)
        assert [shape[0] for shape in encoder] == encoded
        assert [shape[0] for shape in decoder] == decoded
        assert (scores - expected).abs().max() <= 1e-6


class Shapes:
    """Records the inputs' shapes of a module."""

    def __init__(self, module: nn.Module) -> None:
        self.seen: list[tuple[int, ...]] = []
        module.register_forward_pre_hook(self.record)

    def record(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.seen.append(tuple(args[0].shape))


@pytest.mark.parametrize(
    ("removal", "encoded", "decoded"),
    [
        ("full", (6, 6, 32), (6, 17, 24)),
        ("encoder", (6, 6, 32), (6, 17, 24)),
        ("decoder", None, (6, 16, 24)),
    ],
)
def test_the_removed_patch_is_absent(
    removal: str, encoded: tuple[int, ...] | None, decoded: tuple[int, ...]
) -> None:
    teacher, images, visible = case()  # N = 16, V = 6, M = 10: the anchors, then two chunks
    encoder, decoder = Shapes(teacher.blocks[0].attn), Shapes(teacher.decoder_blocks[0].attn)
    predicted = Shapes(teacher.decoder_pred)
    semantic_density(teacher, images, visible, removal=removal, chunk=6)
    assert encoder.seen == [(2, 7, 32), *[encoded] * 2] if encoded else [(2, 7, 32)]
    assert decoder.seen == [(2, 17, 24), decoded, decoded]
    assert predicted.seen == [(2, 10, 24), (6, 10, 24), (6, 10, 24)]  # masked patches only


def test_fused_attention() -> None:
    teacher = small_teacher()
    blocks = [*teacher.blocks, *teacher.decoder_blocks]
    assert all(block.attn.fused_attn for block in blocks)


@every_removal
def test_a_drawn_subset(removal: str) -> None:
    teacher, images, visible = case()
    everything, _ = semantic_density(teacher, images, visible, removal=removal)
    decoder = Shapes(teacher.decoder_blocks[0].attn)

    def draw(seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return semantic_density(
            teacher, images, visible, removal=removal, num_removed=3, generator=generator
        )

    scores, indices = draw(0)
    assert sum(shape[0] for shape in decoder.seen) == 2 + 2 * 3  # drawn before painting
    assert scores.shape == indices.shape == (2, 3)
    columns = (visible.unsqueeze(1) == indices.unsqueeze(2)).int().argmax(dim=2)
    assert torch.equal(visible.gather(1, columns), indices)
    assert (everything.gather(1, columns) - scores).abs().max() <= 1e-6
    assert bool((indices.diff(dim=1) > 0).all())
    assert torch.equal(draw(0)[1], indices)
    drawn = {tuple(draw(seed)[1][0].tolist()) for seed in range(20)}
    assert len(drawn) > 5


def test_draws_of_an_image_do_not_depend_on_its_place() -> None:
    teacher = small_teacher()
    images = torch.randn(2, 3, 32, 32)

    def draw(pictures: Tensor, seeds: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        own = [torch.Generator().manual_seed(seed) for seed in seeds]
        return semantic_density(teacher, pictures, mask_ratio=0.5, num_removed=4, generator=own)

    scores, indices = draw(images, (7, 8))
    turned_scores, turned_indices = draw(images.flip(0), (8, 7))
    assert torch.equal(turned_indices.flip(0), indices)
    assert (turned_scores.flip(0) - scores).abs().max() <= 1e-6
    alone_scores, alone_indices = draw(images[1:], (8,))
    assert torch.equal(alone_indices, indices[1:])
    assert (alone_scores - scores[1:]).abs().max() <= 1e-6
    assert not torch.equal(indices[0], indices[1])


def test_visible_patches_are_drawn_by_the_mask_ratio() -> None:
    teacher, images, _ = case()
    state = torch.get_rng_state()
    for ratio, visible in ((0.9, None), (0.75, 4), (0.5, 8)):
        generator = torch.Generator().manual_seed(0)
        if visible is None:
            with pytest.raises(ValueError, match=r"1 of 16 patches are visible: at least 2"):
                semantic_density(teacher, images, generator=generator)
            continue
        scores, indices = semantic_density(teacher, images, mask_ratio=ratio, generator=generator)
        assert scores.shape == (2, visible)
        again = random_visible_indices(2, 16, ratio, torch.Generator().manual_seed(0))
        assert torch.equal(indices, again)
    assert torch.equal(torch.get_rng_state(), state)


def test_masked_pixels_do_not_count_and_order_is_the_callers() -> None:
    teacher, images, visible = case()
    expected, _ = semantic_density(teacher, images, visible)
    patches = teacher.patchify(images)
    places = masked_indices(visible, 16)[:, :, None].expand(-1, -1, patches.shape[2])
    hidden = teacher.unpatchify(patches.scatter(1, places, 5.0))
    assert torch.equal(semantic_density(teacher, hidden, visible)[0], expected)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    scores, indices = semantic_density(teacher, images, visible[:, order])
    assert torch.equal(indices, visible[:, order])
    assert (scores - expected[:, order]).abs().max() <= 1e-6


def test_any_grid() -> None:
    teacher, images, visible = case(img_size=(24, 40), patch_size=(4, 8), in_chans=2)
    for metric in ("l1", "mse", "ssim", "psnr"):
        scores, _ = semantic_density(teacher, images, visible, metric=metric)
        assert scores.shape == (2, 12)
        assert scores.isfinite().all()
    expected = plain_loop(teacher, images, visible, "full", CHANGES["l1", "mean"])
    assert (semantic_density(teacher, images, visible)[0] - expected).abs().max() <= 1e-5


def test_pixel_metrics_against_the_plain_loop() -> None:
    teacher, images, visible = case()
    for name, change in (("ssim", ssim_change), ("psnr", psnr_change)):
        for aggregate in ("mean", "max"):

            def plain(a: Tensor, b: Tensor, change: Any = change, how: str = aggregate) -> Tensor:
                values = change(teacher.denormalise(a), teacher.denormalise(b), 3)
                return getattr(values, how)()

            expected = plain_loop(teacher, images, visible, "full", plain)
            scores, _ = semantic_density(teacher, images, visible, metric=name, aggregate=aggregate)
            assert (scores - expected).abs().max() <= 1e-4
            assert torch.equal(scores.argsort(dim=1), expected.argsort(dim=1))


def test_a_metric_of_pictures_is_handed_whole_ones() -> None:
    teacher, images, visible = case()
    pictures = teacher.unpatchify(teacher.denormalise(teacher.patchify(images)))

    def distance(a: Tensor, b: Tensor) -> Tensor:
        assert a.shape == b.shape == (4, 3, 32, 32)
        differs = teacher.patchify(a - b).abs().amax(dim=2) > 0
        row = visible[len(calls) // 3]
        calls.append(1)
        assert not differs[:, row].any()  # visible patches are the true ones in both
        true = teacher.patchify(a)[:, row] - teacher.patchify(pictures)[(len(calls) - 1) // 3, row]
        assert true.abs().max() <= 1e-5
        return (a - b).abs().mean(dim=(1, 2, 3))

    calls: list[int] = []
    visible = torch.tensor([[0, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12, 15]] * 2)
    scores, _ = semantic_density(teacher, images, visible, metric=distance, chunk=4)
    assert len(calls) == 6
    in_pixels = plain_loop(
        teacher,
        images,
        visible,
        "full",
        lambda a, b: (teacher.denormalise(a) - teacher.denormalise(b)).abs().mean() * 4 / 16,
    )
    assert (scores - in_pixels).abs().max() <= 1e-5
    with pytest.raises(ValueError, match=r"one distance a picture, \[24\], got \[\]"):
        semantic_density(teacher, images, visible, metric=lambda a, b: (a - b).mean())


def test_scores_train_a_ranker() -> None:
    teacher, images, visible = case()
    scores, _ = semantic_density(teacher, images, visible)
    assert not scores.requires_grad
    assert not scores.is_inference()  # autograd may keep it for a backward pass
    free = small_teacher(frozen=False).train()
    assert not semantic_density(free, images, visible)[0].requires_grad
    assert free.training


def test_autocast() -> None:
    teacher, images, visible = case()
    expected, _ = semantic_density(teacher, images, visible)
    for removal in REMOVALS:
        wide, _ = semantic_density(teacher, images, visible, removal=removal)
        with torch.autocast("cpu", torch.bfloat16):
            scores, _ = semantic_density(teacher, images, visible, removal=removal)
        assert scores.dtype is torch.float32
        assert 0 < (scores - wide).abs().max() < 0.1 * expected.mean()
        assert spearman(scores, wide) > 0.7


def test_a_teacher_in_bfloat16() -> None:
    teacher, images, visible = case()
    expected, _ = semantic_density(teacher, images, visible)
    scores, _ = semantic_density(teacher.bfloat16(), images.bfloat16(), visible)
    assert scores.dtype is torch.float32
    assert spearman(scores, expected) > 0.7


@pytest.mark.parametrize("metric", ["l1", "mse"])
@torch.no_grad()
def test_cells_given_coarsely_equal_a_plain_loop(metric: str) -> None:
    """Token by token: of each image's visible cells, one is a patch of the image at half size."""
    teacher, images, _ = case(img_size=(48, 32))  # 6 x 4 patches of 8 pixels, 3 x 2 cells
    visible = torch.tensor([[0, 3, 5], [4, 1, 2]])
    scores, cells = semantic_density(teacher, images, visible, removal="coarse", metric=metric)
    assert torch.equal(cells, visible)
    weight, bias = teacher.patch_embed.proj.weight, teacher.patch_embed.proj.bias
    table = teacher.pos_embed[0, 1:].view(1, 6, 4, -1).permute(0, 3, 1, 2)
    small = F.interpolate(table, (3, 2), mode="bicubic", antialias=True)[0].flatten(1).T

    def embed(pixels: Tensor) -> Tensor:
        return (weight * pixels).sum((1, 2, 3)) + bias

    def patches(cell: int) -> list[int]:
        first = (cell // 2) * 8 + (cell % 2) * 2
        return [first, first + 1, first + 4, first + 5]

    def predicted(image: Tensor, seen: list[int], coarse: int | None) -> Tensor:
        tokens, places = [], []
        for cell in (cell for cell in seen if cell != coarse):
            for place in patches(cell):
                row, col = place // 4 * 8, place % 4 * 8
                patch = embed(image[:, row : row + 8, col : col + 8])
                tokens.append(patch + teacher.pos_embed[0, 1 + place])
                places.append(place)
        copies = []
        if coarse is not None:
            row, col = coarse // 2 * 16, coarse % 2 * 16
            half = image[:, row : row + 16, col : col + 16].reshape(3, 8, 2, 8, 2).mean((2, 4))
            tokens.append(embed(half) + small[coarse])
            copies = patches(coarse)
        latents = teacher.encode_tokens(torch.stack(tokens)[None])
        latents = torch.cat([latents, *[latents[:, -1:]] * (len(copies) - 1)], dim=1)
        full = teacher.decode(latents, torch.tensor([places + copies]))[0]
        hidden = [place for place in range(24) if place not in places + copies]
        return full[hidden]

    change = CHANGES[metric, "mean"]
    for image, seen, found in zip(images, visible.tolist(), scores):
        anchor = predicted(image, seen, None)
        expected = [change(predicted(image, seen, cell), anchor) for cell in seen]
        assert torch.allclose(found, torch.stack(expected), rtol=1e-4, atol=1e-7)
    assert scores.std() > 1e-3 * scores.mean()
    for chunk in (1, 2, 6):
        again, _ = semantic_density(
            teacher, images, visible, removal="coarse", metric=metric, chunk=chunk
        )
        assert torch.allclose(again, scores, rtol=1e-4)


def test_cells_need_an_even_grid() -> None:
    teacher, images, _ = case(img_size=(24, 32))
    with pytest.raises(ValueError, match="whole cells of 2x2 patches, the teacher has 3x4 patches"):
        semantic_density(teacher, images, mask_ratio=0.5, removal="coarse")
    teacher, images, _ = case(img_size=(48, 32))
    for arguments in ({"metric": "ssim"}, {"aggregate": "max"}):
        with pytest.raises(ValueError, match=r"must be .* for this teacher, got"):
            semantic_density(teacher, images, mask_ratio=0.5, removal="coarse", **arguments)


def test_wrong_arguments() -> None:
    teacher, images, visible = case()
    for arguments, text in (
        ({"removal": "half"}, "removal must be one of full, decoder, encoder, coarse, got 'half'"),
        ({"removal": len}, "removal must be one of full, decoder, encoder, coarse, got <built-in"),
        ({"metric": "l2"}, r"metric must be one of l1, mse, ssim, psnr, lpips, or a func.* 'l2'"),
        ({"aggregate": "min"}, "aggregate must be one of mean, max, got 'min'"),
        ({"metric": "lpips", "aggregate": "max"}, "one value, not one per patch"),
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"num_removed": 0}, "num_removed must be in 1 … V = 6, got 0"),
        ({"num_removed": 7}, "num_removed must be in 1 … V = 6, got 7"),
        ({"visible_indices": visible[:1]}, r"visible_indices must be \(B, K\) with B = 2"),
        ({"visible_indices": visible[:, :1]}, "1 of 16 patches are visible"),
        ({"visible_indices": torch.arange(16).repeat(2, 1)}, "16 of 16 patches are visible"),
        ({"visible_indices": None, "mask_ratio": 1.5}, r"mask_ratio must be in \(0, 1\), got 1.5"),
        ({"generator": [torch.Generator()], "num_removed": 2}, "2 images need 2 generators"),
        ({"images": images[:0]}, r"takes images \(B, 3, 32, 32\), got \[0, 3, 32, 32\]"),
        ({"images": images[0]}, r"takes images \(B, 3, 32, 32\), got \[3, 32, 32\]"),
        ({"images": images[:, :, :16]}, r"takes images \(B, 3, 32, 32\), got \[2, 3, 16, 32\]"),
    ):
        given = {"images": images, "visible_indices": visible, **arguments}
        with pytest.raises(ValueError, match=text):
            semantic_density(teacher, **given)
    with pytest.raises(TypeError, match="visible_indices must be an int64 tensor, got list"):
        semantic_density(teacher, images, visible.tolist())
    assert set(METRICS) >= {"l1", "mse", "ssim", "psnr", "lpips"}


@pytest.mark.parametrize("family", ["vit", "vit_gap", "registers", "rope_mixed", "beit", "relpos"])
@torch.no_grad()
def test_features_in_one_batch_equal_a_loop(family: str, backbone_of: Callable[..., Any]) -> None:
    backbone, images = backbone_of(family)
    teacher = FeatureTeacher(backbone)
    visible = random_visible_indices(len(images), teacher.num_patches, 0.7)
    scores, indices = semantic_density(teacher, images, visible)
    assert torch.equal(indices, visible)
    pruned = drop_patches(backbone)

    def feature(image: Tensor, kept: Tensor) -> Tensor:
        tokens = pruned.forward_features(image[None], keep_indices=kept[None])
        return pruned.forward_head(tokens, pre_logits=True)[0]

    for image, seen, found in zip(images, visible, scores):
        anchor = feature(image, seen)
        loop = [feature(image, seen[seen != patch]) - anchor for patch in seen]
        wanted = torch.stack([change.abs().mean() for change in loop])
        assert torch.allclose(found, wanted, atol=1e-5)
        assert found.std() > 1e-4
        squares = torch.stack([change.square().mean() for change in loop])
        mse = semantic_density(teacher, image[None], seen[None], metric="mse", chunk=2)[0][0]
        assert torch.allclose(mse, squares, atol=1e-5)


@pytest.mark.parametrize("family", ["vit", "dinov3", "vit_gap"])
@torch.no_grad()
def test_cells_given_coarsely_equal_a_loop(family: str, backbone_of: Callable[..., Any]) -> None:
    backbone, images = backbone_of(family)
    teacher = FeatureTeacher(backbone, rest="coarse")
    assert teacher.grid_size == (3, 3)
    assert teacher.patch_size == (32, 32)
    visible = torch.tensor([[0, 4, 8], [1, 2, 3], [5, 6, 7]])
    scores, indices = semantic_density(teacher, images, visible, removal="coarse")
    assert torch.equal(indices, visible)
    pruned = drop_patches(backbone, rest="coarse")

    def feature(image: Tensor, cells: list[int]) -> Tensor:
        corners = [cell // 3 * 12 + cell % 3 * 2 for cell in cells]
        patches = torch.tensor([c + step for c in corners for step in (0, 1, 6, 7)])
        tokens = pruned.forward_features(image[None], keep_indices=patches[None])
        return pruned.forward_head(tokens, pre_logits=True)[0]

    for image, seen, found in zip(images, visible.tolist(), scores):
        anchor = feature(image, seen)
        others = [feature(image, [one for one in seen if one != cell]) for cell in seen]
        wanted = torch.stack([(other - anchor).abs().mean() for other in others])
        assert torch.allclose(found, wanted, atol=1e-5)
        assert found.std() > 1e-5
    with pytest.raises(ValueError, match="removal must be full for this teacher"):
        semantic_density(FeatureTeacher(pruned.restore()), images, visible, removal="coarse")


def test_a_teacher_of_features_says_what_it_takes(backbone_of: Callable[..., Any]) -> None:
    backbone, images = backbone_of("vit")
    teacher = FeatureTeacher(backbone)
    assert not teacher.train().training
    assert not hasattr(backbone, "ranker")
    scores, indices = semantic_density(teacher, images, mask_ratio=0.5, num_removed=3)
    assert scores.shape == indices.shape == (len(images), 3)
    for wrong in ({"metric": "ssim"}, {"removal": "decoder"}, {"aggregate": "max"}):
        with pytest.raises(ValueError, match=r"must be .* for this teacher, got"):
            semantic_density(teacher, images, mask_ratio=0.5, **wrong)
    with pytest.raises(ValueError, match="this teacher takes images"):
        semantic_density(teacher, images[..., :-16])
    with pytest.raises(ValueError, match="img_size goes with a backbone's name"):
        FeatureTeacher(backbone, img_size=64)
    with pytest.raises(TypeError, match=r"a ViT as FeatureTeacher\(vit\), got VisionTransformer"):
        semantic_density(backbone, images)
    with pytest.raises(TypeError, match="ResNet"):
        FeatureTeacher(timm.create_model("resnet10t"))
