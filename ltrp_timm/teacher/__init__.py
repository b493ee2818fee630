"""The teacher: a masked autoencoder (MAE) that shows what the rest of an image tells of a patch."""

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.layers import resample_abs_pos_embed
from torch import Tensor

from ltrp_timm.teacher.layouts import config_args, infer_args, to_plain_names
from ltrp_timm.teacher.mae import MAETeacher
from ltrp_timm.teacher.masking import (
    Generators,
    draw_uniform,
    masked_indices,
    num_visible,
    random_visible_indices,
)
from ltrp_timm.weights.files import (
    PREPROCESSOR_NAME,
    PathLike,
    build_and_load,
    read_weights,
)
from ltrp_timm.weights.untrusted import check_saved_args, read_json

__all__ = [
    "Generators",
    "MAETeacher",
    "create_teacher",
    "draw_uniform",
    "masked_indices",
    "num_visible",
    "random_visible_indices",
    "teacher_of",
]

DEFAULT_SOURCE = "facebook/vit-mae-base"
_SAVED = set(inspect.signature(MAETeacher).parameters) - {"frozen", "device", "dtype"}


def create_teacher(
    source: PathLike = DEFAULT_SOURCE,
    cache_dir: PathLike | None = None,
    token: str | None = None,
    **kwargs: Any,
) -> MAETeacher:
    """Load an MAE, encoder and decoder, frozen.

    Read are: files of the Hugging Face class ``ViTMAEForPreTraining`` (both key layouts), of the
    authors (``mae_visualize_vit_base.pth``), of authors' LTRP checkpoints (their MAE), and what
    ``MAETeacher.save`` writes. The numbers of heads stand in a configuration; where there is none
    they are known for the published sizes and asked for otherwise. LayerNorm's eps is the
    configuration's, so that the pixels are the same as there; 1e-6 without one.

    Args:
        source: a Hub id (``facebook/vit-mae-base``, ``-large``, ``-huge``; also with ``hf-hub:`` in
            front or ``@revision`` behind), a folder, a ``.safetensors`` file or a ``.pth``.
        cache_dir: where downloads lie; as in huggingface_hub.
        token: for private repositories; as in huggingface_hub.
        **kwargs: arguments of ``MAETeacher``; they override what the file says. Another
            ``img_size`` resamples the position tables.

    Returns:
        The teacher, in eval mode.

    Raises:
        FileNotFoundError: nothing is at ``source``.
        OSError: the Hub refuses or does not answer; the message says what to do.
        ValueError: what is there is no whole MAE, or does not tell its number of heads.
        RuntimeError: the weights do not fit; every name that is missing or too much is listed.
    """
    found = read_weights(source, True, (PREPROCESSOR_NAME,), cache_dir, token)
    return teacher_of(found.tensors, found.config, found.path, str(source), kwargs)


def teacher_of(
    state_dict: Mapping[str, Tensor],
    config: Mapping[str, Any] | None,
    path: Path,
    source: str,
    given: Mapping[str, Any],
) -> MAETeacher:
    """The teacher that lies in weights of any layout; errors as in ``create_teacher``.

    Args:
        state_dict: the weights, under the names of their file.
        config: the configuration beside them, if there is one.
        path: folder or file that they are from.
        source: named in the errors.
        given: arguments of ``MAETeacher`` that override what the file says.
    """
    plain = to_plain_names(state_dict, source)
    saved = {**config_args(config or {}, source), **_normalisation(path)}
    args = infer_args(plain, {**check_saved_args(saved, source, _SAVED), **given}, source)
    teacher: MAETeacher = build_and_load(MAETeacher, args, plain, source, _fit_positions)
    return teacher


def _normalisation(path: Path) -> dict[str, Any]:
    """Mean and std from the preprocessor's file that lies beside Hugging Face weights."""
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
            continue  # named with its shape in the table of differences
        side = math.isqrt(table.shape[1] - 1)
        if table.shape[1] != own.shape[1] and side * side == table.shape[1] - 1:
            grid = list(teacher.grid_size)
            out[name] = resample_abs_pos_embed(table, grid, antialias=False)
    return out
