"""``ltrp-timm evaluate``: accuracy and images/s of a model at several keep ratios."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from timm.data import create_transform
from torch import Tensor
from tqdm import tqdm

from ltrp_timm._text import complain, csv_text, printable, say
from ltrp_timm.commands._console import (
    RANDOM,
    ModelOptions,
    check_folder,
    check_names,
    describe_model,
    output_errors,
    quiet_about_training,
    size_text,
)
from ltrp_timm.commands._flags import PathName, Positive, add_command
from ltrp_timm.data.keyed import Batch, KeyedImages, held_out_keys, make_loader
from ltrp_timm.data.labels import LabelledImages, open_labelled
from ltrp_timm.data.multi_label import SEPARATOR, MultiLabelImages, open_multi_label, read_names
from ltrp_timm.measure.accuracy import (
    AccuracyCounter,
    Measured,
    PrecisionCounter,
    measure_all,
    seen_classes,
)
from ltrp_timm.measure.payoff import FULL, SMALLER, on_grid, smaller_grid
from ltrp_timm.measure.throughput import NUM_WORKERS, environment, ratio
from ltrp_timm.models.ltrp import LTRPModel
from ltrp_timm.runtime.keyed_rng import HELD_OUT
from ltrp_timm.runtime.world import World, join_world
from ltrp_timm.scoring import CachedTransform
from ltrp_timm.share.save import EVALUATION_NAME, TITLES, measured_with
from ltrp_timm.train.engine import autocast
from ltrp_timm.train.finetune import image_config
from ltrp_timm.visualize import require_matplotlib
from ltrp_timm.weights.files import write_atomically, write_text

KEEP_RATIOS = (1.0, 0.7, 0.5, 0.25)
CSV_NAME, JSON_NAME, PLOT_NAME = "evaluate.csv", EVALUATION_NAME, "evaluate.png"
PER_IMAGE_NAME, PER_CLASS_NAME = "per_image.csv", "per_class.csv"
PRUNED = "pruned"
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ModelOptions):
    """Options of ``ltrp-timm evaluate``.

    Args:
        model: An ``ltrp_*`` name, any timm model, hf-hub:OWNER/NAME or local-dir:DIR.
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
        skip_absent: With ``multi_label``, leave out images of ``labels`` that ``data`` lacks.
        seen_classes: With ``multi_label``, a file of class names, one per line; also reports mAP of
            these and of the other classes.
        keep_ratio: Shares of patches to keep, in (0, 1] (default: 1 0.7 0.5 0.25).
        smaller_image: Also measure the plain model at the image size with about as many patches as
            are kept, at each keep ratio below 1.
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
    skip_absent: bool = False
    seen_classes: PathName | None = None
    keep_ratio: Sequence[float] | None = None
    smaller_image: bool = False
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
        """Check the options that depend on each other, and that results can be written."""
        if self.output is None and (self.plot or self.per_image):
            raise ValueError("--plot and --per-image require --output DIR.")
        if self.output == "":
            raise ValueError("--output must name a folder, got an empty name.")
        verb, wrong = "requires", ["labels", "skip_absent", "seen_classes"]
        if self.multi_label:
            verb, wrong = "excludes", ["data_root", "input_key", "target_key", "all_classes"]
        for name in wrong:
            if getattr(self, name):
                raise ValueError(f"--{name.replace('_', '-')} {verb} --multi-label.")
        if self.multi_label and not self.labels:
            raise ValueError("--multi-label requires --labels FILE: COCO annotations or a .csv.")
        if self.smaller_image and set(self.keep_ratio or KEEP_RATIOS) == {1.0}:
            raise ValueError("--smaller-image requires a --keep-ratio below 1, got 1 alone.")
        if self.output is not None:
            more = {PLOT_NAME: self.plot, PER_IMAGE_NAME: self.per_image}
            more[PER_CLASS_NAME] = self.multi_label
            names = [CSV_NAME, JSON_NAME, *(name for name, yes in more.items() if yes)]
            check_folder(self.output, names, self.overwrite)
        if self.plot:
            require_matplotlib()


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
        case = Evaluation(options, world)
        if world.main:
            case.describe()
        results, tables = case.measure()
        unreadable = world.gather_names(case.problems)
        if world.main:
            case.report(results, tables, len(unreadable))
    return 2 if unreadable else 0


class Case(NamedTuple):
    """What is measured: a model at a keep ratio, on images (height, width)."""

    method: str
    keep_ratio: float
    model: Any
    img_size: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.method} {self.keep_ratio:g}"  # not the whole model


class Evaluation:
    """A model, labelled images and the keep ratios to measure."""

    def __init__(self, options: EvaluateOptions, world: World) -> None:
        self.options, self.world = options, world
        self.images: Any = _open_images(options)
        self.model, self.weights = _open_model(options)
        self.model.to(world.device)
        names = (self.model.pretrained_cfg or {}).get("label_names")
        if options.class_map is not None:
            names = read_names(options.class_map)
        self.matched = self.images.match(self.model.num_classes, names)
        config = image_config(self.model, options.img_size)
        size: tuple[int, int] = tuple(config["input_size"][-2:])
        pruned = isinstance(self.model, LTRPModel)
        full = self.model.backbone if pruned else self.model  # plain, whatever the selection
        self.cases: list[Case] = []
        for share in _keep_ratios(options, self.model):
            whole = share == 1.0
            method, model = (FULL, full) if whole else (PRUNED, self.model)
            self.cases.append(Case(method, share, model, size))
            if options.smaller_image and not whole:
                grid = smaller_grid(self.model.patch_grid, self.model.num_tokens(share))
                self.cases.append(Case(SMALLER, share, *on_grid(self.model, grid)))
        present = () if options.all_classes else getattr(self.images, "present", ())
        every = len(present) in (0, self.model.num_classes)
        self.classes: Sequence[int] | None = None if every else present  # those that compete
        self.problems: list[str] = []
        self.first: Tensor | None = None  # images of the first batch
        transform: Any = create_transform(**config, is_training=False)
        if options.index_cache is not None:
            transform = CachedTransform(options.index_cache, self.model, self.images, transform)
        others: Any = {
            case.img_size: create_transform(
                **{**config, "input_size": (3, *case.img_size)}, is_training=False
            )
            for case in self.cases
            if case.method == SMALLER
        }
        indices = range(len(self.images))
        self.keyed = KeyedImages(self.images, indices, transform, 0, (3, *size), others)
        self.keyed.check_readable()

    def batches(self) -> Iterator[Batch]:
        """Every image of this process once."""
        workers, device = self.options.num_workers, self.world.device
        if workers is None:
            workers = 0 if device.type == "cpu" else NUM_WORKERS
        sampler = held_out_keys(len(self.keyed), self.world)
        size = max(1, min(self.options.batch_size, len(sampler)))
        loader = make_loader(
            self.keyed, sampler, batch_size=size, device=device, num_workers=workers
        )
        hidden = None if self.world.main else True  # None: hidden where there is no terminal
        with tqdm(total=len(sampler), unit="image", disable=hidden, leave=False) as bar:
            for sample in loader:
                batch = Batch(sample, 0, HELD_OUT, device)
                self.first = batch.images if self.first is None else self.first
                for line in batch.problems:
                    self.problems.append(line)
                    complain(f"skipped {line}")
                yield batch
                bar.update(len(batch))

    def logits(self, case: Case, batch: Batch) -> Tensor:
        """Run the model of a case."""
        model, given = case.model, {}
        with autocast(self.world.device, self.options.precision):
            if case.method == SMALLER:
                return model(batch.others[case.img_size])
            if case.method == PRUNED:
                if model.keep_ratio != case.keep_ratio:
                    model.keep_ratio = case.keep_ratio
                if batch.scores is not None:
                    given["keep_indices"] = model.select(batch.scores, batch.images)
            return model(batch.images, **given)

    def num_kept(self, case: Case) -> float | None:
        """Patches that an image keeps; the mean over the first batch where they differ."""
        model = self.model
        if not isinstance(model, LTRPModel):
            return None
        if case.method == SMALLER:
            (rows, cols), (height, width) = model.patch_size, case.img_size
            return float(height // rows * (width // cols))
        if case.method == PRUNED and model.budget is not None and self.first is not None:
            return float(model.keep_counts(self.first).double().mean())
        return float(model.num_tokens(case.keep_ratio))

    def measure(self) -> tuple[dict[Case, Measured], dict[str, Sequence[Row]]]:
        """Accuracy and speed by case, and tables by name; all processes must call this."""
        options, names = self.options, self.images.class_names
        new: Any = partial(AccuracyCounter, self.classes)
        if options.multi_label:
            new = partial(PrecisionCounter, names, seen_classes(options.seen_classes, names))
        counters = {case: new() for case in self.cases}
        calls = {case: partial(self.logits, case) for case in self.cases}
        with torch.inference_mode(), quiet_about_training():
            results = measure_all(calls, self.batches(), self.world, counters)
            rows = [self.row(results, case) for case in results]
        tables: dict[str, Sequence[Row]] = {CSV_NAME: rows}
        if options.per_image:
            tables[PER_IMAGE_NAME] = _image_rows(counters, self.images, self.world)
        if options.multi_label:
            tables[PER_CLASS_NAME] = _class_rows(results, counters[self.cases[0]])
        return results, tables

    def row(self, results: Mapping[Case, Measured], case: Case) -> Row:
        """The figures of one line of the table; its speed-up is over the first one."""
        full, found = next(iter(results.values())), results[case]
        gain, timing, batch = ratio(full.timing, found.timing), found.timing, found.batch_size
        return {
            "method": case.method,
            "keep_ratio": case.keep_ratio,
            "num_keep": self.num_kept(case),
            "img_size": size_text(case.img_size),
            **found.accuracy.percent(),
            "images_per_second": timing.items_per_second(batch),
            "images_per_second_low": batch / timing.high,
            "images_per_second_high": batch / timing.low,
            "speedup": gain.median,
            "speedup_low": gain.low,
            "speedup_high": gain.high,
            "rounds": len(timing.seconds),
            "timed_batch": batch,
        }

    def describe(self) -> None:
        """Print what is measured on what."""
        model, images, options = self.model, self.images, self.options
        if isinstance(model, LTRPModel):
            ratios = [case.keep_ratio for case in self.cases if case.method != SMALLER]
            describe_model(model, options.model, self.weights, ratios)
        else:
            say(f"model       {printable(options.model)}, a plain model: it cannot drop patches")
            say(f"weights     {self.weights or RANDOM}")
        named, how = len(images.class_names), self.matched
        classes = f"{named} classes, matched {how}" if named else f"classes {how}"
        say(f"data        {printable(options.data)}, {len(images)} images, {classes}")
        if getattr(images, "absent", 0):
            say(f"            {images.absent} labelled images are not there, left out")
        if self.classes is not None:
            others = model.num_classes - len(self.classes)
            say(f"            {others} classes that the data does not have are excluded (use")
            say("            --all-classes to include them)")
        if images.empty and not options.multi_label:  # those of several classes follow the table
            say(f"            classes without any image: {', '.join(map(printable, images.empty))}")

    def report(
        self, results: Mapping[Case, Measured], tables: Mapping[str, Sequence[Row]], unreadable: int
    ) -> None:
        """Print the table of keep ratios, and write all tables."""
        rows, options = tables[CSV_NAME], self.options
        self._print(rows)
        found = next(iter(results.values())).accuracy
        facts: Row = {"images": found.images, "unreadable": unreadable}
        if options.multi_label:
            absent = [printable(name) for name in found.absent]
            facts["absent"] = SEPARATOR.join(absent)
            if absent:
                say(f"  classes without any image, excluded ({len(absent)}): {', '.join(absent)}")
        if unreadable:
            say(f"unreadable images, excluded: {unreadable}")
        if options.output is None:
            return
        facts |= self._conditions()
        folder = Path(options.output)
        with output_errors(options.output):
            folder.mkdir(parents=True, exist_ok=True)
            for name, table in tables.items():
                if table:
                    lines = [{**row, **facts} for row in table] if name == CSV_NAME else table
                    write_text(folder / name, csv_text(lines))
            text = json.dumps({**facts, "results": list(rows)}, indent=2) + "\n"
            write_text(folder / JSON_NAME, text)
            if options.plot:
                _draw(rows, options.model, folder / PLOT_NAME)
        say(f"\nwritten to {printable(options.output)}")

    def _print(self, rows: Sequence[Row]) -> None:
        titles = {name: title for name, title in TITLES.items() if name in rows[0]}
        widths = {name: max(9, len(title) + 4) for name, title in titles.items()}
        header = "".join(f"{title:<{widths[name]}}" for name, title in titles.items())
        say(f"\n{'model':<15}keep    patches    image    {header}images/s    speed-up")
        for row in rows:
            kept = "-" if row["num_keep"] is None else f"{row['num_keep']:.4g}"
            values = "".join(f"{row[name]:<{widths[name]}.2f}" for name in titles)
            spread = f"({row['speedup_low']:.2f} to {row['speedup_high']:.2f})"
            speed = f"{row['images_per_second']:<12.4g}{row['speedup']:.2f} {spread}"
            place = f"{row['keep_ratio']:<8g}{kept:<11}{row['img_size']:<9}"
            say(f"{row['method']:<15}{place}{values}{speed}")
        first, device = rows[0], self.world.device.type
        where = f"{device}, {self.options.precision}, batches of {first['timed_batch']}"
        where += f", {torch.get_num_threads()} thread(s)" if device == "cpu" else ""
        ranking = "ranking read from a file" if self.options.index_cache else "ranking included"
        say(f"  images/s: {where}, {ranking}, reading images excluded;")
        say(f"  median of {first['rounds']} interleaved rounds; speed-up over the first row")
        if self.options.smaller_image:
            say(f"  {SMALLER}: the full model at the size with about as many patches")

    def _conditions(self) -> Row:
        """What the figures depend on."""
        model, options, world = self.model, self.options, self.world
        return {
            "model": options.model,
            "weights": self.weights or "random",
            **measured_with(model),
            "index_cache": options.index_cache is not None,
            "data": options.data,
            "split": options.split,
            "classes": self.matched,
            "num_classes": len(self.classes or range(model.num_classes)),
            "precision": options.precision,
            "device": world.device.type,
            "processes": world.size,
            **environment(world.device),
        }


def _open_images(options: EvaluateOptions) -> LabelledImages | MultiLabelImages:
    if options.multi_label:
        skip = options.skip_absent
        return open_multi_label(options.data, options.labels, allow_empty=True, skip_absent=skip)
    named = {name: getattr(options, name) for name in ("split", "input_key", "target_key")}
    return open_labelled(options.data, root=options.data_root, allow_empty=True, **named)


def _open_model(options: EvaluateOptions) -> tuple[Any, str | None]:
    """A model that drops patches; a plain one if it cannot and no option needs it to."""
    check_names(options.model, options.ranker)
    needs = ("ranker", "ranker_weights", "selection", "rest", "index_cache", "smaller_image")
    needed = any(getattr(options, name) for name in needs)
    plain = set(options.keep_ratio or [1.0]) == {1.0} and not needed
    model, weights = options.open(plain_if_refused=plain)
    if not getattr(model, "num_classes", 0):
        raise ValueError(f"MODEL {printable(options.model)} has no classes: it gives features.")
    return model, weights


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


def _image_rows(counters: Mapping[Case, Any], images: Any, world: World) -> list[Row]:
    """A line for each image and case; all processes must call this."""
    lines: list[tuple[int, Row]] = []
    for case, counter in counters.items():
        several = isinstance(counter, PrecisionCounter)
        about = partial(_labels, counter) if several else partial(_prediction, images)
        for each in zip(*counter.rows(world)):  # one image at a time as Python's numbers
            number, *found = (column.tolist() for column in each)
            row: Row = {"image": printable(images.name(number)), "method": case.method}
            lines.append((number, {**row, "keep_ratio": case.keep_ratio, **about(*found)}))
    lines.sort(key=lambda line: line[0])  # stable: the cases stay in order
    return [row for _, row in lines]


def _prediction(images: Any, target: int, predicted: int, rank: int) -> Row:
    return {
        "target": target,
        "target_name": images.class_name(target),
        "predicted": predicted,
        "predicted_name": images.class_name(predicted),
        "rank": rank + 1,  # 1 is correct
    }


def _labels(counter: PrecisionCounter, logits: Sequence[float], targets: Sequence[int]) -> Row:
    """The labels of an image, and the probability of each class."""
    names = counter.class_names
    labels = SEPARATOR.join(name for name, yes in zip(names, targets) if yes)
    odds = zip(names, torch.tensor(logits).sigmoid().tolist())
    return {"labels": labels, **{f"p({name})": p for name, p in odds}}


def _class_rows(results: Mapping[Case, Measured], counter: Any) -> list[Row]:
    """A line for each class: its average precisions in per cent, empty without any image."""
    rows = []
    for name in counter.class_names:
        row: Row = {"class": name}
        if counter.seen is not None:
            row["seen"] = int(name in counter.seen)
        for case, measured in results.items():
            value = measured.accuracy.per_class.get(name)
            where = f"ap@{case.keep_ratio:g}{' ' + SMALLER if case.method == SMALLER else ''}"
            row[where] = "" if value is None else 100 * value
        rows.append(row)
    return rows


def _draw(rows: Sequence[Row], model: str, path: Path) -> None:
    """Draw accuracy against images/s: a point and the quartiles of its speed for each ratio."""
    figure = require_matplotlib()(figsize=(6.4, 4.4), layout="constrained")
    axis = figure.subplots()
    name = next(name for name in TITLES if name in rows[0])
    for label, marker in ((PRUNED, "o"), (SMALLER, "s")):
        some = [row for row in rows if row["method"] in (FULL, label)]
        speeds = [row["images_per_second"] for row in some]
        below = [row["images_per_second"] - row["images_per_second_low"] for row in some]
        above = [row["images_per_second_high"] - row["images_per_second"] for row in some]
        style: Row = {"marker": marker, "capsize": 3, "ecolor": "0.7", "label": label}
        axis.errorbar(speeds, [row[name] for row in some], xerr=(below, above), **style)
        for number, row in enumerate(some):
            text = f"keep {row['keep_ratio']:g}" if marker == "o" else f"{row['img_size']} px"
            place = (4, 7 if number % 2 == 0 else -15)  # neighbours may be close
            point = (row["images_per_second"], row[name])
            axis.annotate(text, point, place, textcoords="offset points")
        if all(row["method"] != SMALLER for row in rows):
            break
    axis.legend()
    axis.margins(0.15)
    axis.set_xlabel(f"images/s (batches of {rows[0]['timed_batch']}, median and quartiles)")
    axis.set_ylabel("top-1 accuracy, %" if name == "top1" else f"{TITLES[name]}, %")
    axis.set_title(printable(model))
    axis.grid(alpha=0.3)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
