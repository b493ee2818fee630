"""From pixels to scores and kept patches, with a ranker alone or in front of a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from ltrp_timm.models.front_end import drop_patches, make_ranker
from ltrp_timm.models.ltrp import LTRPModel
from ltrp_timm.models.open_model import is_source, open_model, with_front_end
from ltrp_timm.rankers import DEFAULT_RANKER, create_ranker, list_rankers, ranker_class
from ltrp_timm.weights.files import ranker_hash, read_weights

CROP_MODES = ("center", "squash")
IMG_SIZE, PATCH_SIZE = 224, 16  # without a model


class Scorer:
    """Turns images into scores and kept patches by a model's ranker; its backbone does not run.

    Attributes:
        config: timm's data configuration of the images.
        img_size: (H, W) of the images.
        grid_size: (h, w) in patches.
        patch_size: (height, width) of a patch in pixels.
    """

    def __init__(self, model: LTRPModel, config: Mapping[str, Any], device: str) -> None:
        self.model, self.config, self.device = model.to(device).eval(), config, device
        self.ranker: Any = model.ranker
        self.img_size: tuple[int, int] = tuple(config["input_size"][-2:])
        self.grid_size, self.patch_size = model.patch_grid, model.patch_size

    def transform(self) -> Any:
        """timm's evaluation transform up to pixels (3, H, W) uint8, which can still be drawn."""
        return timm.data.create_transform(**self.config, is_training=False, normalize=False)

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3, H, W) uint8 -> scores (B, N) and keep indices (B, K), on the CPU."""
        mean, std = (
            torch.tensor(self.config[name], device=self.device).view(1, -1, 1, 1)
            for name in ("mean", "std")
        )
        with torch.inference_mode():
            images = (pixels.to(self.device).float() / 255.0 - mean) / std
            scores = self.model.patch_scores(images)
            return scores.cpu(), self.model.select(scores, images).cpu()

    def num_kept(self) -> int:
        """K, the patches of an image that are kept."""
        one = torch.zeros(1, self.model.in_chans, *self.img_size, device=self.device)
        scores = torch.zeros(1, self.grid_size[0] * self.grid_size[1], device=self.device)
        return self.model.select(scores, one).shape[1]

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
    ranker_weights: Any = None,
    ranker_args: Mapping[str, Any] | None = None,
    *,
    model: str | None = None,
    img_size: int | None = None,
    patch_size: int | None = None,
    crop_mode: str | None = None,
    keep_ratio: float = 0.5,
    selection: str = "top",
    rest: str | None = None,
    scales: Sequence[int] | None = None,
    device: str = "cpu",
) -> Scorer:
    """Open a ranker by name; ``ranker_weights=True`` loads its published weights.

    Args:
        ranker: Name of the ranker (default: that of ``model``, else border).
        ranker_weights: Weights of the ranker: a folder, a file or hf-hub:OWNER/NAME.
        ranker_args: Arguments of the ranker, such as width=32.
        model: timm ViT that images and patches are prepared for; it does not run.
        img_size: Side of the images in pixels (default: the model's own, else 224).
        patch_size: Side of a patch in pixels, without ``model`` (default: 16).
        crop_mode: "center" crops the picture, "squash" resizes all of it, which
            ``finetune --index-cache`` requires (default: the model's own, else center).
        keep_ratio: Share of patches to keep, in (0, 1].
        selection: How scores choose patches.
        rest: "coarse" keeps whole cells of 2 x 2 patches, and overlays show the others coarsely
            (default: that of ``model``, else drop).
        scales: With a coarse rest: 1 2, or 1 2 4 for blocks of 4 x 4 patches too.
        device: Device of the ranker.

    Raises:
        ValueError: an argument is out of range, or the ranker needs trained weights.
        TypeError: patches cannot be dropped from the model, or a ranker argument is unknown.
        OSError: the weights are missing.
    """
    if crop_mode not in (None, *CROP_MODES):
        raise ValueError(f"crop_mode must be {' or '.join(CROP_MODES)}, got {crop_mode!r}.")
    net: LTRPModel
    if model is None:
        vit = _no_vit(img_size or IMG_SIZE, patch_size or PATCH_SIZE)
        module: Any = make_ranker(
            ranker or DEFAULT_RANKER, vit, ranker_weights, dict(ranker_args or {})
        )
        # images are normalised as the ranker expects
        for name, default in (("mean", (0.0,) * 3), ("std", (1.0,) * 3)):
            vit.pretrained_cfg[name] = tuple(getattr(module, name) or default)
        net = drop_patches(vit, module)
    elif patch_size is not None:
        raise ValueError("--patch-size does not go with --model, which has its own patch size.")
    else:
        net, _ = open_model(
            model,
            pretrained=None if is_source(model) else False,
            ranker=ranker,
            ranker_weights=ranker_weights,
            ranker_args=ranker_args or None,
            img_size=img_size,
        )
    kind: Any = net.ranker
    if kind.learned and not kind.trained:
        published = " or --pretrained" if kind.has_published_weights else ""
        raise ValueError(
            f"the {kind.name} ranker is not trained, its scores mean nothing; give "
            f"--ranker-weights PATH{published}."
        )
    net.budget = None
    coarse = {"rest": rest, "scales": scales}
    net = with_front_end(net, {key: value for key, value in coarse.items() if value is not None})
    net.selection, net.keep_ratio = selection, keep_ratio
    config = net.data_config()
    if crop_mode is not None:
        config["crop_mode"] = crop_mode
    if crop_mode == "squash":
        config["crop_pct"] = 1.0  # the whole picture
    return Scorer(net, config, device)


def open_ranker(
    source: Any, patch_size: tuple[int, int], args: Mapping[str, Any] | None = None
) -> Any:
    """A frozen ranker: a module, a folder, or by its name, with its published weights if any.

    Raises:
        FileNotFoundError: ``source`` does not exist.
        ValueError: It holds no ranker, is the name of a ranker that must be trained, or is a module
            with arguments.
    """
    given = dict(args or {})
    if isinstance(source, nn.Module):
        if given:
            raise ValueError("distill_args go with a ranker's name or folder, not with a module.")
        ranker: Any = source
    elif str(source) in list_rankers():
        kind = ranker_class(str(source))
        published = kind.has_published_weights and "checkpoint_path" not in given
        follows = kind.follows_patch_size and not published
        sizes = {"patch_size": patch_size} if follows else {}
        ranker = create_ranker(str(source), **{"pretrained": published, **sizes, **given})
        if ranker.learned and not ranker.trained:
            raise ValueError(
                f"the {source} ranker must be trained: give the folder of a trained one."
            )
    else:
        if not Path(source).exists():
            raise FileNotFoundError(
                f"{source} does not exist; give the folder of a ranker, or one of "
                f"{', '.join(list_rankers())}."
            )
        name = (read_weights(source).config or {}).get("ranker")
        if not isinstance(name, str):
            raise ValueError(f"{source} holds no ranker.")
        ranker = create_ranker(name, pretrained=source, **given)
    return ranker.requires_grad_(False).eval()


def _no_vit(img_size: int, patch_size: int) -> Any:
    """The patch grid of a ViT, without blocks."""
    if img_size < patch_size:
        raise ValueError(f"images of {img_size} pixels are smaller than a patch of {patch_size}.")
    vit = VisionTransformer(img_size, patch_size, num_classes=0, embed_dim=8, depth=0, num_heads=1)
    vit.pretrained_cfg = {
        "input_size": (3, img_size, img_size),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
    }
    return vit
