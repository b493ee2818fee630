"""What lies in a checkpoint: its layout by the names of its tensors, and what its training told."""

import argparse
import dataclasses
import os
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional

from torch import Tensor

from ltrp_timm.weights.files import PREPROCESSOR_NAME, PathLike, read_weights

STAGE_1 = "LTRP stage 1"
STAGE_2 = "fine-tuned ViT"
MAE = "MAE"
HF = "Hugging Face ViTMAE"
RANKER, TEACHER = "score_net.", "mim."  # prefixes of stage 1
_MAE_PARTS = {"decoder_embed", "mask_token", "decoder_blocks", "decoder_norm", "decoder_pred"}
_VIT_PARTS = {"cls_token", "pos_embed", "patch_embed", "blocks"}


@dataclasses.dataclass
class Checkpoint:
    """A file that was read.

    Attributes:
        source: named in the errors.
        name: for the card; no path of this machine.
        path: where it lies.
        weights: its tensors, under its names.
        config: the configuration beside them, if there is one.
        args: the arguments of the training that wrote it.
        beside: names of what else it holds.
        layout: one of the four.
    """

    source: str
    name: str
    path: Path
    weights: Dict[str, Tensor]
    config: Optional[Dict[str, Any]]
    args: Dict[str, Any]
    beside: List[str]
    layout: str

    def part(self, prefix: str) -> Dict[str, Tensor]:
        """The tensors below a prefix, without it."""
        names = [name for name in self.weights if name.startswith(prefix)]
        return {name[len(prefix) :]: self.weights[name] for name in names}

    def told(self, owner: str, name: str, alone: bool) -> Optional[int]:
        """A whole number that the arguments of the training tell of a network, or None.

        Args:
            owner: the network: what its arguments are called after, or lie below.
            name: of the argument.
            alone: there is no other network whose argument that of no prefix could be.
        """
        values = [_as_dict(self.args.get(owner)).get(name), self.args.get(f"{owner}_{name}")]
        values += [self.args.get(name)] if alone else []
        numbers = (v for v in values if isinstance(v, int) and not isinstance(v, bool))
        return next(numbers, None)


def open_checkpoint(
    source: PathLike, cache_dir: Optional[PathLike] = None, token: Optional[str] = None
) -> Checkpoint:
    """Read a file, a folder or a repository.

    Raises:
        FileNotFoundError: nothing is there.
        OSError: the Hub refuses or does not answer.
        ValueError: it cannot be read, or has none of the known layouts.
    """
    found = read_weights(source, True, (PREPROCESSOR_NAME,), cache_dir, token)
    weights, config, beside, _, path = found
    text = os.fspath(source)
    if {"ranker", "teacher", "architecture"} & set(config or {}):
        raise ValueError(f"{text} is in a layout of this library or of timm already.")
    if all(name.startswith("module.") for name in weights):  # of DistributedDataParallel
        weights = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    name = path.name if Path(text).exists() else text
    args = _as_dict(beside.get("args"))
    layout = find_layout(weights, text)
    return Checkpoint(text, name, path, weights, config, args, sorted(beside), layout)


def _as_dict(value: Any) -> Dict[str, Any]:
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    return {str(k): v for k, v in value.items()} if isinstance(value, Mapping) else {}


def find_layout(weights: Mapping[str, Tensor], source: str) -> str:
    """The layout that the names of tensors tell.

    Raises:
        ValueError: none that is known.
    """
    stems = {name.split(".")[0] for name in weights}
    plain = bool(stems & _VIT_PARTS)
    if {"backbone", "ranker"} <= stems:
        raise ValueError(f"{source} is a pruned model of this library already.")
    if not plain and "score_net" in stems:
        return STAGE_1
    if stems & _MAE_PARTS or (not plain and "mim" in stems):
        return MAE
    if stems & {"vit", "embeddings"} or any(n.startswith("decoder.decoder_") for n in weights):
        return HF
    if plain and "head" in stems:
        return STAGE_2
    if plain:
        raise ValueError(
            f"{source} is an encoder only: without a head it is no classifier and no ranker, "
            "without a decoder no teacher."
        )
    first = ", ".join(list(weights)[:3])
    raise ValueError(f"{source} has none of the known layouts; it begins with {first}.")
