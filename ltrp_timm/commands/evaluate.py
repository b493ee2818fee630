"""``ltrp-timm evaluate``: accuracy and images/s of a model at several keep ratios."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from timm.data import create_transform
from torch import Tensor
from tqdm import tqdm

from ltrp_timm._text import complain, printable, say
from ltrp_timm.commands._console import (
    RANDOM,
    ModelOptions,
    check_folder,
    check_names,
    csv_text,
    describe_model,
    output_errors,
    quiet_about_training,
)
from ltrp_timm.commands._flags import (
    PathName,
    Positive,
    add_command,
)
from ltrp_timm.data.keyed import Batch, HeldOutSampler, KeyedImages, make_loader
from ltrp_timm.data.label_files import SEPARATOR
from ltrp_timm.data.labels import LabelledImages, open_labelled
from ltrp_timm.data.multi_label import MultiLabelImages, open_multi_label
from ltrp_timm.measure.accuracy import AccuracyCounter, PrecisionCounter, seen_classes
from ltrp_timm.measure.evaluate import Measured, Prediction, measure_all
from ltrp_timm.measure.throughput import NUM_WORKERS, environment, ratio
from ltrp_timm.models.ltrp import LTRPModel
from ltrp_timm.runtime.keyed_rng import HELD_OUT
from ltrp_timm.runtime.world import World, join_world
from ltrp_timm.scoring import cached_transform
from ltrp_timm.selection import num_keep
from ltrp_timm.train.engine import autocast
from ltrp_timm.train.head import image_config
from ltrp_timm.train.logs import require_matplotlib
from ltrp_timm.weights.files import write_atomically, write_text

KEEP_RATIOS = (1.0, 0.7, 0.5, 0.25)
CSV_NAME, JSON_NAME, PLOT_NAME = "evaluate.csv", "evaluate.json", "evaluate.png"
PER_IMAGE_NAME, PER_CLASS_NAME = "per_image.csv", "per_class.csv"
TITLES = {
    **{"top1": "top-1", "top5": "top-5"},
    **{"map": "mAP", "map_seen": "mAP seen", "map_unseen": "mAP unseen"},
}
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ModelOptions):
    """Options of ``ltrp-timm evaluate``.

    Args:
        data: Labelled images: a folder with a subfolder for each class, a .tar of one, hfds/NAME or
            torch/NAME.
        split: Split of the data; the subfolder of that name if a folder has one.
        data_root: Folder of a named dataset.
        input_key: Column of a named dataset with the images (default: image).
        target_key: Column of a named dataset with the labels (default: label).
        class_map: Text file whose line n names class n, from 0.
        all_classes: Include the model's classes that the data does not have.
        multi_label: Report mAP of images with several classes.
        labels: With ``multi_label``, COCO annotations (.json) or a .csv; ``data`` is the folder of
            the images.
        seen_classes: With ``multi_label``, a file of class names, one per line; also reports mAP of
            these and of the other classes.
        keep_ratio: Shares of patches to keep, in (0, 1] (default: 1 0.7 0.5 0.25).
        index_cache: Folder of scores that ``ltrp-timm rank`` wrote, used in place of the ranker.
        batch_size: Images per batch.
        num_workers: Processes that read images (default: 0 on a CPU, where they would disturb the
            timing, else up to 4).
        device: Device, such as cpu or cuda (default: a GPU if there is one).
        precision: Precision of autocast.
        threads: CPU threads (default: torch's choice).
        output: Folder for evaluate.csv and evaluate.json.
        plot: Also draw accuracy against images/s as evaluate.png.
        per_image: Also write per_image.csv.
        overwrite: Replace existing results in ``output``.
    """

    data: PathName
    split: str = "validation"
    data_root: PathName | None = None
    input_key: str | None = None
    target_key: str | None = None
    class_map: PathName | None = None
    all_classes: bool = False
    multi_label: bool = False
    labels: PathName | None = None
    seen_classes: PathName | None = None
    keep_ratio: Sequence[float] | None = None
    index_cache: PathName | None = None
    batch_size: int = 64
    num_workers: int | None = None
    device: str | None = None
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    threads: Positive | None = None
    output: PathName | None = None
    plot: bool = False
    per_image: bool = False
    overwrite: bool = False

    def check(self) -> None:
        """Check the options that depend on each other, and that results can be written.

        Raises:
            ValueError: Two options exclude each other.
            ImportError: ``plot`` needs matplotlib.
            OSError: ``output`` cannot be written.
        """
        if self.output is None and (self.plot or self.per_image):
            raise ValueError("--plot and --per-image require --output DIR.")
        if self.output == "":
            raise ValueError("--output must name a folder, got an empty name.")
        verb, wrong = "requires", ["labels", "seen_classes"]
        if self.multi_label:
            verb, wrong = "excludes", ["data_root", "input_key", "target_key", "all_classes"]
        for name in wrong:
            if getattr(self, name):
                raise ValueError(f"--{name.replace('_', '-')} {verb} --multi-label.")
        if self.multi_label and not self.labels:
            raise ValueError("--multi-label requires --labels FILE: COCO annotations or a .csv.")
        if self.output is not None:
            more = {PLOT_NAME: self.plot, PER_IMAGE_NAME: self.per_image}
            more[PER_CLASS_NAME] = self.multi_label
            names = [CSV_NAME, JSON_NAME, *(name for name, yes in more.items() if yes)]
            check_folder(self.output, names, self.overwrite)
        if self.plot:
            require_matplotlib()


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated.

    Attributes:
        options: The user's.
        world: The processes that share the images.
        model: In eval mode, on the device.
        weights: Their origin; None for random weights.
        images: Labelled with the model's class numbers.
        matched: How the classes of data and model were matched.
        config: timm's data configuration.
        ratios: Shares of patches to keep.
    """

    options: EvaluateOptions
    world: World
    model: Any
    weights: str | None
    images: LabelledImages | MultiLabelImages
    matched: str
    config: dict[str, Any]
    ratios: Sequence[float]

    @property
    def classes(self) -> Sequence[int] | None:
        """The classes that compete for an image; None for all of the model's."""
        if isinstance(self.images, MultiLabelImages) or self.options.all_classes:
            return None
        present = self.images.present
        return None if len(present) in (0, self.model.num_classes) else present


def add_evaluate(commands: Any) -> None:
    """Add ``ltrp-timm evaluate``."""
    about = "Measure accuracy on labelled images and images/s at several keep ratios."
    more = "torchrun --nproc-per-node N -m ltrp_timm evaluate … distributes the images."
    arguments: dict[str, Any] = {"positional": ("model",), "epilog": more}
    add_command(commands, "evaluate", about, _run, EvaluateOptions, **arguments)


def _run(**given: Any) -> int:
    options = EvaluateOptions(**given)
    options.check()
    with join_world(options.device) as world:
        return _evaluate(_prepare(options, world))


def _prepare(options: EvaluateOptions, world: World) -> Evaluation:
    if options.multi_label:
        images: Any = open_multi_label(options.data, options.labels, allow_empty=True)
    else:
        images = open_labelled(
            options.data,
            root=options.data_root,
            split=options.split,
            input_key=options.input_key,
            target_key=options.target_key,
            allow_empty=True,
        )
    model, weights = _open_model(options)
    model.to(world.device)
    matched = images.match(model.num_classes, _class_names(options, model))
    config = image_config(model, options.img_size)
    ratios = _keep_ratios(options, model)
    return Evaluation(options, world, model, weights, images, matched, config, ratios)


def _open_model(options: EvaluateOptions) -> tuple[Any, str | None]:
    """A model that drops patches; a plain one if it cannot and no option needs it to."""
    check_names(options.model, options.ranker)
    needs = (options.ranker, options.ranker_weights, options.selection, options.index_cache)
    plain = set(options.keep_ratio or [1.0]) == {1.0} and not any(needs)
    model, weights = options.open(plain_if_refused=plain)
    if not getattr(model, "num_classes", 0):
        raise ValueError(f"MODEL {printable(options.model)} has no classes: it gives features.")
    return model, weights


def _class_names(options: EvaluateOptions, model: Any) -> Any:
    """Class names of ``--class-map``, else those stored with the model."""
    if options.class_map is None:
        return (model.pretrained_cfg or {}).get("label_names")
    names = Path(options.class_map).read_text(encoding="utf-8").split()
    if not names:
        raise ValueError(f"--class-map {printable(options.class_map)} names no classes.")
    return names


def _keep_ratios(options: EvaluateOptions, model: Any) -> list[float]:
    if not isinstance(model, LTRPModel):
        return [1.0]
    if model.budget is None:
        return list(dict.fromkeys(options.keep_ratio or KEEP_RATIOS))
    own = [1.0, model.keep_ratio]
    given = options.keep_ratio or own
    if not set(given) <= set(own):
        raise ValueError(f"an adaptive model has its own budget: use --keep-ratio 1 {own[1]:g}.")
    return list(dict.fromkeys(given))


def _evaluate(case: Evaluation) -> int:
    options, world, images = case.options, case.world, case.images
    reader = _Reader(case)
    if isinstance(images, MultiLabelImages):
        names = images.class_names
        seen = seen_classes(options.seen_classes, names)
        counters: Any = {share: PrecisionCounter(names, seen) for share in case.ratios}
    else:
        counters = {share: AccuracyCounter(case.classes) for share in case.ratios}
    if world.main:
        _describe(case)
    calls = {share: _call(case, share) for share in case.ratios}
    with torch.inference_mode(), quiet_about_training():
        results, predictions = measure_all(calls, reader.batches(), world, counters)
        kept = {share: _num_kept(case, share, reader.first) for share in case.ratios}
    unreadable = world.gather_names(reader.problems)
    by_image: list[Row] = []
    if options.per_image:
        if options.multi_label:
            by_image = _label_rows(counters, images, world)
        else:
            by_image = _image_rows(world.gather(predictions), images)
    if not world.main:
        return 2 if unreadable else 0
    rows = [_row(results, share, kept[share]) for share in results]
    _print_table(case, rows)
    found: Any = next(iter(results.values())).accuracy
    facts = {"images": found.images, "unreadable": len(unreadable), **_conditions(case)}
    tables = {CSV_NAME: [{**row, **facts} for row in rows], PER_IMAGE_NAME: by_image}
    if options.multi_label:
        absent = [printable(name) for name in found.absent]
        facts["absent"] = SEPARATOR.join(absent)
        if absent:
            say(f"  classes without any image, excluded ({len(absent)}): {', '.join(absent)}")
        tables[PER_CLASS_NAME] = _class_rows(results, counters[case.ratios[0]])
    if unreadable:
        say(f"unreadable images, excluded: {len(unreadable)}")
    if options.output is not None:
        _write(case, rows, facts, tables)
    return 2 if unreadable else 0


class _Reader:
    """The batches of this process; notes the first images and what could not be read."""

    def __init__(self, case: Evaluation) -> None:
        self.world, options, images = case.world, case.options, case.images
        transform: Any = create_transform(**case.config, is_training=False)
        if options.index_cache is not None:
            transform = cached_transform(options.index_cache, case.model, images, transform)
        size = case.config["input_size"]
        keyed = KeyedImages(images, range(len(images)), transform, 0, size)
        keyed.check_readable()
        sampler = HeldOutSampler(len(keyed), self.world)
        self.count = len(sampler)
        workers = options.num_workers
        if workers is None:
            workers = 0 if self.world.device.type == "cpu" else NUM_WORKERS
        batch_size = max(1, min(options.batch_size, self.count))
        device = self.world.device
        self.loader = make_loader(
            keyed, sampler, batch_size=batch_size, device=device, num_workers=workers
        )
        self.problems: list[str] = []
        self.first: Tensor | None = None

    def batches(self) -> Iterator[Batch]:
        """Every image of this process once."""
        hidden = None if self.world.main else True  # None: hidden where there is no terminal
        with tqdm(total=self.count, unit="image", disable=hidden, leave=False) as bar:
            for sample in self.loader:
                batch = Batch(sample, 0, HELD_OUT, self.world.device)
                self.first = batch.images if self.first is None else self.first
                for line in batch.problems:
                    self.problems.append(line)
                    complain(f"skipped {line}")
                yield batch
                bar.update(len(batch))


def _call(case: Evaluation, keep_ratio: float) -> Callable[[Batch], Tensor]:
    model, device, precision = case.model, case.world.device, case.options.precision

    def call(batch: Batch) -> Tensor:
        with autocast(device, precision):
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


def _num_kept(case: Evaluation, keep_ratio: float, images: Tensor | None) -> float | None:
    """Patches that an image keeps; an adaptive model's mean over these images."""
    model = case.model
    if not isinstance(model, LTRPModel):
        return None
    if model.budget is not None and keep_ratio < 1.0 and images is not None:
        return float(model.keep_counts(images).double().mean())
    return float(num_keep(model.num_patches, keep_ratio))


def _row(results: Mapping[float, Measured], keep_ratio: float, num_kept: float | None) -> Row:
    """The figures of one keep ratio; its speed-up is over the first one."""
    full, found = next(iter(results.values())), results[keep_ratio]
    gain = ratio(full.timing, found.timing)
    return {
        "keep_ratio": keep_ratio,
        "num_keep": num_kept,
        **found.accuracy.percent(),
        "images_per_second": found.images_per_second,
        "images_per_second_low": found.batch_size / found.timing.high,
        "images_per_second_high": found.batch_size / found.timing.low,
        "speedup": gain.median,
        "speedup_low": gain.low,
        "speedup_high": gain.high,
        "rounds": len(found.timing.seconds),
        "timed_batch": found.batch_size,
    }


def _image_rows(predictions: Sequence[Prediction], images: Any) -> list[Row]:
    """A line for each image and keep ratio; ``rank`` 1 is a correct prediction."""
    return [
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


def _label_rows(counters: Mapping[float, PrecisionCounter], images: Any, world: World) -> list[Row]:
    """A line for each image and keep ratio: its labels and the probability of each class.

    All processes must call this.
    """
    lines = []
    for share, counter in counters.items():
        for number, logits, target in zip(*counter.rows(world)):
            labels = [name for name, yes in zip(counter.class_names, target.tolist()) if yes]
            row = {"image": printable(images.name(int(number))), "keep_ratio": share}
            row["labels"] = SEPARATOR.join(labels)
            odds = zip(counter.class_names, logits.sigmoid().tolist())
            lines.append((int(number), {**row, **{f"p({name})": p for name, p in odds}}))
    lines.sort(key=lambda line: line[0])  # stable: the ratios stay in order
    return [row for _, row in lines]


def _class_rows(results: Mapping[float, Measured], counter: PrecisionCounter) -> list[Row]:
    """A line for each class: its average precisions in per cent, empty without any image."""
    rows = []
    for name in counter.class_names:
        row: Row = {"class": name}
        if counter.seen is not None:
            row["seen"] = int(name in counter.seen)
        for share, measured in results.items():
            found: Any = measured.accuracy
            value = found.per_class.get(name)
            row[f"ap@{share:g}"] = "" if value is None else 100 * value
        rows.append(row)
    return rows


def _describe(case: Evaluation) -> None:
    model, images, options = case.model, case.images, case.options
    if isinstance(model, LTRPModel):
        describe_model(model, options.model, case.weights, case.ratios)
    else:
        say(f"model       {printable(options.model)}, a plain model: it cannot drop patches")
        say(f"weights     {case.weights or RANDOM}")
    named = len(images.class_names)
    classes = f"{named} classes, matched {case.matched}" if named else f"classes {case.matched}"
    say(f"data        {printable(options.data)}, {len(images)} images, {classes}")
    if case.classes is not None:
        others = model.num_classes - len(case.classes)
        say(f"            {others} classes that the data does not have are excluded (use")
        say("            --all-classes to include them)")
    if images.empty and not options.multi_label:  # those of several classes follow the table
        say(f"            classes without any image: {', '.join(map(printable, images.empty))}")


def _print_table(case: Evaluation, rows: Sequence[Row]) -> None:
    titles = {name: title for name, title in TITLES.items() if name in rows[0]}
    widths = {name: max(9, len(title) + 4) for name, title in titles.items()}
    header = "".join(f"{title:<{widths[name]}}" for name, title in titles.items())
    say(f"\nkeep    patches    {header}images/s    speed-up")
    for row in rows:
        kept = "-" if row["num_keep"] is None else f"{row['num_keep']:.4g}"
        values = "".join(f"{row[name]:<{widths[name]}.2f}" for name in titles)
        spread = f"({row['speedup_low']:.2f} to {row['speedup_high']:.2f})"
        speed = f"{row['images_per_second']:<12.4g}{row['speedup']:.2f} {spread}"
        say(f"{row['keep_ratio']:<8g}{kept:<11}{values}{speed}")
    first, device = rows[0], case.world.device.type
    where = f"{device}, {case.options.precision}, batches of {first['timed_batch']}"
    if device == "cpu":
        where += f", {torch.get_num_threads()} thread(s)"
    say(f"  images/s: {where}, median of {first['rounds']} interleaved rounds, without reading")
    ranking = "read from the cache" if case.options.index_cache else "included"
    say(f"  images, ranking {ranking}; speed-up over the first row: median and quartiles")


def _conditions(case: Evaluation) -> Row:
    """What the figures depend on."""
    model, options, world = case.model, case.options, case.world
    pruned = isinstance(model, LTRPModel)
    return {
        "model": options.model,
        "weights": case.weights or "random",
        "ranker": getattr(model.ranker, "name", type(model.ranker).__name__) if pruned else None,
        "selection": model.selection if pruned else None,
        "index_cache": options.index_cache is not None,
        "data": options.data,
        "split": options.split,
        "classes": case.matched,
        "num_classes": len(case.classes or range(model.num_classes)),
        "precision": options.precision,
        "device": world.device.type,
        "processes": world.size,
        **environment(world.device),
    }


def _write(
    case: Evaluation, rows: Sequence[Row], facts: Row, tables: Mapping[str, Sequence[Row]]
) -> None:
    """Write the files, each atomically."""
    output = str(case.options.output)
    folder = Path(output)
    with output_errors(output):
        folder.mkdir(parents=True, exist_ok=True)
        for name, table in tables.items():
            if table:
                write_text(folder / name, csv_text(table))
        results = json.dumps({**facts, "results": list(rows)}, indent=2)
        write_text(folder / JSON_NAME, results + "\n")
        if case.options.plot:
            _draw(rows, case.options.model, folder / PLOT_NAME)
    say(f"\nwritten to {printable(output)}")


def _draw(rows: Sequence[Row], model: str, path: Path) -> None:
    """Draw accuracy against images/s: a point and the quartiles of its speed for each ratio."""
    figure = require_matplotlib()(figsize=(6.4, 4.4), layout="constrained")
    axis = figure.subplots()
    speeds = [row["images_per_second"] for row in rows]
    below = [row["images_per_second"] - row["images_per_second_low"] for row in rows]
    above = [row["images_per_second_high"] - row["images_per_second"] for row in rows]
    name = next(name for name in TITLES if name in rows[0])
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
