"""Checkpoints of a run: whole or the one before, and exact; and its claim on a folder."""

import contextlib
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ltrp_timm._text import one_line
from ltrp_timm.runtime.world import locked
from ltrp_timm.train.logs import LOG_NAME
from ltrp_timm.weights.files import CONFIG_NAME, WEIGHTS_NAME, unpickle, write_atomically

CHECKPOINT_NAME = "checkpoint.pt"
FORMER_NAME = "checkpoint.safetensors"  # of runs that an earlier version began
_KEY = "ltrp_timm_training_state"


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a tree of dicts, lists, tuples, tensors and plain values in one atomic step.

    A run that is killed, or a disk that fills up, at any moment leaves the last good file.

    Raises:
        OSError: The file cannot be written; the former one at ``path`` is intact.
        TypeError: The tree holds what ``read_state`` would refuse.
    """
    buffer = io.BytesIO()
    torch.save({_KEY: dict(state)}, buffer)
    buffer.seek(0)
    unreadable = torch.serialization.get_unsafe_globals_in_checkpoint(buffer)
    if unreadable:
        raise TypeError(f"a checkpoint cannot hold {', '.join(sorted(unreadable))}.")
    try:
        write_atomically(path, lambda file: file.write_bytes(buffer.getbuffer()))
    except OSError as error:
        reason = error.strerror or one_line(error)
        kept = "; the checkpoint before it is whole" if path.exists() else ""
        raise OSError(f"{path} could not be written: {reason}{kept}.") from error


def read_state(path: Path) -> dict[str, Any]:
    """Read what ``save_state`` wrote, onto the CPU; no code is run.

    Raises:
        ValueError: The file is not such a checkpoint.
    """
    try:
        found = unpickle(path)
    except ValueError as error:
        raise ValueError(f"{path} is not a readable checkpoint: {error}") from error
    if not isinstance(found, dict) or _KEY not in found:
        raise ValueError(f"{path} is not a checkpoint of a training run.")
    return found[_KEY]


def check_same(saved: Mapping[str, Any], now: Mapping[str, Any], source: Path) -> None:
    """Compare the configurations of a checkpoint and of a run.

    Raises:
        ValueError: They differ; the message names each differing field with both values.
    """
    saved, now = _flat(saved), _flat(now)
    names = [name for name in {**saved, **now} if saved.get(name) != now.get(name)]
    if names:
        lines = [f"{name} ({saved.get(name)} there, {now.get(name)} here)" for name in names]
        raise ValueError(f"{source} is of another configuration: {', '.join(lines)}.")


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields by dotted names; JSON makes tuples and lists equal."""
    out: dict[str, Any] = {}
    for name, value in json.loads(json.dumps(dict(config))).items():
        nested = isinstance(value, dict)
        out |= _flat(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return out


def check_folder(folder: Path, resume: bool) -> None:
    """Check that a run may use an output folder.

    Args:
        folder: New or empty, or with a checkpoint to ``resume``.
        resume: Whether a run in the folder is to be continued.

    Raises:
        FileExistsError: The folder holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is not a folder.")
    if resume and (folder / CHECKPOINT_NAME).exists():
        return
    if resume and (folder / FORMER_NAME).exists():
        raise FileExistsError(
            f"{folder} holds a run of an earlier version of ltrp-timm, which cannot be resumed; "
            "finish it with that version, or choose another folder."
        )
    names = (CHECKPOINT_NAME, FORMER_NAME, CONFIG_NAME, WEIGHTS_NAME, LOG_NAME)
    present = [name for name in names if (folder / name).exists()]
    if present:
        known = CHECKPOINT_NAME in present
        hint = "resume='auto' continues it" if known else "choose another folder"
        raise FileExistsError(f"{folder} already holds {' and '.join(present)}; {hint}.")


@contextlib.contextmanager
def claimed(folder: Path, resume: bool) -> Iterator[None]:
    """Lock an output folder for this run, if ``check_folder`` allows it and no other run holds it.

    Raises:
        BlockingIOError: Another process writes to the folder.
    """
    if not folder.is_dir():
        check_folder(folder, resume)
    with locked(folder):
        check_folder(folder, resume)
        for orphan in folder.glob(".*.tmp"):  # of a write that was cut off
            orphan.unlink(missing_ok=True)
        yield
