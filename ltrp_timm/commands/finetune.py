"""``ltrp-timm finetune``: flags to plain arguments."""

import argparse
from functools import partial
from typing import Any

from ltrp_timm.commands._flags import keep_ratio
from ltrp_timm.commands._model import check_names
from ltrp_timm.commands.train import (
    add_settings,
    given_settings,
    parse_values,
    run_training,
    setting,
)
from ltrp_timm.selection import SELECTIONS
from ltrp_timm.train.recipe import Augmentation, Recipe


def add_finetune(commands: Any) -> None:
    """Add the command to the parser."""
    about = "Fine-tune a model that drops patches, or a plain timm model, on labelled images."
    parser = commands.add_parser("finetune", help=about, description=about, allow_abbrev=False)
    parser.set_defaults(run=_run)
    add = parser.add_argument
    add("model", metavar="MODEL", help="an ltrp_* name, any timm model, hf-hub:… or local-dir:…")
    text = "a folder with a folder for each class, a .tar, or hfds/…, wds/…, torch/… as in timm"
    add("--data", required=True, metavar="DIR", help=text)
    add("--output", required=True, metavar="DIR", help="folder of the run")
    _add_recipe(partial(setting, add, kind=Recipe))
    _add_augmentation(partial(setting, add, kind=Augmentation))
    add_settings(parser)


def _add_recipe(add: Any) -> None:
    for name in ("num_classes", "img_size", "keep_schedule_epochs"):
        add(name, type=int, metavar="N")
    for name in ("drop_path", "distill_weight", "distill_temperature", "distill_features"):
        add(name, type=float, metavar="X")
    for name in (
        "pretrained",
        "train_ranker",
        "grad_checkpointing",
        "channels_last",
        "multi_label",
    ):
        add(name, action="store_true")
    for name in ("labels", "val_labels", "seen_classes"):
        add(name, metavar="FILE")
    add("loss")
    add("head")
    add("head_args", nargs="+", metavar="NAME=VALUE")
    add("checkpoint", metavar="FILE")
    add("ranker", metavar="NAME")
    add("ranker_weights", metavar="SOURCE")
    add("index_cache", metavar="DIR")
    add("selection", choices=SELECTIONS)
    add("keep_ratio", type=keep_ratio, nargs="+", metavar="R")
    add("keep_schedule")
    add("model_kwargs", nargs="+", metavar="NAME=VALUE")
    add("distill", metavar="MODEL")
    add("gate")


def _add_augmentation(add: Any) -> None:
    for name in ("scale", "ratio"):
        add(name, type=float, nargs=2, metavar=("FROM", "TO"))
    reals = ("hflip", "vflip", "color_jitter", "reprob", "smoothing", "mixup", "cutmix")
    for name in (*reals, "mixup_prob", "mixup_switch_prob"):
        add(name, type=float, metavar="X")
    for name in ("recount", "mixup_off_epoch"):
        add(name, type=int, metavar="N")
    add("aa", metavar="POLICY")
    add("remode")
    add("mixup_mode")
    add("bce_loss", action="store_true")


def _run(arguments: argparse.Namespace) -> int:
    from ltrp_timm.train.finetune import finetune

    values = given_settings(arguments, Recipe, Augmentation)
    check_names(arguments.model, values.get("ranker"), option="MODEL")
    for name in ("model_kwargs", "head_args"):
        if name in values:
            values[name] = parse_values(values[name])
    values |= {name: getattr(arguments, name) for name in ("model", "data", "output")}
    hint = f"timm.create_model('local-dir:{arguments.output}', pretrained=True)"
    return run_training(finetune, values, hint)
