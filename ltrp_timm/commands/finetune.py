"""``ltrp-timm finetune``."""

from typing import Any

from ltrp_timm.commands._console import check_names
from ltrp_timm.commands._flags import add_command, flag
from ltrp_timm.commands.train import run_training
from ltrp_timm.train import Augmentation, Recipe, Settings, finetune
from ltrp_timm.train.recipe import DEFAULTS, MULTI_LABEL_DEFAULTS


def add_finetune(commands: Any) -> None:
    """Add ``ltrp-timm finetune``."""
    about = "Fine-tune a model that drops patches, or a plain timm model, on labelled images."
    sources = (finetune, Recipe, Augmentation, Settings)
    others = (f"{flag(name)} {value:g}" for name, value in MULTI_LABEL_DEFAULTS.items())
    more = f"Defaults with --multi-label: {', '.join(others)}."
    options: dict[str, Any] = {"positional": ("model",), "defaults": DEFAULTS, "epilog": more}
    add_command(commands, "finetune", about, _finetune, *sources, **options)


def _finetune(**given: Any) -> int:
    check_names(given["model"], given.get("ranker"))
    load = f"timm.create_model('local-dir:{given['output']}', pretrained=True)"
    return run_training(finetune, given, load)
