"""Weights and their configuration: safetensors and JSON, atomic, loaded strictly.

What is written here is safetensors. What is read may also be a pickle of weights, by a reader that
runs no code, or a repository of the Hugging Face Hub.
"""

import argparse
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Tuple, Union

import huggingface_hub
import safetensors.torch
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

CONFIG_NAME = "config.json"
PREPROCESSOR_NAME = "preprocessor_config.json"
WEIGHTS_NAME = "model.safetensors"
PICKLE_NAME = "pytorch_model.bin"
PICKLE_SUFFIXES = (".pth", ".pt", ".bin")
_METADATA_KEY = "ltrp_timm_config"

PathLike = Union[str, "os.PathLike[str]"]


def save_weights(
    directory: PathLike,
    config: Mapping[str, Any],
    state_dict: Mapping[str, Tensor],
    overwrite: bool = False,
) -> Path:
    """Write ``config.json`` and ``model.safetensors`` into a folder, each in one atomic step.

    The configuration also stands in the header of the safetensors file, so that the file alone can
    be loaded.

    Args:
        directory: made when missing.
        config: what JSON can hold.
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
    tensors = {
        name: tensor.detach().cpu().contiguous().clone() for name, tensor in state_dict.items()
    }
    metadata = {"format": "pt", _METADATA_KEY: json.dumps(dict(config))}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(
        folder / WEIGHTS_NAME,
        lambda path: safetensors.torch.save_file(tensors, path, metadata=metadata),
    )
    write_atomically(folder / CONFIG_NAME, lambda path: path.write_text(text, encoding="utf-8"))
    return folder / WEIGHTS_NAME


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Have ``write`` fill a temporary neighbour, then rename it: ``path`` is whole or untouched."""
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
    finally:
        temporary.unlink(missing_ok=True)


def locate(source: PathLike) -> Path:
    """A local file or folder as it is; a Hub id as the folder that its files are downloaded to.

    Args:
        source: a path, or ``owner/name`` (also ``hf-hub:owner/name`` and ``owner/name@revision``).

    Raises:
        FileNotFoundError: nothing is there, and the Hub has or gives nothing by that name.
    """
    path, name = Path(source), str(source).removeprefix("hf-hub:")
    if path.exists():
        return path
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", name)
    if found is None or path.suffix in (".safetensors", *PICKLE_SUFFIXES) or name[0] in "./":
        raise FileNotFoundError(f"{source} does not exist.")
    files = [CONFIG_NAME, PREPROCESSOR_NAME, WEIGHTS_NAME]
    try:
        folder = _download(found, files)
        if not (folder / WEIGHTS_NAME).is_file():  # older repositories hold a pickle alone
            folder = _download(found, [*files, PICKLE_NAME])
    except (OSError, ValueError, EntryNotFoundError) as error:
        raise FileNotFoundError(
            f"{source} is no local path, and the Hugging Face Hub does not give it: "
            f"{_first_line(error)}"
        ) from error
    return folder


def _download(name: "re.Match[str]", files: List[str]) -> Path:
    repository, revision = name.groups()
    return Path(
        huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=files)
    )


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__


def read_weights(source: PathLike) -> Tuple[Dict[str, Tensor], Optional[Dict[str, Any]]]:
    """Read a folder with weights and their configuration, or one file of weights.

    Args:
        source: folder with ``config.json`` and ``model.safetensors`` (or ``pytorch_model.bin``), a
            ``.safetensors`` file, or a ``.pth``, ``.pt`` or ``.bin`` file: a pickle of tensors, in
            which the weights may lie under "model" or "state_dict".

    Returns:
        State dict, and the configuration (None when the file carries none).

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: what is there cannot be read as weights, or its configuration is no JSON object.
    """
    path = Path(source)
    if path.is_dir():
        weights, config_file = path / WEIGHTS_NAME, path / CONFIG_NAME
        if not weights.is_file() and (path / PICKLE_NAME).is_file():
            weights = path / PICKLE_NAME
        missing = [file.name for file in (weights, config_file) if not file.is_file()]
        if missing:
            raise FileNotFoundError(f"{path} holds no {' and no '.join(missing)}.")
        config = read_json(config_file)
        return (_read_file(weights)[0], config)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    state_dict, metadata = _read_file(path)
    text = metadata.get(_METADATA_KEY)
    return state_dict, None if text is None else _parse_config(text, path)


def read_json(path: Path) -> Dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: it is none.
    """
    return _parse_config(path.read_text(encoding="utf-8", errors="replace"), path)


def _read_file(path: Path) -> Tuple[Dict[str, Tensor], Dict[str, str]]:
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in PICKLE_SUFFIXES:
        return _read_pickle(path), {}
    kinds = ", ".join((".safetensors", *PICKLE_SUFFIXES))
    raise ValueError(f"{path} must be a folder or a file of the kinds {kinds}.")


def _read_pickle(path: Path) -> Dict[str, Tensor]:
    """Weights out of a pickle; the reader knows tensors and plain containers and runs no code."""
    try:
        # training scripts leave their arguments beside the weights
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files make the unpickler raise anything
        raise ValueError(
            f"{path} is no readable pickle of weights alone: {_first_line(error)}"
        ) from error
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path} holds no state dict, but a {type(content).__name__}.")
    others = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(f"{path} holds more than tensors: {', '.join(others[:5])}.")
    return {str(name): tensor for name, tensor in content.items()}


def _read_safetensors(path: Path) -> Tuple[Dict[str, Tensor], Dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is no readable safetensors file: {error}.") from error


def _parse_config(text: str, source: Path) -> Dict[str, Any]:
    try:
        config = json.loads(text)
    except ValueError as error:
        raise ValueError(f"the configuration in {source} is not JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ValueError(
            f"the configuration in {source} must be a JSON object, got {type(config).__name__}."
        )
    return config


def check_keys(
    expected: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    source: str,
    optional: Iterable[str] = (),
) -> None:
    """Compare the tensors of a file with those of a model, by name and shape.

    Args:
        expected: the model's state dict.
        found: the file's, under the model's names.
        source: named in the error.
        optional: names that may be missing or have another shape (a head for another number of
            classes).

    Raises:
        RuntimeError: a table of what is missing, unexpected or of another shape.
    """
    free = set(optional)
    lines: List[str] = []
    lines += [f"missing     {name}" for name in expected if name not in found and name not in free]
    lines += [f"unexpected  {name}" for name in found if name not in expected and name not in free]
    lines += [
        f"mismatched  {name}: {list(found[name].shape)}, the model has {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and name not in free and found[name].shape != tensor.shape
    ]
    if lines:
        raise RuntimeError(f"{source} does not fit the model:\n  " + "\n  ".join(lines))


def load_strictly(module: nn.Module, state_dict: Mapping[str, Tensor], source: str) -> None:
    """Load every tensor of ``module``, or raise RuntimeError with the table of differences."""
    check_keys(module.state_dict(), state_dict, source)
    module.load_state_dict(dict(state_dict))
