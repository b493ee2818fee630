"""``ltrp-timm train-ranker`` and ``ltrp-timm train-teacher``: flags to plain arguments."""

import argparse
import ast
import dataclasses
import os
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ltrp_timm._text import one_line, say
from ltrp_timm.commands._console import CommandError
from ltrp_timm.data.sources import SCALE
from ltrp_timm.rankers import list_rankers, ranker_class
from ltrp_timm.train.settings import Settings

_HELP = "see the documentation of ltrp_timm.train"


def add_train_commands(commands: Any) -> None:
    """Add both commands to the parser."""
    _add_ranker(commands)
    _add_teacher(commands)


def _add_ranker(commands: Any) -> None:
    from ltrp_timm.train.ranker import LOSSES

    about = "Train a ranker on images without labels, from an MAE or another ranker."
    parser = _command(commands, "train-ranker", about, _run_ranker)
    add = parser.add_argument
    add("--ranker", default="conv", choices=list_rankers(), help="(%(default)s)")
    add(
        "--teacher",
        default="facebook/vit-mae-base",
        help="an MAE: Hub id, folder or file; 'none' with --distill-from (%(default)s)",
    )
    add("--ranker-args", nargs="+", metavar="NAME=VALUE", help="e.g. width=32 depth=2")
    add("--init-from", metavar="RANKER", help="folder of the same ranker, to begin with")
    add("--distill-from", metavar="RANKER", help="folder of a ranker whose scores are the target")
    add("--distill-weight", type=float, default=0.5, metavar="W", help="its share (%(default)s)")
    add("--loss", choices=LOSSES, default="list_mle", help="(%(default)s)")
    add("--list-size", type=int, metavar="K", help="scores of an image at most (20)")
    add("--visible-only", action="store_true", help="a ViT ranker sees visible patches alone")
    add("--mask-ratio", type=float, default=0.9, metavar="R", help="hidden share (%(default)s)")
    add("--removal", default="full", help="full, decoder or encoder (%(default)s)")
    add("--metric", default="l1", help="l1, mse, ssim, psnr or lpips (%(default)s)")
    add("--aggregate", default="mean", help="mean or max (%(default)s)")
    add("--chunk", type=int, metavar="N", help="reconstructions at a time (by memory)")
    free = [name for name in list_rankers() if not ranker_class(name).learned]
    add("--compare", nargs="+", default=[], choices=free, help="measured beside it, for the log")
    add("--dry-run", action="store_true", help="check everything, say what would be done")
    add_settings(parser)


def _add_teacher(commands: Any) -> None:
    about = "Train an MAE, the teacher of rankers, on images without labels."
    parser = _command(commands, "train-teacher", about, _run_teacher)
    add = parser.add_argument
    add("--teacher-args", nargs="+", metavar="NAME=VALUE", help="e.g. embed_dim=192 depth=6")
    add("--init-from", metavar="TEACHER", help="Hub id, folder or file, to begin with")
    add("--mask-ratio", type=float, default=0.75, metavar="R", help="hidden share (%(default)s)")
    add("--norm-pix-loss", action="store_true", help="paint patches normalised one by one")
    add_settings(parser)


def _command(commands: Any, name: str, about: str, run: Callable[..., int]) -> Any:
    parser = commands.add_parser(name, help=about, description=about, allow_abbrev=False)
    parser.set_defaults(run=run)
    add = parser.add_argument
    text = "images: a folder, a .tar, or hfds/…, wds/…, torch/… as timm names them"
    add("--data", required=True, metavar="DIR", help=text)
    add("--output", required=True, metavar="DIR", help="folder of the run")
    add("--img-size", type=int, metavar="PIXELS", help="side of the images (the teacher's, or 224)")
    text = "share of a picture's area that a random crop takes (0.2 1)"
    add("--scale", type=float, nargs=2, default=SCALE, metavar=("FROM", "TO"), help=text)
    return parser


def add_settings(parser: Any) -> None:
    """Settings of every training; what is not given keeps the recipe's default."""
    add = parser.add_argument
    whole = ("epochs", "batch_size", "accumulate", "seed", "num_workers", "checkpoint_steps")
    for name in (*whole, "num_samples"):
        setting(add, name, type=int, metavar="N")
    reals = ("lr", "base_lr", "weight_decay", "warmup_epochs", "warmup_lr", "min_lr", "layer_decay")
    for name in (*reals, "clip_grad", "ema_decay", "holdout"):
        setting(add, name, type=float, metavar="X")
    for name in ("opt", "sched", "device", "val_data", "data_root", "split", "val_split"):
        setting(add, name, metavar="NAME")
    for name in ("input_key", "target_key"):
        setting(add, name, metavar="NAME")
    for name in ("clip_mode", "precision", "resume"):
        setting(add, name)
    setting(add, "opt_args", nargs="+", metavar="NAME=VALUE")
    setting(add, "compile", action="store_true")
    setting(add, "plot", action="store_true")
    for name in ("tensorboard", "progress"):
        setting(add, name, action=argparse.BooleanOptionalAction)


def setting(add: Any, name: str, kind: Any = Settings, **kwargs: Any) -> None:
    """A flag of that field of a class of settings, with the line that documents it as help."""
    flag, hint = "--" + name.replace("_", "-"), get_type_hints(kind)[name]
    for part in (hint, *get_args(hint)):
        if get_origin(part) is Literal:
            kwargs["choices"] = get_args(part)
    add(flag, dest=name, default=argparse.SUPPRESS, help=documentation(name, kind), **kwargs)


def documentation(name: str, kind: Any = Settings) -> str:
    """The line that documents a field of a class of settings."""
    lines = (kind.__doc__ or "").splitlines()
    marks = [i for i, line in enumerate(lines) if line.strip().startswith(f"{name}: ")]
    text = lines[marks[0]].strip().removeprefix(f"{name}: ") if marks else _HELP
    for line in lines[marks[0] + 1 :] if marks else []:
        if not line.startswith(" " * 12):
            break
        text += " " + line.strip()
    return text.replace("``", "").replace("%", "%%")


def parse_values(pairs: list[str] | None) -> dict[str, Any]:
    """``["width=32", "name=x"]`` -> values, numbers and lists as such.

    Raises:
        CommandError: one of them is no ``name=value``.
    """
    out: dict[str, Any] = {}
    for pair in pairs or []:
        name, mark, text = pair.partition("=")
        if not mark or not name.isidentifier():
            raise CommandError(f"expected NAME=VALUE, got {pair!r}.")
        try:
            out[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            out[name] = text
    return out


def given_settings(arguments: argparse.Namespace, *kinds: Any) -> dict[str, Any]:
    """The fields of some classes of settings that were given as flags."""
    names = [field.name for kind in (Settings, *kinds) for field in dataclasses.fields(kind)]
    given = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
    if "opt_args" in given:
        given["opt_args"] = parse_values(given["opt_args"])
    return given


def _run_ranker(arguments: argparse.Namespace) -> int:
    from ltrp_timm.train.ranker import train_ranker

    names = [
        *("data", "output", "ranker", "img_size", "init_from", "distill_from", "distill_weight"),
        *("loss", "list_size", "visible_only", "mask_ratio", "removal", "metric", "aggregate"),
        *("chunk", "scale", "compare", "dry_run"),
    ]
    values = {name: getattr(arguments, name) for name in names}
    values["teacher"] = None if arguments.teacher == "none" else arguments.teacher
    values["ranker_args"] = parse_values(arguments.ranker_args)
    hint = f"create_ranker({arguments.ranker!r}, pretrained={arguments.output!r})"
    return run_training(train_ranker, {**values, **given_settings(arguments)}, hint)


def _run_teacher(arguments: argparse.Namespace) -> int:
    from ltrp_timm.train.mae import train_teacher

    names = ("data", "output", "img_size", "init_from", "mask_ratio", "norm_pix_loss", "scale")
    values = {name: getattr(arguments, name) for name in names}
    values["teacher_args"] = parse_values(arguments.teacher_args)
    hint = f"create_teacher({arguments.output!r})"
    return run_training(train_teacher, {**values, **given_settings(arguments)}, hint)


def run_training(train: Callable[..., Any], values: dict[str, Any], hint: str) -> int:
    """Train; what the user can put right becomes one line, said by one process."""
    main = os.environ.get("RANK", "0") == "0"
    try:
        summary = train(**values)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        if not main:
            return 2
        raise CommandError(one_line(error)) from error
    if main and not values.get("dry_run"):
        _report(summary, hint)
    return 128 + summary.stopped_by if summary.stopped_by else 0


def _report(summary: Any, hint: str) -> None:
    if summary.unreadable:
        say(f"{len(summary.unreadable)} images could not be read and were skipped")
    if summary.stopped_by:
        where = f"epoch {summary.epochs + 1}, step {summary.steps}"
        say(f"stopped by signal {summary.stopped_by} in {where}; --resume auto goes on")
    else:
        say(f"{summary.epochs} epochs, {summary.steps} steps; load it by {hint}")
