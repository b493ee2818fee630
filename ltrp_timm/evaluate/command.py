"""``ltrp-timm evaluate``: what each keep ratio costs in accuracy and gains in time."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.data import create_transform
from torch import Tensor
from tqdm import tqdm

from ltrp_timm.arguments import threads
from ltrp_timm.console import CommandError, complain, say
from ltrp_timm.evaluate.measure import measure_all
from ltrp_timm.evaluate.report import (
    CSV_NAME,
    JSON_NAME,
    PER_IMAGE_NAME,
    PLOT_NAME,
    check_folder,
    make_rows,
    say_table,
    write_per_image,
    write_results,
)
from ltrp_timm.model import LTRPModel
from ltrp_timm.named_model import (
    build_model,
    build_plain,
    check_names,
    describe_model,
    quiet_about_training,
)
from ltrp_timm.photos import one_line, printable
from ltrp_timm.selection import num_keep
from ltrp_timm.throughput import environment
from ltrp_timm.train.cached import CachedTransform, open_cache, select_cached
from ltrp_timm.train.curves import require_matplotlib
from ltrp_timm.train.data import Batch, HeldOutSampler, KeyedImages, make_loader
from ltrp_timm.train.engine import autocast
from ltrp_timm.train.keys import HELD_OUT
from ltrp_timm.train.labels import LabelledImages, open_labelled
from ltrp_timm.train.network import image_config
from ltrp_timm.train.world import World, join_world

KEEP_RATIOS = (1.0, 0.7, 0.5, 0.25)


@dataclass(frozen=True)
class EvaluateOptions:
    """What ``ltrp-timm evaluate`` was asked for; names are those of its flags."""

    model: str
    data: Any
    split: str = "validation"
    data_root: str | None = None
    input_key: str | None = None
    target_key: str | None = None
    class_map: str | None = None
    all_classes: bool = False
    keep_ratio: Sequence[float] | None = None
    ranker: str | None = None
    ranker_weights: str | None = None
    selection: str | None = None
    index_cache: str | None = None
    pretrained: bool = False
    checkpoint: str | None = None
    img_size: int | None = None
    num_classes: int | None = None
    batch_size: int = 64
    workers: int | None = None
    device: str | None = None
    precision: str = "fp32"
    threads: int | None = None
    output: str | None = None
    plot: bool = False
    per_image: bool = False
    overwrite: bool = False


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
        except CommandError as error:
            reason = str(error)
    if os.environ.get("RANK", "0") != "0":
        return 2  # the first process says it
    raise CommandError(reason)


def _evaluate(options: EvaluateOptions, world: World) -> int:
    if options.output is not None:
        _check_output(options)
    images = _open(options)
    model, weights = _build(options)
    model.to(world.device)
    how = images.match(model.num_classes, _label_names(options, model))
    config = image_config(model, options.img_size)
    transform: Any = create_transform(**config, is_training=False)
    if options.index_cache is not None:
        transform = CachedTransform(open_cache(options.index_cache, model), images, transform)
    keyed = KeyedImages(images, range(len(images)), transform, 0, config["input_size"])
    keyed.check_readable()
    ratios = _keep_ratios(options, model)
    if world.main:
        _describe(options, model, weights, ratios, images, how)
    runner = _Runner(options, world, keyed)
    with torch.inference_mode(), quiet_about_training():
        calls = {ratio: _call(model, ratio, options.precision, world) for ratio in ratios}
        results, predictions = measure_all(
            calls,
            runner.batches(),
            world,
            _classes(options, images, model),
            runner.note,
            keep_predictions=options.per_image,
        )
        kept = {ratio: _num_keep(model, ratio, config, runner.first) for ratio in ratios}
    unreadable = world.gather_names(runner.problems)
    predictions = world.gather(predictions)
    if not world.main:
        return 2 if unreadable else 0
    rows = make_rows(results, kept)
    say_table(rows)
    _explain(options, rows, world)
    if unreadable:
        say(f"could not be read, and count nowhere: {len(unreadable)}")
    if options.output is not None:
        total = next(iter(results.values())).accuracy.images
        facts = _facts(options, model, weights, images, how, world)
        facts |= {"images": total, "unreadable": len(unreadable), **environment(world.device)}
        write_results(options.output, rows, facts, options.plot)
        if options.per_image:
            order = {ratio: place for place, ratio in enumerate(ratios)}
            predictions.sort(key=lambda found: (found.index, order[found.keep_ratio]))
            names = {p.index: printable(images.name(p.index)) for p in predictions}
            write_per_image(options.output, predictions, names, images.class_name)
        say(f"\nwritten to {printable(options.output)}")
    return 2 if unreadable else 0


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
            workers = min(4, os.cpu_count() or 1) if on_gpu else 0
        loader = make_loader(self.keyed, sampler, size, workers, self.world.device, False)
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
    check_folder(str(options.output), names, options.overwrite)
    if options.plot:
        require_matplotlib()


def _open(options: EvaluateOptions) -> LabelledImages:
    return open_labelled(
        options.data,
        options.data_root,
        options.split,
        options.input_key,
        options.target_key,
        allow_empty=True,
    )


def _build(options: EvaluateOptions) -> tuple[Any, str | None]:
    """A model that drops patches, or one that cannot as it is, where nobody asked it to."""
    check_names(options.model, options.ranker, option="MODEL")
    shared: dict[str, Any] = {
        "option": "MODEL",
        "pretrained": options.pretrained,
        "checkpoint": options.checkpoint,
        "img_size": options.img_size,
        "num_classes": options.num_classes,
    }
    front = (options.ranker, options.ranker_weights, options.selection, options.index_cache)
    ratios = set(options.keep_ratio or [1.0])
    try:
        model, weights = build_model(
            options.model,
            ranker=options.ranker,
            ranker_weights=options.ranker_weights,
            selection=options.selection,
            **shared,
        )
    except CommandError as error:
        refused = isinstance(error.__cause__, TypeError)
        if not refused or ratios != {1.0} or any(value is not None for value in front):
            raise
        model, weights = _build_plain(options.model, shared)
    if not getattr(model, "num_classes", 0):
        raise CommandError(f"MODEL {printable(options.model)} has no classes: it gives features.")
    return model, weights


def _build_plain(name: str, shared: dict[str, Any]) -> tuple[Any, str | None]:
    """A model as it is; one that takes images of any size is not told theirs."""
    try:
        return build_plain(name, **shared)
    except CommandError as error:
        if not isinstance(error.__cause__, TypeError) or "img_size" not in str(error):
            raise
    return build_plain(name, **{**shared, "img_size": None})


def _label_names(options: EvaluateOptions, model: Any) -> Any:
    """Class names: those of ``--class-map``, or those that the model has recorded."""
    if options.class_map is not None:
        names = Path(options.class_map).read_text(encoding="utf-8").split()
        if not names:
            raise ValueError(f"--class-map {printable(options.class_map)} names no classes.")
        return names
    return (model.pretrained_cfg or {}).get("label_names")


def _keep_ratios(options: EvaluateOptions, model: Any) -> list[float]:
    if not isinstance(model, LTRPModel):
        return [1.0]
    adaptive = model.selection == "adaptive"
    own = [1.0, model.keep_ratio]
    given = options.keep_ratio or (own if adaptive else KEEP_RATIOS)
    if adaptive and not set(given) <= set(own):
        raise ValueError(f"an adaptive budget is the model's own: --keep-ratio 1 {own[1]:g}.")
    return list(dict.fromkeys(given))


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
            keep = select_cached(model, batch.scores, batch.images)
            return model(batch.images, keep_indices=keep)

    return call


def _num_keep(
    model: Any, keep_ratio: float, config: dict[str, Any], images: Tensor | None
) -> float | None:
    """Patches that an image keeps; on average over the first batch where images differ."""
    if not isinstance(model, LTRPModel):
        return None
    h, w = model.grid_size(torch.empty(1, *config["input_size"], device="meta"))
    if model.selection == "adaptive" and keep_ratio < 1.0 and images is not None:
        return float(model.keep_counts(images).double().mean())
    return float(num_keep(h * w, keep_ratio))


def _classes(options: EvaluateOptions, images: LabelledImages, model: Any) -> Sequence[int] | None:
    """The classes that compete, where they are not all of the model's."""
    if options.all_classes or len(images.present) in (0, model.num_classes):
        return None
    return images.present


def _describe(
    options: EvaluateOptions,
    model: Any,
    weights: str | None,
    ratios: Sequence[float],
    images: LabelledImages,
    how: str,
) -> None:
    if isinstance(model, LTRPModel):
        describe_model(model, options.model, weights, ratios)
    else:
        random = "random (not in the cache; --pretrained downloads them)"
        say(f"model       {printable(options.model)}, as it is: it cannot drop patches")
        say(f"weights     {weights or random}")
    named = len(images.class_names)
    count = f"{named} classes, found {how}" if named else f"classes are {how}"
    say(f"data        {printable(str(options.data))}, {len(images)} images, {count}")
    if _classes(options, images, model) is not None:
        others = model.num_classes - len(images.present)
        say(f"            the model's {others} other classes are left out (--all-classes: not)")
    if images.empty:
        names = ", ".join(printable(name) for name in images.empty)
        say(f"            without any image: {names}")


def _explain(options: EvaluateOptions, rows: Sequence[Any], world: World) -> None:
    first = rows[0]
    where = f"{world.device.type}, {options.precision}, batches of {first['timed_batch']}"
    if world.device.type == "cpu":
        where += f", {torch.get_num_threads()} thread(s)"
    say(f"  images/s: {where}, median of {first['rounds']} rounds in turns;")
    cached = "orders came from the cache" if options.index_cache else "ranking is included"
    say(f"  {cached}, reading images is not; times as fast as the first row: median (quartiles)")


def _facts(
    options: EvaluateOptions,
    model: Any,
    weights: str | None,
    images: LabelledImages,
    how: str,
    world: World,
) -> dict[str, Any]:
    """What the figures depend on, beside the machine."""
    pruned = isinstance(model, LTRPModel)
    competing = _classes(options, images, model)
    return {
        "model": options.model,
        "weights": weights or "random",
        "ranker": getattr(model.ranker, "name", type(model.ranker).__name__) if pruned else None,
        "selection": model.selection if pruned else None,
        "index_cache": options.index_cache is not None,
        "data": str(options.data),
        "split": options.split,
        "classes": how,
        "num_classes": len(competing or range(model.num_classes)),
        "precision": options.precision,
        "device": world.device.type,
        "processes": world.size,
    }
