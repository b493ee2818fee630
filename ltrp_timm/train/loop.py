"""One training loop for all recipes: read it from top to bottom.

A recipe brings a ``Task``: a model, its loss on a batch, its metrics. The loop brings all else:
timm's optimiser, schedule and EMA, autocast, accumulation, DistributedDataParallel, checkpoints
that go on exactly, and an end in order whenever it is asked to stop.
"""

import contextlib
import dataclasses
import math
import signal
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ltrp_timm._text import complain, one_line, say
from ltrp_timm.data.keyed import Batch
from ltrp_timm.data.sources import Sources
from ltrp_timm.runtime.stopping import StopRequests, stop_requests
from ltrp_timm.runtime.world import World
from ltrp_timm.train.curves import CURVES_NAME, plot_curves, require_matplotlib
from ltrp_timm.train.engine import Engine
from ltrp_timm.train.logs import LOG_NAME, Log, find_writer
from ltrp_timm.train.settings import Settings
from ltrp_timm.train.state import CHECKPOINT_NAME, check_same, locked, read_state, save_state
from ltrp_timm.train.task import NonFiniteLossError, Progress, Summary, Task
from ltrp_timm.weights.files import CONFIG_NAME, WEIGHTS_NAME, write_atomically

BEST = "best"
PICTURES_NAME = "pictures.png"


def fit(task: Task, sources: Sources, settings: Settings, world: World, output: Any) -> Summary:
    """Train, into a folder of its own.

    Raises:
        FileExistsError: the folder holds a run, or another process writes to it.
        ValueError: its checkpoint is of another configuration.
        NonFiniteLossError: the loss is no finite number.
        OSError: the disk is full, or refuses.
    """
    folder = Path(output)
    if settings.plot:
        require_matplotlib()
    if settings.tensorboard:
        find_writer(required=True)
    trainer = Trainer(task, sources, settings, world, folder)
    with contextlib.ExitStack() as stack:
        world.on_main(lambda: _claim(folder, settings, stack))
        trainer.start()
        stack.callback(trainer.close)
        with stop_requests() as requests:
            return trainer.run(requests)


def rehearse(
    task: Task, sources: Sources, settings: Settings, world: World, output: Any
) -> Summary:
    """Say what ``fit`` would do; nothing is written. Errors are those of its beginning."""
    folder = Path(output)
    _check_folder(folder, settings)
    trainer = Trainer(task, sources, settings, world, folder)
    if trainer.checkpoint.exists():
        state = read_state(trainer.checkpoint)
        check_same(state["config"], trainer.config(), trainer.checkpoint)
        trainer.progress = Progress(**state["progress"])
    if world.main:
        done, epochs = trainer.progress.epoch, settings.epochs
        state_now = "finished" if done >= epochs else f"{done} of {epochs} epochs done"
        held = len(sources.held_out) if sources.held_out is not None else 0
        each, count = sources.per_update, sources.updates_per_epoch
        say(f"{folder}: {state_now if trainer.checkpoint.exists() else 'new'}")
        say(
            f"{epochs} epochs of {count} updates with {each} images, {held} images held out, "
            f"learning rate {trainer.engine.lr:.3g}, {trainer.engine.precision}, {world.size} "
            f"process{'es' if world.size > 1 else ''} on {world.device}"
        )
    return trainer.summary(None)


def _check_folder(folder: Path, settings: Settings) -> None:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is no folder.")
    names = (CHECKPOINT_NAME, CONFIG_NAME, WEIGHTS_NAME, LOG_NAME)
    resumes = settings.resume == "auto" and (folder / CHECKPOINT_NAME).exists()
    present = [name for name in names if (folder / name).exists()]
    if present and not resumes:
        hint = "resume='auto' goes on with it" if CHECKPOINT_NAME in present else "choose another"
        raise FileExistsError(f"{folder} already holds {' and '.join(present)}; {hint}.")


def _claim(folder: Path, settings: Settings, stack: contextlib.ExitStack) -> None:
    """Take the output folder for this run, and nothing else."""
    if folder.is_dir():
        stack.enter_context(locked(folder))
    _check_folder(folder, settings)
    if not folder.exists():
        folder.mkdir(parents=True)
        stack.enter_context(locked(folder))


class Trainer:
    """The state of a run and its steps."""

    def __init__(
        self, task: Task, sources: Sources, settings: Settings, world: World, folder: Path
    ) -> None:
        self.task, self.sources, self.settings = task, sources, settings
        self.world, self.folder = world, folder
        self.checkpoint = folder / CHECKPOINT_NAME
        lr = settings.lr or settings.base_lr * sources.per_update / 256
        self.engine = Engine(
            task.model,
            lr,
            sources.updates_per_epoch,
            settings,
            world,
            forward=getattr(task, "forward", None),
            num_graphs=getattr(task, "num_graphs", 1),
        )
        self.progress = Progress()
        self.problems: list[str] = []
        self.log: Any = None
        self.rate = 0.0  # of the last update

    def config(self) -> dict[str, Any]:
        """What a continuation must not change."""
        return {
            "command": self.task.name,
            **self.task.config(),
            "data": self.sources.fingerprint,
            "images_per_update": self.sources.per_update,
            "updates_per_epoch": self.sources.updates_per_epoch,
            **self.settings.fixed(),
            "precision": self.engine.precision,
            "lr": self.engine.lr,
        }

    def start(self) -> None:
        """Take up a checkpoint, or write the first one; then wrap the model for the work."""
        if self.world.on_main(self.checkpoint.exists):  # the main process is about to write it
            self.restore()
        else:
            self.world.on_main(self.save_checkpoint)
        self.engine.wrap()
        if self.world.main:
            p, s = self.progress, self.settings
            self.log = Log(self.folder, p.epoch, p.step, s.tensorboard, s.progress)

    def save_checkpoint(self) -> None:
        """Write all that a continuation needs; in the main process.

        Raises:
            NonFiniteLossError: a weight is not finite; the last checkpoint stays.
            OSError: it cannot be written; the last checkpoint stays.
        """
        if not self.engine.is_finite():
            raise NonFiniteLossError(self._not_finite("a weight is not finite"))
        progress = dataclasses.asdict(self.progress)
        state = {"config": self.config(), "progress": progress, **self.engine.state_dict()}
        save_state(self.checkpoint, state)

    def restore(self) -> None:
        """Go on from the checkpoint, exactly.

        Raises:
            ValueError: it is of another configuration, or no checkpoint.
        """
        state = read_state(self.checkpoint)
        check_same(state["config"], self.config(), self.checkpoint)
        self.progress = Progress(**state["progress"])
        self.engine.load_state_dict(state)
        if self.world.main:
            p = self.progress
            if p.epoch >= self.settings.epochs:
                say(f"{self.folder} is finished: {p.epoch} epochs, {p.step} steps")
            else:
                where = f"epoch {p.epoch + 1}, update {p.update + 1} (step {p.step + 1})"
                say(f"resuming {self.folder} at {where}")

    def close(self) -> None:
        """Put the log away."""
        if self.log:
            self.log.close()

    def run(self, requests: StopRequests) -> Summary:
        """All epochs that are left."""
        while self.progress.epoch < self.settings.epochs:
            stopped = self.train_epoch(requests)
            if stopped:
                self._leave()
                return self.summary(stopped)
            self.end_epoch()
        return self.summary(None)

    def _leave(self) -> None:
        """Save what was reached, at the request to stop."""
        if not self.sources.streaming:
            self.world.on_main(self.save_checkpoint)
        elif self.world.main:
            epoch = self.progress.epoch + 1
            say(f"a stream cannot be taken up within an epoch: epoch {epoch} will begin again")

    def train_epoch(self, requests: StopRequests) -> int:
        """Updates from where the run is; returns the signal that ended it early, or 0."""
        progress, per_epoch = self.progress, self.sources.updates_per_epoch
        accumulate = self.settings.accumulate
        self._show_epoch()
        batches = self.sources.training_batches(progress.epoch, progress.update * accumulate)
        self.engine.model.train()
        with contextlib.closing(batches):
            while progress.update < per_epoch:
                self.rate = self.engine.rate
                loss, stopped = self.train_update(list(islice(batches, accumulate)), requests)
                self._count(loss)
                if self.log:
                    self.log.update(progress.step, self.sources.per_update, loss, self.rate)
                every = self.settings.checkpoint_steps
                due = every and progress.step % every == 0 and progress.update < per_epoch
                if due and not self.sources.streaming and not stopped:
                    self.world.on_main(self.save_checkpoint)
                if stopped:
                    return stopped
        return 0

    def train_update(self, batches: list[Batch], requests: StopRequests) -> tuple[float, int]:
        """One update from as many batches as are accumulated.

        Returns:
            Its loss over all processes, and the signal that asks for an end, or 0.

        Raises:
            NonFiniteLossError: before anything has changed.
        """
        for batch in batches:
            self._name_problems(batch)
        loss = self.engine.gradients(batches, self.task.loss, self.progress.step)
        sums = self.world.sum([loss, float(requests.signal is not None)])
        loss_value = sums[0] / self.world.size
        if not math.isfinite(loss_value):
            raise NonFiniteLossError(self._not_finite(f"the loss is {loss_value}"))
        self.progress.step += 1
        self.engine.update(self.progress.step)
        return loss_value, (requests.signal or signal.SIGTERM) if sums[1] else 0

    def end_epoch(self) -> None:
        """Measure, save, log; the checkpoint comes last: a run killed here does all of it again."""
        speed = self.log.images_per_second() if self.log else 0.0
        metrics = self.evaluate()
        unreadable = self.world.gather_names(self.problems)
        progress = self.progress
        row = {
            "epoch": progress.epoch + 1,
            "step": progress.step,
            "lr": self.rate,
            "loss": progress.loss_sum / self.sources.updates_per_epoch,
            "chance": self.task.chance,
            **{f"val_{name}": value for name, value in metrics.items()},
            "unreadable": len(unreadable),
            "images_per_second": speed,
        }
        better = self._is_best(metrics.get(self.task.metric))
        if better:
            progress.best = metrics[self.task.metric]
        progress.epoch, progress.update, progress.loss_sum = progress.epoch + 1, 0, 0.0
        self.engine.end_epoch(progress.epoch, metrics.get(self.task.metric))
        self.world.on_main(lambda: self._write_epoch(row, better))

    def _write_epoch(self, row: dict[str, Any], better: bool) -> None:
        model = self.engine.trained_model
        if not self.engine.is_finite():
            raise NonFiniteLossError(self._not_finite("a weight is not finite"))
        try:
            self.task.save(model, self.folder)
            if better:
                self.task.save(model, self.folder / BEST)
        except (OSError, SafetensorError) as error:
            reason = f"{self.folder} cannot be written to: {one_line(error)}"
            raise OSError(f"{reason}; the last checkpoint is whole.") from error
        self.log.end_epoch(row, self.settings.epochs)
        if self.settings.plot:
            plot_curves(self.log.rows, self.folder / CURVES_NAME)
            with self.engine.measuring() as model:
                picture = self.task.draw(model, self.sources.fixed_batch())
            path = self.folder / PICTURES_NAME
            write_atomically(path, lambda file: picture.save(file, format="png"))
        self.save_checkpoint()

    def evaluate(self) -> dict[str, float]:
        """Means over the held-out images of all processes; none where nothing is held out."""
        sums: dict[str, float] = {}
        with self.engine.measuring() as model:
            for batch in self.sources.held_out_batches():
                self._name_problems(batch)
                values = self.task.measure(model, batch)
                values["images"] = batch.real
                for name, value in values.items():
                    part = value.double()[batch.real].sum().item()
                    sums[name] = sums.get(name, 0.0) + part
        # a process without any held-out image does not know the names
        names = self.world.gather_names(list(sums))
        totals = dict(zip(names, self.world.sum([sums.get(name, 0.0) for name in names])))
        count = totals.pop("images", 0.0)
        if not count:
            return {}
        judge = getattr(self.task, "judge", None)  # of what is no mean over images
        whole = {} if judge is None else judge(self.world)
        return {**{name: total / count for name, total in totals.items()}, **whole}

    def _show_epoch(self) -> None:
        if self.log:
            progress, each = self.progress, self.sources.per_update
            images = self.sources.updates_per_epoch * each
            self.log.start_epoch(
                progress.epoch + 1, self.settings.epochs, images, progress.update * each
            )

    def _count(self, loss: float) -> None:
        progress = self.progress
        progress.update += 1
        progress.loss_sum += loss
        progress.last_losses = [*progress.last_losses, loss][-5:]

    def _name_problems(self, batch: Batch) -> None:
        """Name each unreadable image once."""
        for line in batch.problems:
            if line not in self.problems:
                self.problems.append(line)
                complain(f"skipped {line}")

    def _not_finite(self, what: str) -> str:
        progress = self.progress
        losses = ", ".join(f"{loss:.4g}" for loss in progress.last_losses) or "none"
        return (
            f"{what} at step {progress.step + 1} (epoch {progress.epoch + 1}); losses before it: "
            f"{losses}; learning rate {self.rate:.3g}. The weights of the last checkpoint are in "
            f"{self.checkpoint}."
        )

    def _is_best(self, value: float | None) -> bool:
        best = self.progress.best
        if value is None or best is None:
            return value is not None
        return value > best if self.task.higher_is_better else value < best

    def summary(self, stopped_by: int | None) -> Summary:
        """How it ended."""
        progress = self.progress
        rows: list[Mapping[str, Any]] = self.log.rows if self.log else []
        return Summary(
            self.folder,
            progress.epoch,
            progress.step,
            dict(rows[-1]) if rows else {},
            self.world.gather_names(self.problems),
            stopped_by,
        )
