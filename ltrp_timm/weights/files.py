"""Weights and their configuration: written atomically, read without running code, loaded strictly.

It writes safetensors and JSON. It also reads pickles of weights and repositories of the Hub.
"""

import argparse
import contextlib
import hashlib
import json
import mmap
import os
import pickle
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, Union

import numpy as np
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from ltrp_timm.weights import hub
from ltrp_timm.weights.untrusted import first_line, parse_json, read_json, shapes_of

CONFIG_NAME = "config.json"
PREPROCESSOR_NAME = "preprocessor_config.json"
WEIGHTS_NAME = "model.safetensors"
_INDEX_SUFFIX = ".safetensors.index.json"
WEIGHT_NAMES = (WEIGHTS_NAME, f"model{_INDEX_SUFFIX}", "pytorch_model.bin")  # in this order
PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".tar", ".ckpt")
WEIGHT_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)
_PREFIXES = ("module.", "_orig_mod.", "model.")
_AVERAGES = ("state_dict_ema", "model_ema")  # as timm's train.py and others name them
_METADATA_KEY = "ltrp_timm_config"
_DIGEST_KEY = "ltrp_timm_sha256"

PathLike = Union[str, os.PathLike[str]]


def save_weights(
    directory: PathLike,
    config: Mapping[str, Any],
    state_dict: Mapping[str, Tensor],
    overwrite: bool = False,
) -> Path:
    """Write ``config.json`` and ``model.safetensors`` into a folder, each in one atomic step.

    The header of the safetensors file repeats the configuration, so that the file alone loads.

    Args:
        directory: created if it is missing.
        config: values that JSON can hold.
        state_dict: tensors by name.
        overwrite: replace files of an earlier save.

    Returns:
        The path of the weights file.

    Raises:
        FileExistsError: the folder holds a saved model already and ``overwrite`` is False.
    """
    folder = Path(directory)
    present = [name for name in (CONFIG_NAME, WEIGHTS_NAME) if (folder / name).exists()]
    if present and not overwrite:
        raise FileExistsError(
            f"{folder} already holds {' and '.join(present)}; pass overwrite=True to replace."
        )
    text = json.dumps(dict(config), indent=2) + "\n"
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in state_dict.items()}
    metadata = {"format": "pt", _METADATA_KEY: json.dumps(dict(config))}
    metadata[_DIGEST_KEY] = _digest(tensors, metadata)
    folder.mkdir(parents=True, exist_ok=True)
    content = safetensors.torch.save(tensors, metadata)  # save_file's error for a full disk is odd
    write_atomically(folder / WEIGHTS_NAME, lambda path: path.write_bytes(content))
    write_text(folder / CONFIG_NAME, text)
    return folder / WEIGHTS_NAME


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes private files
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.errno is not None:
            error.filename = str(path)  # a full disk names none, others the temporary file
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Bring a rename to the disk, where the system can open a folder."""
    with contextlib.suppress(OSError, AttributeError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, atomically."""
    write_atomically(path, lambda place: place.write_text(text, encoding="utf-8"))


def locate(
    source: PathLike,
    bare: bool = False,
    optional: Sequence[str] = (),
    cache_dir: PathLike | None = None,
    token: str | None = None,
) -> Path:
    """Find a local file or folder, or download a repository to a folder.

    Args:
        source: a path, or ``hf-hub:owner/name[@revision]``.
        bare: ``owner/name`` without ``hf-hub:`` is a repository too, if it is not a path.
        optional: further files of a repository.
        cache_dir: as in huggingface_hub.
        token: as in huggingface_hub.

    Raises:
        OSError: the path or the repository does not exist, or lacks a file; or see ``hub_errors``.
        ValueError: the text after ``hf-hub:`` cannot name a repository.
    """
    text, path = os.fspath(source), Path(source)
    named = text.startswith(hub.PREFIX)
    if not named and path.exists():
        return path
    found = hub.split_repository(text.removeprefix(hub.PREFIX))
    local = not bare or path.suffix in WEIGHT_SUFFIXES or text[0] in "./"
    if not named and (local or found is None):
        raise FileNotFoundError(f"{source} does not exist.")
    if found is None:
        raise ValueError(f"a repository is hf-hub:owner/name[@revision], got {text!r}.")
    patterns = [CONFIG_NAME, *WEIGHT_NAMES[:2], "model-*.safetensors", *optional]
    cache = None if cache_dir is None else os.fspath(cache_dir)
    try:
        return hub.download(found[0], patterns, WEIGHT_NAMES, found[1], cache, token)
    except OSError as error:
        if named:
            raise
        raise type(error)(f"{source} is no local path, and as a repository: {error}") from error


class Weights(NamedTuple):
    """Weights that were read.

    Attributes:
        tensors: state dict, without the prefixes of wrappers.
        config: the configuration beside them; None when there is none.
        beside: the other entries of a training's checkpoint ("args", "epoch", …).
        keys: the entries of the file in which the weights lay ("state_dict", "model", …).
        path: the local file or folder.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any] | None
    beside: dict[str, Any]
    keys: tuple[str, ...]
    path: Path

    @property
    def averaged(self) -> bool:
        """Whether the file also held other weights than this average of them."""
        return any(key in _AVERAGES for key in self.keys)

    @property
    def by_authors(self) -> bool:
        """Whether the file has the layout of MAE's and LTRP's authors: weights under "model"."""
        return any(key.startswith("model") for key in self.keys)


def read_weights(source: PathLike, **options: Any) -> Weights:
    """Read weights from a file, a folder or a repository. No code of a pickle runs.

    Args:
        source: a ``.safetensors`` file; the ``.safetensors.index.json`` of a sharded one; a pickle
            of tensors (``.pth``, ``.pt``, ``.bin``, ``.tar``, ``.ckpt``), in which the weights may
            lie under "state_dict" or "model", and an average of them, which is preferred as in
            timm, under "state_dict_ema" or "model_ema"; or a folder or repository
            (``hf-hub:owner/name[@revision]``) with ``config.json`` and such a file.
        **options: see ``locate``.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file holds no weights, or its configuration is not a JSON object.
        OSError: the Hub does not provide the files (see ``locate``).
    """
    path = locate(source, **options)
    file, config = path, None
    if path.is_dir():
        there = [path / name for name in WEIGHT_NAMES if (path / name).is_file()]
        missing = [WEIGHTS_NAME] * (not there)
        missing += [CONFIG_NAME] * (not (path / CONFIG_NAME).is_file())
        if missing:
            raise FileNotFoundError(f"{path} holds no {' and no '.join(missing)}.")
        file, config = there[0], read_json(path / CONFIG_NAME)
    elif not path.is_file():  # opening a pipe would wait forever
        raise ValueError(f"{path} is not a regular file.")
    beside: dict[str, Any] = {}
    keys: tuple[str, ...] = ()
    if file.name.endswith(_INDEX_SUFFIX):
        tensors = _read_shards(file)
    elif file.suffix == ".safetensors":
        tensors, metadata = _read_safetensors(file)
        if config is None and _METADATA_KEY in metadata:
            config = parse_json(metadata[_METADATA_KEY], file)
    elif file.suffix in PICKLE_SUFFIXES:
        tensors, beside, keys = _read_pickle(file)
    else:
        kinds = ", ".join((*WEIGHT_SUFFIXES, _INDEX_SUFFIX))
        raise ValueError(f"{path} must be a folder or a file of the kinds {kinds}.")
    return Weights(_without_wrappers(tensors), config, beside, keys, path)


def _without_wrappers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove what DistributedDataParallel, torch.compile and Lightning put before all names."""
    for prefix in _PREFIXES * 2:  # wrappers nest
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _read_shards(index: Path) -> dict[str, Tensor]:
    """Read a model that is stored in several safetensors files."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, Mapping) or not places:
        raise ValueError(f"{index} lists no weights.")
    tensors: dict[str, Tensor] = {}
    for name in sorted({str(name) for name in places.values()}):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{index} must list .safetensors files beside it, got {name!r}.")
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"{index.parent} holds no {name}, which {index.name} lists.")
        tensors.update(_read_safetensors(index.parent / name)[0])
    differing = sorted(tensors.keys() ^ set(places))
    if differing:
        raise ValueError(f"{index} and its files differ in {', '.join(differing[:5])}.")
    return tensors


class _Dtype:
    """Takes the place of ``numpy.dtype`` in a pickle."""

    def __init__(self, code: str, *_: Any) -> None:
        self.code, self.order = code, "<"

    def __setstate__(self, state: Any) -> None:
        self.order = ">" if state[1] == ">" else "<"


def _number(dtype: _Dtype, content: bytes) -> Any:
    """Takes the place of numpy's function that makes a scalar in a pickle."""
    if re.fullmatch(r"[biuf][1248]", dtype.code) is None:
        raise ValueError(f"{dtype.code!r} is no type of number")
    return np.frombuffer(content, dtype.order + dtype.code)[0].item()


# what training scripts leave beside the weights: arguments, and metrics as numbers of numpy
_SAFE = (
    argparse.Namespace,
    (_Dtype, "numpy.dtype"),
    (_number, "numpy.core.multiarray.scalar"),
    (_number, "numpy._core.multiarray.scalar"),
)
_BYTEARRAY = re.compile(rb"c(__builtin__|builtins)\nbytearray\n")  # torch allows it; not for us


def unpickle(path: Path) -> Any:
    """Read a pickle of tensors and plain values onto the CPU; no code runs.

    ValueError, with the reason alone, if it cannot be read or takes far more memory than its size.
    """
    try:
        _check_pickle(path)
        with torch.serialization.safe_globals(list(_SAFE)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files make the unpickler raise anything
        # torch puts advice to run the file's code around the unpickler's own reason
        source = error.__context__ if isinstance(error, pickle.UnpicklingError) else None
        reason = first_line(source or error).partition(". ")[0]
        name = re.search(r"GLOBAL (\S+)", reason)
        if name is not None:
            reason = f"it holds {name[1]}, which is no tensor or number; save the weights alone"
        raise ValueError(f"{reason.rstrip('.?')}.") from error


def _check_pickle(path: Path) -> None:
    """Raise ValueError for a file that is none of ``torch.save``, or grows when it is read."""
    size = path.stat().st_size
    if size == 0:
        raise ValueError("it is empty")
    with open(path, "rb") as file:
        start = file.read(2)
        if start == b"PK":
            texts = _pickles_in(file, size)
        elif start[:1] == b"\x80":
            texts = [mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)]
        else:
            raise ValueError("it was not written by torch.save")
        if any(_BYTEARRAY.search(text) for text in texts):
            raise ValueError("it holds a bytearray, which could have any size")


def _pickles_in(file: IO[bytes], size: int) -> list[Any]:
    """The pickles of a zip of ``torch.save``, which does not compress."""
    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile as error:
        raise ValueError("it is damaged or cut short") from error
    if any(name.endswith("/constants.pkl") for name in archive.namelist()):
        raise ValueError("it is a TorchScript program")
    unpacked = sum(record.file_size for record in archive.infolist())
    if unpacked > size:
        raise ValueError(f"it has {size} bytes but unpacks to {unpacked}")
    return [archive.read(name) for name in archive.namelist() if name.endswith(".pkl")]


def _read_pickle(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], tuple[str, ...]]:
    """Weights, what lies beside them, and the entries in which they lay."""
    try:
        content = unpickle(path)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as a pickle of weights only: {error}") from error
    beside: dict[str, Any] = {}
    keys: tuple[str, ...] = ()
    for key in (*_AVERAGES, "state_dict", "model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            keys += (key,)
            beside.update({str(name): value for name, value in content.items() if name != key})
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path} holds no state dict, but a {type(content).__name__}.")
    others = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(f"{path} holds more than tensors: {', '.join(others[:5])}.")
    odd = [str(name) for name, tensor in content.items() if not _is_plain(tensor)]
    if odd:
        raise ValueError(f"{path} holds tensors that are not plain weights: {', '.join(odd[:5])}.")
    return {str(name): tensor for name, tensor in content.items()}, beside, keys


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is dense, real, not quantised, and stored in full.

    A view that repeats a few numbers could claim any shape.
    """
    whole = tensor.layout is torch.strided and not tensor.is_meta and not tensor.is_quantized
    if not whole or tensor.is_nested or tensor.is_complex():
        return False
    return tensor.untyped_storage().nbytes() >= tensor.nbytes


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # a damaged header may also name types and sizes that torch refuses
        raise ValueError(f"{path} cannot be read as a safetensors file: {error}.") from error
    if _DIGEST_KEY in metadata and metadata[_DIGEST_KEY] != _digest(tensors, metadata):
        raise ValueError(f"{path} is damaged: its content is not what was saved.")
    return tensors, metadata


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over names, shapes, types and bytes: safetensors itself does not detect damage."""
    out = hashlib.sha256(metadata.get(_METADATA_KEY, "").encode())
    return _hash_tensors(out, tensors, "{} {} {}\n")


def ranker_hash(ranker: Any) -> str:
    """Hash what determines a ranker's scores: its kind, its arguments, its weights."""
    out = hashlib.sha256(json.dumps([ranker.name, ranker.config()], sort_keys=True).encode())
    return _hash_tensors(out, ranker.state_dict(), "{} {} {}")


def digest(state_dict: Mapping[str, Tensor]) -> str:
    """Hash weights: equal values give equal digests, whatever file they came from."""
    return _hash_tensors(hashlib.blake2b(digest_size=8), state_dict, "{}{}{}")


def _hash_tensors(out: Any, tensors: Mapping[str, Tensor], line: str) -> str:
    """Add name, type, shape and bytes of each tensor to a hash; saved files fix each ``line``."""
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        out.update(line.format(name, tensor.dtype, list(tensor.shape)).encode())
        out.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return str(out.hexdigest())


def check_keys(
    expected: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    source: str,
    optional: Iterable[str] = (),
) -> None:
    """Compare the tensors of a file with those of a model: name, shape, kind of number, no NaN.

    ``optional`` names may be missing or have another shape, such as a new head's. RuntimeError with
    a table of all differences if a tensor cannot be taken.
    """
    free = set(optional)
    lines = [f"missing     {n}" for n in expected if n not in found and n not in free]
    lines += [f"unexpected  {n}" for n in found if n not in expected and n not in free]
    for name in (name for name in expected if name in found):
        own, new = expected[name], found[name]
        if name not in free and new.shape != own.shape:
            lines.append(f"mismatched  {name}: {list(new.shape)}, the model has {list(own.shape)}")
        if new.is_floating_point() != own.is_floating_point():
            lines.append(f"mismatched  {name}: {new.dtype}, the model has {own.dtype}")
        if not new.is_meta and not new.float().isfinite().all():
            lines.append(f"not finite  {name}")
    if lines:
        raise RuntimeError(f"{source} does not fit the model:\n  " + "\n  ".join(lines))


def load_strictly(module: nn.Module, state_dict: Mapping[str, Tensor], source: str) -> None:
    """Load every tensor of ``module``, or raise RuntimeError with the table of differences."""
    check_keys(module.state_dict(), state_dict, source)
    module.load_state_dict(dict(state_dict))


def build_and_load(
    make: Callable[..., Any],
    args: Mapping[str, Any],
    state_dict: Mapping[str, Tensor],
    source: str,
    fit: Callable[[Mapping[str, Tensor], Any], Mapping[str, Tensor]],
) -> Any:
    """Build a model from saved arguments and load all its weights.

    Shapes are compared with those of the file before memory is allocated. ``fit`` (tensors, model)
    resamples tensors to the model's shapes where possible.

    Raises:
        ValueError: the arguments do not describe a model.
        TypeError: an argument is unknown or of another type.
        RuntimeError: names or shapes differ; the message is a table of all differences.
    """
    sizes = {name: value for name, value in args.items() if name != "device"}
    outline = shapes_of(lambda: make(**sizes), source, _stored_bytes(state_dict))
    check_keys(outline.state_dict(), fit(state_dict, outline), source)
    module = make(**args)
    module.load_state_dict(dict(fit(state_dict, module)))
    return module


def _stored_bytes(state_dict: Mapping[str, Tensor]) -> int:
    """Bytes of all storages, each counted once: tensors may share one."""
    storages = (tensor.untyped_storage() for tensor in state_dict.values())
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
