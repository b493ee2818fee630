"""Reference vectors of the published method's arithmetic, on random weights."""

import re
from pathlib import Path

import pytest
import timm
import torch
from conftest import small_teacher
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ltrp_timm import create_ranker, create_teacher, drop_patches, select_top
from ltrp_timm.layers.bridge import sincos_pos_embed
from ltrp_timm.models.open_model import open_model
from ltrp_timm.rankers.vit import VitRanker

DATA = Path(__file__).parent / "data"
SHARED = Path(__file__).parents[2] / "shared" / "parity"  # the larger cases, where they lie beside
with_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the larger reference vectors are not here"
)


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
    for k in (4, 8, 12):
        published = arrays[f"top{k}_ids_ascending_score"].sort(dim=1)[0]
        assert torch.equal(select_top(scores, k), published)


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
    assert (full.gather(1, visible) - arrays["y_pred_full"]).abs().max() <= 1e-5
    assert (full - scores).abs().max() > 1e-2


@torch.no_grad()
def test_published_names_load_from_a_file(tmp_path: Path) -> None:
    arrays, weights = load("c_ranker_small")
    save_file(weights, tmp_path / "ranker.safetensors")
    size = {"img_size": 64, "embed_dim": 48, "depth": 3, "num_heads": 4}
    ranker = create_ranker("vit_small", pretrained=tmp_path / "ranker.safetensors", **size).eval()
    assert (ranker(arrays["images"]).flatten(1) - arrays["scores_full"]).abs().max() <= 1e-5


@with_shared
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
    tokens = model.forward_features(arrays["images"], keep_indices=arrays[f"k{k}_ids"].long())
    assert (tokens - arrays[f"k{k}_tokens"]).abs().max() <= 1e-5
    assert (logits - arrays["logits_full"]).abs().max() > 1e-2


def test_sincos_table() -> None:
    table = load_file(DATA / "f_pos.safetensors")["sincos_d16_g4"]
    assert (sincos_pos_embed(16, (4, 4))[0] - table).abs().max() <= 1e-6
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_pos_embed(18, (4, 4))


@with_shared
def test_sincos_table_of_the_published_ranker() -> None:
    table = load_file(SHARED / "f_pos.safetensors")["sincos_d384_g14"]
    assert (sincos_pos_embed(384, (14, 14))[0] - table).abs().max() <= 1e-6


def test_the_authors_tables_are_resized_as_they_do_it(tmp_path: Path) -> None:
    """Without antialiasing, for a teacher and a fine-tuned ViT; timm's own files as timm does."""
    arrays, _ = load("f_pos")
    table, published = arrays["resize_in_g4"], arrays["resize_out_g6"]
    sizes = {"embed_dim": 12, "depth": 1, "num_heads": 2, "num_classes": 5}
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, **sizes)
    weights = {**vit.state_dict(), "pos_embed": table}
    torch.save({"model": weights, "epoch": 3}, tmp_path / "authors.pth")
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "timm.pth.tar")
    save_file(weights, tmp_path / "timm.safetensors")
    larger = timm.create_model("vit_tiny_patch16_224", img_size=96, **sizes)
    timms = timm.models.vision_transformer.checkpoint_filter_fn(weights, larger)["pos_embed"]
    assert (timms - published).abs().max() > 0.2
    for name, expected in (
        ("authors.pth", published),
        ("timm.pth.tar", timms),
        ("timm.safetensors", timms),
    ):
        for plain in (True, False):
            model, _ = open_model(
                "vit_tiny_patch16_224",
                checkpoint=tmp_path / name,
                plain=plain,
                img_size=96,
                **sizes,
            )
            found = model.state_dict()["pos_embed" if plain else "backbone.pos_embed"]
            assert (found - expected).abs().max() <= 1e-6, name
    mae = small_teacher(embed_dim=12, num_heads=2, decoder_embed_dim=12, decoder_num_heads=2)
    mae.load_state_dict({**mae.state_dict(), "pos_embed": table, "decoder_pos_embed": table})
    mae.save(tmp_path / "mae")
    teacher = create_teacher(tmp_path / "mae", img_size=48)
    for own in (teacher.pos_embed, teacher.decoder_pos_embed):
        assert (own - published).abs().max() <= 1e-6


@with_shared
def test_every_reference_vector_is_read_by_a_test() -> None:
    texts = "".join(path.read_text("utf-8") for path in Path(__file__).parent.glob("test_*.py"))
    unread = []
    for path in SHARED.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if not name.startswith("w:")]  # noqa: SIM118
        for name in names:
            spelled = re.sub(r"^(k|top)\d+_", r"\1{k}_", name)
            spelled = re.sub(r"^score_(all|decoder)$", "score_{column}", spelled)
            spelled = re.sub(r"^(full|asym)_(loss|grad_).*", r"{kind}_\2", spelled)
            spelled = re.sub(r"^(loss|grad|rand)_(?!noise)", "", spelled)
            if f'"{spelled}' not in texts:
                unread.append(f"{path.name}: {name}")
    assert not unread, unread
