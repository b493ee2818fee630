"""From pixels to scores and kept patches, with a ranker alone or in front of a model."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import timm
import torch
from torch import Tensor

from ltrp_timm._text import one_line
from ltrp_timm.layers import InputBridge, resize_score_map
from ltrp_timm.models.ltrp import LTRPModel
from ltrp_timm.models.open_model import is_source, open_model
from ltrp_timm.rankers import create_ranker, ranker_class
from ltrp_timm.scoring.store import ranker_hash
from ltrp_timm.selection import check_keep_ratio, check_selection_args, num_keep, select

CROP_MODES = ("center", "squash")
IMG_SIZE, PATCH_SIZE = 224, 16  # without a model
_PIXELS = ((0.0,), (1.0,))


@dataclasses.dataclass(frozen=True)
class Scorer:
    """Turns a batch of images into scores and kept patches.

    Attributes:
        ranker: in eval mode.
        config: timm's data configuration of the images.
        grid_size: (h, w) in patches.
        patch_size: (height, width) of a patch in pixels.
        device: of the ranker.
        score: images normalised by ``config`` (B, 3, H, W) -> scores (B, N) float32.
        select: scores (B, N) and these images -> keep indices (B, K) int64.
    """

    ranker: Any
    config: dict[str, Any]
    grid_size: tuple[int, int]
    patch_size: tuple[int, int]
    device: str
    score: Callable[[Tensor], Tensor]
    select: Callable[[Tensor, Tensor], Tensor]

    @property
    def img_size(self) -> tuple[int, int]:
        """(H, W) of the images."""
        h, w = self.config["input_size"][-2:]
        return h, w

    def transform(self) -> Any:
        """timm's evaluation transform up to pixels (3, H, W) uint8, which can still be drawn."""
        return timm.data.create_transform(**self.config, is_training=False, normalize=False)

    def images(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) uint8 -> normalised float32, as by the rest of timm's transform."""
        pixels = pixels.to(self.device)
        shape = (1, 3, 1, 1)
        mean, std = (
            torch.tensor(self.config[name], device=pixels.device).expand(3).reshape(shape)
            for name in ("mean", "std")
        )
        return (pixels.float() / 255.0 - mean) / std

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3, H, W) uint8 -> scores (B, N) and keep indices (B, K), on the CPU."""
        with torch.inference_mode():
            images = self.images(pixels)
            scores = self.score(images)
            return scores.cpu(), self.select(scores, images).cpu()

    def settings(self) -> dict[str, Any]:
        """What the scores depend on, as JSON can hold it."""
        config = self.config
        return {
            "ranker": self.ranker.name,
            "ranker_args": self.ranker.config(),
            "ranker_hash": ranker_hash(self.ranker),
            "input_size": list(self.img_size),
            "patch_size": list(self.patch_size),
            "grid_size": list(self.grid_size),
            **{name: config[name] for name in ("interpolation", "crop_pct", "crop_mode")},
            **{name: list(config[name]) for name in ("mean", "std")},
        }


def open_scorer(
    ranker: str | None = None,
    weights: Any = None,
    ranker_args: Mapping[str, Any] | None = None,
    *,
    model: str | None = None,
    img_size: int | None = None,
    patch_size: int | None = None,
    crop_mode: str | None = None,
    keep_ratio: float = 0.5,
    selection: str = "top",
    device: str = "cpu",
) -> Scorer:
    """Open a ranker by name.

    Args:
        ranker: one of ``list_rankers()`` (default: the model's own, or contrast).
        weights: of the ranker: a folder, a file or ``hf-hub:…``; True for published ones.
        ranker_args: further arguments of ``create_ranker``.
        model: a timm ViT: the images and patches are those of the ranker in front of it. The ViT
            itself does not run.
        img_size: side of the images (default: 224, or the model's).
        patch_size: side of a patch without a model (default: 16).
        crop_mode: "center" (default, or the model's), or "squash": the whole picture.
        keep_ratio: share of patches to keep, in (0, 1].
        selection: "top", "random", "mixed" or "stratified".
        device: of the ranker.

    Raises:
        ValueError: an argument is out of range, or the ranker needs trained weights.
        TypeError: patches cannot be dropped from the model, or a ranker argument is unknown.
        OSError: the weights are missing.
    """
    if selection == "adaptive":
        raise ValueError("selection 'adaptive' keeps other numbers of patches in each image.")
    check_keep_ratio(keep_ratio)
    if model is None:
        sizes = img_size or IMG_SIZE, patch_size or PATCH_SIZE
        args = dict(ranker_args or {})
        scorer = _alone(ranker or "contrast", weights, args, *sizes, keep_ratio, selection, device)
    elif patch_size is not None:
        raise ValueError("--patch-size does not go with --model, which has its own patch size.")
    else:
        net, _ = open_model(
            model,
            pretrained=None if is_source(model) else False,
            ranker=ranker,
            ranker_weights=weights,
            ranker_args=ranker_args or None,
            img_size=img_size,
        )
        net.selection, net.keep_ratio = selection, keep_ratio
        scorer = _of_model(net.to(device), device)
    if scorer.ranker.learned and not scorer.ranker.trained:
        published = " or --pretrained" if scorer.ranker.has_published_weights else ""
        raise ValueError(
            f"the {scorer.ranker.name} ranker is not trained, its scores mean nothing; give "
            f"--ranker-weights PATH{published}."
        )
    config = {**scorer.config, "crop_mode": crop_mode or scorer.config["crop_mode"]}
    if crop_mode == "squash":
        config["crop_pct"] = 1.0  # all of every picture
    return dataclasses.replace(scorer, config=config)


def _alone(
    name: str,
    weights: Any,
    args: dict[str, Any],
    img_size: int,
    patch_size: int,
    keep_ratio: float,
    selection: str,
    device: str,
) -> Scorer:
    """A ranker on images of one size, cut into a grid of patches of one size."""
    side = img_size // patch_size
    if side < 1:
        raise ValueError(f"images of {img_size} pixels are smaller than a patch of {patch_size}.")
    if not weights and ranker_class(name).follows_patch_size:
        args = {"patch_size": patch_size, **args}
    ranker = create_ranker(name, weights, **args).to(device).eval()
    # the transform normalises as the ranker wants it; only a size of its own is left to bridge
    mean, std = ranker.mean or _PIXELS[0], ranker.std or _PIXELS[1]
    config = {
        "input_size": (3, img_size, img_size),
        "interpolation": "bicubic",
        "mean": tuple(mean),
        "std": tuple(std),
        "crop_pct": 1.0,
        "crop_mode": "center",
    }
    bridge = InputBridge(_PIXELS, _PIXELS, ranker.img_size).to(device)
    options = check_selection_args(selection, None)
    k = num_keep(side * side, keep_ratio)

    def score(images: Tensor) -> Tensor:
        return resize_score_map(ranker(bridge(images)), side, side)

    def choose(scores: Tensor, images: Tensor) -> Tensor:
        return select(scores, k, selection, options, (side, side), images)

    return Scorer(ranker, config, (side, side), (patch_size, patch_size), device, score, choose)


def _of_model(model: LTRPModel, device: str) -> Scorer:
    """The ranker of a model, on its images and its grid."""
    config, grid, patch = model.data_config(), model.patch_grid, model.patch_size
    return Scorer(model.ranker, config, grid, patch, device, model.patch_scores, model.select)


def find_device(name: str | None) -> str:
    """The device of that name, or a GPU if there is one; each process has its own of several GPUs.

    Raises:
        ValueError: the device cannot be used.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    local = os.environ.get("LOCAL_RANK")
    if name == "cuda" and local is not None and torch.cuda.is_available():
        name = f"cuda:{int(local) % torch.cuda.device_count()}"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch built without a device asserts
        raise ValueError(f"device {name!r} cannot be used: {one_line(error)}") from error
    return name
