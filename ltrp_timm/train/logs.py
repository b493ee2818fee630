"""What a run reports: a progress bar, a table, TensorBoard events, trackio or wandb."""

import csv
import importlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ltrp_timm._text import csv_text, say
from ltrp_timm.weights.files import write_text

LOG_NAME = "log.csv"
PROJECT = "ltrp_timm"  # for trackio and wandb, unless TRACKIO_PROJECT or WANDB_PROJECT is set
Row = dict[str, Any]


def read_log(path: Path) -> list[Row]:
    """Read the rows of a log, numbers as numbers; a missing file has none."""
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return [
            {name: _number(text) if text else None for name, text in row.items()}
            for row in csv.DictReader(file)
        ]


class Log:
    """The log of a run in its output folder; only the main process has one.

    Args:
        folder: Output folder of the run.
        epoch: Epochs that the checkpoint has done. Later rows, of a run that got further than its
            checkpoint, are dropped and will be written again.
        step: Updates that the checkpoint has done.
        tensorboard: See ``Settings``.
        progress: See ``Settings``.
        report_to: See ``Settings``.
        config: What the run reports of itself to ``report_to``.

    Raises:
        ImportError: ``tensorboard=True`` or ``report_to`` needs what is not installed.
    """

    def __init__(
        self,
        folder: Path,
        epoch: int,
        step: int,
        tensorboard: bool | None = None,
        progress: bool | None = None,
        report_to: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.path, self.progress = folder / LOG_NAME, progress
        self.rows = [row for row in read_log(self.path) if row["epoch"] <= epoch]
        writer = None if tensorboard is False else find_writer(bool(tensorboard))
        self.writer = writer and writer(str(folder), purge_step=step)
        self.tracker = None if report_to is None else find_tracker(report_to)
        if self.tracker:
            project = os.environ.get(f"{report_to}_PROJECT".upper(), PROJECT)
            self.tracker.init(project=project, name=folder.name, config=dict(config or {}))
        self.bar: Any = None
        self._images, self._since = 0, time.perf_counter()

    def start_epoch(self, epoch: int, epochs: int, images: int, done: int) -> None:
        """Start the bar of an epoch of ``images``, the first ``done`` of which are done."""
        hidden = None if self.progress is None else not self.progress
        text = f"epoch {epoch}/{epochs}"
        self.bar = tqdm(
            total=images, initial=done, desc=text, unit="image", disable=hidden, leave=False
        )
        self._images, self._since = 0, time.perf_counter()

    def update(self, step: int, images: int, loss: float, rate: float) -> None:
        """Report one update."""
        self._images += images
        self.bar.update(images)
        self.bar.set_postfix_str(f"loss {loss:.4f}, lr {rate:.2e}", refresh=False)
        self._report({"train/loss": loss, "train/lr": rate}, step)

    def images_per_second(self) -> float:
        """Measure the speed since the epoch began or was resumed."""
        return self._images / max(time.perf_counter() - self._since, 1e-9)

    def end_epoch(self, row: Mapping[str, Any], epochs: int) -> None:
        """Write and print the row of an epoch."""
        self.bar.close()
        self.rows.append(dict(row))
        write_text(self.path, csv_text(self.rows))
        values = {name: row[name] for name in row if name not in ("epoch", "step")}
        self._report({f"epoch/{n}": v for n, v in values.items() if v is not None}, row["step"])
        if self.writer:
            self.writer.flush()
        shown = [f"{name} {_short(value)}" for name, value in row.items() if value is not None]
        say(f"epoch {row['epoch']}/{epochs}: " + ", ".join(shown[1:]))

    def _report(self, values: Mapping[str, float], step: int) -> None:
        if self.writer:
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
        if self.tracker:
            self.tracker.log(dict(values), step=step)

    def close(self) -> None:
        """Close the bar and flush the events."""
        if self.bar is not None:
            self.bar.close()
        if self.writer:
            self.writer.close()
        if self.tracker:
            self.tracker.finish()


def find_writer(required: bool) -> Any:
    """TensorBoard's SummaryWriter, or None where it is not installed.

    Raises:
        ImportError: It is required and not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        if required:
            raise ImportError("TensorBoard is missing: pip install 'ltrp-timm[train]'") from error
        return None
    return SummaryWriter


def find_tracker(name: str) -> Any:
    """The module ``trackio`` or ``wandb``: both have ``init``, ``log`` and ``finish``.

    Raises:
        ImportError: It is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ImportError(f"report_to={name!r} needs {name}: pip install {name}") from error


def _number(text: str) -> float:
    return int(text) if text.isdigit() else float(text)


def _short(value: float) -> str:
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e9 else f"{value:.4g}"
