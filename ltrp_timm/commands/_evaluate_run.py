"""``ltrp-timm evaluate``: what each keep ratio costs in accuracy and gains in time."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from timm.data import create_transform
from torch import Tensor
from tqdm import tqdm

from ltrp_timm._text import complain, one_line, printable, say
from ltrp_timm.commands._console import CommandError
from ltrp_timm.commands._evaluate_multi_label import (
    class_rows,
    image_rows,
    make_counters,
    say_absent,
)
from ltrp_timm.commands._evaluate_report import (
    CSV_NAME,
    JSON_NAME,
    PER_CLASS_NAME,
    PER_IMAGE_NAME,
    PLOT_NAME,
    check_folder,
    make_rows,
    say_table,
    write_per_image,
    write_results,
    write_tables,
)
from ltrp_timm.commands._evaluate_setup import (
    EvaluateOptions,
    Subject,
    competing,
    conditions,
    describe,
    explain,
    mean_kept,
    prepare,
)
from ltrp_timm.commands._flags import threads
from ltrp_timm.commands._model import quiet_about_training
from ltrp_timm.data.keyed import Batch, HeldOutSampler, KeyedImages, make_loader
from ltrp_timm.data.labels import LabelledImages
from ltrp_timm.measure.evaluate import measure_all
from ltrp_timm.measure.throughput import NUM_WORKERS
from ltrp_timm.models.ltrp import LTRPModel
from ltrp_timm.runtime.keyed_rng import HELD_OUT
from ltrp_timm.runtime.world import World, join_world
from ltrp_timm.scoring import cached_transform
from ltrp_timm.train.engine import autocast
from ltrp_timm.train.logs import require_matplotlib


def evaluate(options: EvaluateOptions) -> int:
    """Measure accuracy and throughput, say them, and write them.

    Args:
        options: what was asked for.

    Returns:
        0, or 2 when some of the images could not be read.

    Raises:
        CommandError: an argument is wrong, or classes and model disagree.
    """
    with threads(options.threads):
        try:
            with join_world(options.device) as world:
                return _evaluate(options, world)
        except (ValueError, TypeError, OSError, ImportError) as error:
            if isinstance(error, BrokenPipeError):
                raise
            reason = one_line(error)
        except torch.OutOfMemoryError as error:
            reason = f"{one_line(error)} (a smaller --batch-size needs less.)"
        except CommandError as error:
            reason = str(error)
    if os.environ.get("RANK", "0") != "0":
        return 2  # the first process says it
    raise CommandError(reason)


def _evaluate(options: EvaluateOptions, world: World) -> int:
    if options.output is not None:
        _check_output(options)
    subject = prepare(options, world)
    model, images = subject.model, subject.images
    runner = _Runner(options, world, _keyed(options, subject))
    counters = make_counters(options, subject)
    if world.main:
        describe(options, subject)
    with torch.inference_mode(), quiet_about_training():
        results, predictions = measure_all(
            {ratio: _call(model, ratio, options.precision, world) for ratio in subject.ratios},
            runner.batches(),
            world,
            competing(options, subject),
            runner.note,
            keep_predictions=options.per_image and counters is None,
            counters=counters,
        )
        kept = {ratio: mean_kept(subject, ratio, runner.first) for ratio in subject.ratios}
    unreadable = world.gather_names(runner.problems)
    predictions = world.gather(predictions)
    by_image = counters is not None and options.per_image
    lines = image_rows(counters, images, world) if counters is not None and by_image else []
    if world.main:
        rows = make_rows(results, kept)
        say_table(rows)
        explain(options, rows, world)
        absent = say_absent(results)
        if unreadable:
            say(f"could not be read, and count nowhere: {len(unreadable)}")
        if options.output is not None:
            total = next(iter(results.values())).accuracy.images
            counts = {"images": total, "unreadable": len(unreadable)}
            facts = {**counts, **absent, **conditions(options, subject, world)}
            write_results(options.output, rows, facts, options.plot)
            if counters is not None:
                tables = {PER_CLASS_NAME: class_rows(results, counters), PER_IMAGE_NAME: lines}
                write_tables(options.output, tables)
            elif options.per_image and isinstance(images, LabelledImages):
                write_per_image(options.output, predictions, images)
            say(f"\nwritten to {printable(options.output)}")
    return 2 if unreadable else 0


def _keyed(options: EvaluateOptions, subject: Subject) -> KeyedImages:
    """The images as the model wants them, with cached scores of their patches if there are any."""
    images, size = subject.images, subject.config["input_size"]
    transform: Any = create_transform(**subject.config, is_training=False)
    if options.index_cache is not None:
        transform = cached_transform(options.index_cache, subject.model, images, transform)
    keyed = KeyedImages(images, range(len(images)), transform, 0, size)
    keyed.check_readable()
    return keyed


class _Runner:
    """The batches of this process, and what it notes of them."""

    def __init__(self, options: EvaluateOptions, world: World, keyed: KeyedImages) -> None:
        self.options, self.world, self.keyed = options, world, keyed
        self.problems: list[str] = []
        self.first: Tensor | None = None
        self.bar: Any = None

    def batches(self) -> Iterator[Batch]:
        """Every image of this process once."""
        sampler = HeldOutSampler(len(self.keyed), self.world)
        size = max(1, min(self.options.batch_size, len(sampler)))
        on_gpu = self.world.device.type != "cpu"
        workers = self.options.workers
        if workers is None:
            workers = NUM_WORKERS if on_gpu else 0
        loader = make_loader(
            self.keyed,
            sampler,
            batch_size=size,
            device=self.world.device,
            num_workers=workers,
        )
        quiet = None if self.world.main else True  # None: not where nobody looks
        with tqdm(total=len(sampler), unit="image", disable=quiet, leave=False) as self.bar:
            for sample in loader:
                yield Batch(sample, 0, HELD_OUT, self.world.device)
                self.bar.update(len(sample["index"]))

    def note(self, batch: Batch) -> None:
        """Name what could not be read."""
        if self.first is None:
            self.first = batch.images
        for line in batch.problems:
            self.problems.append(line)
            complain(f"skipped {line}")


def _check_output(options: EvaluateOptions) -> None:
    names = [CSV_NAME, JSON_NAME]
    names += [PLOT_NAME] if options.plot else []
    names += [PER_IMAGE_NAME] if options.per_image else []
    names += [PER_CLASS_NAME] if options.multi_label else []
    check_folder(str(options.output), names, options.overwrite)
    if options.plot:
        require_matplotlib()


def _call(model: Any, keep_ratio: float, precision: str, world: World) -> Callable[[Batch], Tensor]:
    def call(batch: Batch) -> Tensor:
        with autocast(world.device, precision):
            if not isinstance(model, LTRPModel):
                logits: Tensor = model(batch.images)
                return logits
            if keep_ratio == 1.0:
                return model.backbone(batch.images)  # the plain model, whatever the selection
            if model.keep_ratio != keep_ratio:
                model.keep_ratio = keep_ratio
            if batch.scores is None:
                return model(batch.images)
            keep = model.select(batch.scores, batch.images)
            return model(batch.images, keep_indices=keep)

    return call
