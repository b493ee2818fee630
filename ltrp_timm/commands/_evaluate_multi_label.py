"""Evaluating on images with several classes: who judges, and the tables that it gives."""

from collections.abc import Mapping
from typing import Any

from ltrp_timm._text import printable, say
from ltrp_timm.commands._evaluate_report import Row
from ltrp_timm.commands._evaluate_setup import EvaluateOptions, Subject
from ltrp_timm.data.label_files import SEPARATOR
from ltrp_timm.data.multi_label import MultiLabelImages
from ltrp_timm.measure.evaluate import Measured
from ltrp_timm.measure.mean_precision import MeanPrecision, PrecisionCounter, seen_classes
from ltrp_timm.runtime.world import World

Counters = dict[float, PrecisionCounter]


def make_counters(options: EvaluateOptions, subject: Subject) -> Counters | None:
    """What judges images with several classes, by keep ratio; None for images with one.

    Raises:
        FileNotFoundError: there is no file of seen classes.
        ValueError: it names none, others, or all of them.
    """
    images = subject.images
    if not isinstance(images, MultiLabelImages):
        return None
    seen = seen_classes(options.seen_classes, images.class_names)
    return {ratio: PrecisionCounter(images.class_names, seen) for ratio in subject.ratios}


def say_absent(results: Mapping[float, Measured]) -> dict[str, str]:
    """Name the classes that no image has; returns them for the record."""
    found = next(iter(results.values())).accuracy
    if not isinstance(found, MeanPrecision):
        return {}
    names = [printable(name) for name in found.absent]
    if names:
        say(f"  classes that no image has, they count nowhere ({len(names)}): {', '.join(names)}")
    return {"absent": SEPARATOR.join(names)}


def class_rows(results: Mapping[float, Measured], counters: Counters) -> list[Row]:
    """A line for each class: its average precision in per cent, empty where no image has it."""
    counter = next(iter(counters.values()))
    rows = []
    for name in counter.class_names:
        row: Row = {"class": name}
        if counter.seen is not None:
            row["seen"] = int(name in counter.seen)
        for ratio, measured in results.items():
            found: Any = measured.accuracy
            known = name in found.per_class
            row[f"ap@{ratio:g}"] = 100 * found.per_class[name] if known else ""
        rows.append(row)
    return rows


def image_rows(counters: Counters, images: Any, world: World) -> list[Row]:
    """A line for each image and keep ratio: its labels, and the probability of each class.

    Each process must ask.
    """
    lines = []
    for ratio, counter in counters.items():
        for number, logits, target in zip(*counter.rows(world)):
            has = [name for name, yes in zip(counter.class_names, target.tolist()) if yes]
            row = {"image": printable(images.name(int(number))), "keep_ratio": ratio}
            row["labels"] = SEPARATOR.join(has)
            odds = zip(counter.class_names, logits.sigmoid().tolist())
            lines.append((int(number), {**row, **{f"p({name})": p for name, p in odds}}))
    lines.sort(key=lambda line: line[0])  # stable: the ratios stay in their order
    return [row for _, row in lines]
