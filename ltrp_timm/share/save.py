"""Save a model or a ranker in timm's layout with a model card; upload it to the Hub.

A card states what its author gives and what the model shows: no figure, licence or data set is
guessed.
"""

import json
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from torch import nn

from ltrp_timm import _timm
from ltrp_timm.models.ltrp import LTRPModel
from ltrp_timm.rankers import list_rankers, ranker_class
from ltrp_timm.selection.rules import check_keep_ratio, num_keep
from ltrp_timm.weights import hub
from ltrp_timm.weights.files import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    PathLike,
    digest,
    ranker_hash,
    read_weights,
    save_weights,
    write_text,
)
from ltrp_timm.weights.untrusted import first_line

CARD_NAME = "README.md"
FILES = (CONFIG_NAME, WEIGHTS_NAME, CARD_NAME)
EVALUATION_NAME = "evaluate.json"  # what `ltrp-timm evaluate` writes
# accuracies of an evaluation: as people and as the Hub name them
TITLES = {"top1": "top-1", "top5": "top-5", "map": "mAP"}
TITLES |= {"map_seen": "mAP seen", "map_unseen": "mAP unseen"}
_METRICS = {"top-1": "accuracy", "top-5": "top_5_accuracy", "mAP": "mean_average_precision"}
_SETTINGS = ("selection", "selection_args", "rest", "scales", "size_bias", "budget")
UNNAMED = "owner/name"  # the repository in cards that are not on the Hub
NOT_STATED = "not stated"
_RATIOS = (1.0, 0.75, 0.5, 0.25)
_STATED = {
    "Licence": "license",
    "Training data": "training_data",
    "Weights of the ranker": "ranker",
}
_TEXTS = (*_STATED.values(), "base_model", "description", "evaluation_data", "results_note")
_TABLES = {"measured": "{keep_ratio: {what: value}}", "results": "{who: {what: value}}"}
_TAGS = ["image-classification", "timm", "ltrp", "token-pruning"]


def save_pretrained(
    model: nn.Module,
    directory: PathLike,
    model_card: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    evaluation: PathLike | None = None,
) -> Path:
    """Write ``config.json``, ``model.safetensors`` and a model card ``README.md`` into a folder.

    ``timm.create_model("local-dir:…", pretrained=True)`` loads a model, and ``create_ranker(name,
    pretrained=folder)`` a ranker.

    Args:
        model: an LTRPModel with a ranker of ``list_rankers()``, or such a ranker alone.
        directory: created if it is missing.
        model_card: what the card states: "license" (an identifier such as "apache-2.0"),
            "training_data", "ranker" (where its weights are from), "base_model" (the repository it
            was trained from), "description", "measured" ``{keep_ratio: {what: value}}`` on
            "evaluation_data", "results" ``{who: {what: value}}`` with a "results_note".
        overwrite: replace these three files.
        evaluation: evaluate.json of ``ltrp-timm evaluate``, or its folder, of this model; its
            accuracies are the card's "measured" and the results that the Hub reads.

    Returns:
        The folder.

    Raises:
        TypeError: ``model`` is neither a pruned model nor a ranker.
        ValueError: the ranker has no name or no trained weights, ``model_card`` is wrong, or the
            evaluation is of another model.
        FileExistsError: the folder holds one of the files and ``overwrite`` is False.

    >>> import tempfile, timm
    >>> folder = tempfile.mkdtemp()
    >>> save_pretrained(timm.create_model("ltrp_vit_tiny", depth=1), folder).name in folder
    True
    """
    return _save(model, Path(directory), model_card, overwrite, UNNAMED, evaluation)


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    model_card: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    evaluation: PathLike | None = None,
) -> str:
    """Upload a model or a ranker to the Hub in one commit.

    ``timm.create_model("hf-hub:owner/name", pretrained=True)`` loads a model, and
    ``create_ranker(name, pretrained="hf-hub:owner/name")`` a ranker. An existing card stays,
    unless ``overwrite``.

    Args:
        model: As in ``save_pretrained``.
        repo_id: Repository, ``owner/name`` or a name in your account; it is created if it does not
            exist.
        private: Whether a new repository is private (default: your account's setting).
        token: Token with write access (default: HF_TOKEN, else that of ``hf auth login``).
        revision: Branch; it is created if it does not exist (default: main).
        model_card: As in ``save_pretrained``.
        overwrite: Replace the files of the branch.
        evaluation: As in ``save_pretrained``.

    Returns:
        The name to load it by: ``hf-hub:owner/name``, with ``@revision`` when given.

    Raises:
        TypeError: ``model`` is neither a pruned model nor a ranker.
        ValueError: As in ``save_pretrained``.
        FileExistsError: the branch holds such files and ``overwrite`` is False.
        OSError: the Hub refuses or does not answer; the message says what to do.
    """
    with tempfile.TemporaryDirectory() as folder:
        _save(model, Path(folder), model_card, True, repo_id, evaluation)
        options = (repo_id, private, token, revision, overwrite)
        return hub.upload(Path(folder), FILES, *options, keep=(CARD_NAME,))


def push_folder(directory: PathLike, repo_id: str, **options: Any) -> str:
    """Upload what ``save_pretrained`` wrote; ``options``, result and errors as in ``push_to_hub``.

    Raises:
        FileNotFoundError: the folder lacks a file.
        ValueError: a file is damaged.
    """
    folder = Path(directory)
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} holds no {' and no '.join(missing)}: write it with save_pretrained or "
            "`ltrp-timm save`."
        )
    read_weights(folder)  # nothing damaged is uploaded
    card = (folder / CARD_NAME).read_text(encoding="utf-8", errors="replace")
    with tempfile.TemporaryDirectory() as staged:
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            os.symlink((folder / name).resolve(), Path(staged) / name)
        text = card.replace(f"hf-hub:{UNNAMED}", f"hf-hub:{repo_id}")
        (Path(staged) / CARD_NAME).write_text(text, encoding="utf-8")
        return hub.upload(Path(staged), FILES, repo_id, keep=(CARD_NAME,), **options)


def _save(
    model: Any,
    folder: Path,
    model_card: Mapping[str, Any] | None,
    overwrite: bool,
    repo_id: str,
    evaluation: PathLike | None = None,
) -> Path:
    stated, whole = check_card(model_card), isinstance(model, LTRPModel)
    ranker = model.ranker if whole else model
    check_ranker(ranker, whole)
    if evaluation is not None:
        if not whole:
            raise ValueError("an evaluation goes with a whole model, not with a ranker alone.")
        found = read_evaluation(evaluation, measured_with(model))
        stated = check_card({**found, **(model_card or {})})
    origin = ranker.origin if ranker.learned else "none: it has no weights"
    card = {"ranker": origin, **stated}
    config = model_config(model) if whole else {"ranker": ranker.name, "args": ranker.config()}
    text = _model_card(model, card, repo_id) if whole else _ranker_card(ranker, card, repo_id)
    if (folder / CARD_NAME).exists() and not overwrite:
        raise FileExistsError(
            f"{folder} already holds {CARD_NAME}; pass overwrite=True (--overwrite) to replace."
        )
    save_weights(folder, config, model.state_dict(), overwrite=overwrite)
    write_text(folder / CARD_NAME, text)
    return folder


def check_ranker(ranker: Any, whole: bool) -> None:
    """Check that a ranker can be saved, with a whole model or alone.

    Raises:
        TypeError: a ranker alone that is not one of this library.
        ValueError: the ranker has no name, no weights, or no trained weights.
    """
    name = getattr(ranker, "name", None)
    if name not in list_rankers() or not isinstance(ranker, ranker_class(str(name))):
        if not whole:
            kind = type(ranker).__name__
            raise TypeError(f"expected an LTRPModel or a ranker of this library, got {kind}.")
        raise ValueError(
            f"the ranker {type(ranker).__name__} cannot be saved: it is none of "
            f"{', '.join(list_rankers())}. Save model.restore() and the ranker separately."
        )
    if not whole and not ranker.learned:
        raise ValueError(f"the {name} ranker has no weights: its name is enough to create it.")
    if ranker.learned and not ranker.trained:
        raise ValueError(
            f"the {name} ranker has no trained weights, so its choice means nothing: train it "
            "first (your own training sets ranker.trained = True)."
        )


def model_config(model: Any) -> dict[str, Any]:
    """timm's configuration of a model; ValueError if JSON cannot hold one of its arguments."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / CONFIG_NAME
        args = dict(model._model_args) if isinstance(model, LTRPModel) else None
        try:
            _timm.save_config_for_hf(model, str(path), model_args=args)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the model cannot be saved: {first_line(error)}") from error
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    # it stands in the config itself; transformers passes both, and Python refuses an argument twice
    config.get("model_args", {}).pop("num_classes", None)
    return config


def _model_card(model: LTRPModel, card: Mapping[str, Any], repo_id: str) -> str:
    args, cfg = model._model_args, model.pretrained_cfg or {}
    backbone = (getattr(model.backbone, "pretrained_cfg", None) or {}).get("architecture")
    size = model.data_config()["input_size"][-2:]
    options = args.get("selection_args")
    options = f" with {json.dumps(dict(options))}" if options else ""
    pixels = f"{size[0]} × {size[1]}, mean {cfg.get('mean')}, std {cfg.get('std')}"
    facts = {
        "Backbone": f"`{backbone}`",
        "Ranker": f"`{model.ranker.name}`",
        "Selection": f"`{model.selection}`{options}",
        **({"Budget": f"adaptive with {json.dumps(args['budget'])}"} if "budget" in args else {}),
        "Classes": str(model.num_classes),
        "Images": f"{model.in_chans} × {pixels}",
    }
    title = f"{args.get('backbone') or cfg.get('architecture')} with a ranker of patches"
    usage = f"""import timm, ltrp_timm  # the import registers the models

model = timm.create_model("{hub.PREFIX}{repo_id}", pretrained=True).eval()
model.keep_ratio = {model.keep_ratio:g}  # any in (0, 1]"""
    return write_card(title, card, facts, usage, size, model.patch_size, model.keep_ratio)


def _ranker_card(ranker: Any, card: Mapping[str, Any], repo_id: str) -> str:
    weights = sum(parameter.numel() for parameter in ranker.parameters())
    facts = {
        "Ranker": f"`{ranker.name}`, {weights / 1e6:.2f} M parameters",
        "Images": f"{ranker.in_chans} channels, mean {ranker.mean}, std {ranker.std}",
    }
    usage = f"""import timm, ltrp_timm

vit = timm.create_model('vit_base_patch16_224', pretrained=True).eval()
weights = "{hub.PREFIX}{repo_id}"
model = ltrp_timm.drop_patches(vit, "{ranker.name}", ranker_weights=weights)"""
    title, size = f"A {ranker.name} ranker of patches", ranker.img_size or (224, 224)
    return write_card(title, card, facts, usage, size, ranker.patch_size)


def check_card(card: Mapping[str, Any] | None) -> dict[str, Any]:
    """Check what a user states for the card, see ``save_pretrained``.

    Raises:
        ValueError: a field is unknown, or its value is of another kind.
        TypeError: ``card`` is not a mapping.
    """
    if card is not None and not isinstance(card, Mapping):
        raise TypeError(f"model_card must be a mapping, got {type(card).__name__}.")
    out = dict(card or {})
    for name, value in out.items():
        if name not in (*_TEXTS, *_TABLES):
            known = ", ".join((*_TEXTS, *_TABLES))
            raise ValueError(f"model_card knows {known}; got {name!r}.")
        if name in _TEXTS and not isinstance(value, str):
            raise ValueError(f"model_card[{name!r}] must be a text, got {value!r}.")
    if re.fullmatch(r"[\w.+-]*", out.get("license", "")) is None:
        raise ValueError(f"model_card['license'] must be an identifier, got {out['license']!r}.")
    for name, form in _TABLES.items():
        table = out.setdefault(name, {})
        rows = table.values() if isinstance(table, Mapping) else [None]
        if not all(isinstance(row, Mapping) for row in rows):
            raise ValueError(f"model_card[{name!r}] must be {form}, got {table!r}.")
    out["measured"] = {check_keep_ratio(ratio): row for ratio, row in out["measured"].items()}
    return out


def measured_with(model: Any) -> dict[str, Any]:
    """What the accuracy of a model depends on, as JSON has it: its weights, size and settings."""
    if not isinstance(model, LTRPModel):
        return {"weights_digest": digest(model.state_dict())}
    settings = {"rest": model.rest, **model.settings()}
    found = {
        **{"ranker": getattr(model.ranker, "name", ""), "ranker_hash": ranker_hash(model.ranker)},
        **{name: settings.get(name) for name in _SETTINGS},
        "input_size": model.data_config()["input_size"],
        "weights_digest": digest(model.backbone.state_dict()),
    }
    return dict(json.loads(json.dumps(found)))


def read_evaluation(source: Any, made_with: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a card from evaluate.json or its folder: "evaluation_data", and "measured" in %.

    ``made_with`` is ``measured_with`` of the model; ValueError if the evaluation is of another
    model, or is none.
    """
    path = Path(source)
    path = path / EVALUATION_NAME if path.is_dir() else path
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = [row for row in found["results"] if row["method"] in ("full", "pruned")]
        measured = {
            float(row["keep_ratio"]): {
                title: round(float(row[name]), 2) for name, title in TITLES.items() if name in row
            }
            for row in rows
        }
        data = str(found["data"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no {EVALUATION_NAME} of `ltrp-timm evaluate`.") from error
    if "weights_digest" not in found:
        raise ValueError(f"{path} does not say which weights were measured: evaluate again.")
    always = ("weights_digest", "input_size")  # the full model has no other settings
    for name, value in made_with.items():
        if (name in always or min(measured, default=1) < 1) and found.get(name) != value:
            raise ValueError(
                f"{path} is of a model with {name} {found.get(name)!r}, this one has {value!r}: "
                "evaluate this one."
            )
    data = data if re.match(r"\w+/", data) and not Path(data).exists() else Path(data).name
    return {"evaluation_data": f"{data}, {found.get('split')}", "measured": measured}


def write_card(
    title: str,
    card: Mapping[str, Any],
    facts: Mapping[str, str],
    usage: str,
    img_size: Sequence[int],
    patch_size: Sequence[int],
    keep_ratio: float | None = None,
) -> str:
    """Write the README.md of a model; sizes are (height, width) in pixels, ``usage`` is Python."""
    (height, width), (rows, cols) = img_size, patch_size
    count, measured = (height // rows) * (width // cols), card["measured"]
    ratios = sorted({*_RATIOS, *measured, *filter(None, [keep_ratio])}, reverse=True)
    kept = {
        f"{ratio:g}{' (as saved)' * (ratio == keep_ratio)}": {
            **{"K": num_keep(count, ratio)},
            **measured.get(ratio, {}),
        }
        for ratio in ratios
    }
    stated = {name: card.get(key) or NOT_STATED for name, key in _STATED.items()}
    results = ["## Results", _table("", card["results"]), card.get("results_note")]
    measurements = "Values are the author's." if measured else "No measurements at these ratios."
    parts = [
        f"---\n{_metadata(title, card).to_yaml()}\n---",
        f"# {title}",
        card.get("description"),
        "Made with ltrp_timm: a ranker scores the patches of an image, the ViT encodes the best.",
        "\n".join(f"- **{n}:** {' '.join(t.split())}" for n, t in {**facts, **stated}.items()),
        *(results if card["results"] else []),
        "## Keep ratios",
        _table("keep_ratio", kept),
        f"K patches of N = {count} (images of {height}×{width}, patches of {rows}×{cols}) are "
        f"encoded. {measurements}",
        "## Use",
        f"```python\n{usage.rstrip()}\n```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(title: str, card: Mapping[str, Any]) -> ModelCardData:
    """What the Hub reads: results only where the data set is stated."""
    data = card.get("evaluation_data")
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=re.sub(r"[^\w.-]+", "-", data.lower()),
            dataset_name=data,
            metric_type=_METRICS.get(what, what),
            metric_name=f"{what} at keep_ratio {ratio:g}",
            metric_value=value,
        )
        for ratio, row in card["measured"].items()
        for what, value in row.items()
        if data
    ]
    return ModelCardData(
        license=card.get("license") or None,
        base_model=card.get("base_model"),
        library_name="timm",
        tags=_TAGS,
        model_name=title if results else None,
        eval_results=results or None,
    )


def _table(corner: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Rows of values as a Markdown table."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [[corner, *columns], ["---"] * (1 + len(columns))]
    lines += [[name, *(row.get(column, "") for column in columns)] for name, row in rows.items()]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
