"""The feature contrast ranker equals its formula on the features of the plain model."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn import functional

from ltrp_timm import create_ranker, drop_patches

SMALL = {"embed_dim": 48, "depth": 3, "num_heads": 4, "img_size": 64}
SIZES = ("embed_dim", "depth", "num_heads")
NAMES = ("vit_tiny_patch16_224", "vit_base_patch16_dinov3", "vit_base_patch16_clip_quickgelu_224")


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_it_is_the_contrast_to_the_border(name: str) -> None:
    net = timm.create_model(name, num_classes=0, **SMALL).eval()
    images = torch.randn(3, 3, 64, 64)
    features = net.forward_intermediates(images, indices=[1], intermediates_only=True)[0]
    values = functional.layer_norm(features.permute(0, 2, 3, 1), [48])
    edge = torch.zeros(4, 4, dtype=torch.bool)
    edge[[0, -1]] = edge[:, [0, -1]] = True
    border = values[:, edge].mean(1)
    wanted = 1 - functional.cosine_similarity(values, border[:, None, None], dim=-1)
    ranker = create_ranker("feature_contrast", backbone=net, blocks=2, img_size=64).eval()
    assert (ranker(images) - wanted).abs().max() <= 1e-5
    assert len(ranker.backbone.blocks) == 2
    assert len(net.blocks) == 3  # the model that was given stays whole
    other = create_ranker("feature_contrast", backbone=net, blocks=3, img_size=64).eval()
    assert not torch.equal(other(images), ranker(images))


def test_it_ranks_in_front_of_a_model_and_is_saved(tmp_path: Path) -> None:
    args = {"backbone": NAMES[0], "blocks": 2, "img_size": 32, "embed_dim": 48, "depth": 3}
    ranker = create_ranker("feature_contrast", **args, num_heads=4).eval()
    vit = timm.create_model(NAMES[0], **SMALL).eval()
    model = drop_patches(vit, ranker, keep_ratio=0.5)
    images = torch.randn(2, 3, 64, 64)
    with pytest.warns(UserWarning, match="feature_contrast ranker has no trained weights"):
        assert model.keep_indices(images).shape == (2, 8)
    ranker.save(tmp_path / "ranker")
    again = create_ranker("feature_contrast", pretrained=tmp_path / "ranker").eval()
    pixels = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(pixels), ranker(pixels))
    assert again.trained


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match=r"blocks must lie in 1 … 3, got 4"):
        create_ranker("feature_contrast", backbone=NAMES[0], blocks=4, **SMALL)
    with pytest.raises(TypeError, match="takes a VisionTransformer or Eva of timm, got ResNet"):
        create_ranker("feature_contrast", backbone=timm.create_model("resnet18"))


@torch.no_grad()
def test_weights_of_another_image_size_are_fitted(tmp_path: Path) -> None:
    """A file of the whole model, with its head, for images of 64 pixels."""
    net = timm.create_model(NAMES[0], **SMALL).eval()
    save_file(net.state_dict(), tmp_path / "vit.safetensors")
    args = {"backbone": NAMES[0], "blocks": 2, "img_size": 32, **{n: SMALL[n] for n in SIZES}}
    ranker = create_ranker(
        "feature_contrast", checkpoint_path=str(tmp_path / "vit.safetensors"), **args
    )
    net.set_input_size(img_size=32)
    expected = create_ranker("feature_contrast", backbone=net, blocks=2, img_size=32).eval()
    images = torch.randn(2, 3, 32, 32)
    assert ranker.trained
    assert (ranker.eval()(images) - expected(images)).abs().max() <= 1e-5
