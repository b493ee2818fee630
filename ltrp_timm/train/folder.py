"""What a run keeps in its folder and reports: checkpoints, its claim, a table, events, a tracker.

A checkpoint is whole or the one before, and exact.
"""

import contextlib
import csv
import io
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ltrp_timm._text import csv_text, one_line, optional_import, say
from ltrp_timm.runtime.world import locked
from ltrp_timm.train.settings import Settings
from ltrp_timm.weights.files import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    unpickle,
    write_atomically,
    write_text,
)

CHECKPOINT_NAME = "checkpoint.pt"
LOG_NAME = "log.csv"
PROJECT = "ltrp_timm"  # for trackio and wandb, unless TRACKIO_PROJECT or WANDB_PROJECT is set
Row = dict[str, Any]
_KEY = "ltrp_timm_training_state"


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write a tree of dicts, lists, tuples, tensors and plain values in one atomic step.

    A run that is killed, or a disk that fills up, at any moment leaves the last good file.

    Raises:
        OSError: The file cannot be written; the former one at ``path`` is intact.
        TypeError: The tree holds what ``read_state`` would refuse.
    """
    buffer = io.BytesIO()
    torch.save({_KEY: dict(state)}, buffer)
    buffer.seek(0)
    unreadable = torch.serialization.get_unsafe_globals_in_checkpoint(buffer)
    if unreadable:
        raise TypeError(f"a checkpoint cannot hold {', '.join(sorted(unreadable))}.")
    try:
        write_atomically(path, lambda file: file.write_bytes(buffer.getbuffer()))
    except OSError as error:
        reason = error.strerror or one_line(error)
        kept = "; the checkpoint before it is whole" if path.exists() else ""
        raise OSError(f"{path} could not be written: {reason}{kept}.") from error


def read_state(path: Path) -> dict[str, Any]:
    """Read what ``save_state`` wrote, onto the CPU; no code runs. ValueError for any other file."""
    try:
        found = unpickle(path)
    except ValueError as error:
        raise ValueError(f"{path} is not a readable checkpoint: {error}") from error
    if not isinstance(found, dict) or _KEY not in found:
        raise ValueError(f"{path} is not a checkpoint of a training run.")
    return found[_KEY]


def check_same(saved: Mapping[str, Any], now: Mapping[str, Any], source: Path) -> None:
    """Raise ValueError, naming each field with both values, if two configurations differ."""
    saved, now = _flat(saved), _flat(now)
    names = [name for name in {**saved, **now} if saved.get(name) != now.get(name)]
    if names:
        lines = [f"{name} ({saved.get(name)} there, {now.get(name)} here)" for name in names]
        raise ValueError(f"{source} is of another configuration: {', '.join(lines)}.")


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields by dotted names; JSON makes tuples and lists equal."""
    out: dict[str, Any] = {}
    for name, value in json.loads(json.dumps(dict(config))).items():
        nested = isinstance(value, dict)
        out |= _flat(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return out


def check_folder(folder: Path, resume: bool) -> None:
    """Raise FileExistsError unless a folder is new or empty, or has a checkpoint to ``resume``."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is not a folder.")
    if resume and (folder / CHECKPOINT_NAME).exists():
        return
    names = (CHECKPOINT_NAME, CONFIG_NAME, WEIGHTS_NAME, LOG_NAME)
    present = [name for name in names if (folder / name).exists()]
    if present:
        known = CHECKPOINT_NAME in present
        hint = "resume='auto' continues it" if known else "choose another folder"
        raise FileExistsError(f"{folder} already holds {' and '.join(present)}; {hint}.")


@contextlib.contextmanager
def claimed(folder: Path, resume: bool) -> Iterator[None]:
    """Lock a folder that passes ``check_folder``; BlockingIOError if another process holds it."""
    if not folder.is_dir():
        check_folder(folder, resume)
    with locked(folder):
        check_folder(folder, resume)
        for orphan in folder.glob(".*.tmp"):  # of a write that was cut off
            orphan.unlink(missing_ok=True)
        yield


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

    Rows after ``epoch``, of a run that got further than its checkpoint, are dropped and will be
    written again. ``config`` is what the run reports of itself to ``report_to``.
    """

    def __init__(
        self, folder: Path, epoch: int, step: int, settings: Settings, config: Mapping[str, Any]
    ) -> None:
        self.path, self.progress = folder / LOG_NAME, settings.progress
        self.rows = [row for row in read_log(self.path) if row["epoch"] <= epoch]
        self.writer: Any = None
        wanted, name = settings.tensorboard, settings.report_to
        with contextlib.nullcontext() if wanted else contextlib.suppress(ImportError):
            if wanted is not False:
                self.writer = find_writer()(str(folder), purge_step=step)
        self.tracker = None if name is None else find_tracker(name)
        if self.tracker:
            project = os.environ.get(f"{name}_PROJECT".upper(), PROJECT)
            self.tracker.init(project=project, name=folder.name, config=dict(config))
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


def find_writer() -> Any:
    """TensorBoard's SummaryWriter; ImportError if it is not installed."""
    name, reason = "torch.utils.tensorboard", "TensorBoard is missing"
    return optional_import(name, reason, "'ltrp-timm[train]'").SummaryWriter


def find_tracker(name: str) -> Any:
    """``trackio`` or ``wandb``, which have ``init``, ``log`` and ``finish``; else ImportError."""
    return optional_import(name, f"report_to={name!r} needs {name}", name)


def _number(text: str) -> float:
    return int(text) if text.isdigit() else float(text)


def _short(value: float) -> str:
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e9 else f"{value:.4g}"
