"""Dicts of patches of NaFlexVit: images of different sizes in one padded batch."""

from collections.abc import Sequence
from typing import Any

import pytest
import timm
import torch
from conftest import awaken, make_backbone
from timm.data.naflex_dataset import NaFlexCollator
from timm.data.naflex_transforms import Patchify
from torch import Tensor

from ltrp_timm import AdaptiveBudget, drop_patches, num_keep
from ltrp_timm.rankers.base import Ranker

GRIDS = [(4, 6), (3, 3), (5, 2), (4, 6)]
ROPE = {"pos_embed": "none", "num_heads": 4}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "learned": ("naflexvit_base_patch16_gap", {}),
    "aspect": ("naflexvit_base_patch16_par_gap", {}),
    "factorised": ("naflexvit_base_patch16_parfac_gap", {}),
    "sampled": ("naflexvit_base_patch16_parfac_gap", {"pos_embed_use_grid_sample": True}),
    "map": ("naflexvit_base_patch16_map", {}),
    "siglip": ("naflexvit_base_patch16_siglip", {}),
    "register": ("naflexvit_so150m2_patch16_reg1_gap", {}),
    "axial": ("naflexvit_base_patch16_gap", {"rope_type": "axial", **ROPE}),
}
if hasattr(timm.layers.pos_embed_sincos, "RotaryEmbeddingMRope"):  # an older timm has not all
    mixed = {"rope_type": "mixed", "class_token": True, **ROPE}
    KINDS["mixed"] = ("naflexvit_base_patch16_gap", mixed)
    KINDS["dinov3"] = ("naflexvit_base_patch16_gap", {"rope_type": "dinov3", **ROPE})


def model_of(kind: str, **changes: Any) -> Any:
    name, args = KINDS[kind]
    torch.manual_seed(0)
    size = {"embed_dim": 64, "num_heads": 2, "depth": 2, "num_classes": 7}
    return awaken(timm.create_model(name, **{**size, **args, **changes})).eval()


def batch_of(grids: Sequence[tuple[int, int]] = GRIDS, length: int = 28) -> dict[str, Any]:
    """What timm's loader gives for noise of these sizes."""
    cut = Patchify(16)
    items = [(cut(torch.randn(3, 16 * h, 16 * w)), 0) for h, w in grids]
    batch: dict[str, Any] = NaFlexCollator(length)(items)[0]
    return batch


def alone(batch: dict[str, Any], image: int) -> dict[str, Any]:
    """One image of a batch, without padding."""
    n = int(batch["patch_valid"][image].sum())
    names = ("patches", "patch_coord", "patch_valid")
    return {name: batch[name][image : image + 1, :n] for name in names}


def masked(model: Any, one: dict[str, Any], keep: Tensor) -> tuple[Tensor, Tensor]:
    """The plain model of one image, dropped patches masked as keys: kept tokens and logits."""
    prefix, n = model.num_prefix_tokens, one["patches"].shape[1]
    column = torch.zeros(1, 1, 1, prefix + n).index_fill(3, torch.arange(prefix, prefix + n), -1e9)
    column[..., prefix + keep] = 0.0
    tokens = model.forward_features(**one, attn_mask=column)["patches"]
    kept = torch.cat([tokens[:, :prefix], tokens[:, prefix + keep]], dim=1)
    return kept, model.forward_head(kept)


def some_of(grids: Sequence[tuple[int, int]], counts: Sequence[int]) -> Tensor:
    keep = torch.full((len(grids), max(counts)), -1)
    for row, (h, w), k in zip(keep, grids, counts):
        row[:k] = torch.randperm(h * w)[:k].sort()[0]
    return keep


@pytest.mark.parametrize("counts", [(12, 4, 5, 20), (3, 3, 3, 3), (24, 9, 10, 24)])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_drop_equals_mask(kind: str, counts: Sequence[int]) -> None:
    backbone, batch = model_of(kind), batch_of()
    keep = some_of(GRIDS, counts)
    expected = [masked(backbone, alone(batch, i), row[row >= 0]) for i, row in enumerate(keep)]
    full = backbone(batch)
    model = drop_patches(backbone)
    features = model.forward_features(batch, keep_indices=keep)
    logits = model(batch, keep_indices=keep)
    assert features["patch_valid"].tolist() == (keep >= 0).tolist()
    for image, (tokens, one) in enumerate(expected):
        count = tokens.shape[1]
        assert (features["patches"][image, :count] - tokens[0]).abs().max() <= 1e-5
        assert (logits[image] - one[0]).abs().max() <= 1e-5
    assert not backbone.training
    assert backbone.patch_drop is None
    if counts[0] < 24:  # the proof that this test can fail
        assert (logits - full).norm() > 1e-2 * full.norm()


@pytest.mark.parametrize("kind", ["learned", "aspect", "factorised", "map", "siglip"])
@torch.no_grad()
def test_a_subset_of_the_dict_is_another_input(kind: str) -> None:
    """timm reads positions from the order of patches and the largest coordinate."""
    backbone, batch = model_of(kind), batch_of()
    keep = some_of(GRIDS, [4] * 4)
    names = ("patches", "patch_coord", "patch_valid")
    subset = {n: torch.stack([x[row] for x, row in zip(batch[n], keep)]) for n in names}
    by_hand = backbone(subset)
    model = drop_patches(backbone)
    logits = model(batch, keep_indices=keep)
    assert (logits - by_hand).norm() > 1e-3 * logits.norm()
    with pytest.raises(ValueError, match="must hold its whole grid"):
        model(subset)


@pytest.mark.parametrize("kind", ["learned", "factorised", "siglip"])
@torch.no_grad()
def test_images_are_ranked_on_their_own_grids(kind: str) -> None:
    backbone, batch = model_of(kind), batch_of()
    plain = backbone(batch)
    model = drop_patches(backbone, "contrast", keep_ratio=0.5)
    keep = model.keep_indices(batch)
    counts = [num_keep(h * w, 0.5) for h, w in GRIDS]
    assert (keep >= 0).sum(1).tolist() == counts
    assert keep.shape[1] == max(counts)
    logits = model(batch)
    assert torch.equal(logits, model(batch, keep_indices=keep))
    for image, (h, w) in enumerate(GRIDS):
        cells = batch["patches"][image, : h * w].reshape(h, w, 16, 16, 3)
        picture = cells.permute(4, 0, 2, 1, 3).reshape(1, 3, 16 * h, 16 * w)
        assert torch.equal(model.keep_indices(picture)[0], keep[image, : counts[image]])
        assert (model(picture) - logits[image]).abs().max() <= 1e-5
        assert (model(alone(batch, image)) - logits[image]).abs().max() <= 1e-5
    model.keep_ratio = 1.0
    assert torch.equal(model(batch), plain)
    assert (model.keep_indices(batch) >= 0).sum(1).tolist() == [h * w for h, w in GRIDS]


@torch.no_grad()
def test_scores_given_and_found() -> None:
    model, batch = drop_patches(model_of("learned"), "pixel_std", keep_ratio=0.25), batch_of()
    scores = model.patch_scores(batch)
    assert scores.shape == batch["patch_valid"].shape
    assert torch.equal(scores.isfinite(), batch["patch_valid"])
    assert torch.equal(model.select(scores, batch), model.keep_indices(batch))
    assert not torch.equal(model.select(-scores, batch), model.keep_indices(batch))
    with pytest.raises(ValueError, match=r"scores must be \(B, N\) = \[4, 28\], got \[4, 27\]"):
        model.select(scores[:, 1:], batch)


@torch.no_grad()
def test_each_image_may_have_a_budget_in_one_padded_batch() -> None:
    model, batch = drop_patches(model_of("siglip"), "pixel_std"), batch_of()
    reached = model.calibrate(batch, mean_keep_ratio=0.6)
    assert 0.3 < reached <= 0.6
    counts = model.keep_counts(batch)
    shares = [count / (h * w) for count, (h, w) in zip(counts.tolist(), GRIDS)]
    assert sum(shares) / len(shares) == pytest.approx(reached)
    assert len({round(share, 3) for share in shares}) > 1
    logits = model(batch)
    for image in range(len(GRIDS)):
        assert (model(alone(batch, image)) - logits[image]).abs().max() <= 1e-5
    model.budget = AdaptiveBudget("mass", 0.5, 4, 0.5)
    keep = model.keep_indices(batch)
    assert torch.equal((keep >= 0).sum(1), model.keep_counts(batch))


@pytest.mark.parametrize("selection", ["random", "mixed", "stratified", "dithered"])
@torch.no_grad()
def test_selections_work_on_each_grid(selection: str) -> None:
    model = drop_patches(model_of("learned"), "contrast", keep_ratio=0.5, selection=selection)
    batch = batch_of()
    keep = model.keep_indices(batch)
    assert torch.equal(model.keep_indices(alone(batch, 1))[0], keep[1][keep[1] >= 0])


def test_it_trains() -> None:
    model, batch = drop_patches(model_of("register"), keep_ratio=0.5).train(), batch_of()
    model.set_grad_checkpointing()
    model(batch).square().sum().backward()
    assert model.backbone.embeds.proj.weight.grad.abs().sum() > 0
    assert model.backbone.training


def test_an_error_inside_leaves_nothing_behind() -> None:
    model, batch = drop_patches(model_of("learned"), keep_ratio=0.5), batch_of()
    expected = model(batch)
    handle = model.backbone.blocks[0].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(batch)
    handle.remove()
    assert model.backbone.patch_drop is None
    assert not model.backbone.training
    assert torch.equal(model(batch), expected)


@torch.no_grad()
def test_patches_of_another_size_are_ranked_too() -> None:
    model = drop_patches(model_of("learned", enable_patch_interpolator=True), "contrast")
    cut = Patchify(8, flatten_patches=False)
    items = [(cut(torch.randn(3, 8 * h, 8 * w)), 0) for h, w in GRIDS]
    batch = NaFlexCollator(28)(items)[0]
    assert model(batch).shape == (4, 7)
    assert (model.keep_indices(batch) >= 0).sum(1).tolist() == [12, 5, 5, 12]


class Recorder(Ranker, torch.nn.Module):
    """Keeps the images it sees."""

    def forward(self, images: Tensor) -> Tensor:
        self.seen = images
        return images.new_zeros(images.shape[0], 1, 1)


@pytest.mark.parametrize("channels_last", [True, False])
def test_a_ranker_sees_the_picture(channels_last: bool) -> None:
    if (
        not channels_last
        and "patchify_channels_last" not in timm.models.naflexvit.NaFlexVitCfg.__annotations__
    ):
        pytest.skip("an older timm has one layout")
    layout = {} if channels_last else {"patchify_channels_last": False}
    model = drop_patches(model_of("learned", **layout), Recorder())
    picture = torch.randn(3, 48, 32)
    cut = Patchify(16, **({} if channels_last else {"channels_last": False}))
    model.keep_indices(NaFlexCollator(9)([(cut(picture), 0)])[0])
    assert torch.equal(model.ranker.seen[0], picture)


def wrong(batch: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**batch, **changes}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: {"patches": b["patches"]}, "needs the tensors .*patch_valid, got patches"),
        (lambda b: wrong(b, attn_mask=torch.zeros(1)), "must not have an attn_mask"),
        (lambda b: wrong(b, patches=b["patches"][..., :5]), r"\(B, N, 768\) .*\[4, 28, 5\]"),
        (lambda b: wrong(b, patches=b["patches"].byte()), "floating point .* got torch.uint8"),
        (lambda b: wrong(b, patches=b["patches"][0]), r"got torch.float32 \[28, 768\]"),
        (lambda b: wrong(b, patch_coord=b["patch_coord"][:, :9]), r"= \[4, 28, 2\], got .*\[4, 9"),
        (lambda b: wrong(b, patch_coord=b["patch_coord"] * 1.0), "integers .* got torch.float32"),
        (lambda b: wrong(b, patch_valid=b["patch_valid"][:2]), r"= \[4, 28\], got \[2, 28\]"),
        (lambda b: wrong(b, patch_coord=b["patch_coord"] - 1), "image 0 leaves its grid"),
        (lambda b: wrong(b, patch_coord=b["patch_coord"].flip(2)), "image 0 must hold its whole"),
        (
            lambda b: {n: b[n][:, :8] for n in list(b)[:3]},
            "image 0 must .* of 2x6 patches",
        ),
        (lambda b: wrong(b, patch_valid=b["patch_valid"] & False), "image 0 .* no valid patch"),
    ],
)
def test_wrong_dicts_are_refused_in_one_sentence(change: Any, message: str) -> None:
    model, batch = drop_patches(model_of("learned")), change(batch_of())
    for call in (model, model.patch_scores, model.keep_indices, model.forward_features):
        with pytest.raises(ValueError, match=message) as found:
            call(batch)
        assert "\n" not in str(found.value)


def test_padding_outside_the_grid_is_refused() -> None:
    batch = batch_of()
    batch["patch_coord"][1, 20] = torch.tensor([7, 0])
    with pytest.raises(ValueError, match="image 1 leaves its grid of 3x3 "):
        drop_patches(model_of("learned"))(batch)


@pytest.mark.parametrize("row", [[0, 1, 9], [0, 1, -2], [2, 2, 3], [-1, -1, -1]])
def test_wrong_keep_indices_are_refused(row: list[int]) -> None:
    model, keep = drop_patches(model_of("learned")), torch.tensor([[0, 1, 2]] * 4)
    keep[1] = torch.tensor(row)
    with pytest.raises(ValueError, match=r"image 1 must name some of its patches 0 … 8 \(of 28"):
        model(batch_of(), keep_indices=keep)


def test_what_takes_no_dict_says_so() -> None:
    batch = batch_of()
    with pytest.raises(ValueError, match="got dict: only a NaFlexVit takes a dict of patches"):
        drop_patches(make_backbone("vit")[0])(batch)
    with pytest.raises(ValueError, match="forward_intermediates takes images"):
        drop_patches(model_of("learned")).forward_intermediates(batch)
    with pytest.raises(ValueError, match=r"by a convolution .* embed_proj_type='linear'"):
        drop_patches(model_of("learned", embed_proj_type="conv"))(batch)
    with pytest.raises(ValueError, match="ML-Decoder head takes no dict"):
        drop_patches(model_of("learned"), head="ml_decoder")(batch)
