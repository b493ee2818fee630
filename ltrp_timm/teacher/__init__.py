"""The teacher: a masked autoencoder (MAE) that predicts hidden patches from visible ones."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.layers import resample_abs_pos_embed
from torch import Tensor

from ltrp_timm.teacher.layouts import config_args, infer_args, to_plain_names, training_args
from ltrp_timm.teacher.mae import (
    SAVED_ARGS,
    Generators,
    MAETeacher,
    PatchTeacher,
    draw_uniform,
    masked_indices,
    num_visible,
    random_visible_indices,
)
from ltrp_timm.weights.files import PREPROCESSOR_NAME, PathLike, build_and_load, read_weights
from ltrp_timm.weights.untrusted import check_saved_args, read_json

__all__ = [
    "Generators",
    "MAETeacher",
    "PatchTeacher",
    "create_teacher",
    "draw_uniform",
    "masked_indices",
    "num_visible",
    "random_visible_indices",
]

DEFAULT_SOURCE = "facebook/vit-mae-base"


def create_teacher(
    source: PathLike = DEFAULT_SOURCE,
    cache_dir: PathLike | None = None,
    token: str | None = None,
    **kwargs: Any,
) -> MAETeacher:
    """Load an MAE, encoder and decoder, frozen.

    It reads files of Hugging Face's ``ViTMAEForPreTraining`` (all key layouts), of MAE's authors
    (``mae_visualize_vit_base.pth``), of LTRP's authors (the MAE in their checkpoints of stage 1),
    and of ``MAETeacher.save``. Without a configuration the numbers of heads must be given, unless
    the sizes are the published ones, and LayerNorm's eps is 1e-6.

    Args:
        source: a Hub id (``facebook/vit-mae-base``, ``-large``, ``-huge``; also with ``hf-hub:`` in
            front or ``@revision`` behind), a folder, a ``.safetensors`` file or a ``.pth``.
        cache_dir: where downloads lie; as in huggingface_hub.
        token: for private repositories; as in huggingface_hub.
        **kwargs: arguments of ``MAETeacher``, which override those of the file. Another
            ``img_size`` resamples the position tables.

    Returns:
        The teacher, in eval mode.

    Raises:
        FileNotFoundError: ``source`` does not exist.
        OSError: the Hub refuses or does not answer; the message says what to do.
        ValueError: ``source`` is not a whole MAE, or its number of heads is unknown.
        RuntimeError: the weights do not fit; the message lists every difference.
    """
    more = {"bare": True, "optional": (PREPROCESSOR_NAME,)}
    found = read_weights(source, **more, cache_dir=cache_dir, token=token)
    text = str(source)
    plain = to_plain_names(found.tensors, text)
    saved = {
        **training_args(found.beside),
        **config_args(found.config or {}, text),
        **_normalisation(found.path),
    }
    args = infer_args(plain, {**check_saved_args(saved, text, SAVED_ARGS), **kwargs}, text)
    return build_and_load(MAETeacher, args, plain, text, _fit_positions)


def _normalisation(path: Path) -> dict[str, Any]:
    """Mean and std from the preprocessor file beside Hugging Face weights."""
    file = path / PREPROCESSOR_NAME
    if not path.is_dir() or not file.is_file():
        return {}
    config = read_json(file)
    if config.get("do_normalize") is False:
        return {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    names = {"mean": "image_mean", "std": "image_std"}
    return {ours: config[theirs] for ours, theirs in names.items() if theirs in config}


def _fit_positions(state_dict: Mapping[str, Tensor], teacher: MAETeacher) -> dict[str, Tensor]:
    """Resample position tables of a square grid to the teacher's."""
    out = dict(state_dict)
    for name in ("pos_embed", "decoder_pos_embed"):
        table, own = out[name], getattr(teacher, name)
        if table.dim() != 3 or table.shape[0] != 1 or table.shape[1] < 2:
            continue  # the table of differences names its shape
        side = math.isqrt(table.shape[1] - 1)
        if table.shape[1] != own.shape[1] and side * side == table.shape[1] - 1:
            grid = list(teacher.grid_size)
            out[name] = resample_abs_pos_embed(table, grid, antialias=False)
    return out
