"""One training loop for all recipes: read it from top to bottom.

A recipe brings a ``Task``: a model, its loss on a batch, its metrics. The loop brings the rest:
timm's optimiser, schedule and EMA, autocast, accumulation, DistributedDataParallel, checkpoints
that continue exactly, and an orderly end when it is asked to stop.
"""

import abc
import contextlib
import dataclasses
import math
import signal
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn

from ltrp_timm._text import complain, counted, one_line, say
from ltrp_timm.data.keyed import Batch
from ltrp_timm.data.sources import Sources
from ltrp_timm.runtime.world import StopRequests, World, stop_requests
from ltrp_timm.train.engine import Engine
from ltrp_timm.train.folder import (
    CHECKPOINT_NAME,
    Log,
    check_folder,
    check_same,
    claimed,
    find_tracker,
    find_writer,
    read_state,
    save_state,
)
from ltrp_timm.train.settings import Settings
from ltrp_timm.visualize import plot_curves, require_matplotlib, row, stack_rows
from ltrp_timm.weights.files import digest, write_atomically

BEST = "best"
CURVES_NAME, PICTURES_NAME = "curves.png", "pictures.png"
MAX_UNREADABLE = 0.5  # share of all images; a run that cannot read more of them stops


class Task(abc.ABC):
    """What a recipe brings.

    Attributes:
        name: Name of the command.
        metric: The metric of ``measure`` that selects the best epoch.
        higher_is_better: Direction of that metric.
        model: What is trained, on the device.
        forward: What is called in training: the model, or a module around it.
        chance: Loss of a model that knows nothing, or None where that is unknown.
        num_graphs: Kinds of updates, each of which is compiled separately.
        notes: Lines that are printed once the settings and the output folder are checked.
        start: Digest of the weights that the run starts from.
    """

    name: str
    metric: str
    higher_is_better = True
    chance: float | None = None
    num_graphs = 1
    notes: Sequence[str] = ()

    def __init__(self, model: Any, forward: nn.Module | None = None) -> None:
        self.model, self.start = model, digest(model.state_dict())
        self.forward: Any = model if forward is None else forward

    @abc.abstractmethod
    def config(self) -> dict[str, Any]:
        """What a continuation must not change, as JSON can hold it."""

    @abc.abstractmethod
    def loss(self, forward: nn.Module, batch: Batch) -> Tensor:
        """Mean loss of a batch by ``forward``, which may wrap ``self.forward``."""

    @abc.abstractmethod
    def measure(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Metrics of each image of a held-out batch, (B,)."""

    def measure_set(self, world: World) -> dict[str, float]:
        """Metrics of the whole held-out set that are no means over images."""
        return {}

    @abc.abstractmethod
    def save(self, model: nn.Module, folder: Path) -> None:
        """Write a model for use."""

    @abc.abstractmethod
    def panels(self, model: nn.Module, batch: Batch) -> list[list[tuple[Image.Image, str]]]:
        """Pictures and captions that show what the model makes of each image."""


class NonFiniteLossError(RuntimeError):
    """The loss or a weight is not finite: nothing is learned from there on."""


@dataclasses.dataclass
class Progress:
    """Where a run is: ``update`` of ``epoch`` comes next, both from 0."""

    epoch: int = 0
    update: int = 0
    step: int = 0
    loss_sum: float = 0.0
    best: float | None = None
    last_losses: list[float] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Summary:
    """How a run ended.

    Attributes:
        output: Folder that the model loads from.
        epochs: Epochs done.
        steps: Updates done.
        metrics: The last row of the log.
        unreadable: One line for each image that could not be read.
        stopped_by: Signal that ended the run early, or None.
    """

    output: Path
    epochs: int
    steps: int
    metrics: dict[str, Any]
    unreadable: list[str]
    stopped_by: int | None


def fit(
    task: Task, sources: Sources, settings: Settings, world: World, output: Any, dry: bool = False
) -> Summary:
    """Train, into an output folder; a dry run says what would be done and writes nothing."""
    if settings.plot:
        require_matplotlib()
    if settings.tensorboard:
        find_writer()
    if settings.report_to:
        find_tracker(settings.report_to)
    resume = settings.resume == "auto"
    trainer = Trainer(task, sources, settings, world, Path(output))
    world.on_main(lambda: check_folder(trainer.folder, resume))
    for line in task.notes if world.main else ():
        say(line)
    if dry:
        trainer.rehearse()
        return trainer.summary(None)
    with contextlib.ExitStack() as stack:
        world.on_main(lambda: stack.enter_context(claimed(trainer.folder, resume)))
        trainer.start()
        if trainer.log:
            stack.callback(trainer.log.close)
        with stop_requests() as requests:
            return trainer.run(requests)


class Trainer:
    """The state of a run and its steps."""

    def __init__(
        self, task: Task, sources: Sources, settings: Settings, world: World, folder: Path
    ) -> None:
        self.task, self.sources, self.settings = task, sources, settings
        self.world, self.folder = world, folder
        self.checkpoint = folder / CHECKPOINT_NAME
        power = 0.5 if settings.lr_base_scale == "sqrt" else 1.0
        lr = settings.lr or settings.base_lr * (sources.per_update / 256) ** power
        self.engine = Engine(task, settings, world, lr, sources.updates_per_epoch)
        self.progress = Progress()
        self.problems: dict[str, None] = {}  # a line for each unreadable image
        self.log: Log | None = None  # in the main process
        self.rate = 0.0  # of the last update

    def config(self) -> dict[str, Any]:
        """What a continuation must not change."""
        return {
            "command": self.task.name,
            "start": self.task.start,
            **self.task.config(),
            "data": self.sources.fingerprint,
            "images_per_update": self.sources.per_update,
            "updates_per_epoch": self.sources.updates_per_epoch,
            **self.settings.fixed(),
            "precision": self.engine.precision,
            "lr": self.engine.lr,
        }

    def rehearse(self) -> None:
        """Report what a run would do."""
        sources, settings, world, state = self.sources, self.settings, self.world, "new"
        if self.checkpoint.exists():
            self.read_checkpoint()
            done = self.progress.epoch
            finished = done >= settings.epochs
            state = "finished" if finished else f"{done} of {settings.epochs} epochs done"
        if world.main:
            say(f"{self.folder}: {state}")
            say(
                f"{counted(settings.epochs, 'epoch')}, {sources.describe()}, "
                f"learning rate {self.engine.lr:.3g}, {self.engine.precision}, "
                f"{counted(world.size, 'process')} on {world.device}"
            )

    def start(self) -> None:
        """Restore a checkpoint, or write the first one; then wrap the model for training."""
        if self.world.on_main(self.checkpoint.exists):  # the main process is about to write it
            self.engine.load_state_dict(self.read_checkpoint())
            if self.world.main:
                self._say_where()
        else:
            self.world.on_main(self.save_checkpoint)
        self.engine.wrap()
        if self.world.main:
            settings, done = self.settings, (self.progress.epoch, self.progress.step)
            self.log = Log(self.folder, *done, settings, self.config())
            if self.engine.ema:
                decay = f"decay {settings.ema_decay:g} at most"
                say(f"measured and saved: an average of the weights, {decay}")

    def read_checkpoint(self) -> dict[str, Any]:
        """Read the checkpoint, check its configuration, take over its progress."""
        state = read_state(self.checkpoint)
        saved, now, sched = state["config"], self.config(), self.settings.sched
        if saved["epochs"] != now["epochs"]:
            if not self.settings.open_ended and saved["sched"] == sched:
                raise ValueError(
                    f"{self.checkpoint} cannot go on to other epochs ({saved['epochs']} there, "
                    f"{now['epochs']} here): its schedule ({sched}) is laid out for all of them. "
                    "Start a new run from its weights, or train with sched='none'."
                )
            saved = {**saved, "epochs": now["epochs"]}
        check_same(saved, now, self.checkpoint)
        self.progress = Progress(**state["progress"])
        return state

    def _say_where(self) -> None:
        p = self.progress
        if p.epoch >= self.settings.epochs:
            done = f"{counted(p.epoch, 'epoch')}, {counted(p.step, 'step')}"
            say(f"{self.folder} is finished: {done}")
        else:
            where = f"epoch {p.epoch + 1}, update {p.update + 1} (step {p.step + 1})"
            say(f"resuming {self.folder} at {where}")

    def save_checkpoint(self) -> None:
        """Write all that a continuation needs; in the main process. An error keeps the last one."""
        self._check_weights()
        progress = dataclasses.asdict(self.progress)
        state = {"config": self.config(), "progress": progress, **self.engine.state_dict()}
        save_state(self.checkpoint, state)

    def run(self, requests: StopRequests) -> Summary:
        """Train all epochs that are left."""
        while self.progress.epoch < self.settings.epochs:
            stopped = self.train_epoch(requests)
            if not stopped:
                self.end_epoch()
                continue
            if not self.sources.streaming:
                self.world.on_main(self.save_checkpoint)
            elif self.world.main:
                epoch = f"epoch {self.progress.epoch + 1}"
                say(f"Streams resume at epoch boundaries: {epoch} restarts from its first batch.")
            return self.summary(stopped)
        return self.summary(None)

    def train_epoch(self, requests: StopRequests) -> int:
        """Train the updates left in the epoch; returns the signal that ended it early, or 0."""
        progress, sources, settings = self.progress, self.sources, self.settings
        if self.log:
            each, count = sources.per_update, sources.updates_per_epoch
            done = progress.update * each
            self.log.start_epoch(progress.epoch + 1, settings.epochs, count * each, done)
        batches = sources.training_batches(progress.epoch, progress.update * settings.accumulate)
        self.engine.model.train()
        with contextlib.closing(batches):
            while progress.update < sources.updates_per_epoch:
                self.rate = self.engine.rate
                update = list(islice(batches, settings.accumulate))
                loss, stopped = self.train_update(update, requests)
                if self.log:
                    self.log.update(progress.step, sources.per_update, loss, self.rate)
                if stopped:
                    return stopped
                every = settings.checkpoint_steps
                due = every and progress.step % every == 0
                if due and progress.update < sources.updates_per_epoch and not sources.streaming:
                    self.world.on_main(self.save_checkpoint)
        return 0

    def train_update(self, batches: list[Batch], requests: StopRequests) -> tuple[float, int]:
        """Train one update on its accumulated batches; its mean loss, and a stop signal or 0.

        Raises NonFiniteLossError, or ValueError if too many images are unreadable, before anything
        has changed.
        """
        progress = self.progress
        self._check_images(batches)
        loss = self.engine.gradients(batches, self.task.loss, progress.step)
        sums = self.world.sum([loss, float(requests.signal is not None)])
        mean_loss = sums[0] / self.world.size
        if not math.isfinite(mean_loss):
            raise NonFiniteLossError(self._not_finite(f"the loss is {mean_loss}"))
        progress.step += 1
        progress.update += 1
        self.engine.update(progress.step)
        progress.loss_sum += mean_loss
        progress.last_losses = [*progress.last_losses, mean_loss][-5:]
        return mean_loss, (requests.signal or signal.SIGTERM) if sums[1] else 0

    def end_epoch(self) -> None:
        """Measure, save, log; the checkpoint comes last: a run killed here does all of it again."""
        speed = self.log.images_per_second() if self.log else 0.0
        metrics = self.evaluate()
        self._check_images([])
        unreadable = self.world.gather_names(list(self.problems))
        progress, metric = self.progress, metrics.get(self.task.metric)
        sign = 1.0 if self.task.higher_is_better else -1.0
        best = progress.best
        better = metric is not None and (best is None or sign * metric > sign * best)
        log_row = {
            "epoch": progress.epoch + 1,
            "step": progress.step,
            "lr": self.rate,
            "loss": progress.loss_sum / self.sources.updates_per_epoch,
            "chance": self.task.chance,
            "ema_decay": self.engine.ema and self.engine.ema.get_decay(progress.step),
            **{f"val_{name}": value for name, value in metrics.items()},
            "unreadable": len(unreadable),
            "images_per_second": speed,
        }
        if better:
            progress.best = metric
        progress.epoch, progress.update, progress.loss_sum = progress.epoch + 1, 0, 0.0
        self.world.on_main(lambda: self._write_epoch(log_row, better))

    def _write_epoch(self, log_row: dict[str, Any], better: bool) -> None:
        model = self.engine.trained_model
        self._check_weights()
        try:
            self.task.save(model, self.folder)
            if better:
                self.task.save(model, self.folder / BEST)
        except (OSError, SafetensorError) as error:
            reason = f"{self.folder} cannot be written to: {one_line(error)}"
            raise OSError(f"{reason}; the last checkpoint is whole.") from error
        if self.log:
            self.log.end_epoch(log_row, self.settings.epochs)
            if self.settings.plot:
                self._plot(self.log)
        self.save_checkpoint()

    def _plot(self, log: Log) -> None:
        plot_curves(log.rows, self.folder / CURVES_NAME)
        with self.engine.measuring() as model:
            panels = self.task.panels(model, self.sources.fixed_batch())
        picture = stack_rows([row(parts) for parts in panels])
        path = self.folder / PICTURES_NAME
        write_atomically(path, lambda file: picture.save(file, format="png"))

    def evaluate(self) -> dict[str, float]:
        """Metrics of the held-out images of all processes; empty where nothing is held out."""
        sums: dict[str, float] = {}
        with self.engine.measuring() as model:
            for batch in self.sources.held_out_batches():
                self._report_problems(batch)
                values = self.task.measure(model, batch)
                values["images"] = batch.real
                for name, value in values.items():
                    part = value.double()[batch.real].sum().item()
                    sums[name] = sums.get(name, 0.0) + part
        # a process without any held-out image does not know the names
        names = self.world.gather_names(list(sums))
        totals = dict(zip(names, self.world.sum([sums.get(name, 0.0) for name in names])))
        count = totals.pop("images", 0.0)
        if not count and self.sources.held_out and self.sources.given:
            self._stop_reading(f"none of {len(self.sources.held_out)} held-out images can be read")
        if not count:
            return {}
        means = {name: total / count for name, total in totals.items()}
        return {**means, **self.task.measure_set(self.world)}

    def _report_problems(self, batch: Batch) -> None:
        """Report each unreadable image once."""
        for line in batch.problems:
            if line not in self.problems:
                self.problems[line] = None
                complain(f"skipped {line}")

    def _check_images(self, batches: list[Batch]) -> None:
        """Report unreadable images of an update; ValueError in all processes if too few are left.

        A blank sample stands for no image: it must not enter a loss.
        """
        for batch in batches:
            self._report_problems(batch)
        if self.sources.streaming:  # it ends with the first image that cannot be read
            return
        count, held_out = len(self.sources.train), len(self.sources.held_out or ())
        lost = any(batch.problems and not bool(batch.real.all()) for batch in batches)
        many = len(self.problems) > MAX_UNREADABLE * (count + held_out)
        lost_somewhere, many_somewhere = self.world.sum([lost, many])
        if lost_somewhere:
            self._stop_reading(f"none of {count} training images can be read")
        if many_somewhere:
            text = f"more than {MAX_UNREADABLE:.0%} of {count + held_out} images cannot be read"
            self._stop_reading(text)

    def _stop_reading(self, what: str) -> NoReturn:
        """Raise ValueError with the last reason; all processes must call this."""
        last = self.world.gather([*self.problems][-1:])[:1]
        where = f"the last checkpoint stays in {self.checkpoint}."
        raise ValueError("; ".join([what, *(line.rstrip(".") for line in last), where]))

    def _check_weights(self) -> None:
        if not all(bool(p.isfinite().all()) for p in self.engine.model.parameters()):
            raise NonFiniteLossError(self._not_finite("a weight is not finite"))

    def _not_finite(self, what: str) -> str:
        progress = self.progress
        losses = ", ".join(f"{loss:.4g}" for loss in progress.last_losses) or "none"
        return (
            f"{what} at step {progress.step + 1} (epoch {progress.epoch + 1}); losses before it: "
            f"{losses}; learning rate {self.rate:.3g}. The weights of the last checkpoint are in "
            f"{self.checkpoint}."
        )

    def summary(self, stopped_by: int | None) -> Summary:
        """How the run ended."""
        rows = self.log.rows if self.log else []
        return Summary(
            output=self.folder,
            epochs=self.progress.epoch,
            steps=self.progress.step,
            metrics=dict(rows[-1]) if rows else {},
            unreadable=self.world.gather_names(list(self.problems)),
            stopped_by=stopped_by,
        )
