"""Embedding kept patches only gives what embedding all of them gives, at those places."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn

from ltrp_timm import drop_patches, gather_patches
from ltrp_timm.slots.base import KeptPatchEmbed, can_embed_kept, embed_kept

EMBEDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "norm": {"norm_layer": nn.LayerNorm},
    "other patch": {"patch_size": (8, 16)},
    "grid": {"output_fmt": "NHWC"},
    "any size": {"strict_img_size": False, "img_size": 32},
    "pads": {"strict_img_size": False, "img_size": 32, "dynamic_img_pad": True},
}


def slot_of(embed: nn.Module) -> Any:
    vit = timm.create_model("vit_tiny_patch16_224", depth=1)
    vit.patch_embed = embed
    return drop_patches(vit).backbone.patch_embed


@pytest.mark.parametrize("kind", EMBEDS)
def test_kept_rows_are_timms_and_others_zero(kind: str) -> None:
    args = {"img_size": (64, 96), "patch_size": 16, "embed_dim": 24, **EMBEDS[kind]}
    plain = PatchEmbed(**args)
    images = torch.randn(3, 3, 58 if kind == "pads" else 64, 96)
    wanted = plain(images)
    slot = slot_of(plain)
    assert type(slot) is KeptPatchEmbed
    assert torch.equal(slot(images), wanted)  # an empty slot is timm's
    n = wanted.flatten(1, -2).shape[1]
    keep = torch.stack([torch.randperm(n)[:7] for _ in images])
    slot.keep_indices = keep
    out = slot(images)
    assert slot.keep_indices is None
    assert out.shape == wanted.shape
    wanted, out = wanted.flatten(1, -2), out.flatten(1, -2)
    assert (gather_patches(out, keep) - gather_patches(wanted, keep)).abs().max() <= 1e-5
    if kind != "norm":
        assert int((out != 0).any(dim=2).sum()) == 3 * 7
    assert (out - wanted).abs().max() > 0.1


def test_gradients_are_timms() -> None:
    images, keep = torch.randn(2, 3, 32, 32), torch.tensor([[1, 3], [0, 2]])
    gradients = []
    for kept in (True, False):
        torch.manual_seed(1)
        embed: Any = PatchEmbed(img_size=32, patch_size=16, embed_dim=8)
        parameters = list(embed.parameters())
        embed = slot_of(embed)
        embed.keep_indices = keep if kept else None
        gather_patches(embed(images), keep).square().sum().backward()
        gradients.append([parameter.grad for parameter in parameters])
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*gradients))


def test_dropped_pixels_are_never_read(backbone_of: Callable[..., Any]) -> None:
    backbone, images = backbone_of("vit")
    model = drop_patches(backbone)
    keep = torch.tensor([[0, 7, 14]] * 3)
    wanted = model(images, keep_indices=keep)
    images[:, :, 16:32, :16] = torch.nan  # patch 6
    assert torch.equal(model(images, keep_indices=keep), wanted)
    assert model(images, keep_indices=torch.tensor([[6, 7]] * 3)).isnan().all()


def test_who_works_inside_the_projection_is_asked(backbone_of: Callable[..., Any]) -> None:
    backbone, images = backbone_of("vit")
    model = drop_patches(backbone)
    keep = torch.tensor([[0, 7, 14]] * 3)
    before = model(images, keep_indices=keep)
    handle = backbone.patch_embed.proj.register_forward_hook(lambda *args: args[2] * 2.0)
    hooked = model(images, keep_indices=keep)
    assert (hooked - before).abs().max() > 1e-3
    handle.remove()
    assert torch.equal(model(images, keep_indices=keep), before)
    handle = backbone.patch_embed.proj.register_forward_pre_hook(lambda _, args: args[0] * 2.0)
    assert (model(images, keep_indices=keep) - before).abs().max() > 1e-3
    handle.remove()

    class Doubled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2.0

    proj = Doubled(3, 192, 16, 16)
    proj.load_state_dict(backbone.patch_embed.proj.state_dict())
    backbone.patch_embed.proj = proj
    assert torch.equal(model(images, keep_indices=keep), hooked)


def test_other_embeddings_stay_as_they_are(backbone_of: Callable[..., Any]) -> None:
    for family in ("hybrid", "relpos"):
        backbone, _ = backbone_of(family)
        before = type(backbone.patch_embed)
        assert type(drop_patches(backbone).backbone.patch_embed) is before
    overlapping = PatchEmbed(img_size=32, patch_size=16)
    overlapping.proj = nn.Conv2d(3, 768, 16, 8)
    assert not can_embed_kept(overlapping)
    assert not can_embed_kept(PatchEmbed(img_size=32, patch_size=16, flatten=False))
    assert not can_embed_kept(nn.Identity())


def test_restore_gives_timms_module_back(backbone_of: Callable[..., Any]) -> None:
    backbone, images = backbone_of("vit")
    embed, full = backbone.patch_embed, backbone(images)
    model = drop_patches(backbone)
    assert type(backbone.patch_embed) is KeptPatchEmbed
    model.set_input_size(img_size=64)
    assert model.restore().patch_embed is embed
    assert type(embed) is PatchEmbed
    assert embed.img_size == (64, 64)
    assert not hasattr(embed, "keep_indices")
    backbone.set_input_size(img_size=96)
    assert (backbone(images) - full).abs().max() > 0  # position embeddings were resampled twice
    own = PatchEmbed(img_size=96, patch_size=16, embed_dim=192)
    model = drop_patches(backbone)
    backbone.patch_embed = own
    assert model.restore().patch_embed is own


def test_images_of_another_size_are_an_error() -> None:
    with pytest.raises(ValueError, match="must divide into patches of 16x16, got 32x50"):
        embed_kept(torch.randn(1, 3, 32, 50), torch.tensor([[0]]), torch.randn(8, 3, 16, 16), None)
