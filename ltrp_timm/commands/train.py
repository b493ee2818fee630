"""``ltrp-timm train-ranker``, ``ltrp-timm train-teacher`` and ``ltrp-timm finetune``."""

from collections.abc import Callable
from typing import Any

from ltrp_timm._text import counted, say
from ltrp_timm.commands._console import check_names
from ltrp_timm.commands._flags import add_command, flag
from ltrp_timm.runtime.world import first_process
from ltrp_timm.train import (
    Augmentation,
    Recipe,
    Settings,
    Summary,
    finetune,
    mae,
    ranker,
    train_ranker,
    train_teacher,
)
from ltrp_timm.train.recipe import DEFAULTS, MULTI_LABEL_DEFAULTS


def add_train_ranker(commands: Any) -> None:
    """Add ``ltrp-timm train-ranker``."""
    about = "Train a ranker on images without labels, from an MAE or another ranker."
    sources, defaults = (train_ranker, Settings), dict(ranker.RECIPES["short"])
    defaults["base_lr"] = f"{ranker.CONV_LR:g} for conv, {defaults['base_lr']:g} for other rankers"
    defaults["epochs"] = f"{defaults['epochs']}, {ranker.EPOCHS} without a teacher"
    add_command(commands, "train-ranker", about, _train_ranker, *sources, defaults=defaults)


def add_train_teacher(commands: Any) -> None:
    """Add ``ltrp-timm train-teacher``."""
    about = "Train an MAE, the teacher of rankers, on images without labels."
    sources, defaults = (train_teacher, Settings), mae.DEFAULTS
    add_command(commands, "train-teacher", about, _train_teacher, *sources, defaults=defaults)


def add_finetune(commands: Any) -> None:
    """Add ``ltrp-timm finetune``."""
    about = "Fine-tune a model that drops patches, or a plain timm model, on labelled images."
    sources = (finetune, Recipe, Augmentation, Settings)
    others = (f"{flag(name)} {value:g}" for name, value in MULTI_LABEL_DEFAULTS.items())
    more = f"Defaults with --multi-label: {', '.join(others)}."
    options: dict[str, Any] = {"positional": ("model",), "defaults": DEFAULTS, "epilog": more}
    add_command(commands, "finetune", about, _finetune, *sources, **options)


def _train_ranker(**given: Any) -> int:
    hint = f"create_ranker({given.get('ranker', 'conv')!r}, pretrained={given['output']!r})"
    return run_training(train_ranker, given, hint)


def _train_teacher(**given: Any) -> int:
    return run_training(train_teacher, given, f"create_teacher({given['output']!r})")


def _finetune(**given: Any) -> int:
    check_names(given["model"], given.get("ranker"))
    load = f"timm.create_model('local-dir:{given['output']}', pretrained=True)"
    return run_training(finetune, given, load)


def run_training(train: Callable[..., Summary], given: dict[str, Any], load: str) -> int:
    """Train, and report how it ended; ``load`` is the Python expression that loads the result.

    Returns 0, or 128 + the number of the signal that stopped the training.
    """
    summary = train(**given)
    if first_process() and not given.get("dry_run"):
        _report(summary, load)
    return 128 + summary.stopped_by if summary.stopped_by else 0


def _report(summary: Summary, load: str) -> None:
    if summary.unreadable:
        say(f"skipped {counted(len(summary.unreadable), 'image')} that could not be read")
    if summary.stopped_by:
        where = f"epoch {summary.epochs + 1}, step {summary.steps}"
        say(f"stopped by signal {summary.stopped_by} in {where}; --resume auto continues")
    else:
        done = f"{counted(summary.epochs, 'epoch')}, {counted(summary.steps, 'step')}"
        say(f"{done}; load it with {load}")
