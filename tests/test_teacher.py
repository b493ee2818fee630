"""The MAE teacher: files of every layout, the same pixels as transformers, frozen for ever."""

import argparse
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import timm
import torch
from conftest import SMALL_MAE, lively, small_teacher
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel

from ltrp_timm.selection.coverage import patch_pixels
from ltrp_timm.teacher import (
    MAETeacher,
    create_teacher,
    masked_indices,
    num_visible,
    random_visible_indices,
)

HEADS = {name: SMALL_MAE[name] for name in ("num_heads", "decoder_num_heads")}


def hf_model(**changes: Any) -> ViTMAEForPreTraining:
    config = ViTMAEConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        image_size=32,
        patch_size=8,
        decoder_hidden_size=24,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=3,
        decoder_intermediate_size=72,
        **changes,
    )
    return lively(ViTMAEForPreTraining(config)).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ViTMAEForPreTraining]:
    torch.manual_seed(0)
    folder, model = tmp_path_factory.mktemp("hf"), hf_model()
    model.save_pretrained(folder)
    return folder, model


def masked_run(model: ViTMAEForPreTraining, images: Tensor) -> tuple[Any, Tensor]:
    """What transformers paints, and the visible patches of its mask."""
    noise = torch.rand(images.shape[0], 16)
    with torch.no_grad():
        out = model(images, noise=noise)
    visible = (out.mask == 0).nonzero()[:, 1].reshape(images.shape[0], -1)
    return out, visible


@torch.no_grad()
def test_same_pixels_as_transformers(saved: tuple[Path, ViTMAEForPreTraining]) -> None:
    folder, model = saved
    images = torch.randn(3, 3, 32, 32)
    out, visible = masked_run(model, images)
    assert visible.shape == (3, num_visible(16, 0.75))
    teacher = create_teacher(folder)
    painted, used = teacher(images, visible)
    assert (painted - out.logits).abs().max() <= 1e-5
    assert torch.equal(used, visible)
    assert (teacher.reconstruction_loss(images, painted, visible) - out.loss).abs() <= 1e-5
    assert torch.equal(teacher.patchify(images), model.patchify(images))
    other, _ = teacher(images, visible.roll(1, dims=0))  # another mask, other pixels
    assert (other - out.logits).abs().max() > 1e-2


@torch.no_grad()
def test_eps_is_the_configurations(tmp_path: Path) -> None:
    model = hf_model(layer_norm_eps=1e-2, norm_pix_loss=True)
    model.save_pretrained(tmp_path)
    images = 1.0 + 0.3 * torch.randn(2, 3, 32, 32)
    out, visible = masked_run(model, images)
    teacher = create_teacher(tmp_path)
    painted, _ = teacher(images, visible)
    assert (painted - out.logits).abs().max() <= 1e-5
    assert (teacher.reconstruction_loss(images, painted, visible) - out.loss).abs() <= 1e-5
    assert teacher.norm_pix_loss
    other, _ = create_teacher(tmp_path, norm_eps=1e-6)(images, visible)
    assert (other - out.logits).abs().max() > 1e-4
    plain = create_teacher(tmp_path, norm_pix_loss=False)
    assert (plain.reconstruction_loss(images, painted, visible) - out.loss).abs() > 1e-2


def older_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    new = "decoder.decoder_encoder.layer."
    assert any(name.startswith(new) for name in tensors)
    return {name.replace(new, "decoder.decoder_layers."): t for name, t in tensors.items()}


@torch.no_grad()
def test_every_layout_is_the_same_teacher(
    saved: tuple[Path, ViTMAEForPreTraining], tmp_path: Path
) -> None:
    folder, model = saved
    teacher = create_teacher(folder)
    images, visible = torch.randn(2, 3, 32, 32), torch.tensor([[0, 3, 9, 15], [1, 2, 3, 4]])
    expected, _ = teacher(images, visible)

    file = folder / "model.safetensors"
    save_file(older_names(load_file(file)), tmp_path / "older.safetensors")
    save_file(dict(model.state_dict()), tmp_path / "memory.safetensors")
    plain = teacher.state_dict()
    save_file(plain, tmp_path / "plain.safetensors")
    args = argparse.Namespace(model="mae_vit", epochs=1600)
    torch.save({"model": plain, "args": args, "epoch": 3}, tmp_path / "authors.pth")
    ranker = {"score_net.head.weight": torch.zeros(16, 8)}
    inner = {f"mim.{name}": tensor for name, tensor in plain.items()}
    torch.save({"model": {**inner, **ranker}, "args": args}, tmp_path / "ltrp.pth")
    torch.save({"state_dict": plain}, tmp_path / "wrapped.pt")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(folder / "config.json", pickled)
    torch.save(dict(model.state_dict()), pickled / "pytorch_model.bin")
    teacher.save(tmp_path / "own")

    alone = ("older.safetensors", "memory.safetensors", "plain.safetensors", "authors.pth")
    for name in (*alone, "ltrp.pth", "wrapped.pt"):
        loaded = create_teacher(tmp_path / name, norm_eps=1e-12, **HEADS)
        assert torch.equal(loaded(images, visible)[0], expected), name
    assert torch.equal(create_teacher(file, norm_eps=1e-12, **HEADS)(images, visible)[0], expected)
    for name in ("pickled", "own", "own/model.safetensors"):
        loaded = create_teacher(tmp_path / name)
        assert torch.equal(loaded(images, visible)[0], expected), name
        assert loaded.config() == teacher.config()


def test_sizes_are_read_from_the_shapes(tmp_path: Path) -> None:
    teacher = small_teacher(mlp_ratio=3.0, decoder_mlp_ratio=2.0, qkv_bias=False, in_chans=4)
    save_file(teacher.state_dict(), tmp_path / "mae.safetensors")
    loaded = create_teacher(tmp_path / "mae.safetensors", **HEADS)
    assert loaded.config() == teacher.config()
    with pytest.raises(ValueError, match="does not state num_heads and decoder_num_heads: pass"):
        create_teacher(tmp_path / "mae.safetensors")


def test_published_sizes_need_no_configuration(tmp_path: Path) -> None:
    published = {**SMALL_MAE, "embed_dim": 768, "num_heads": 12, "depth": 1}
    published |= {"decoder_embed_dim": 512, "decoder_num_heads": 16, "decoder_depth": 1}
    save_file(MAETeacher(**published).state_dict(), tmp_path / "mae.safetensors")
    config = create_teacher(tmp_path / "mae.safetensors").config()
    assert (config["num_heads"], config["decoder_num_heads"]) == (12, 16)
    assert config["norm_eps"] == 1e-6


def test_an_encoder_alone_is_refused(tmp_path: Path) -> None:
    lacks = (
        r"is an encoder only: it lacks decoder_embed, mask_token, decoder_pos_embed, "
        r"decoder_blocks, decoder_norm, decoder_pred\. A teacher needs encoder and decoder"
    )
    hf_encoder = ViTMAEModel(hf_model().config)
    hf_encoder.save_pretrained(tmp_path / "hf")
    vit = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0)
    save_file(vit.state_dict(), tmp_path / "timm.safetensors")
    weights = hf_model().state_dict()
    half = {name: t for name, t in weights.items() if name.startswith("vit.")}
    torch.save(half, tmp_path / "half.pth")
    for name in ("hf", "timm.safetensors", "half.pth"):
        with pytest.raises(ValueError, match=lacks):
            create_teacher(tmp_path / name)
    weights.pop("decoder.mask_token")
    save_file(weights, tmp_path / "most.safetensors")
    with pytest.raises(ValueError, match=r"is not a whole MAE: it lacks mask_token\."):
        create_teacher(tmp_path / "most.safetensors")


def test_nothing_is_half_loaded(tmp_path: Path) -> None:
    weights = small_teacher().state_dict()
    weights["extra"] = weights.pop("blocks.1.norm1.bias")
    save_file(weights, tmp_path / "mae.safetensors")
    with pytest.raises(RuntimeError) as error:
        create_teacher(tmp_path / "mae.safetensors", **HEADS)
    assert "missing     blocks.1.norm1.bias" in str(error.value)
    assert "unexpected  extra" in str(error.value)
    queries = {**small_teacher().state_dict(), "blocks.0.attn.q.weight": torch.zeros(32, 32)}
    save_file(queries, tmp_path / "query.safetensors")
    with pytest.raises(RuntimeError, match=r"unexpected  blocks\.0\.attn\.q\.weight"):
        create_teacher(tmp_path / "query.safetensors", **HEADS)
    with pytest.raises(TypeError, match="no_argument"):
        create_teacher(tmp_path / "mae.safetensors", **HEADS, no_argument=1)


class Trap:
    """Its pickle runs a command when an unsafe reader opens it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def test_pickles_run_nothing(tmp_path: Path) -> None:
    content = {"model": small_teacher().state_dict(), "trap": Trap(tmp_path / "ran")}
    torch.save(content, tmp_path / "trap.pth")
    with pytest.raises(ValueError, match=r"trap\.pth cannot be read as a pickle of weights only"):
        create_teacher(tmp_path / "trap.pth", **HEADS)
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "trap.pth", weights_only=False)  # the trap does work
    assert (tmp_path / "ran").exists()
    torch.save({"args": argparse.Namespace()}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth holds more than tensors: args"):
        create_teacher(tmp_path / "other.pth")
    torch.save(argparse.Namespace(), tmp_path / "none.pth")
    with pytest.raises(ValueError, match="holds no state dict, but a Namespace"):
        create_teacher(tmp_path / "none.pth")
    assert argparse.Namespace not in torch.serialization.get_safe_globals()
    for name in ("broken.pth", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"\x80nonsense")
        with pytest.raises(ValueError, match="cannot be read as"):
            create_teacher(tmp_path / name)


def test_other_models_are_refused(saved: tuple[Path, ViTMAEForPreTraining], tmp_path: Path) -> None:
    shutil.copytree(saved[0], tmp_path / "relu")
    config = json.loads((saved[0] / "config.json").read_text())
    (tmp_path / "relu" / "config.json").write_text(json.dumps({**config, "hidden_act": "relu"}))
    with pytest.raises(ValueError, match="hidden_act='relu'; only 'gelu' is supported"):
        create_teacher(tmp_path / "relu")
    flat = {**small_teacher().state_dict(), "patch_embed.proj.weight": torch.zeros(32, 192)}
    save_file(flat, tmp_path / "flat.safetensors")
    with pytest.raises(ValueError, match="is not an MAE: its embeddings have other dimensions"):
        create_teacher(tmp_path / "flat.safetensors", **HEADS)


@torch.no_grad()
def test_hub_ids(
    saved: tuple[Path, ViTMAEForPreTraining], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the Hub's own cache, offline: ids are resolved by huggingface_hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789012345678901234567890123456789"
    repository = tmp_path / "models--somebody--small-mae"
    shutil.copytree(saved[0], repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    expected = create_teacher(saved[0]).state_dict()
    for name in ("somebody/small-mae", "hf-hub:somebody/small-mae", "somebody/small-mae@main"):
        loaded = create_teacher(name).state_dict()
        assert all(torch.equal(loaded[key], tensor) for key, tensor in expected.items())
    with pytest.raises(FileNotFoundError, match=r"^facebook/vit-mae-base is no local path"):
        create_teacher()
    for name in ("weights.pth", "a/weights.safetensors", "./a/b", "/a/b", "a/b/c", "name"):
        with pytest.raises(FileNotFoundError, match=re.escape(f"{name} does not exist")):
            create_teacher(name)


def test_its_own_normalisation(saved: tuple[Path, ViTMAEForPreTraining], tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(saved[0], folder)
    assert create_teacher(folder).mean == [0.485, 0.456, 0.406]
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    teacher = create_teacher(folder)
    assert (teacher.mean, teacher.std) == ([0.5] * 3, [0.25] * 3)
    assert create_teacher(folder, mean=(0.1,)).mean == [0.1] * 3
    file.write_text(json.dumps({"do_normalize": False, "image_mean": [0.5] * 3}))
    assert create_teacher(folder).std == [1.0] * 3
    pixels = torch.rand(2, 3, 32, 32)
    patches = teacher.patchify((pixels - 0.5) / 0.25)
    assert (teacher.unpatchify(teacher.denormalise(patches)) - pixels).abs().max() <= 1e-6
    assert torch.equal(teacher.to_pixels(patches, patches * 0), teacher.denormalise(patches))
    own = MAETeacher(**SMALL_MAE, norm_pix_loss=True)
    mean, std = patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    back = own.to_pixels((patches - mean) / std, patches)
    assert (back - own.denormalise(patches)).abs().max() <= 1e-5


def test_frozen_for_ever() -> None:
    teacher = small_teacher()
    parent = nn.Sequential(teacher, nn.Linear(2, 2))
    parent.train()
    assert parent.training
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    free = small_teacher(frozen=False)
    assert free.train().blocks[0].training
    assert not free.eval().blocks[0].training


def test_a_free_one_learns() -> None:
    model = MAETeacher(**SMALL_MAE, frozen=False)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 3, 1, 1).expand(-1, -1, 32, 32).contiguous()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        painted, visible = model(images, mask_ratio=0.5, generator=generator)
        loss = model.reconstruction_loss(images, painted, visible)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert all(p.grad is not None for p in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("size", [{}, {"img_size": (24, 40), "patch_size": (4, 8), "in_chans": 2}])
def test_patchify_and_back(size: dict[str, Any]) -> None:
    teacher = small_teacher(**size)
    images = torch.randn(2, teacher.in_chans, *teacher.img_size)
    patches = teacher.patchify(images)
    assert torch.equal(patches, patch_pixels(images, teacher.grid_size))
    assert torch.equal(teacher.unpatchify(patches), images)
    (p, q), w = teacher.patch_size, teacher.grid_size[1]
    second_row = images[1, :, p : 2 * p, q : 2 * q].permute(1, 2, 0).flatten()
    assert torch.equal(patches[1, w + 1], second_row)
    assert teacher(images)[0].shape == patches.shape


@torch.no_grad()
def test_hidden_patches_are_not_seen() -> None:
    teacher = small_teacher()
    images, visible = torch.randn(2, 3, 32, 32), torch.tensor([[0, 3, 9, 15], [1, 2, 3, 4]])
    painted, _ = teacher(images, visible)
    hidden = masked_indices(visible, 16)
    assert hidden.shape == (2, 12)
    assert torch.equal(torch.cat([visible, hidden], 1).sort(1)[0], torch.arange(16).repeat(2, 1))
    patches = teacher.patchify(images)
    noise = patches.scatter(1, hidden[:, :, None].expand(-1, -1, 192), 9.0)
    assert torch.equal(teacher(teacher.unpatchify(noise), visible)[0], painted)
    seen = patches.scatter(1, visible[:, :1, None].expand(-1, -1, 192), 9.0)
    assert (teacher(teacher.unpatchify(seen), visible)[0] - painted).abs().max() > 1e-3
    order = torch.tensor([2, 0, 3, 1])  # the order of the indices does not matter
    assert (teacher(images, visible[:, order])[0] - painted).abs().max() <= 1e-5
    everything = torch.arange(16).repeat(2, 1)
    full = teacher.decode(teacher.encode(images), everything)
    assert torch.equal(full, teacher(images, everything)[0])


@torch.no_grad()
def test_another_image_size(tmp_path: Path) -> None:
    teacher = small_teacher()
    teacher.save(tmp_path)
    larger = create_teacher(tmp_path, img_size=(48, 64))
    assert larger.grid_size == (6, 8)
    painted, visible = larger(torch.randn(1, 3, 48, 64))
    assert painted.shape == (1, 48, 192)
    assert visible.shape == (1, 12)
    corner = larger.pos_embed[0, 1], teacher.pos_embed[0, 1]
    assert (corner[0] - corner[1]).abs().max() < 0.5  # resampled, not cut or drawn anew
    assert torch.equal(larger.pos_embed[:, 0], teacher.pos_embed[:, 0])


def test_masks_are_drawn_from_generators() -> None:
    def draw(seed: int) -> Tensor:
        return random_visible_indices(3, 16, 0.75, torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    noise = torch.rand(3, 16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(draw(1), noise.argsort(dim=1)[:, :4].sort(dim=1)[0])  # the published rule
    own = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    pair = random_visible_indices(2, 16, 0.75, own)
    turned = [torch.Generator().manual_seed(seed) for seed in (6, 5)]
    assert torch.equal(random_visible_indices(2, 16, 0.75, turned), pair.flip(0))
    with pytest.raises(ValueError, match="3 images need 3 generators, got 2"):
        random_visible_indices(3, 16, 0.75, own)
    teacher, images = small_teacher(), torch.randn(2, 3, 32, 32)
    state = torch.get_rng_state()
    _, first = teacher(images, generator=torch.Generator().manual_seed(3))
    _, again = teacher(images, generator=torch.Generator().manual_seed(3))
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), state)


def test_wrong_arguments() -> None:
    teacher, images = small_teacher(), torch.randn(2, 3, 32, 32)
    for ratio, text in ((0.0, r"in \(0, 1\)"), (1.0, r"in \(0, 1\)"), (0.99, "leaves 0 of 16")):
        with pytest.raises(ValueError, match=text):
            teacher(images, mask_ratio=ratio)
    with pytest.raises(ValueError, match=r"takes images \(B, 3, 32, 32\), got \[2, 3, 32, 24\]"):
        teacher(images[..., :24])
    with pytest.raises(ValueError, match=r"patches must be \(B, 16, 192\), got \[2, 15, 192\]"):
        teacher.unpatchify(torch.zeros(2, 15, 192))
    for visible, text in (
        (torch.tensor([[0, 1]]), r"visible_indices must be \(B, K\) with B = 2"),
        (torch.tensor([[0, 16], [0, 1]]), r"visible_indices must lie in 0 … 15, got 0 … 16"),
        (torch.tensor([[0, 0], [0, 1]]), "visible_indices holds the same patch twice"),
    ):
        with pytest.raises(ValueError, match=text):
            teacher(images, visible)
    with pytest.raises(ValueError, match="2 visible_indices need one more latent"):
        teacher.decode(torch.zeros(2, 2, 32), torch.tensor([[0, 1], [0, 1]]))
    for changes, text in (
        ({"img_size": 30}, r"\(30, 30\) must be a multiple of patch_size \(8, 8\)"),
        ({"num_heads": 5}, "2 blocks of width 32 with 5 heads"),
        ({"depth": 0}, "at least one block"),
        ({"embed_dim": 30, "num_heads": 3}, "multiple of 4"),
        ({"mean": (0.5, 0.5)}, "mean and std need 1, 3 or 3 values, got 2"),
    ):
        with pytest.raises(ValueError, match=text):
            small_teacher(**changes)
