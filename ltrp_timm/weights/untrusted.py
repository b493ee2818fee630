"""Checks of saved configurations. They may be hostile: they are read as data and bounded."""

import json
import math
import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

MAX_BYTES = 4 * 2**20  # class names of the largest data sets take 1 MiB
_MAX_INT = 2**31
MAX_DEPTH = 1024  # blocks are built one by one
_MAX_ITEMS = 64
_GROWTH = 4  # weights of one byte fill a model of float32
_SPARE = 2**30  # for a new head, other channels, position tables of larger images
# only the caller may name files, repositories and devices
NEVER_SAVED = (
    "ranker_weights",
    "checkpoint_path",
    "cache_dir",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_model_args",
    "device",
    "dtype",
)
_WORD = re.compile(r"[\w +,.-]{0,128}")  # no separators of paths, drives or sources


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; ValueError if it is too large or something else."""
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"the configuration in {path} has {size} bytes, more than {MAX_BYTES}.")
    return parse_json(path.read_text(encoding="utf-8", errors="replace"), path)


def parse_json(text: str, source: object) -> dict[str, Any]:
    """Read a JSON object from a text; ValueError if it is something else."""
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the configuration in {source} is not JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ValueError(
            f"the configuration in {source} must be a JSON object, got {type(config).__name__}."
        )
    return config


def check_saved_args(
    args: Any, source: object, known: Collection[str] | None = None, refused: Collection[str] = ()
) -> dict[str, Any]:
    """Check saved arguments of a model before anything is built from them; returns them.

    Args:
        args: the arguments in the file.
        source: what the errors call the file.
        known: all valid names; None accepts any name.
        refused: names that a saved configuration must not set.

    Raises:
        ValueError: ``args`` is not a mapping, a name is unknown or refused, a text could be a path,
            or a number is not finite or too large for a model.
    """
    if not isinstance(args, Mapping):
        kind = type(args).__name__
        raise ValueError(f"the saved arguments in {source} must be a JSON object, got {kind}.")
    for name, value in args.items():
        if name in refused or (known is not None and name not in known):
            why = f"; known are {', '.join(sorted(known))}" if known is not None else ""
            raise ValueError(f"the configuration in {source} must not set {name!r}{why}.")
        fine = _is_statistic(name, value) if name in ("mean", "std") else True
        if not fine or not _harmless(str(name), value, 0):
            text = repr(value)
            shown = text if len(text) <= 80 else f"{text[:80]}…"
            raise ValueError(f"the configuration in {source} sets {name!r} to {shown}: refused.")
    return dict(args)


def _is_statistic(name: str, value: Any) -> bool:
    """Whether a value can be a mean or standard deviation of pixels, one number per channel."""
    if value is None:
        return True
    found = isinstance(value, (list, tuple)) and value and {*map(type, value)} <= {int, float}
    return bool(found) and (name == "mean" or min(value) > 0)


def _harmless(name: str, value: Any, level: int) -> bool:
    if value is None or isinstance(value, bool):
        return True
    if isinstance(value, int):
        return abs(value) <= (MAX_DEPTH if "depth" in name else _MAX_INT)
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, str):
        return _WORD.fullmatch(value) is not None and ".." not in value
    if level > 2 or not isinstance(value, (list, tuple, Mapping)) or len(value) > _MAX_ITEMS:
        return False
    if isinstance(value, Mapping):
        return all(_harmless(str(key), item, level + 1) for key, item in value.items())
    return all(_harmless(name, item, level + 1) for item in value)


def shapes_of(
    make: Callable[[], nn.Module], source: object, weights: int | None = None
) -> nn.Module:
    """Build a model of a saved configuration on the meta device, without memory for its weights.

    ``weights`` is the size of the file's weights in bytes, if it is known.

    Raises:
        ValueError: the configuration does not describe a model, or one that is far larger than its
            weights or than the memory of this machine.
        TypeError: an argument is unknown or of another type.
    """
    try:
        with torch.device("meta"):
            model = make()
    except (TypeError, ValueError) as error:  # they name the argument, not the file
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{source}: {error}") from error
    except Exception as error:  # constructors raise anything for impossible sizes
        reason = first_line(error)
        raise ValueError(
            f"the configuration in {source} does not describe a model: {reason}"
        ) from error
    tensors = [*model.parameters(), *model.buffers()]
    size = sum(t.numel() * t.element_size() for t in tensors)
    text = f"the configuration in {source} describes a model of {size / 2**30:.0f} GiB; "
    if weights is not None and size > _GROWTH * weights + _SPARE:
        raise ValueError(f"{text}its weights have {weights / 2**30:.1f}.")
    if size > _memory():
        raise ValueError(f"{text}this machine has {_memory() / 2**30:.0f}.")
    return model


def first_line(error: BaseException) -> str:
    """The first line of an error's text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _memory() -> float:
    """Bytes of memory of this machine; infinite if they are unknown."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return math.inf
