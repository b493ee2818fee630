"""What an evaluation is of: model, keep ratios, classes; and what is said of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltrp_timm._text import printable, say
from ltrp_timm.commands._console import CommandError
from ltrp_timm.commands._model import build_model, check_names, describe_model
from ltrp_timm.data.labels import LabelledImages, open_labelled
from ltrp_timm.data.multi_label import MultiLabelImages, open_multi_label
from ltrp_timm.measure.throughput import environment
from ltrp_timm.models.ltrp import LTRPModel
from ltrp_timm.runtime.world import World
from ltrp_timm.selection import num_keep
from ltrp_timm.train.head import image_config

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
    multi_label: bool = False
    labels: str | None = None
    seen_classes: str | None = None
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


@dataclass(frozen=True)
class Subject:
    """What is evaluated.

    Attributes:
        model: in eval mode, on the device.
        weights: where they are from; None: they are random.
        images: labelled by the model's class numbers.
        how: these were found.
        config: timm's data configuration.
        ratios: shares of patches to keep.
    """

    model: Any
    weights: str | None
    images: LabelledImages | MultiLabelImages
    how: str
    config: dict[str, Any]
    ratios: Sequence[float]


def prepare(options: EvaluateOptions, world: World) -> Subject:
    """Open the images, build the model, and see whether they fit.

    Raises:
        CommandError: the model cannot be built.
        ValueError: the images are none, or of other classes than the model's.
        FileNotFoundError: something is not there.
    """
    _check_multi_label(options)
    images = _open(options)
    model, weights = _build(options)
    model.to(world.device)
    how = images.match(model.num_classes, _label_names(options, model))
    config = image_config(model, options.img_size)
    return Subject(model, weights, images, how, config, _keep_ratios(options, model))


def _check_multi_label(options: EvaluateOptions) -> None:
    """Say which flags do not go together."""
    if not options.multi_label:
        others: Sequence[str] = ("labels", "seen_classes")
        reason = "goes with --multi-label"
    else:
        others = ("data_root", "input_key", "target_key", "all_classes")
        reason = "does not go with --multi-label"
    given = [name for name in others if getattr(options, name)]
    if given:
        raise ValueError(f"--{given[0].replace('_', '-')} {reason}.")
    if options.multi_label and not options.labels:
        raise ValueError("--multi-label needs --labels FILE: COCO's annotations or a .csv.")


def _open(options: EvaluateOptions) -> LabelledImages | MultiLabelImages:
    if options.multi_label:
        return open_multi_label(options.data, options.labels, allow_empty=True)
    return open_labelled(
        options.data,
        root=options.data_root,
        split=options.split,
        input_key=options.input_key,
        target_key=options.target_key,
        allow_empty=True,
    )


def _build(options: EvaluateOptions) -> tuple[Any, str | None]:
    """A model that drops patches, or one that cannot as it is, where nobody asked it to."""
    check_names(options.model, options.ranker, option="MODEL")
    shared: dict[str, Any] = {
        "option": "MODEL",
        "pretrained": options.pretrained or None,
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
        return build_model(name, plain=True, **shared)
    except CommandError as error:
        if not isinstance(error.__cause__, TypeError) or "img_size" not in str(error):
            raise
    return build_model(name, plain=True, **{**shared, "img_size": None})


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
    adaptive = model.budget is not None
    own = [1.0, model.keep_ratio]
    given = options.keep_ratio or (own if adaptive else KEEP_RATIOS)
    if adaptive and not set(given) <= set(own):
        raise ValueError(f"an adaptive budget is the model's own: --keep-ratio 1 {own[1]:g}.")
    return list(dict.fromkeys(given))


def mean_kept(subject: Subject, keep_ratio: float, images: Tensor | None) -> float | None:
    """Patches that an image keeps; on average over these images where they differ."""
    model = subject.model
    if not isinstance(model, LTRPModel):
        return None
    if model.budget is not None and keep_ratio < 1.0 and images is not None:
        return float(model.keep_counts(images).double().mean())
    return float(num_keep(model.num_patches, keep_ratio))


def competing(options: EvaluateOptions, subject: Subject) -> Sequence[int] | None:
    """The classes that compete, where they are not all of the model's."""
    if isinstance(subject.images, MultiLabelImages):
        return None  # they do not compete: each has a precision of its own
    present = subject.images.present
    if options.all_classes or len(present) in (0, subject.model.num_classes):
        return None
    return present


def describe(options: EvaluateOptions, subject: Subject) -> None:
    """Say what is evaluated on what."""
    model, images = subject.model, subject.images
    if isinstance(model, LTRPModel):
        describe_model(model, options.model, subject.weights, subject.ratios)
    else:
        random = "random (not in the cache; --pretrained downloads them)"
        say(f"model       {printable(options.model)}, as it is: it cannot drop patches")
        say(f"weights     {subject.weights or random}")
    named = len(images.class_names)
    count = f"{named} classes, found {subject.how}" if named else f"classes are {subject.how}"
    say(f"data        {printable(str(options.data))}, {len(images)} images, {count}")
    if competing(options, subject) is not None:
        others = model.num_classes - len(competing(options, subject) or ())
        say(f"            the model's {others} other classes are left out (--all-classes: not)")
    if images.empty and not options.multi_label:  # what is absent there is said at the end
        names = ", ".join(printable(name) for name in images.empty)
        say(f"            without any image: {names}")


def explain(options: EvaluateOptions, rows: Sequence[Any], world: World) -> None:
    """Say what the figures of the table are."""
    first = rows[0]
    where = f"{world.device.type}, {options.precision}, batches of {first['timed_batch']}"
    if world.device.type == "cpu":
        where += f", {torch.get_num_threads()} thread(s)"
    say(f"  images/s: {where}, median of {first['rounds']} rounds in turns;")
    cached = "orders came from the cache" if options.index_cache else "ranking is included"
    say(f"  {cached}, reading images is not; times as fast as the first row: median (quartiles)")


def conditions(options: EvaluateOptions, subject: Subject, world: World) -> dict[str, Any]:
    """What the figures depend on."""
    model = subject.model
    pruned = isinstance(model, LTRPModel)
    classes = competing(options, subject) or range(model.num_classes)
    return {
        "model": options.model,
        "weights": subject.weights or "random",
        "ranker": getattr(model.ranker, "name", type(model.ranker).__name__) if pruned else None,
        "selection": model.selection if pruned else None,
        "index_cache": options.index_cache is not None,
        "data": str(options.data),
        "split": options.split,
        "classes": subject.how,
        "num_classes": len(classes),
        "precision": options.precision,
        "device": world.device.type,
        "processes": world.size,
        **environment(world.device),
    }
