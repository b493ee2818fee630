"""Models of this package inside transformers: its timm wrappers, its folders and ours."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import records_arguments
from torch import Tensor

import ltrp_timm

transformers = pytest.importorskip("transformers", "5")  # older ones load weights in other ways

TINY: dict[str, Any] = {"img_size": 64, "depth": 1}
KEEP = torch.tensor([[0, 3, 9], [1, 2, 15]])


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 64, 64)


def wrapper_config(**args: Any) -> Any:
    args = {**TINY, "keep_ratio": 0.25, **args}
    return transformers.TimmWrapperConfig(
        architecture="ltrp_vit_tiny", num_labels=5, model_args=args
    )


@torch.no_grad()
def test_a_wrapper_is_the_model(images: Tensor) -> None:
    classifier = transformers.TimmWrapperForImageClassification(wrapper_config()).eval()
    model = classifier.timm_model
    assert isinstance(model, ltrp_timm.LTRPModel)
    assert (model.keep_ratio, model.num_classes) == (0.25, 5)
    assert torch.equal(classifier(images).logits, model(images))
    given = classifier(images, keep_indices=KEEP).logits
    assert torch.equal(given, model(images, keep_indices=KEEP))
    assert not torch.equal(given, classifier(images).logits)
    maps = classifier(images, output_hidden_states=True, keep_indices=KEEP).hidden_states
    assert maps[0].shape == (2, 192, 4, 4)
    assert int((maps[0].abs().sum(1) > 0).sum()) == KEEP.numel()


@torch.no_grad()
def test_tokens_and_pooled_features(images: Tensor) -> None:
    encoder = transformers.TimmWrapperModel(wrapper_config()).eval()
    out = encoder(images)
    assert out.last_hidden_state.shape == (2, 1 + 4, 192)
    assert torch.equal(out.pooler_output, encoder.timm_model(images))
    assert encoder(images, keep_indices=KEEP).last_hidden_state.shape == (2, 1 + 3, 192)


@pytest.mark.parametrize("kind", ["TimmWrapperModel", "TimmWrapperForImageClassification"])
@torch.no_grad()
def test_a_wrapper_comes_back_exactly(images: Tensor, tmp_path: Path, kind: str) -> None:
    args = {"ranker": "conv", "selection": "stratified", "selection_args": {"cell": 4}}
    wrapper = getattr(transformers, kind)(wrapper_config(**args)).eval()
    wrapper.timm_model.ranker.trained = True
    wrapper.save_pretrained(tmp_path)
    twin = getattr(transformers, kind).from_pretrained(tmp_path).eval()
    assert twin.timm_model.settings() == wrapper.timm_model.settings()
    assert not any(parameter.requires_grad for parameter in twin.timm_model.ranker.parameters())
    assert all(parameter.requires_grad for parameter in twin.timm_model.backbone.parameters())
    assert torch.equal(
        twin.timm_model.patch_scores(images), wrapper.timm_model.patch_scores(images)
    )
    assert torch.equal(twin(images)[0], wrapper(images)[0])


def test_a_wrapper_trains(images: Tensor) -> None:
    classifier = transformers.TimmWrapperForImageClassification(wrapper_config(ranker="conv"))
    classifier.timm_model.ranker.trained = True
    classifier.timm_model.set_grad_checkpointing()
    classifier.train()
    classifier(images, labels=torch.tensor([0, 4])).loss.backward()
    trained = {name for name, p in classifier.named_parameters() if p.grad is not None}
    assert all(name.startswith("timm_model.backbone.") for name in trained)
    assert "timm_model.backbone.blocks.0.attn.qkv.weight" in trained


@records_arguments
@pytest.mark.parametrize("name", ["ltrp_vit_tiny", "ltrp"])
@torch.no_grad()
def test_our_folder_opens_by_auto_classes(images: Tensor, tmp_path: Path, name: str) -> None:
    backbone = {"backbone": "vit_tiny_patch16_224"} if name == "ltrp" else {}
    args = {"num_classes": 5, "keep_ratio": 0.5, "ranker": "conv", "ranker_weights": True}
    model = timm.create_model(name, **TINY, **backbone, **args).eval()
    ltrp_timm.save_pretrained(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that its ranker is untrained, for one
        classifier = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
        assert torch.equal(classifier(images).logits, model(images))
        encoder = transformers.AutoModel.from_pretrained(tmp_path).eval()
        assert torch.equal(encoder(images).last_hidden_state, model.forward_features(images))
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(images), model(images))
    # what transformers trained goes back into a folder of ours
    ltrp_timm.save_pretrained(classifier.timm_model, tmp_path, overwrite=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(images), model(images))


@records_arguments
def test_the_image_processor_is_that_of_the_model(tmp_path: Path) -> None:
    pil = pytest.importorskip("PIL.Image")
    model = timm.create_model("ltrp_vit_tiny", **TINY)
    ltrp_timm.save_pretrained(model, tmp_path)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    expected = timm.data.create_transform(**model.data_config(), is_training=False)
    picture = pil.effect_noise((90, 70), 60).convert("RGB")
    assert torch.equal(processor(picture)["pixel_values"][0], expected(picture))
