"""Model cards: what a saved model is, where its parts are from, how to use it.

A card states what its author gives and what the model shows: no figure, licence or data set is
guessed.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ltrp_timm.selection.rules import check_keep_ratio, num_keep

EVALUATION_NAME = "evaluate.json"  # what `ltrp-timm evaluate` writes
# accuracies of an evaluation: as people and as the Hub name them
TITLES = {
    **{"top1": "top-1", "top5": "top-5"},
    **{"map": "mAP", "map_seen": "mAP seen", "map_unseen": "mAP unseen"},
}
_METRICS = {"top-1": "accuracy", "top-5": "top_5_accuracy", "mAP": "mean_average_precision"}
UNNAMED = "owner/name"  # the repository in cards that are not on the Hub
NOT_STATED = "not stated"
_RATIOS = (1.0, 0.75, 0.5, 0.25)
_STATED = {
    "Licence": "license",
    "Training data": "training_data",
    "Weights of the ranker": "ranker",
}
_TEXTS = (
    *("license", "training_data", "ranker", "base_model", "description"),
    *("evaluation_data", "results_note"),
)
_TABLES = {"measured": "{keep_ratio: {what: value}}", "results": "{who: {what: value}}"}
_TAGS = ["image-classification", "timm", "ltrp", "token-pruning"]


def check_card(card: Mapping[str, Any] | None) -> dict[str, Any]:
    """Check what a user states for the card.

    Args:
        card: texts: "license" (an identifier such as "apache-2.0"), "training_data", "ranker"
            (where its weights are from), "base_model" (the repository it was trained from),
            "description", "evaluation_data" (what "measured" is of), "results_note" (below
            "results"); tables: "measured" ``{keep_ratio: {what: value}}`` and "results"
            ``{who: {what: value}}``.

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


def read_evaluation(source: Any, made_with: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a card from what ``ltrp-timm evaluate --output`` wrote.

    Args:
        source: evaluate.json, or its folder.
        made_with: the model's "ranker", "selection" and "rest"; the evaluation's must be the same.

    Returns:
        "evaluation_data", and "measured" accuracies in per cent, by keep ratio.

    Raises:
        FileNotFoundError: ``source`` does not exist.
        ValueError: It holds no evaluation, or that of another model.
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
    for name, value in made_with.items():
        if any(ratio < 1 for ratio in measured) and found.get(name, value) != value:
            raise ValueError(
                f"{path} is of a model with {name} {found[name]!r}, this one has {value!r}: "
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
    """Write the README.md of a model.

    Args:
        title: what the model is.
        card: as ``check_card`` returns it.
        facts: what the model shows.
        usage: lines of Python.
        img_size: (height, width) in pixels.
        patch_size: (height, width) in pixels.
        keep_ratio: the model's.
    """
    (height, width), (rows, cols) = img_size, patch_size
    count, measured = (height // rows) * (width // cols), card["measured"]
    ratios = sorted({*_RATIOS, *measured, *filter(None, [keep_ratio])}, reverse=True)
    kept = {
        f"{ratio:g}{' (as saved)' * (ratio == keep_ratio)}": {
            "K": num_keep(count, ratio),
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
        "\n".join(f"- **{name}:** {_one_line(t)}" for name, t in {**facts, **stated}.items()),
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
    return _one_line(str(value)).replace("|", "\\|")


def _one_line(text: str) -> str:
    return " ".join(text.split())
