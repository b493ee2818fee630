"""What an evaluation says: a table, a CSV, JSON, a picture."""

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ltrp_timm._text import printable, say
from ltrp_timm.commands._console import CommandError, output_errors
from ltrp_timm.data.labels import LabelledImages
from ltrp_timm.measure.accuracy import Accuracy
from ltrp_timm.measure.evaluate import Measured, Prediction
from ltrp_timm.measure.mean_precision import MeanPrecision
from ltrp_timm.measure.throughput import ratio as speed_up
from ltrp_timm.train.logs import require_matplotlib
from ltrp_timm.weights.files import write_atomically, write_text

CSV_NAME, JSON_NAME, PLOT_NAME = "evaluate.csv", "evaluate.json", "evaluate.png"
PER_IMAGE_NAME = "per_image.csv"
PER_CLASS_NAME = "per_class.csv"
Row = dict[str, Any]
TITLES = {
    **{"top1": "top-1", "top5": "top-5"},
    **{"map": "mAP", "map_seen": "mAP seen", "map_unseen": "mAP unseen"},
}
_WIDTH = {name: max(9, len(title) + 4) for name, title in TITLES.items()}


def make_rows(results: Mapping[float, Measured], kept: Mapping[float, float | None]) -> list[Row]:
    """A row for each keep ratio, in their order; speeds are compared with the first.

    Args:
        results: by keep ratio.
        kept: patches of an image that are encoded, on average; None for a plain model.
    """
    first = next(iter(results.values()))
    rows = []
    for keep_ratio, found in results.items():
        gain = speed_up(first.timing, found.timing)
        rows.append(
            {
                "keep_ratio": keep_ratio,
                "num_keep": kept[keep_ratio],
                **figures(found.accuracy),
                "images_per_second": found.images_per_second,
                "images_per_second_low": found.batch_size / found.timing.high,
                "images_per_second_high": found.batch_size / found.timing.low,
                "times_as_fast": gain.median,
                "times_as_fast_low": gain.low,
                "times_as_fast_high": gain.high,
                "rounds": len(found.timing.seconds),
                "timed_batch": found.batch_size,
            }
        )
    return rows


def figures(found: Accuracy | MeanPrecision) -> dict[str, float]:
    """How well, in per cent, by name; what is meant first.

    Raises:
        ValueError: not one image has a label.
    """
    if isinstance(found, MeanPrecision):
        if not found.row():
            raise ValueError("no image that could be read has a label: there is no mAP.")
        return {name: 100 * value for name, value in found.row().items()}
    return {"top1": 100 * found.top1, "top5": 100 * found.top5}


def _names(row: Row) -> list[str]:
    """Which of the known figures a row has."""
    return [name for name in TITLES if name in row]


def say_table(rows: Sequence[Row]) -> None:
    """The rows on the console."""
    names = _names(rows[0])
    titles = "".join(f"{TITLES[name]:<{_WIDTH[name]}}" for name in names)
    say(f"\nkeep    patches    {titles}images/s    times as fast")
    for row in rows:
        kept = "-" if row["num_keep"] is None else f"{row['num_keep']:.4g}"
        spread = f"({row['times_as_fast_low']:.2f} to {row['times_as_fast_high']:.2f})"
        say(
            f"{row['keep_ratio']:<8g}{kept:<11}"
            + "".join(f"{row[name]:<{_WIDTH[name]}.2f}" for name in names)
            + f"{row['images_per_second']:<12.4g}{row['times_as_fast']:.2f} {spread}"
        )


def check_folder(output: str, names: Iterable[str], overwrite: bool) -> None:
    """Say before any long work that results cannot be written, or would replace others.

    Raises:
        CommandError: what stands in the way.
    """
    folder = Path(output)
    if os.path.lexists(folder) and not folder.is_dir():
        raise CommandError(f"--output {printable(output)} is no folder.")
    there = [name for name in names if os.path.lexists(folder / name)]
    if there and not overwrite:
        files = " and ".join(there)
        raise CommandError(f"{printable(output)} holds {files} already: --overwrite replaces it.")
    parent = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    if not os.access(parent, os.W_OK):
        raise CommandError(f"--output {printable(output)} cannot be written: Permission denied.")


def write_results(output: str, rows: Sequence[Row], facts: Mapping[str, Any], plot: bool) -> None:
    """The files, each in one atomic step.

    Raises:
        CommandError: one of them cannot be written.
    """
    folder = Path(output)
    with output_errors(output):
        folder.mkdir(parents=True, exist_ok=True)
        table = _csv([{**row, **facts} for row in rows])
        write_text(folder / CSV_NAME, table)
        text = json.dumps({**facts, "results": list(rows)}, indent=2) + "\n"
        write_text(folder / JSON_NAME, text)
        if plot:
            _draw(rows, str(facts["model"]), folder / PLOT_NAME)


def write_per_image(output: str, predictions: Sequence[Prediction], images: LabelledImages) -> None:
    """A line for each image and keep ratio; ``rank`` counts from 1, the right class first.

    Raises:
        CommandError: it cannot be written.
    """
    lines = [
        {
            "image": printable(images.name(found.index)),
            "keep_ratio": found.keep_ratio,
            "target": found.target,
            "target_name": images.class_name(found.target),
            "predicted": found.predicted,
            "predicted_name": images.class_name(found.predicted),
            "rank": found.rank + 1,
        }
        for found in sorted(predictions, key=lambda found: found.index)
    ]
    with output_errors(output):
        path = Path(output) / PER_IMAGE_NAME
        write_text(path, _csv(lines))


def write_tables(output: str, tables: Mapping[str, Sequence[Row]]) -> None:
    """More CSVs, by name; one without a row is left out.

    Raises:
        CommandError: one of them cannot be written.
    """
    with output_errors(output):
        for name, rows in tables.items():
            if rows:
                write_text(Path(output) / name, _csv(rows))


def _csv(rows: Sequence[Row]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _draw(rows: Sequence[Row], model: str, path: Path) -> None:
    """Accuracy against images/s, a point for each keep ratio with the quartiles of its speed."""
    figure = require_matplotlib()(figsize=(6.4, 4.4), layout="constrained")
    axis = figure.subplots()
    speeds = [row["images_per_second"] for row in rows]
    below = [row["images_per_second"] - row["images_per_second_low"] for row in rows]
    above = [row["images_per_second_high"] - row["images_per_second"] for row in rows]
    name = _names(rows[0])[0]
    values = [row[name] for row in rows]
    axis.errorbar(speeds, values, xerr=(below, above), marker="o", capsize=3, ecolor="0.7")
    for number, (row, speed, value) in enumerate(zip(rows, speeds, values)):
        text = f"keep {row['keep_ratio']:g}"
        place = (4, 7 if number % 2 == 0 else -15)  # neighbours may be close
        axis.annotate(text, (speed, value), place, textcoords="offset points")
    axis.margins(0.15)
    axis.set_xlabel(f"images/s (batches of {rows[0]['timed_batch']}, median and quartiles)")
    axis.set_ylabel("top-1 accuracy, %" if name == "top1" else f"{TITLES[name]}, %")
    axis.set_title(printable(model))
    axis.grid(alpha=0.3)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
