"""Weights of a plain ViT, under the names of MAE and timm -> a ranker, or a classifier."""

import math
from typing import Any, Dict, Mapping, Optional, Sequence, Union

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from ltrp_timm.layers.bridge import fit_channels
from ltrp_timm.layers.sizes import to_pair
from ltrp_timm.rankers import create_ranker
from ltrp_timm.teacher.layouts import count_blocks, mlp_ratio_of
from ltrp_timm.weights.files import build_and_load, check_keys

_RANKERS = {192: "vit_tiny", 384: "vit_small", 768: "vit_base"}
_SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge"}
_BACKBONE = "vit_base_patch16_224"  # of sizes that no name of timm's has
_TELLING = ("patch_embed.proj.weight", "pos_embed", "head.weight")  # all sizes but the heads'


def usual_heads(width: int) -> Optional[int]:
    """Attention heads of a ViT of this width; None where there is no usual number.

    >>> usual_heads(384)
    6
    """
    if width == 1280:  # ViT-H
        return 16
    return width // 64 if width % 64 == 0 and 192 <= width <= 1024 else None


def read_sizes(
    weights: Mapping[str, Tensor], source: str, img_size: Union[int, Sequence[int], None] = None
) -> Dict[str, Any]:
    """What shapes tell of a plain ViT with a class token and a linear head.

    Args:
        weights: its tensors.
        source: named in the errors.
        img_size: side or (height, width); None for a square grid.

    Returns:
        img_size, patch_size, embed_dim, depth, in_chans.

    Raises:
        RuntimeError: a table of those tensors that are missing.
        ValueError: shapes of no ViT, or a grid that is not square while ``img_size`` is None.
    """
    here = {name: weights[name] for name in _TELLING if name in weights}
    check_keys({**dict.fromkeys(_TELLING, torch.empty(0)), **here}, here, source)
    kernel, table, head = (weights[name] for name in _TELLING)
    if (kernel.dim(), table.dim(), head.dim()) != (4, 3, 2) or 0 in kernel.shape:
        raise ValueError(f"{source} is no ViT: its embeddings have shapes of something else.")
    patch, count = to_pair(tuple(kernel.shape[2:])), table.shape[1] - 1
    side = math.isqrt(max(count, 0))
    if img_size is None and side * side != count:
        raise ValueError(
            f"{source} has {count} positions, no square grid: pass img_size (--img-size)."
        )
    size = (side * patch[0], side * patch[1]) if img_size is None else to_pair(img_size)
    grid = (size[0] // patch[0], size[1] // patch[1])
    if grid[0] * grid[1] != count or count < 1:
        raise ValueError(
            f"{source} has {count} positions; images of {size[0]}x{size[1]} in patches of "
            f"{patch[0]}x{patch[1]} need {grid[0] * grid[1]}."
        )
    depth = count_blocks(weights, "blocks", source)
    if depth < 1:
        raise ValueError(f"{source} holds no blocks.")
    return {
        "img_size": size,
        "patch_size": patch,
        "embed_dim": kernel.shape[0],
        "depth": depth,
        "in_chans": kernel.shape[1],
    }


def build_ranker(weights: Mapping[str, Tensor], sizes: Mapping[str, Any], source: str) -> Any:
    """The published ranker of these weights.

    Args:
        weights: its tensors.
        sizes: as ``read_sizes`` gives them, and ``num_heads``.
        source: named in the errors.

    Raises:
        RuntimeError: a table of the tensors that are missing, unexpected or of another shape.
        ValueError: sizes that no ranker has.
    """
    name = _RANKERS.get(sizes["embed_dim"], "vit_small")
    ranker: Any = build_and_load(
        lambda **args: create_ranker(name, **args), sizes, weights, source, _as_they_are
    )
    ranker.trained = True
    return ranker


def build_vit(weights: Mapping[str, Tensor], sizes: Mapping[str, Any], source: str) -> Any:
    """The classifier of these weights, as timm's ``VisionTransformer``.

    Images are those of MAE's fine-tuning: ImageNet's mean and std, 224 of 256 pixels.

    Args:
        weights: its tensors.
        sizes: as ``read_sizes`` gives them, and ``num_heads``.
        source: named in the errors.

    Raises:
        RuntimeError: a table of the tensors that are missing, unexpected or of another shape.
        ValueError: sizes that no ViT has.
    """
    width, patch = sizes["embed_dim"], sizes["patch_size"]
    name = f"vit_{_SIZES.get(width)}_patch{patch[0]}_224"
    args = {
        **sizes,
        "num_classes": weights["head.weight"].shape[0],
        "mlp_ratio": mlp_ratio_of(weights, "blocks", width),
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights,
        "global_pool": "avg" if "fc_norm.weight" in weights else "token",
    }
    known = name if timm.is_model(name) else _BACKBONE
    about = {  # not what timm says of its own weights by that name
        "architecture": known,
        "input_size": (sizes["in_chans"], *sizes["img_size"]),
        "fixed_input_size": True,
        "num_classes": args["num_classes"],
        "mean": fit_channels(IMAGENET_DEFAULT_MEAN, sizes["in_chans"]),
        "std": fit_channels(IMAGENET_DEFAULT_STD, sizes["in_chans"]),
        "interpolation": "bicubic",
        "crop_pct": 0.875 if max(sizes["img_size"]) <= 224 else 1.0,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    return build_and_load(
        lambda **given: timm.create_model(known, pretrained_cfg=about, **given),
        args,
        weights,
        source,
        _as_they_are,
    )


def _as_they_are(weights: Mapping[str, Tensor], model: Any) -> Mapping[str, Tensor]:
    return weights
