"""Names of MAE weights in different files, and the sizes that their shapes give."""

import argparse
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ltrp_timm.weights.untrusted import MAX_DEPTH, check_saved_args

# Hugging Face -> plain names; what transformers writes today has `decoder.decoder_encoder.layer`
_RENAMES: tuple[tuple[str, str], ...] = (
    (r"^(?:vit\.)?embeddings\.cls_token$", "cls_token"),
    (r"^(?:vit\.)?embeddings\.position_embeddings$", "pos_embed"),
    (r"^(?:vit\.)?embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(?:vit\.)?layernorm\.", "norm."),
    (r"^(?:vit\.)?(?:encoder\.layer|layers)\.(?=\d)", "blocks."),
    (r"^decoder\.(?:decoder_encoder\.layer|decoder_layers)\.(?=\d)", "decoder_blocks."),
    (r"^decoder\.(?=mask_token$|decoder_)", ""),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.attention\.(?:attention\.)?([qkv])(?:uery|ey|alue|_proj)\.", r".attn.\1."),
)
_PARTS = ("cls_token", "pos_embed", "patch_embed", "blocks", "norm")
_DECODER_PARTS = (
    "decoder_embed",
    "mask_token",
    "decoder_pos_embed",
    "decoder_blocks",
    "decoder_norm",
    "decoder_pred",
)
_TENSORS = ("cls_token", "pos_embed", "mask_token", "decoder_pos_embed")  # parts of one tensor
_HEADS = {768: 12, 1024: 16, 1280: 16}  # encoders of the published sizes
_DECODER_HEADS = {512: 16}
_CONFIG_ARGS = {
    "num_heads": "num_attention_heads",
    "decoder_num_heads": "decoder_num_attention_heads",
    "img_size": "image_size",
    "norm_eps": "layer_norm_eps",
    "norm_pix_loss": "norm_pix_loss",
}


def to_plain_names(state_dict: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Weights of any known layout -> the authors' names, which are those of ``MAETeacher``.

    ValueError if a part of the MAE is missing, or a tensor is present in two layouts.
    """
    inner = {name[4:]: t for name, t in state_dict.items() if name.startswith("mim.")}
    renamed = {name: name for name in inner or state_dict}
    for pattern, replacement in _RENAMES:
        renamed = {name: re.sub(pattern, replacement, new) for name, new in renamed.items()}
    if len(set(renamed.values())) < len(renamed):
        raise ValueError(f"{source} holds some weights of the MAE twice, in two layouts.")
    out = _fuse_qkv({renamed[name]: t for name, t in (inner or state_dict).items()})
    present = {name.split(".")[0] for name in out} - {name for name in _TENSORS if name not in out}
    missing = [part for part in (*_PARTS, *_DECODER_PARTS) if part not in present]
    if missing:
        kind = "is an encoder only" if set(_DECODER_PARTS) <= set(missing) else "is not a whole MAE"
        raise ValueError(
            f"{source} {kind}: it lacks {', '.join(missing)}. A teacher needs encoder and decoder, "
            "as in facebook/vit-mae-base or mae_visualize_vit_base.pth."
        )
    return out


def _fuse_qkv(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Separate query, key and value -> one qkv; incomplete triples keep their names."""
    out: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        stem, _, part = name.rpartition(".")
        group = [f"{stem[:-1]}{letter}.{part}" for letter in "qkv"]
        if not re.search(r"\.attn\.[qkv]$", stem) or not all(each in state_dict for each in group):
            out[name] = tensor
        elif stem.endswith("q"):
            out[f"{stem[:-1]}qkv.{part}"] = torch.cat([state_dict[each] for each in group])
    return out


def config_args(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """A saved configuration, ours or Hugging Face's -> arguments of ``MAETeacher``."""
    if config.get("teacher") == "mae":
        return check_saved_args(config.get("args"), source)
    if config.get("model_type") != "vit_mae":
        return {}
    activation = config.get("hidden_act", "gelu")
    if activation != "gelu":
        raise ValueError(f"{source} uses hidden_act={activation!r}; only 'gelu' is supported.")
    defaults = {"norm_eps": 1e-12, "norm_pix_loss": False}  # the defaults of that class
    stated = {ours: config[name] for ours, name in _CONFIG_ARGS.items() if name in config}
    return {**defaults, **stated}


def training_args(beside: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a training that lie beside its weights -> arguments of ``MAETeacher``."""
    args = beside.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    normalised = args.get("norm_pix_loss") if isinstance(args, Mapping) else None
    return {"norm_pix_loss": normalised} if isinstance(normalised, bool) else {}


def infer_args(
    state_dict: Mapping[str, Tensor], given: Mapping[str, Any], source: str
) -> dict[str, Any]:
    """Complete the arguments of ``MAETeacher`` from the shapes; ``given`` ones take precedence.

    ValueError if a shape does not fit an MAE, or an argument is neither in shapes nor given.
    """
    kernel, table = state_dict.get("patch_embed.proj.weight"), state_dict["pos_embed"]
    embed = state_dict.get("decoder_embed.weight")
    if kernel is None or kernel.dim() != 4 or table.dim() != 3 or embed is None or embed.dim() != 2:
        raise ValueError(f"{source} is not an MAE: its embeddings have other dimensions.")
    width, decoder_width = kernel.shape[0], embed.shape[0]
    args: dict[str, Any] = {
        "patch_size": tuple(kernel.shape[2:]),
        "in_chans": kernel.shape[1],
        "embed_dim": width,
        "depth": count_blocks(state_dict, "blocks", source),
        "mlp_ratio": mlp_ratio_of(state_dict, "blocks", width),
        "decoder_embed_dim": decoder_width,
        "decoder_depth": count_blocks(state_dict, "decoder_blocks", source),
        "decoder_mlp_ratio": mlp_ratio_of(state_dict, "decoder_blocks", decoder_width),
        "qkv_bias": "blocks.0.attn.qkv.bias" in state_dict,
        **given,
    }
    side = math.isqrt(max(table.shape[1] - 1, 0))
    if side * side == table.shape[1] - 1:
        args.setdefault("img_size", tuple(side * p for p in kernel.shape[2:]))
    known = {"num_heads": _HEADS.get(width), "decoder_num_heads": _DECODER_HEADS.get(decoder_width)}
    for name, heads in known.items():
        if heads is not None:
            args.setdefault(name, heads)
    unknown = [name for name in ("img_size", *known) if name not in args]
    if unknown:
        raise ValueError(
            f"{source} does not state {' and '.join(unknown)}: pass them as arguments."
        )
    return args


def count_blocks(state_dict: Mapping[str, Tensor], stem: str, source: str) -> int:
    """Number of blocks in names like ``blocks.11.…``; ValueError if a number is too large."""
    found = (re.match(rf"{stem}\.([0-9]{{1,18}})\.", name) for name in state_dict)
    count = 1 + max((int(match[1]) for match in found if match), default=-1)
    if count > max(len(state_dict), 1) or count > MAX_DEPTH:
        raise ValueError(
            f"{source} names {stem}.{count - 1}, but holds {len(state_dict)} tensors in all."
        )
    return count


def mlp_ratio_of(state_dict: Mapping[str, Tensor], stem: str, width: int) -> float:
    """Hidden width of the MLPs over the width of the tokens, from the first block."""
    weight = state_dict.get(f"{stem}.0.mlp.fc1.weight")
    if weight is None or weight.dim() != 2 or width < 1:
        return 4.0
    return weight.shape[0] / width
