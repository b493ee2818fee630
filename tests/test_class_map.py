"""Maps of a classifier's classes, held against their definitions."""

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from ltrp_timm import create_ranker, drop_patches
from ltrp_timm.rankers import CamRanker, GradCamRanker

IMAGES = torch.randn(3, 3, 96, 96, generator=torch.Generator().manual_seed(0))


def classifier(name: str = "resnet18", **kwargs: Any) -> Any:
    """Weights by which places and classes differ."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **kwargs).eval()
    for key, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        elif "gamma" in key:
            nn.init.ones_(parameter)
    return model


def test_cam_is_the_logit_of_each_place() -> None:
    net = classifier()
    ranker = CamRanker(net)
    with torch.inference_mode():
        logits, best = net(IMAGES), net(IMAGES).argmax(1)
        maps = ranker(IMAGES)
        assert maps.shape == (3, 3, 3)
        # the mean over places and the bias are the class's logit
        found = maps.mean((1, 2)) + net.fc.bias[best]
    torch.testing.assert_close(found, logits.amax(1), atol=1e-4, rtol=1e-4)
    assert maps.flatten(1).std(1).min() > 0.1


def test_two_classes_and_blur() -> None:
    net = classifier()
    with torch.no_grad():
        maps = CamRanker(net, top=2).class_maps(IMAGES)
        assert maps.shape == (3, 2, 3, 3)
        best = net(IMAGES).topk(2).indices
        features = net.forward_features(IMAGES)
        for image in range(3):
            for place, name in enumerate(best[image]):
                expected = (net.fc.weight[name, :, None, None] * features[image]).sum(0)
                torch.testing.assert_close(maps[image, place], expected, atol=1e-4, rtol=1e-4)
        combined = CamRanker(net, top=2)(IMAGES)
        torch.testing.assert_close(combined, maps.amax(1))
        assert not torch.equal(combined, CamRanker(net)(IMAGES))
        blurred = CamRanker(net, top=2, blur=True)(IMAGES)
    for i in range(3):
        for j in range(3):
            near = combined[:, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2]
            torch.testing.assert_close(blurred[:, i, j], near.mean((1, 2)))


def test_grad_cam_behind_a_pool_is_cam() -> None:
    net = classifier()
    with torch.no_grad():
        cam, grad_cam = CamRanker(net, top=3)(IMAGES), GradCamRanker(net, top=3)(IMAGES)
    torch.testing.assert_close(grad_cam * 9, cam, atol=1e-4, rtol=1e-4)  # 3 x 3 places


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_grad_cam_of_a_class_token(name: str) -> None:
    net = classifier(name, img_size=96, depth=3)
    caught: list[Tensor] = []
    plain = copy.deepcopy(net)
    plain.blocks[-1].register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    best = plain(IMAGES).max(1).values.sum()
    gradient = torch.autograd.grad(best, caught[0])[0][:, net.num_prefix_tokens :]
    tokens = caught[0].detach()[:, net.num_prefix_tokens :]
    expected = (tokens * gradient.mean(1, keepdim=True)).sum(2).reshape(3, 6, 6)
    ranker = GradCamRanker(net)
    found = ranker(IMAGES)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
    assert found.flatten(1).std(1).min() > 0
    assert not found.requires_grad


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("convnext_atto", (3, 3, 3)),
        ("swin_tiny_patch4_window7_224", (3, 3, 3)),  # features in NHWC
        ("vgg11", (3, 3, 3)),
    ],
)
def test_grad_cam_of_other_layouts(name: str, shape: tuple[int, ...]) -> None:
    sizes = {"depths": (1, 1, 1, 1), "img_size": 96, "window_size": 3} if "swin" in name else {}
    net = classifier(name, **sizes)
    found = GradCamRanker(net)(IMAGES)
    features = net.forward_features(IMAGES).detach().requires_grad_()
    gradient = torch.autograd.grad(net.forward_head(features).max(1).values.sum(), features)[0]
    places = (1, 2) if "swin" in name else (2, 3)
    channels = 3 if "swin" in name else 1
    expected = (features * gradient.mean(places, keepdim=True)).sum(channels).detach()
    assert found.shape == shape
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)


def test_gradients_stay_inside() -> None:
    net = classifier()
    ranker = GradCamRanker(net)
    with torch.inference_mode():
        found = ranker(IMAGES)
    with torch.no_grad():
        assert torch.equal(found, ranker(IMAGES))
    assert all(parameter.grad is None for parameter in ranker.parameters())
    assert not any(parameter.requires_grad for parameter in ranker.parameters())
    assert all(parameter.requires_grad for parameter in net.parameters())  # a copy was frozen


@pytest.mark.parametrize("name", ["cam", "grad_cam"])
def test_in_front_of_a_vit(name: str, tmp_path: Path) -> None:
    ranker = create_ranker(name, backbone="resnet18", blur=True, num_classes=7, top=2)
    assert not ranker.trained
    backbone = timm.create_model("vit_tiny_patch16_224", img_size=96, depth=2).eval()
    model = drop_patches(backbone, ranker, keep_ratio=0.5).eval()
    model.ranker.trained = True  # its time and order, not its worth
    with torch.inference_mode():
        keep = model.keep_indices(IMAGES)
        assert keep.shape == (3, 18)
        assert torch.equal(model(IMAGES), model(IMAGES, keep_indices=keep))
    ranker.save(tmp_path)
    again = create_ranker(name, pretrained=tmp_path)
    assert again.trained
    assert again.config() == ranker.config()
    assert torch.equal(again(IMAGES), ranker(IMAGES))


def test_the_size_it_looks_at() -> None:
    ranker = create_ranker("grad_cam", backbone="vit_tiny_patch16_224", img_size=64, depth=1)
    assert ranker.img_size == (64, 64)
    assert ranker(torch.zeros(1, 3, 64, 64)).shape == (1, 4, 4)
    assert create_ranker("cam", backbone="resnet18", img_size=64).img_size == (64, 64)
    assert create_ranker("cam", backbone="resnet18").img_size is None
    assert create_ranker("cam", backbone="resnet18", in_chans=1).in_chans == 1


@pytest.mark.parametrize(
    ("ranker", "name", "kwargs", "text"),
    [
        ("cam", "vit_tiny_patch16_224", {}, "not a linear layer on pooled places"),
        ("cam", "convnext_atto", {}, "grad_cam takes it"),
        ("cam", "beit_base_patch16_224", {"depth": 1}, "not a linear layer"),
        ("cam", "mobilenetv3_small_050", {}, "not a linear layer"),
        ("cam", "resnet18", {"num_classes": 0}, "no classes"),
        ("grad_cam", "vit_small_patch14_dinov2", {"depth": 1}, "no classes"),
    ],
)
def test_refusals(ranker: str, name: str, kwargs: dict[str, Any], text: str) -> None:
    with pytest.raises(TypeError, match=text):
        create_ranker(ranker, backbone=name, **kwargs)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="top must lie in 1 … 5, got 6"):
        CamRanker(classifier(), top=6)
    with pytest.raises(ValueError, match="takes 3 channels, the images have 4"):
        CamRanker(classifier(), in_chans=4)
    with pytest.raises(TypeError, match="no forward_features"):
        GradCamRanker(nn.Linear(3, 3))
    with pytest.raises(TypeError, match="got int"):
        GradCamRanker(3)  # type: ignore[arg-type]
    mixer = classifier("mixer_s32_224")
    with pytest.raises(ValueError, match="takes images of"):
        GradCamRanker(mixer, img_size=64)


def test_grad_cam_says_that_it_cannot_be_traced() -> None:
    ranker = GradCamRanker(classifier())
    with pytest.raises(RuntimeError, match="takes a gradient at every call"):
        torch.jit.trace(ranker, IMAGES)
    with pytest.raises(RuntimeError, match="takes a gradient at every call"):
        torch.export.export(ranker, (IMAGES,))


def test_two_threads_do_not_share_a_grad_cam() -> None:
    ranker = create_ranker("grad_cam", backbone="vit_tiny_patch16_224", depth=2, img_size=64)
    images, refused = torch.rand(1, 3, 64, 64), []
    expected = ranker(images)

    def second() -> None:
        with pytest.raises(RuntimeError, match="this grad_cam ranker is running already"):
            ranker(images)
        refused.append(True)

    def call_meanwhile(*_: Any) -> None:
        hook.remove()
        inner = threading.Thread(target=second)
        inner.start()
        inner.join()

    hook = ranker.backbone.patch_embed.register_forward_pre_hook(call_meanwhile)
    assert torch.equal(ranker(images), expected)
    assert refused
