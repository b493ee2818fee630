"""Metrics of change against scikit-image, by hand, and LPIPS through torchmetrics."""

import itertools
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import small_teacher
from einops import rearrange
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor
from torchvision.models import AlexNet_Weights, alexnet

from ltrp_timm import semantic_density
from ltrp_timm.teacher.density import (
    _lpips_network,
    l1_change,
    lpips_change,
    mse_change,
    psnr_change,
    ssim_change,
)

CHANGES = {"l1": l1_change, "mse": mse_change, "psnr": psnr_change, "ssim": ssim_change}


def patches(pixels: int = 49) -> tuple[Tensor, Tensor]:
    a = torch.rand(2, 5, 3 * pixels)
    return a, (a + 0.2 * torch.randn_like(a)).clamp(0, 1)


@pytest.mark.parametrize("name", list(CHANGES))
def test_larger_is_more_change(name: str) -> None:
    a, b = patches()
    change = CHANGES[name]
    values = [change(a, a + share * (b - a), 3) for share in (0.0, 0.25, 0.5, 1.0)]
    assert values[0].shape == (2, 5)
    for less, more in itertools.pairwise(values):
        assert bool((less < more).all())
    assert (change(b, a, 3) - values[-1]).abs().max() <= 1e-5


def test_by_hand() -> None:
    a, b = torch.tensor([[0.0, 0.5, 1.0]]), torch.tensor([[0.5, 0.5, 0.0]])
    assert l1_change(a, b).item() == pytest.approx(0.5)
    assert mse_change(a, b).item() == pytest.approx(1.25 / 3)
    assert psnr_change(a, b).item() == pytest.approx(10 * math.log10(1.25 / 3), rel=1e-5)
    assert psnr_change(a, a).item() == pytest.approx(-100.0)
    assert ssim_change(a, a, 1).item() == pytest.approx(0.0, abs=1e-6)
    # flat patches: the luminance term alone
    flat = ssim_change(torch.full((1, 4), 0.2), torch.full((1, 4), 0.4), 1)
    assert flat.item() == pytest.approx(1 - (2 * 0.08 + 1e-4) / (0.04 + 0.16 + 1e-4), rel=1e-4)


def test_against_scikit_image() -> None:
    a, b = patches()
    ssim, psnr = ssim_change(a, b, 3), psnr_change(a, b, 3)
    for i in range(2):
        for j in range(5):
            x, y = (rearrange(t[i, j], "(p q c) -> p q c", p=7, c=3).numpy() for t in (a, b))
            window = {"win_size": 7, "data_range": 1.0, "use_sample_covariance": False}
            _, image = structural_similarity(x, y, channel_axis=2, full=True, **window)
            centre = image[3, 3].mean()  # where the window is the whole patch
            assert ssim[i, j].item() == pytest.approx(1 - centre, abs=1e-5)
            expected = -peak_signal_noise_ratio(x, y, data_range=1.0)
            assert psnr[i, j].item() == pytest.approx(expected, abs=1e-3)


def test_lpips_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    _lpips_network.cache_clear()
    monkeypatch.setitem(sys.modules, "torchmetrics.image.lpip", None)
    with pytest.raises(ImportError, match=r"needs torchmetrics: pip install 'ltrp-timm\[lpips\]'"):
        semantic_density(small_teacher(), torch.randn(1, 3, 32, 32), mask_ratio=0.5, metric="lpips")


@pytest.fixture
def random_alexnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A file of random weights where torchvision keeps those that it has downloaded."""
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    name = AlexNet_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1]
    torch.save(alexnet().state_dict(), folder / name)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    _lpips_network.cache_clear()
    yield
    _lpips_network.cache_clear()


def test_lpips(random_alexnet: None) -> None:
    pytest.importorskip("torchmetrics")
    a = torch.rand(3, 3, 64, 64)
    noise = torch.randn_like(a)
    near, far = (lpips_change(a, a + step * noise) for step in (0.05, 0.5))
    assert near.shape == (3,)
    assert bool((near < far).all())
    assert lpips_change(a, a).abs().max() <= 1e-6
    assert torch.equal(lpips_change(a[:1], (a + 0.5 * noise)[:1]), far[:1])
    teacher = small_teacher(img_size=64)
    images = torch.randn(2, 3, 64, 64)
    args = {"mask_ratio": 0.9, "metric": "lpips"}
    generator = torch.Generator()
    scores = [
        semantic_density(teacher, images, chunk=n, generator=generator.manual_seed(0), **args)[0]
        for n in (1, 5)
    ]
    assert scores[0].shape == (2, 6)
    assert (scores[0] - scores[1]).abs().max() <= 1e-6
    assert scores[0].std(dim=1).min() > 0
