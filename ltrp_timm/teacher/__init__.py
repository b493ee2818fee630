"""The teacher: a masked autoencoder (MAE) that shows what the rest of an image tells of a patch."""

from pathlib import Path
from typing import Any, Dict

from timm.layers import resample_abs_pos_embed
from torch import Tensor

from ltrp_timm.checkpoints import (
    PREPROCESSOR_NAME,
    PathLike,
    load_strictly,
    locate,
    read_json,
    read_weights,
)
from ltrp_timm.teacher.layouts import config_args, infer_args, to_plain_names
from ltrp_timm.teacher.mae import MAETeacher
from ltrp_timm.teacher.masking import (
    Generators,
    draw_uniform,
    masked_indices,
    num_visible,
    random_visible_indices,
)

__all__ = [
    "Generators",
    "MAETeacher",
    "create_teacher",
    "draw_uniform",
    "masked_indices",
    "num_visible",
    "random_visible_indices",
]

DEFAULT_SOURCE = "facebook/vit-mae-base"


def create_teacher(source: PathLike = DEFAULT_SOURCE, **kwargs: Any) -> MAETeacher:
    """Load an MAE, encoder and decoder, frozen.

    Read are: files of the Hugging Face class ``ViTMAEForPreTraining`` (both key layouts), of the
    authors (``mae_visualize_vit_base.pth``), of authors' LTRP checkpoints (their MAE), and what
    ``MAETeacher.save`` writes. The numbers of heads stand in a configuration; where there is none
    they are known for the published sizes and asked for otherwise. LayerNorm's eps is the
    configuration's, so that the pixels are the same as there; 1e-6 without one.

    Args:
        source: a Hub id (``facebook/vit-mae-base``, ``-large``, ``-huge``), a folder, a
            ``.safetensors`` file or a ``.pth``.
        **kwargs: arguments of ``MAETeacher``; they override what the file says. Another
            ``img_size`` resamples the position tables.

    Returns:
        The teacher, in eval mode.

    Raises:
        FileNotFoundError: nothing is at ``source``.
        ValueError: what is there is no whole MAE, or does not tell its number of heads.
        RuntimeError: the weights do not fit; every name that is missing or too much is listed.
    """
    path = locate(source)
    state_dict, config = read_weights(path)
    state_dict = to_plain_names(state_dict, str(source))
    args = {**config_args(config or {}, str(source)), **_normalisation(path), **kwargs}
    teacher = MAETeacher(**infer_args(state_dict, args, str(source)))
    load_strictly(teacher, _fit_positions(state_dict, teacher), str(source))
    return teacher


def _normalisation(path: Path) -> Dict[str, Any]:
    """Mean and std from the preprocessor's file that lies beside Hugging Face weights."""
    file = path / PREPROCESSOR_NAME
    if not path.is_dir() or not file.is_file():
        return {}
    config = read_json(file)
    if config.get("do_normalize") is False:
        return {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    names = {"mean": "image_mean", "std": "image_std"}
    return {ours: config[theirs] for ours, theirs in names.items() if theirs in config}


def _fit_positions(state_dict: Dict[str, Tensor], teacher: MAETeacher) -> Dict[str, Tensor]:
    """Resample position tables of a square grid to the teacher's."""
    out = dict(state_dict)
    for name in ("pos_embed", "decoder_pos_embed"):
        table, own = out[name], getattr(teacher, name)
        side = round((table.shape[1] - 1) ** 0.5)
        if table.shape[1] != own.shape[1] and side * side == table.shape[1] - 1:
            grid = list(teacher.grid_size)
            out[name] = resample_abs_pos_embed(table, grid, antialias=False)
    return out
