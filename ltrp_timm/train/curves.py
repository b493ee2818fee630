"""The curves of a run as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ltrp_timm.train.logs import Row
from ltrp_timm.weights.files import write_atomically

CURVES_NAME = "curves.png"


def require_matplotlib() -> Any:
    """matplotlib's Figure.

    Raises:
        ImportError: it is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("curves need matplotlib: pip install 'ltrp-timm[demo]'") from error
    return Figure


def plot_curves(rows: Sequence[Row], path: Path) -> None:
    """Loss against its chance level, and the held-out metrics, over epochs."""
    scores = [n for n in rows[-1] if n.startswith("val_") and n not in ("val_loss", "val_chance")]
    figure = require_matplotlib()(figsize=(5 * (1 + bool(scores)), 4), layout="constrained")
    axes = figure.subplots(1, 1 + bool(scores), squeeze=False)[0]
    for name, style in (("loss", "-"), ("val_loss", "-"), ("chance", "--")):
        _line(axes[0], rows, name, style)
    axes[0].set_ylabel("loss")
    for name in scores:
        _line(axes[1], rows, name, "-")
    for axis in axes:
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend()
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def _line(axis: Any, rows: Sequence[Row], name: str, style: str) -> None:
    points = [(row["epoch"], row[name]) for row in rows if row.get(name) is not None]
    if points:
        marker = "o" if len(points) < 20 and style == "-" else None
        label = {"loss": "training", "val_loss": "held out"}.get(name, name.removeprefix("val_"))
        axis.plot(*zip(*points), style, marker=marker, label=label)
