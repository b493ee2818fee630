"""What several commands share: the options of a model, what they print, where they may write."""

import contextlib
import os
import tempfile
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset

from ltrp_timm._text import one_line, printable, say
from ltrp_timm.commands._flags import NotNegative, PathName
from ltrp_timm.data.labels import listed_names
from ltrp_timm.measure.throughput import Timing, ratio
from ltrp_timm.models.ltrp import LTRPModel
from ltrp_timm.models.open_model import check_name, open_model
from ltrp_timm.rankers import list_rankers
from ltrp_timm.train.recipe import RestOptions

_LONGEST = 300  # characters of an error from another library


@dataclass(frozen=True, kw_only=True)
class ModelOptions(RestOptions):
    """A model by name, with its ranker and its weights.

    Args:
        model: An ``ltrp_*`` name, any timm ViT, hf-hub:OWNER/NAME or local-dir:DIR.
        pretrained: Download the weights that timm publishes, and those of ``ranker`` if there are
            any.
        checkpoint: File with weights of the model or of its plain backbone.
        ranker: Name of the ranker (default: the model's own, else border).
        ranker_weights: Weights of the ranker: a folder, a .safetensors file or hf-hub:OWNER/NAME.
        ranker_args: Arguments of the ranker, such as width=32.
        selection: How scores choose patches (default: the model's own, else top).
        img_size: Side of the images in pixels (default: the model's own).
        num_classes: Number of classes, 0 for features (default: the model's own).
    """

    model: str
    pretrained: bool = False
    checkpoint: PathName | None = None
    ranker: str | None = None
    ranker_weights: PathName | None = None
    ranker_args: dict[str, Any] | None = None
    selection: str | None = None
    img_size: int | None = None
    num_classes: NotNegative | None = None

    def open(
        self, keep_ratio: float | None = None, plain_if_refused: bool = False
    ) -> tuple[Any, str | None]:
        """Build the model in eval mode.

        Args:
            keep_ratio: Share of patches to keep; None for the model's own.
            plain_if_refused: Give the plain timm model if patches cannot be dropped from it.

        Returns:
            The model, and the origin of its backbone's weights; None for random ones.

        Raises:
            ValueError: It cannot be built, or weights are missing; one line that names the model.
        """
        values = {field.name: getattr(self, field.name) for field in fields(ModelOptions)}
        name, values["pretrained"] = values.pop("model"), self.pretrained or None
        with _in_one_line(name):
            try:
                return open_model(name, keep_ratio=keep_ratio, **values)
            except TypeError:
                if not plain_if_refused:
                    raise
            sizes = ("pretrained", "checkpoint", "num_classes")
            plain = {key: values[key] for key in sizes}
            try:
                return open_model(name, plain=True, img_size=self.img_size, **plain)
            except TypeError as error:
                if "img_size" not in str(error):
                    raise
            return open_model(name, plain=True, **plain)  # it takes images of any size


@contextlib.contextmanager
def _in_one_line(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        reason = textwrap.shorten(one_line(error), _LONGEST, placeholder=" …")
        raise ValueError(f"MODEL {printable(name)}: {reason}") from error


def check_names(model: str, *rankers: str | None) -> None:
    """Check names before any long work; ValueError, with similar ones, for an unknown model."""
    check_name(model, "MODEL")
    for name in rankers:
        if name is not None and name not in list_rankers():
            raise ValueError(f"--ranker must be one of {', '.join(list_rankers())}, got {name!r}.")


@contextlib.contextmanager
def quiet_about_training() -> Iterator[None]:
    """Suppress the warning of an untrained ranker: ``describe_model`` prints it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the .* ranker has no trained weights")
        yield


def describe_model(
    model: LTRPModel, name: str, weights: str | None, keep_ratios: Sequence[float]
) -> None:
    """Print a model's size, its ranker, how many patches it keeps and where its weights are from.

    ``name`` is what the user typed; ``weights`` is the origin of the backbone's, None if they are
    random.
    """
    h, w = model.data_config()["input_size"][-2:]
    kept = ", ".join(f"{model.num_tokens(r)} of {model.num_patches} at {r:g}" for r in keep_ratios)
    kept += " (about that on average, as calibrated)" * (model.budget is not None)
    say(f"model       {printable(name)}, {_millions(model.backbone)}, images of {h}x{w}")
    say(f"ranker      {model.ranker.name}: {_about_ranker(model.ranker)}")
    say(f"patches     keeps {kept}")
    say(f"selection   {how_chosen(model.settings())}")
    say(f"backbone weights: {weights or RANDOM}")


def how_chosen(settings: Mapping[str, Any]) -> str:
    """The selection, and the scales if the rest is coarse."""
    scales = settings.get("scales")
    rest = f", coarse rest with scales {' '.join(map(str, scales))}" if scales else ""
    return f"{settings['selection']}{rest}"


RANDOM = "random (not in the cache; --pretrained downloads them)"


def _about_ranker(ranker: Any) -> str:
    if ranker.name == "random":
        return "a fixed random order, independent of the image"
    if not ranker.learned:
        return "weight-free, no learning"
    state = "learned" if ranker.trained else "untrained, its choice means nothing"
    state += f" ({ranker.origin})" if ranker.origin else ""
    return f"{_millions(ranker)}, {state}"


def _millions(module: Any) -> str:
    count = sum(parameter.numel() for parameter in module.parameters())
    return f"{count / 1e6:.{1 if count > 1e6 else 2}f} M parameters"


def class_names(model: LTRPModel) -> list[str]:
    """Names of the classes in the order of the logits; [] for features or an embedding as CLIP's.

    Those that the model was saved with, else ImageNet's.
    """
    saved = listed_names((model.pretrained_cfg or {}).get("label_names"))
    if saved:
        return saved
    subset = infer_imagenet_subset(model)
    if subset is None:
        return []
    classes = ImageNetInfo(subset)
    return [classes.index_to_description(index) for index in range(classes.num_classes())]


def time_and_gain(timing: Timing, full: Timing) -> str:
    """A median in milliseconds, and the speed-up over the full model with its quartiles."""
    gain = ratio(full, timing)
    spread = f"{gain.low:.2f} to {gain.high:.2f}"
    return f"{1e3 * timing.median:.1f} ms, {gain.median:.2f}x ({spread})"


def check_output(
    output: str, suffixes: Sequence[str], overwrite: bool, photos: Sequence[str] = ()
) -> None:
    """Check before any long work that the file ``--output`` can be written; OSError if not.

    Args:
        output: The file.
        suffixes: Allowed endings, in lower case; ValueError for another one.
        overwrite: Whether the file may exist.
        photos: Files that are read and must not be replaced.
    """
    path = Path(output)
    if path.suffix.lower() not in suffixes:
        endings = " or ".join(suffixes)
        raise ValueError(f"--output must end in {endings}, got {printable(output)}.")
    with output_errors(output):
        if os.path.lexists(path):
            if not path.is_file():
                raise ValueError("it is not a regular file")
            if any(os.path.exists(photo) and path.samefile(photo) for photo in photos):
                raise ValueError("it is one of the photos")
            if not overwrite:
                raise FileExistsError("it exists already; --overwrite replaces it")
        with tempfile.TemporaryFile(dir=behind_links(output).parent):
            pass  # the folder takes new files


def check_folder(output: str, names: Sequence[str], overwrite: bool) -> None:
    """Check before any long work that ``names`` can be written in the folder ``--output``.

    The folder is not made. OSError if it is a file or cannot be written to, or if a file exists and
    may not be replaced.
    """
    folder = Path(output)
    with output_errors(output):
        if os.path.lexists(folder) and not folder.is_dir():
            raise NotADirectoryError("it is not a folder")
        found = [name for name in names if os.path.lexists(folder / name)]
        if found and not overwrite:
            files = " and ".join(found)
            raise FileExistsError(f"it holds {files} already; --overwrite replaces them")
        parent = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
        if not os.access(parent, os.W_OK):
            raise PermissionError("Permission denied")


@contextlib.contextmanager
def output_errors(output: str) -> Iterator[None]:
    """Turn the block's OSError or ValueError into an OSError that names ``--output``."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(f"--output {printable(output)} cannot be written: {reason}.") from error


def behind_links(output: str) -> Path:
    """The file that a link ``output`` points to; the link stays when the file is replaced."""
    return Path(os.path.realpath(output))


def size_text(size: Sequence[int]) -> str:
    """An image size (height, width) for a table: one number for a square."""
    height, width = size
    return f"{height}" if height == width else f"{height}x{width}"
