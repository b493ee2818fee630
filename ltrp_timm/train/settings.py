"""What every training has in common, as plain values."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ltrp_timm.measure.throughput import NUM_WORKERS

PRECISIONS = ("fp32", "bf16", "fp16")
RESUMES = ("never", "auto")
SCALE = (0.2, 1.0)  # of the published crops
CLIP_MODES = ("norm", "value", "agc")

# what may differ between a run and its continuation: it changes no weight
_FREE = {
    *("device", "num_workers", "resume", "checkpoint_steps", "tensorboard", "plot", "progress"),
    *("val_data", "val_split", "data_root", "split", "num_samples", "input_key"),
    *("batch_size", "accumulate"),  # their product with the processes is what counts
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Data, optimisation, precision and bookkeeping of a run.

    Args:
        epochs: passes over the training images.
        batch_size: images of one process at a time; None: 64, or fewer where there are fewer.
        accumulate: batches per update.
        opt: a name of timm's optimisers.
        lr: learning rate; None: ``base_lr`` · images per update / 256.
        base_lr: learning rate at 256 images per update.
        weight_decay: none on biases and norms.
        opt_args: more arguments of the optimiser; None: betas (0.9, 0.95) for AdamW.
        layer_decay: factor of the learning rate from each layer to the one below; None for none.
        sched: a name of timm's schedules, stepped at every update; "none" for a constant rate.
        warmup_epochs: None for a tenth of the epochs.
        warmup_lr: where the warm-up begins.
        min_lr: where the schedule ends.
        clip_grad: norm, value or factor to clip gradients at; None for no clipping.
        clip_mode: "norm", "value" or "agc".
        ema_decay: of an average of the weights, which is then what is measured and saved; None or 0
            for none.
        precision: "fp32", "bf16" or "fp16" (autocast); None: bf16 on a GPU, fp32 elsewhere.
        compile: use ``torch.compile``.
        seed: of everything that is drawn.
        device: None for a GPU when there is one.
        num_workers: processes that read images.
        resume: "never" refuses an output folder that holds a run; "auto" goes on with it.
        checkpoint_steps: updates between checkpoints; None for one an epoch.
        holdout: share of the images that are held out, when there is no ``val_data``; 0 for none.
        val_data: held-out images, a name as ``data``.
        data_root: folder of a named dataset (``wds/``, ``hfds/``, ``torch/`` …).
        split: timm's split; of a folder, its subfolder of that name when there is one.
        val_split: split of ``val_data``.
        input_key: where a named dataset keeps its images; None for the reader's default.
        target_key: where it keeps its labels; None for the reader's default.
        num_samples: length of a stream that does not know it.
        tensorboard: write its events; None: if it is installed.
        plot: write ``curves.png``, and pictures of fixed held-out images.
        progress: show a bar; None: on a terminal.

    Raises:
        ValueError: a value out of its range.
    """

    epochs: int = 400
    batch_size: int | None = None
    accumulate: int = 1
    opt: str = "adamw"
    lr: float | None = None
    base_lr: float = 1.5e-4
    weight_decay: float = 0.06
    opt_args: Mapping[str, Any] | None = None
    layer_decay: float | None = None
    sched: str = "cosine"
    warmup_epochs: float | None = None
    warmup_lr: float = 0.0
    min_lr: float = 0.0
    clip_grad: float | None = None
    clip_mode: str = "norm"
    ema_decay: float | None = None
    precision: str | None = None
    compile: bool = False
    seed: int = 0
    device: str | None = None
    num_workers: int = NUM_WORKERS
    resume: str = "never"
    checkpoint_steps: int | None = None
    holdout: float = 0.05
    val_data: Any = None
    data_root: str | None = None
    split: str = "train"
    val_split: str = "validation"
    input_key: str | None = None
    target_key: str | None = None
    num_samples: int | None = None
    tensorboard: bool | None = None
    plot: bool = False
    progress: bool | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "checkpoint_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        for name in ("lr", "base_lr", "clip_grad"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < float("inf"):
                raise ValueError(f"{name} must be above 0, got {value}.")
        for name in ("weight_decay", "warmup_lr", "min_lr", "warmup_epochs", "num_workers"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < float("inf"):
                raise ValueError(f"{name} must be at least 0, got {value}.")
        if self.layer_decay is not None and not 0.0 < self.layer_decay <= 1.0:
            raise ValueError(f"layer_decay must be in (0, 1], got {self.layer_decay}.")
        if self.ema_decay is not None and not 0.0 <= self.ema_decay < 1.0:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}.")
        if not 0.0 <= self.holdout < 1.0:
            raise ValueError(f"holdout must be in [0, 1), got {self.holdout}.")
        for name, allowed in (
            ("precision", PRECISIONS),
            ("resume", RESUMES),
            ("clip_mode", CLIP_MODES),
        ):
            value = getattr(self, name)
            if value not in allowed and not (name == "precision" and value is None):
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")

    def fixed(self) -> dict[str, Any]:
        """What a continuation must not change, as JSON can hold it."""
        names = (field.name for field in dataclasses.fields(self))
        return {name: getattr(self, name) for name in names if name not in _FREE}


def check_range(name: str, value: Any, top: float) -> None:
    """Check two numbers, from and to.

    Raises:
        ValueError: they are not, or not 0 < from <= to <= ``top``.
    """
    pair = isinstance(value, (tuple, list)) and len(value) == 2
    if not pair or not 0.0 < value[0] <= value[1] <= top:
        most = "" if top == float("inf") else f" <= {top:g}"
        raise ValueError(f"{name} must be two numbers, 0 < from <= to{most}, got {value}.")


def make_settings(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> Settings:
    """Settings of a recipe's defaults and a user's values.

    Raises:
        TypeError: a name that is no setting.
        ValueError: a value out of its range.
    """
    known = [field.name for field in dataclasses.fields(Settings)]
    unknown = [name for name in given if name not in known]
    if unknown:
        raise TypeError(f"no such argument: {', '.join(unknown)}; settings are {', '.join(known)}.")
    return Settings(**{**defaults, **given})
