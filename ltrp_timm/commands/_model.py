"""Models by the names that a user types: errors of one line, and what a command prints on them."""

import contextlib
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from ltrp_timm._text import one_line, printable, say
from ltrp_timm.commands._console import CommandError
from ltrp_timm.models.ltrp import LTRPModel
from ltrp_timm.models.open_model import check_name, open_model
from ltrp_timm.rankers import list_rankers
from ltrp_timm.selection import num_keep

_LONGEST = 300  # characters of an error from another library


def check_names(model_name: str, ranker: str | None, option: str = "--model") -> None:
    """Check the names of model and ranker before any long work.

    Args:
        model_name: an ``ltrp_*`` name, any timm model, or ``hf-hub:…`` or ``local-dir:…``.
        ranker: one of ``list_rankers()``, or None.
        option: how the command calls the model's name.

    Raises:
        CommandError: a name is unknown; the message lists similar ones.
    """
    if ranker is not None and ranker not in list_rankers():
        raise CommandError(f"--ranker must be one of {', '.join(list_rankers())}, got {ranker!r}.")
    try:
        check_name(model_name, option)
    except ValueError as error:
        raise CommandError(str(error)) from error


def build_model(name: str, option: str = "--model", **kwargs: Any) -> tuple[Any, str | None]:
    """Build a model with ``open_model``.

    Raises:
        CommandError: the model cannot be built; the error is the ``__cause__``.
    """
    try:
        return open_model(name, **kwargs)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        reason = textwrap.shorten(one_line(error), _LONGEST, placeholder=" …")
        raise CommandError(f"{option} {printable(name)}: {reason}") from error


def describe_model(
    model: LTRPModel, name: str, weights: str | None, keep_ratios: Sequence[float]
) -> None:
    """Print a model's size, its ranker, how many patches it keeps, and its weights."""
    size = model.data_config()["input_size"][-2:]
    n = model.num_patches
    kept = ", ".join(f"{num_keep(n, r)} of {n} at {r:g}" for r in keep_ratios)
    backbone = f"{_millions(model.backbone)}, images of {size[0]}x{size[1]}"
    say(f"model       {printable(name)}, {backbone}")
    say(f"ranker      {model.ranker.name}: {_about_ranker(model.ranker)}")
    say(f"patches     keeps {kept}")
    random = "random (not in the cache; --pretrained downloads them)"
    say(f"backbone weights: {weights or random}")


def _about_ranker(ranker: Any) -> str:
    if ranker.name == "random":
        return "a fixed random order, looks at nothing"
    if not ranker.learned:
        return "weight-free, no learning"
    state = "learned" if ranker.trained else "untrained here, so its choice means nothing"
    state += f" ({ranker.origin})" if ranker.origin else ""
    return f"{_millions(ranker)}, {state}"


def _millions(module: Any) -> str:
    count = sum(parameter.numel() for parameter in module.parameters())
    return f"{count / 1e6:.{1 if count > 1e6 else 2}f} M parameters"


@contextlib.contextmanager
def quiet_about_training() -> Iterator[None]:
    """Hide the warning about an untrained ranker: ``describe_model`` prints the same."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the .* ranker has no trained weights")
        yield
