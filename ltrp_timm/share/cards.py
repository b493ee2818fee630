"""Model cards: what a saved model is, where its parts come from, how to use it.

Nothing is claimed that was not told or computed here: no figure, licence or data set is guessed.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ltrp_timm.selection import check_keep_ratio, num_keep

UNNAMED = "owner/name"  # stands for the repository until there is one
NOT_STATED = "not stated"
_UNMEASURED = "Nothing was measured at these ratios."
_RATIOS = (1.0, 0.75, 0.5, 0.25)
_TEXTS = ("license", "training_data", "ranker", "base_model", "description", "results_note")
_TABLES = {"measured": "{keep_ratio: {what: value}}", "results": "{who: {what: value}}"}


def check_card(card: Mapping[str, Any] | None) -> dict[str, Any]:
    """Check what a user tells for the card.

    Args:
        card: "license" (an identifier such as "apache-2.0"), "training_data", "ranker" (where its
            weights come from), "base_model" (the repository it was trained from), "description":
            texts; "measured": ``{keep_ratio: {what: value}}``; "results": ``{who: {what: value}}``,
            a table of its own, with "results_note" below it.

    Raises:
        ValueError: another field, or a value that cannot stand there.
        TypeError: no mapping.
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
        if not isinstance(table, Mapping) or not all(
            isinstance(row, Mapping) for row in table.values()
        ):
            raise ValueError(f"model_card[{name!r}] must be {form}, got {table!r}.")
    measured = out["measured"]
    out["measured"] = {check_keep_ratio(ratio): dict(row) for ratio, row in measured.items()}
    return out


def write_card(
    title: str,
    card: Mapping[str, Any],
    facts: Sequence[tuple[str, str]],
    usage: str,
    num_patches: int,
    grid: str,
    keep_ratio: float | None = None,
) -> str:
    """The text of a README.md for the Hub.

    Args:
        title: what the model is.
        card: as ``check_card`` returns it.
        facts: (what, how) of the model.
        usage: lines of Python.
        num_patches: N at ``grid``.
        grid: the size of image and patch, in words.
        keep_ratio: the one that the model was saved with.
    """
    told = [
        ("Licence", card.get("license") or NOT_STATED),
        ("Training data", card.get("training_data") or NOT_STATED),
        ("Weights of the ranker", card.get("ranker") or NOT_STATED),
    ]
    lines = [
        *_front_matter(card.get("license"), card.get("base_model")),
        f"# {title}",
        "",
        *([card["description"], ""] if card.get("description") else []),
        "Made with ltrp_timm: a ranker scores the patches of an image, the ViT encodes the best.",
        "",
        *[f"- **{name}:** {_one_line(text)}" for name, text in (*facts, *told)],
        "",
        *_results(card),
        "## Keep ratios",
        "",
        *_table(card["measured"], num_patches, keep_ratio),
        "",
        f"K patches of N = {num_patches} ({grid}) are encoded. "
        + ("Values are those of the author." if card["measured"] else _UNMEASURED),
        "",
        "## Use",
        "",
        "```python",
        usage.rstrip(),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _front_matter(licence: str | None, base_model: str | None) -> list[str]:
    tags = ["image-classification", "timm", "ltrp", "token-pruning"]
    fields = {"license": licence, "base_model": base_model, "library_name": "timm"}
    return [
        "---",
        *[f"{name}: {json.dumps(value)}" for name, value in fields.items() if value],
        f"tags: {json.dumps(tags)}",
        "---",
        "",
    ]


def _results(card: Mapping[str, Any]) -> list[str]:
    rows = card.get("results") or {}
    if not rows:
        return []
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = ["## Results", "", " | ".join(["|", *map(_cell, columns)]) + " |"]
    lines.append("|" + " --- |" * (1 + len(columns)))
    for who, row in rows.items():
        cells = [f"| {_cell(who)}", *(_cell(row.get(name, "")) for name in columns)]
        lines.append(" | ".join(cells) + " |")
    return [*lines, "", *([card["results_note"], ""] if card.get("results_note") else [])]


def _table(
    measured: Mapping[float, Mapping[str, Any]], num_patches: int, own: float | None
) -> list[str]:
    ratios = sorted({*_RATIOS, *measured, *([] if own is None else [own])}, reverse=True)
    columns = list(dict.fromkeys(name for row in measured.values() for name in row))
    lines = [
        " | ".join(["| keep_ratio", "K", *map(_cell, columns)]) + " |",
        "|" + " --- |" * (2 + len(columns)),
    ]
    for ratio in ratios:
        mark = " (as saved)" if ratio == own else ""
        values = [_cell(measured.get(ratio, {}).get(name, "")) for name in columns]
        cells = [f"| {ratio:g}{mark}", str(num_keep(num_patches, ratio)), *values]
        lines.append(" | ".join(cells) + " |")
    return lines


def _cell(value: Any) -> str:
    return _one_line(str(value)).replace("|", "\\|")


def _one_line(text: str) -> str:
    return " ".join(text.split())
