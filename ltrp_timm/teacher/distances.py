"""How much one reconstruction differs from another, per patch: larger = more change.

Axes: n reconstructions, M patches, C = pixels * channels values of a patch, channels last.
"""

import functools
import importlib
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from einops import rearrange
from torch import Tensor

PatchChange = Callable[[Tensor, Tensor, int], Tensor]


def l1_change(a: Tensor, b: Tensor, num_channels: int = 3) -> Tensor:
    """Mean absolute difference of patches a and b (…, M, C) -> (…, M)."""
    return (a - b).abs().mean(dim=-1)


def mse_change(a: Tensor, b: Tensor, num_channels: int = 3) -> Tensor:
    """Mean squared difference of patches a and b (…, M, C) -> (…, M)."""
    return (a - b).square().mean(dim=-1)


def psnr_change(a: Tensor, b: Tensor, num_channels: int = 3) -> Tensor:
    """Minus the peak signal to noise ratio in dB, of pixels with the range [0, 1].

    Patches a and b (…, M, C) -> (…, M). Equal patches give -100 dB, not minus infinity.
    """
    return 10.0 / math.log(10.0) * mse_change(a, b).clamp(min=1e-10).log()


def ssim_change(a: Tensor, b: Tensor, num_channels: int = 3) -> Tensor:
    """One minus the structural similarity of pixels with the range [0, 1]; a patch is the window.

    Patches a and b (…, M, C) -> (…, M) in [0, 2], the mean over the channels. All
    pixels of the window weigh the same; variances are those of a population.

    Source: Wang et al. (2004), Image quality assessment: from error visibility to structural
    similarity; K1 = 0.01, K2 = 0.03.
    """
    a, b = (rearrange(x, "... (pixels c) -> ... c pixels", c=num_channels) for x in (a, b))
    mean_a, mean_b = (x.mean(dim=-1, keepdim=True) for x in (a, b))
    a, b = a - mean_a, b - mean_b
    variances = (a.square() + b.square()).mean(dim=-1)
    covariance = (a * b).mean(dim=-1)
    mean_a, mean_b = mean_a.squeeze(-1), mean_b.squeeze(-1)
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a.square() + mean_b.square() + c1)
    structure = (2 * covariance + c2) / (variances + c2)
    return 1.0 - (luminance * structure).mean(dim=-1)


# the first compare predictions, the second need pixels
PREDICTION_CHANGES: dict[str, PatchChange] = {"l1": l1_change, "mse": mse_change}
PIXEL_CHANGES: dict[str, PatchChange] = {"ssim": ssim_change, "psnr": psnr_change}
Metric = Literal["l1", "mse", "ssim", "psnr", "lpips"]
METRICS: tuple[str, ...] = get_args(Metric)


def lpips_change(a: Tensor, b: Tensor) -> Tensor:
    """LPIPS distance (AlexNet) of images a and b (n, 3, H, W) with pixels in [0, 1] -> (n,).

    torchvision's weights of the network are downloaded at the first call.

    Raises:
        ImportError: torchmetrics is not installed; the message has the command to type.

    Source: Zhang et al. (2018), The unreasonable effectiveness of deep features as a perceptual
    metric.
    """
    network = _lpips_network(a.device)
    values: Tensor = network(a.clamp(0.0, 1.0), b.clamp(0.0, 1.0))
    network.reset()  # it keeps all its values otherwise
    return values.reshape(-1)


@functools.lru_cache(maxsize=2)
def _lpips_network(device: torch.device) -> Any:
    try:
        module: Any = importlib.import_module("torchmetrics.image.lpip")
    except ImportError as error:
        raise ImportError(
            "metric='lpips' needs torchmetrics: pip install 'ltrp-timm[lpips]'"
        ) from error
    network = module.LearnedPerceptualImagePatchSimilarity
    return network("alex", reduction="none", normalize=True).to(device)
