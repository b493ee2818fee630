r"""Convert a fine-tuned ViT of LTRP's authors to a folder for ``timm.create_model("local-dir:…")``.

    python scripts/convert_ltrp.py ltrp_stage2.pth --ranker ltrp_stage1.pth -o my-model

The checkpoint of stage 1 itself needs no conversion: ``create_ranker("vit_small", pretrained=…)``
reads its ranker, and ``create_teacher(…)`` its MAE. Sizes come from the shapes of the tensors.
Nothing is overwritten, and nothing is written unless every tensor fits.
"""

import argparse
import math
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from ltrp_timm import create_ranker, drop_patches, list_rankers, save_pretrained
from ltrp_timm._text import complain, one_line, say
from ltrp_timm.layers.bridge import fit_channels
from ltrp_timm.rankers import PUBLISHED
from ltrp_timm.scoring.scorer import open_ranker
from ltrp_timm.teacher.layouts import count_blocks, mlp_ratio_of
from ltrp_timm.weights.files import build_and_load, check_keys, read_weights

SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge"}
SIZED = ("patch_embed.proj.weight", "pos_embed", "head.weight")  # their shapes give the sizes


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns 0, or 2 after an error that the user can correct."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("source", metavar="CHECKPOINT", help="weights of a fine-tuned ViT, under plain names")
    add("-o", "--output", required=True, metavar="DIR", help="the new folder")
    text = "a checkpoint of stage 1, a saved ranker, or the name of one without weights"
    add("--ranker", help=f"{text} (default: the one in CHECKPOINT)")
    add("--keep-ratio", type=float, default=0.5, metavar="R", help="(%(default)s)")
    add("--selection", default="mixed", help="(%(default)s, the published one)")
    text = "size of the images, if they are not square"
    add("--img-size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help=text)
    add("--num-heads", type=int, metavar="N", help="attention heads, if the width is unusual")
    add("--license", help="for the model card, such as apache-2.0")
    add("--training-data", help="for the model card")
    try:
        convert(**vars(parser.parse_args(argv)))
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        return complain(one_line(error))
    return 0


def convert(
    source: Any,
    output: Any,
    ranker: Any = None,
    keep_ratio: float = 0.5,
    selection: str = "mixed",
    img_size: Sequence[int] | None = None,
    num_heads: int | None = None,
    **card: str | None,
) -> None:
    """Convert a checkpoint; the arguments are the flags of the script."""
    if os.path.lexists(output):
        raise FileExistsError(f"{output} exists already: choose a new folder.")
    tensors = read_weights(source).tensors
    if (ranker is None) != any(name.startswith(PUBLISHED) for name in tensors):
        holds = "no ranker: pass --ranker" if ranker is None else "a ranker: leave --ranker out"
        raise ValueError(f"{source} holds {holds}.")
    vit = {name: t for name, t in tensors.items() if not name.startswith((PUBLISHED, "mim."))}
    model = make_vit(vit, sizes_of(vit, source, img_size, num_heads), str(source))
    if ranker is None or (Path(ranker).is_file() and ranker not in list_rankers()):
        front = make_ranker(source if ranker is None else ranker)
    else:
        front = open_ranker(ranker, model.patch_embed.patch_size)
    about = {"description": f"Converted from {Path(source).name}."}
    if front.learned:
        about["ranker"] = f"converted from {Path(ranker or source).name}"
    about |= {name: text for name, text in card.items() if text}
    save_pretrained(drop_patches(model, front, keep_ratio, selection), output, about)
    say(f"written {output}")


def sizes_of(
    weights: Mapping[str, Tensor], source: Any, size: Any = None, heads: int | None = None
) -> dict[str, Any]:
    """Arguments of a plain ViT with a class token and a linear head, from the shapes."""
    here = {name: weights[name] for name in SIZED if name in weights}
    check_keys({**dict.fromkeys(SIZED, torch.empty(0)), **here}, here, str(source))
    kernel, table, head = (weights[name] for name in SIZED)
    if (kernel.dim(), table.dim(), head.dim()) != (4, 3, 2) or 0 in kernel.shape:
        raise ValueError(f"{source} is no ViT: its embeddings have other dimensions.")
    patch, count, width = tuple(kernel.shape[2:]), table.shape[1] - 1, kernel.shape[0]
    side = math.isqrt(max(count, 0))
    size = tuple(size or (side * patch[0], side * patch[1]))
    if count < 1 or (size[0] // patch[0]) * (size[1] // patch[1]) != count:
        raise ValueError(f"{source} has {count} positions, which {size} does not fit: --img-size.")
    heads = heads or {1280: 16}.get(width, width // 64 if width in SIZES else None)
    if heads is None:
        raise ValueError(f"{source} has width {width}: pass its number of heads (--num-heads).")
    depth = count_blocks(weights, "blocks", str(source))
    if depth < 1:
        raise ValueError(f"{source} holds no blocks.")
    args = {"img_size": size, "patch_size": patch, "in_chans": kernel.shape[1], "depth": depth}
    return {**args, "embed_dim": width, "num_heads": heads}


def make_ranker(source: Any) -> Any:
    """The ranker in a checkpoint of the authors."""
    tensors = read_weights(source).tensors
    inner = {n.removeprefix(PUBLISHED): t for n, t in tensors.items() if n.startswith(PUBLISHED)}
    sizes = sizes_of(inner or tensors, source)
    name = f"vit_{SIZES[sizes['embed_dim']]}"
    return create_ranker(name, pretrained=source, **sizes)


def make_vit(weights: Mapping[str, Tensor], sizes: Mapping[str, Any], source: str) -> Any:
    """The classifier, with images as in MAE's fine-tuning."""
    size, patch, channels = sizes["img_size"], sizes["patch_size"], sizes["in_chans"]
    name = f"vit_{SIZES.get(sizes['embed_dim'])}_patch{patch[0]}_224"
    name = name if timm.is_model(name) else "vit_base_patch16_224"
    args = {
        "num_classes": weights["head.weight"].shape[0],
        "mlp_ratio": mlp_ratio_of(weights, "blocks", sizes["embed_dim"]),
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights,
        "global_pool": "avg" if "fc_norm.weight" in weights else "token",
    }
    cfg = {  # timm's describes its own weights by this name
        "architecture": name,
        "input_size": (channels, *size),
        "fixed_input_size": True,
        "num_classes": args["num_classes"],
        "mean": fit_channels(IMAGENET_DEFAULT_MEAN, channels),
        "std": fit_channels(IMAGENET_DEFAULT_STD, channels),
        "interpolation": "bicubic",
        "crop_pct": 0.875 if max(size) <= 224 else 1.0,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    make = partial(timm.create_model, name, pretrained_cfg=cfg)
    return build_and_load(make, {**sizes, **args}, weights, source, lambda tensors, _: tensors)


if __name__ == "__main__":
    sys.exit(main())
