"""The adaptive budget: equal to each image alone, and calibrated to a mean."""

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ltrp_timm import AdaptiveBudget, PatchSelector, drop_patches
from ltrp_timm.selection.adaptive import bucket_sizes, patches_needed
from ltrp_timm.visualize import keeping


class Brightness(nn.Module):
    """Mean brightness of each patch: scores that compare between images."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(images.mean(1, keepdim=True), 16).squeeze(1)


@pytest.fixture
def adaptive(backbone_of: Callable[..., Any]) -> tuple[Any, Tensor]:
    """A model with an adaptive budget, and images that ask for different numbers of patches."""
    backbone, _ = backbone_of("vit")
    images = torch.randn(7, 3, 96, 96)
    for i, image in enumerate(images):  # i bright rows of patches
        image[:, : 16 * i] += 5.0
    budget = AdaptiveBudget("threshold", 2.5, buckets=6, mean_keep_ratio=0.5)
    return drop_patches(backbone, Brightness(), budget=budget).eval(), images


def test_what_scores_ask_for_by_hand() -> None:
    scores = torch.tensor([[1.0, 5.0, 3.0, 1.0], [9.0, 9.0, 9.0, 9.0], [0.0, 0.0, 8.0, 0.0]])
    assert patches_needed(scores, "threshold", 3.0).tolist() == [2, 4, 1]
    assert patches_needed(scores, "threshold", 99.0).tolist() == [1, 1, 1]
    # above the lowest: 4 2 0 0, nothing, 8 0 0 0
    assert patches_needed(scores, "mass", 0.5).tolist() == [1, 1, 1]
    assert patches_needed(scores, "mass", 4 / 6).tolist() == [1, 1, 1]
    assert patches_needed(scores, "mass", 0.7).tolist() == [2, 1, 1]
    assert torch.equal(
        patches_needed(scores * 7 - 3, "mass", 0.7), patches_needed(scores, "mass", 0.7)
    )
    odd = torch.tensor([[torch.nan, 4.0, 0.0, torch.nan], [-torch.inf, 4.0, 3.0, 0.0]])
    assert patches_needed(odd, "mass", 0.9).tolist() == [1, 2]
    assert bucket_sizes(36, 6) == [6, 12, 18, 24, 30, 36]
    assert bucket_sizes(3, 8) == [1, 2, 3]
    asked = torch.arange(36).expand(4, -1) >= 36 - torch.tensor([[1], [6], [7], [36]])
    assert AdaptiveBudget("threshold", 1.0, 6, 0.5).counts(asked.float()).tolist() == [6, 6, 12, 36]
    for bad, words in (
        ({"rule": "most"}, "rule must be one of mass, threshold, got 'most'"),
        ({"level": 1.5}, "level must be a number from 0.0 to 1.0, got 1.5"),
        ({"level": "a"}, "level must be a number"),
        ({"buckets": 2.5}, "buckets must be a whole number from 1, got 2.5"),
        ({"mean_keep_ratio": 0.0}, r"mean_keep_ratio must be in \(0, 1\], got 0.0"),
    ):
        with pytest.raises(ValueError, match=words):
            AdaptiveBudget(
                **{"rule": "mass", "level": 0.5, "buckets": 4, "mean_keep_ratio": 0.5, **bad}
            )


@torch.no_grad()
def test_a_batch_equals_each_image_alone(adaptive: tuple[Any, Tensor]) -> None:
    model, images = adaptive
    counts = model.keep_counts(images)
    assert counts.tolist() == [6, 6, 12, 18, 24, 30, 36]
    shuffled = torch.tensor([4, 0, 6, 2, 5, 1, 3])
    logits = model(images[shuffled])
    for place, number in enumerate(shuffled):
        image = images[number : number + 1]
        keep = model.keep_indices(image)
        assert keep.shape[1] == counts[number]
        alone = model(image)
        assert torch.equal(alone, model(image, keep_indices=keep))
        assert (logits[place] - alone[0]).abs().max() <= 1e-5
    assert (logits[2] - model.backbone(images[6:])[0]).abs().max() <= 1e-5  # all of its patches
    model.budget = None
    assert (model(images[shuffled]) - logits).abs().max() > 1e-2


@torch.no_grad()
def test_dense_features_keep_the_order_of_images(adaptive: tuple[Any, Tensor]) -> None:
    model, images = adaptive
    images = images.flip(0)
    options = {"intermediates_only": True, "return_prefix_tokens": True, "norm": True}
    features = model.forward_intermediates(images, **options)
    assert len(features) == 2
    for i in range(len(images)):
        alone = model.forward_intermediates(images[i : i + 1], **options)
        for (dense, prefix), (one, its_prefix) in zip(features, alone):
            assert (dense[i] - one[0]).abs().max() <= 1e-5
            assert (prefix[i] - its_prefix[0]).abs().max() <= 1e-5
    with pytest.raises(ValueError, match=r"different numbers of patches \(6, 12, 18"):
        model.forward_intermediates(images)
    with pytest.raises(ValueError, match="or give one image"):
        model.forward_features(images)
    with pytest.raises(ValueError, match="or give one image"):
        model.keep_indices(images)
    assert model.forward_features(images[-1:]).shape[1] == 1 + 6


def test_gradients_are_those_of_the_images_alone(adaptive: tuple[Any, Tensor]) -> None:
    model, images = adaptive
    model(images).sum().backward()
    together = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    for image in images:
        model(image[None]).sum().backward()
    alone = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(together, alone))


@pytest.mark.parametrize("rule", ["mass", "threshold"])
def test_calibration_reaches_its_mean(backbone_of: Callable[..., Any], rule: str) -> None:
    backbone, _ = backbone_of("vit")
    images = torch.rand(64, 3, 96, 96) ** torch.arange(1, 65).reshape(-1, 1, 1, 1)
    model = drop_patches(backbone, Brightness())
    reached = {}
    for target in (0.3, 0.6):
        reached[target] = model.calibrate(images.split(10), target, rule, buckets=36)
        assert target - 0.03 <= reached[target] <= target
        counts = model.keep_counts(images)
        assert counts.float().mean() / 36 == pytest.approx(reached[target])
        assert counts.unique().numel() > 1
        assert model.budget.rule == rule
        assert model.keep_ratio == model.budget.mean_keep_ratio == target
    assert reached[0.3] < reached[0.6]


def test_a_mean_of_numpy_is_a_plain_number() -> None:
    budget = AdaptiveBudget("mass", 0.5, 4, np.float32(0.5))  # type: ignore[arg-type]
    assert type(budget.mean_keep_ratio) is float


def test_calibration_warns_of_ranks(backbone_of: Callable[..., Any]) -> None:
    backbone, images = backbone_of("vit")
    model = drop_patches(backbone, "border")
    with pytest.warns(UserWarning, match="scores of border are ranks within an image"):
        model.calibrate(images, 0.5)
    assert model.keep_counts(images).unique().numel() == 1


def test_calibration_refuses_nonsense(adaptive: tuple[Any, Tensor]) -> None:
    model, images = adaptive
    before = model.budget
    for bad, words in (
        ({"images": [], "mean_keep_ratio": 0.5}, "needs images"),
        ({"images": images, "mean_keep_ratio": 1.0}, "needs images and mean_keep_ratio < 1"),
        ({"images": images, "mean_keep_ratio": 0.0}, "must be in"),
        ({"images": images, "mean_keep_ratio": 0.5, "rule": "most"}, "got 'most'"),
        ({"images": images, "mean_keep_ratio": 0.5, "buckets": 0}, "buckets must be"),
        ({"images": images * math.nan, "mean_keep_ratio": 0.5}, "whose scores are finite"),
    ):
        with pytest.raises(ValueError, match=words):
            model.calibrate(**bad)
    assert model.budget is before
    own, counts = model.keep_ratio, model.keep_counts(images)
    with pytest.raises(
        ValueError, match=r"keep_ratio may be 1 or the mean 0\.5 of the adaptive budget, got 0\.7"
    ):
        model.keep_ratio = 0.7
    model.keep_ratio = 1.0
    assert model.keep_counts(images).tolist() == [36] * 7
    model.keep_ratio = own  # for a while all patches, then its budget again
    assert torch.equal(model.keep_counts(images), counts)
    with keeping(model, 1.0):
        assert model.keep_counts(images).tolist() == [36] * 7
    assert torch.equal(model.keep_counts(images), counts)
    with pytest.raises(TypeError, match="budget must be an AdaptiveBudget or None, got float"):
        model.budget = 0.5
    model.budget = None
    assert model.keep_ratio == own
    with pytest.raises(ValueError, match="keep_counts needs an adaptive budget"):
        model.keep_counts(images)
    with pytest.raises(ValueError, match=r"'adaptive' needs a budget: call model\.calibrate"):
        PatchSelector(selection="adaptive")
    with pytest.raises(ValueError, match=r"'adaptive' needs a budget: call model\.calibrate"):
        model.selection = "adaptive"


def test_no_argument_means_nothing(backbone_of: Callable[..., Any]) -> None:
    budget = AdaptiveBudget("threshold", 2.5, 6, mean_keep_ratio=0.4)
    with pytest.raises(ValueError, match=r"'adaptive' needs a budget: call model\.calibrate"):
        drop_patches(backbone_of("vit")[0], Brightness(), 0.5, "adaptive")
    with pytest.raises(ValueError, match=r"or the mean 0\.4 of the adaptive budget, got 0\.5"):
        drop_patches(backbone_of("vit")[0], Brightness(), 0.5, budget=budget)
    for ratio in (None, 0.4, 1.0):
        model = drop_patches(backbone_of("vit")[0], Brightness(), ratio, budget=budget)
        assert model.keep_ratio == (ratio or 0.4)


@torch.no_grad()
def test_a_budget_goes_with_every_selection(adaptive: tuple[Any, Tensor]) -> None:
    model, images = adaptive
    counts, top = model.keep_counts(images), model(images)
    for selection in ("random", "mixed", "stratified", "dithered"):
        model.selection = selection
        assert torch.equal(model.keep_counts(images), counts)
        logits = model(images)
        assert (logits - top)[1:-1].abs().max() > 1e-3
        for i, image in enumerate(images.split(1)):
            assert model.keep_indices(image).shape[1] == counts[i]
            assert (model(image)[0] - logits[i]).abs().max() <= 1e-5


@torch.no_grad()
def test_it_says_that_it_is_eager(adaptive: tuple[Any, Tensor]) -> None:
    model, images = adaptive
    with pytest.raises(ValueError, match="eager mode only"):
        torch.jit.trace(model, images)
    with pytest.raises(ValueError, match="eager mode only"):
        torch.fx.symbolic_trace(model)
    with pytest.raises(Exception, match="eager mode only"):
        torch.export.export(model, (images,))
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    scripted = torch.jit.load(file)
    with pytest.raises(Exception, match="in eager mode"):
        scripted(images)
    keep = torch.arange(5).expand(7, -1)
    assert (scripted(images, keep) - model(images, keep_indices=keep)).abs().max() <= 1e-5
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")  # with breaks between graphs
    assert (compiled(images) - model(images)).abs().max() <= 1e-5
