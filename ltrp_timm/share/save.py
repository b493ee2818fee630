"""Save a model or a ranker in timm's layout, and push it to the Hugging Face Hub."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.models._hub import save_config_for_hf
from torch import nn

from ltrp_timm.models.ltrp import LTRPModel
from ltrp_timm.models.timm_interface import pixels_per_token
from ltrp_timm.rankers import list_rankers, ranker_class
from ltrp_timm.share.cards import UNNAMED, check_card, write_card
from ltrp_timm.weights import hub
from ltrp_timm.weights.files import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    PathLike,
    read_weights,
    save_weights,
    write_text,
)
from ltrp_timm.weights.untrusted import first_line

CARD_NAME = "README.md"
FILES = (CONFIG_NAME, WEIGHTS_NAME, CARD_NAME)


def save_pretrained(
    model: nn.Module,
    directory: PathLike,
    model_card: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write ``config.json``, ``model.safetensors`` and a model card ``README.md`` into a folder.

    A model comes back by ``timm.create_model("local-dir:…", pretrained=True)``, a ranker by
    ``create_ranker(name, pretrained=folder)``.

    Args:
        model: an LTRPModel with a ranker of ``list_rankers()``, or such a ranker alone.
        directory: made when missing.
        model_card: what the card shall say: "license", "training_data", "ranker" (where its weights
            come from), "base_model" (the repository it was trained from), "description", and
            "measured": ``{keep_ratio: {what: value}}``, or "results": ``{who: {what: value}}`` with
            "results_note".
        overwrite: replace these three files where the folder holds them.

    Returns:
        The folder.

    Raises:
        TypeError: neither a pruned model nor a ranker.
        ValueError: a ranker without a name or without trained weights, or a wrong ``model_card``.
        FileExistsError: the folder holds one of the files and ``overwrite`` is False.

    >>> import tempfile, timm
    >>> folder = tempfile.mkdtemp()
    >>> save_pretrained(timm.create_model("ltrp_vit_tiny", depth=1), folder).name in folder
    True
    """
    return _save(model, Path(directory), model_card, overwrite, UNNAMED)


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    model_card: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> str:
    """Put a model or a ranker on the Hub, in one commit; the repository is created when missing.

    It comes back by ``timm.create_model("hf-hub:owner/name", pretrained=True)``, a ranker by
    ``create_ranker(name, pretrained="hf-hub:owner/name")``. A card that the repository has stays,
    unless ``overwrite``.

    Args:
        model: as in ``save_pretrained``.
        repo_id: ``owner/name``; a name alone is one of yours.
        private: whether a new repository is hidden.
        token: with the right to write; None takes that of ``hf auth login`` or HF_TOKEN.
        revision: the branch, created when missing; None is the main branch.
        model_card: as in ``save_pretrained``.
        overwrite: replace the files that the branch holds.

    Returns:
        The name to load it by: ``hf-hub:owner/name``, with ``@revision`` when given.

    Raises:
        TypeError: neither a pruned model nor a ranker.
        ValueError: a ranker without a name or without trained weights, or a wrong ``model_card``.
        FileExistsError: the branch holds such files and ``overwrite`` is False.
        OSError: the Hub refuses or does not answer; the message says what to do.
    """
    with tempfile.TemporaryDirectory() as folder:
        _save(model, Path(folder), model_card, True, repo_id)
        return _upload(Path(folder), repo_id, private, token, revision, overwrite)


def push_folder(
    directory: PathLike,
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
) -> str:
    """Put what ``save_pretrained`` wrote on the Hub; arguments and errors as in ``push_to_hub``.

    Raises:
        FileNotFoundError: the folder lacks a file.
        ValueError: a file cannot be read as what it should be.
    """
    folder = Path(directory)
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} holds no {' and no '.join(missing)}: write it with save_pretrained or "
            "`ltrp-timm save`."
        )
    read_weights(folder)  # nothing damaged goes out
    card = (folder / CARD_NAME).read_text(encoding="utf-8", errors="replace")
    with tempfile.TemporaryDirectory() as staged:
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            os.symlink((folder / name).resolve(), Path(staged) / name)
        text = card.replace(f"hf-hub:{UNNAMED}", f"hf-hub:{repo_id}")
        (Path(staged) / CARD_NAME).write_text(text, encoding="utf-8")
        return _upload(Path(staged), repo_id, private, token, revision, overwrite)


def _upload(
    folder: Path,
    repo_id: str,
    private: bool | None,
    token: str | None,
    revision: str | None,
    overwrite: bool,
) -> str:
    name = hub.upload(
        folder, FILES, repo_id, private, token, revision, overwrite, keep=(CARD_NAME,)
    )
    return f"{hub.PREFIX}{name}" + (f"@{revision}" if revision else "")


def _save(
    model: Any,
    folder: Path,
    model_card: Mapping[str, Any] | None,
    overwrite: bool,
    repo_id: str,
) -> Path:
    told = check_card(model_card)
    whole = isinstance(model, LTRPModel)
    ranker = model.ranker if isinstance(model, LTRPModel) else model
    check_ranker(ranker, whole)
    card = {**_origin(ranker), **told}
    config = model_config(model) if whole else {"ranker": ranker.name, "args": ranker.config()}
    text = _model_text(model, card, repo_id) if whole else _ranker_text(model, card, repo_id)
    if (folder / CARD_NAME).exists() and not overwrite:
        raise FileExistsError(
            f"{folder} already holds {CARD_NAME}; pass overwrite=True (--overwrite) to replace."
        )
    save_weights(folder, config, model.state_dict(), overwrite=overwrite)
    write_text(folder / CARD_NAME, text)
    return folder


def check_ranker(ranker: Any, whole: bool) -> None:
    """Check that a ranker can be saved: with a whole model, or alone.

    Raises:
        TypeError: alone, and no ranker of this library.
        ValueError: a ranker without a name, without weights, or without trained ones.
    """
    name = getattr(ranker, "name", None)
    if name not in list_rankers() or not isinstance(ranker, ranker_class(str(name))):
        if not whole:
            kind = type(ranker).__name__
            raise TypeError(f"expected an LTRPModel or a ranker of this library, got {kind}.")
        raise ValueError(
            f"the ranker {type(ranker).__name__} cannot be saved: it is none of "
            f"{', '.join(list_rankers())}. Save model.restore() and the ranker on their own."
        )
    if not whole and not ranker.learned:
        raise ValueError(f"the {name} ranker has no weights: its name is all that one needs.")
    if ranker.learned and not ranker.trained:
        raise ValueError(
            f"the {name} ranker has no trained weights, its choice means nothing: train it first "
            "(a training of your own sets ranker.trained = True)."
        )


def model_config(model: Any) -> dict[str, Any]:
    """timm's configuration of a model, ours or a plain one, as it is now.

    Raises:
        ValueError: it was built of something that cannot be written down.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / CONFIG_NAME
        args = dict(model._model_args) if isinstance(model, LTRPModel) else None
        try:
            save_config_for_hf(model, str(path), model_args=args)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the model cannot be saved: {first_line(error)}") from error
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config


def _model_text(model: LTRPModel, card: dict[str, Any], repo_id: str) -> str:
    args, cfg = model._model_args, model.pretrained_cfg or {}
    backbone = (getattr(model.backbone, "pretrained_cfg", None) or {}).get("architecture")
    rows, cols = pixels_per_token(model.backbone)
    height, width = _image_size(model)
    facts: list[tuple[str, str]] = [
        ("Backbone", f"`{backbone}`"),
        ("Ranker", f"`{model.ranker.name}`"),
        ("Selection", f"`{model.selection}`" + _options(args.get("selection_args"))),
        ("Classes", str(model.num_classes)),
        (
            "Images",
            f"{model.in_chans} × {height} × {width}, mean {cfg.get('mean')}, std {cfg.get('std')}",
        ),
    ]
    usage = (
        "import timm, ltrp_timm  # the import registers the models\n\n"
        f'model = timm.create_model("{hub.PREFIX}{repo_id}", pretrained=True).eval()\n'
        f"model.keep_ratio = {model.keep_ratio:g}  # any in (0, 1]\n"
    )
    return write_card(
        f"{args.get('backbone') or cfg.get('architecture')} with a ranker of patches",
        card,
        facts,
        usage,
        (height // rows) * (width // cols),
        f"images of {height}×{width}, patches of {rows}×{cols}",
        model.keep_ratio,
    )


def _image_size(model: LTRPModel) -> tuple[int, int]:
    size = getattr(getattr(model.backbone, "patch_embed", None), "img_size", None)
    cfg = model.pretrained_cfg or {}
    height, width = size if size is not None else cfg.get("input_size", (3, 224, 224))[-2:]
    return int(height), int(width)


def _options(options: Any) -> str:
    return f" with {json.dumps(dict(options))}" if options else ""


def _origin(ranker: Any) -> dict[str, Any]:
    """Where the ranker's weights are from, as a card says it, when that is known."""
    if not ranker.learned:
        return {"ranker": "none: it has no weights"}
    return {"ranker": ranker.origin} if ranker.origin else {}


def _ranker_text(ranker: Any, card: dict[str, Any], repo_id: str) -> str:
    height, width = ranker.img_size or (224, 224)
    rows, cols = ranker.patch_size
    weights = sum(parameter.numel() for parameter in ranker.parameters())
    facts = [
        ("Ranker", f"`{ranker.name}`, {weights / 1e6:.2f} M parameters"),
        ("Images", f"{ranker.in_chans} channels, mean {ranker.mean}, std {ranker.std}"),
    ]
    usage = (
        "import timm, ltrp_timm\n\n"
        "vit = timm.create_model('vit_base_patch16_224', pretrained=True).eval()\n"
        f'weights = "{hub.PREFIX}{repo_id}"\n'
        f'model = ltrp_timm.drop_patches(vit, "{ranker.name}", ranker_weights=weights)\n'
    )
    return write_card(
        f"A {ranker.name} ranker of patches",
        card,
        facts,
        usage,
        (height // rows) * (width // cols),
        f"images of {height}×{width}, patches of {rows}×{cols}",
    )
