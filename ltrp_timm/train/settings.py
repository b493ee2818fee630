"""What every training has in common: settings as plain values, and the data that they name."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from torch.utils.data import IterableDataset

from ltrp_timm.data.images import open_dataset
from ltrp_timm.data.sources import Sources
from ltrp_timm.measure.throughput import NUM_WORKERS
from ltrp_timm.runtime.world import World
from ltrp_timm.weights.files import PathLike

# annotations of numbers: the text is the range that ``check_value`` allows
AtLeastOne = Annotated[int, "at least 1"]
Positive = Annotated[float, "above 0"]
NotNegative = Annotated[float, "at least 0"]
Probability = Annotated[float, "in [0, 1]"]
BelowOne = Annotated[float, "in [0, 1)"]
Share = Annotated[float, "in (0, 1]"]
CropScale = Annotated[tuple[float, float], "two numbers, 0 < from <= to <= 1"]
CropRatio = Annotated[tuple[float, float], "two numbers, 0 < from <= to"]

Precision = Literal["fp32", "bf16", "fp16"]

# a continuation may change these: they change no weight
_FREE = {
    *("device", "num_workers", "resume", "checkpoint_steps", "tensorboard", "plot", "progress"),
    "report_to",
    *("val_data", "val_split", "data_root", "split", "num_samples", "input_key"),
    *("batch_size", "accumulate"),  # their product with the processes is what counts
}
_RANGES: dict[str, Callable[[Any], bool]] = {
    "at least 1": lambda value: value >= 1,
    "at least 2": lambda value: value >= 2,
    "above 0": lambda value: 0.0 < value < math.inf,
    "at least 0": lambda value: 0.0 <= value < math.inf,
    "in [0, 1]": lambda value: 0.0 <= value <= 1.0,
    "in [0, 1)": lambda value: 0.0 <= value < 1.0,
    "in (0, 1]": lambda value: 0.0 < value <= 1.0,
    "two numbers, 0 < from <= to <= 1": lambda value: _ascending(value, 1.0),
    "two numbers, 0 < from <= to": lambda value: _ascending(value, math.inf),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Data, optimisation, precision and bookkeeping of a run.

    Args:
        epochs: Passes over the training images.
        batch_size: Images per process and batch (default: 64, or fewer in a small data set).
        accumulate: Batches per update.
        opt: Optimiser, by timm's name.
        lr: Learning rate (default: ``base_lr``, scaled to the images per update).
        base_lr: Learning rate at 256 images per update.
        lr_base_scale: How ``base_lr`` grows with the images per update, or with their root.
        weight_decay: Weight decay; biases and norm weights are excluded.
        opt_args: More arguments of the optimiser (default for AdamW: the recipe's betas).
        layer_decay: Factor of the learning rate from each layer to the one below it.
        sched: Learning-rate schedule after the warm-up, by timm's name, stepped at every update;
            "none" keeps the rate constant.
        warmup_epochs: Epochs of linear warm-up, fewer than ``epochs`` (default: a tenth of them;
            none where that is less than one update).
        warmup_lr: Learning rate at the start of the warm-up.
        min_lr: Learning rate at the end of the schedule.
        clip_grad: Gradient clipping: the norm, value or AGC factor (default: no clipping).
        clip_mode: What ``clip_grad`` limits.
        ema_decay: Decay of an average of the weights, which is then measured and saved; after t
            updates it is t / (10 + t) at most (default, and 0: no average).
        precision: Autocast precision (default: bf16 on a GPU, fp32 elsewhere).
        compile: Use ``torch.compile``.
        seed: Seed of every random draw.
        device: Device to train on (default: a GPU if there is one).
        num_workers: Processes that read images.
        resume: "never" refuses an output folder that holds a run; "auto" continues the run, to
            other ``epochs`` where the rates do not depend on their number: ``sched`` "none", or
            "constant", "step" or "multistep" with ``warmup_epochs``.
        checkpoint_steps: Updates between checkpoints (default: one checkpoint per epoch).
        holdout: Share of the images to hold out when there is no ``val_data``; 0 holds out none.
        val_data: Held-out images, in any form that the training data may have.
        data_root: Folder of a named dataset (``wds/``, ``hfds/``, ``torch/`` …).
        split: timm's split of the data; for a folder, its subfolder of that name if there is one.
        val_split: Split of ``val_data``.
        input_key: Field of a named dataset that holds the images (default: the reader's).
        target_key: Field of a named dataset that holds the labels (default: the reader's).
        num_samples: Length of a stream that does not know its own.
        tensorboard: Write TensorBoard events (default: if TensorBoard is installed).
        report_to: Also report to trackio or wandb, in the project of TRACKIO_PROJECT or
            WANDB_PROJECT (default: to neither).
        plot: Write ``curves.png`` and ``pictures.png``, the latter from fixed held-out images.
        progress: Show a progress bar (default: on a terminal).

    Raises:
        ValueError: A value is out of its range.
    """

    epochs: AtLeastOne = 400
    batch_size: AtLeastOne | None = None
    accumulate: AtLeastOne = 1
    opt: str = "adamw"
    lr: Positive | None = None
    base_lr: Positive = 1.5e-4
    lr_base_scale: Literal["linear", "sqrt"] = "linear"
    weight_decay: NotNegative = 0.06
    opt_args: Mapping[str, Any] | None = None
    layer_decay: Share | None = None
    sched: str = "cosine"
    warmup_epochs: NotNegative | None = None
    warmup_lr: NotNegative = 0.0
    min_lr: NotNegative = 0.0
    clip_grad: Positive | None = None
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    ema_decay: BelowOne | None = None
    precision: Precision | None = None
    compile: bool = False
    seed: int = 0
    device: str | None = None
    num_workers: Annotated[int, "at least 0"] = NUM_WORKERS
    resume: Literal["never", "auto"] = "never"
    checkpoint_steps: AtLeastOne | None = None
    holdout: BelowOne = 0.05
    val_data: Any = None
    data_root: PathLike | None = None
    split: str = "train"
    val_split: str = "validation"
    input_key: str | None = None
    target_key: str | None = None
    num_samples: int | None = None
    tensorboard: bool | None = None
    report_to: Literal["trackio", "wandb"] | None = None
    plot: bool = False
    progress: bool | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.warmup_epochs is not None and self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs must be below epochs = {self.epochs}, got {self.warmup_epochs:g}."
            )
        if self.sched == "plateau":
            raise ValueError(
                "sched='plateau' follows a metric, and timm saves nothing of that: a run could not "
                "resume exactly. Choose another schedule, such as cosine, step or none."
            )

    @property
    def open_ended(self) -> bool:
        """Whether the rates are the same for any number of epochs."""
        known = self.warmup_epochs is not None and self.sched in ("constant", "step", "multistep")
        return known or self.sched == "none"

    def fixed(self) -> dict[str, Any]:
        """What a continuation must not change, as JSON can hold it."""
        names = (field.name for field in dataclasses.fields(self))
        return {name: getattr(self, name) for name in names if name not in _FREE}


def check_fields(options: Any) -> None:
    """Check the fields of a dataclass by their annotations: ranges, and the values of a Literal."""
    for name, hint in get_type_hints(type(options), include_extras=True).items():
        value = getattr(options, name)
        for part in (hint, *get_args(hint)) if value is not None else ():
            if get_origin(part) is Annotated:
                check_value(name, value, part.__metadata__[0])
            elif get_origin(part) is Literal:
                check_choice(name, value, get_args(part))


def check_value(name: str, value: Any, allowed: str) -> None:
    """Raise ValueError if a value is outside of the range, one of those that annotations name."""
    if not _RANGES[allowed](value):
        raise ValueError(f"{name} must be {allowed}, got {value}.")


def check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Raise ValueError if a value is none of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")


def _ascending(value: Any, top: float) -> bool:
    pair = isinstance(value, (tuple, list)) and len(value) == 2
    return pair and 0.0 < value[0] <= value[1] <= top


def make_settings(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> Settings:
    """Combine a recipe's defaults and a user's values; TypeError for a name that is no setting."""
    known = [field.name for field in dataclasses.fields(Settings)]
    unknown = [name for name in given if name not in known]
    if unknown:
        raise TypeError(f"no such argument: {', '.join(unknown)}; settings are {', '.join(known)}.")
    return Settings(**{**defaults, **given})


def make_sources(data: Any, settings: Settings, world: World, **options: Any) -> Sources:
    """Open the training and held-out batches of a run; ``options`` go to ``Sources``."""
    s = settings
    named = {name: getattr(s, name) for name in ("input_key", "num_samples", "seed")}
    named["root"] = s.data_root
    train = open_dataset(data, split=s.split, training=True, **named)
    held_out = s.val_data
    if held_out is not None:
        held_out = open_dataset(held_out, split=s.val_split, training=False, **named)
    if isinstance(held_out, IterableDataset):
        raise ValueError(f"val_data must not be a stream, got {s.val_data}.")
    if s.plot and held_out is None and isinstance(train, IterableDataset):
        raise ValueError("pictures of a stream's training need val_data, or plot=False.")
    names = ("batch_size", "accumulate", "holdout", "num_samples", "num_workers", "seed")
    return Sources(train, held_out, world, **{name: getattr(s, name) for name in names}, **options)
