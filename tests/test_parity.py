"""Reference vectors of the published method's arithmetic, on random weights."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ltrp_timm import create_ranker, drop_patches
from ltrp_timm.layers.pos_embed import sincos_pos_embed
from ltrp_timm.rankers.vit import VitRanker

DATA = Path(__file__).parent / "data"
SHARED = Path(__file__).parents[2] / "shared" / "parity"  # the larger cases, where they lie beside


def load(case: str, folder: Path = DATA) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Arrays and weights of a case."""
    tensors = load_file(folder / f"{case}.safetensors")
    weights = {name[2:]: tensor for name, tensor in tensors.items() if name.startswith("w:")}
    return {name: t for name, t in tensors.items() if not name.startswith("w:")}, weights


def small_ranker() -> VitRanker:
    return VitRanker(img_size=64, patch_size=16, embed_dim=48, depth=3, num_heads=4).eval()


@torch.no_grad()
def test_vit_ranker() -> None:
    arrays, weights = load("c_ranker_small")
    ranker = small_ranker()
    ranker.load_state_dict(weights)  # the published names are the ranker's own
    scores = ranker(arrays["images"]).flatten(1)
    assert (scores - arrays["scores_full"]).abs().max() <= 1e-5
    assert torch.equal(scores.argsort(dim=1), arrays["order_full_ascending"])


@torch.no_grad()
def test_vit_ranker_on_visible_patches_alone() -> None:
    arrays, weights = load("c_ranker_small")
    ranker = small_ranker()
    ranker.load_state_dict(weights)
    batch = arrays["images"].shape[0]
    visible = (arrays["mask"] == 0).nonzero()[:, 1].reshape(batch, -1)
    scores = ranker(arrays["images"], visible_indices=visible).flatten(1)
    assert (scores - arrays["scores_asym"]).abs().max() <= 1e-5
    assert (scores.gather(1, visible) - arrays["y_pred_asym"]).abs().max() <= 1e-5
    full = ranker(arrays["images"]).flatten(1)  # and the next call sees everything again
    assert (full - arrays["scores_full"]).abs().max() <= 1e-5
    assert (full - scores).abs().max() > 1e-2


@torch.no_grad()
def test_published_names_load_from_a_file(tmp_path: Path) -> None:
    arrays, weights = load("c_ranker_small")
    save_file(weights, tmp_path / "ranker.safetensors")
    size = {"img_size": 64, "embed_dim": 48, "depth": 3, "num_heads": 4}
    ranker = create_ranker("vit_small", pretrained=tmp_path / "ranker.safetensors", **size).eval()
    assert (ranker(arrays["images"]).flatten(1) - arrays["scores_full"]).abs().max() <= 1e-5


@pytest.mark.skipif(not SHARED.is_dir(), reason="the larger reference vectors are not here")
@pytest.mark.parametrize("k", [4, 8, 12])
@torch.no_grad()
def test_pruned_vit(k: int) -> None:
    arrays, weights = load("e_vit_small", SHARED)
    heads = {"embed_dim": 64, "depth": 3, "num_heads": 4, "num_classes": 10, "img_size": 64}
    backbone = timm.create_model("vit_tiny_patch16_224", **heads).eval()
    backbone.load_state_dict(weights)
    assert (backbone(arrays["images"]) - arrays["logits_full"]).abs().max() <= 1e-5
    model = drop_patches(backbone)
    logits = model(arrays["images"], keep_indices=arrays[f"k{k}_ids"].long())
    assert (logits - arrays[f"k{k}_logits"]).abs().max() <= 1e-5
    assert (logits - arrays["logits_full"]).abs().max() > 1e-2


def test_sincos_table() -> None:
    table = load_file(DATA / "f_pos.safetensors")["sincos_d16_g4"]
    assert (sincos_pos_embed(16, (4, 4))[0] - table).abs().max() <= 1e-6
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_pos_embed(18, (4, 4))
