"""Checkpoints that can be trusted: whole or the one before, and exact.

One safetensors file holds all of it: tensors as such, all else as JSON in its header. It is written
to a neighbour, brought to the disk and renamed, so that a run killed or a disk filled at any moment
leaves the last good one.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ltrp_timm._text import one_line
from ltrp_timm.weights.files import write_atomically

CHECKPOINT_NAME = "checkpoint.safetensors"
LOCK_NAME = ".lock"
_KEY = "ltrp_timm_training_state"


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a tree of dicts, lists, tuples, tensors and what JSON can hold, in one atomic step.

    Raises:
        OSError: it cannot be written; what was at ``path`` is still there.
        TypeError: the tree holds something else.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_encode(dict(state), tensors))
    blob = safetensors.torch.save(tensors, metadata={_KEY: text})
    try:
        write_atomically(path, lambda file: file.write_bytes(blob))
        _sync_folder(path.parent)
    except OSError as error:
        reason = error.strerror or one_line(error)
        kept = "; the checkpoint before it is whole" if path.exists() else ""
        raise OSError(f"{path} could not be written: {reason}{kept}.") from error


def read_state(path: Path) -> dict[str, Any]:
    """Read what ``save_state`` has written; no code is run.

    Raises:
        ValueError: it is no such file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no readable checkpoint: {one_line(error)}.") from error
    if text is None:
        raise ValueError(f"{path} is no checkpoint of a training run.")
    state: dict[str, Any] = _decode(json.loads(text), tensors)
    return state


def _encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A tree as JSON; its tensors go to ``tensors`` and leave their number."""
    if isinstance(value, Tensor):
        tensors[str(len(tensors))] = value.detach().cpu().contiguous().clone()
        return {"tensor": str(len(tensors) - 1)}
    if isinstance(value, Mapping):  # pairs: keys may be numbers
        return {"dict": [[key, _encode(item, tensors)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_encode(item, tensors) for item in value]}
    if isinstance(value, list):
        return [_encode(item, tensors) for item in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}: {value!r}.")


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "tuple" in value:
        return tuple(_decode(item, tensors) for item in value["tuple"])
    return {key: _decode(item, tensors) for key, item in value["dict"]}


def _sync_folder(folder: Path) -> None:
    """Bring a rename to the disk, where the system lets a folder be opened."""
    with contextlib.suppress(OSError, AttributeError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def check_same(saved: Mapping[str, Any], now: Mapping[str, Any], source: Path) -> None:
    """Compare the configurations of a checkpoint and of a run.

    Raises:
        ValueError: they differ; each field that does is named with both values.
    """
    saved, now = _flat(saved), _flat(now)
    names = [name for name in {**saved, **now} if saved.get(name) != now.get(name)]
    if names:
        lines = [f"{name} ({saved.get(name)} there, {now.get(name)} here)" for name in names]
        raise ValueError(f"{source} is of another configuration: {', '.join(lines)}.")


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in json.loads(json.dumps(dict(config))).items():
        if isinstance(value, dict):
            out.update(_flat(value, f"{prefix}{name}."))
        else:
            out[prefix + name] = value
    return out


def digest(state_dict: Mapping[str, Tensor]) -> str:
    """A short name for weights: equal for equal values, whatever file they came from."""
    import hashlib

    total = hashlib.blake2b(digest_size=8)
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().cpu().contiguous()
        total.update(f"{name}{tensor.dtype}{list(tensor.shape)}".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; the system lets go of it however the process ends.

    Raises:
        FileExistsError: another process holds it.
    """
    with open(folder / LOCK_NAME, "a+b") as file:
        if not _lock(file):
            raise FileExistsError(f"{folder} is in use by another run.")
        for orphan in folder.glob(".*.tmp"):  # of a write that was cut off
            orphan.unlink(missing_ok=True)
        yield


def _lock(file: BinaryIO) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError:
            return False
        return True
    try:  # a lock of the process: the loader's workers do not inherit it
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
