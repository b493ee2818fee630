"""``ltrp-timm demo``: what is kept of photos, and how much time that saves on this machine."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ltrp_timm._text import complain, optional_import, printable, say
from ltrp_timm.commands._console import (
    ModelOptions,
    behind_links,
    check_names,
    check_output,
    class_names,
    describe_model,
    output_errors,
    quiet_about_training,
    time_and_gain,
)
from ltrp_timm.commands._flags import PathName, Positive, add_command
from ltrp_timm.data.photos import load_image
from ltrp_timm.measure.payoff import twin
from ltrp_timm.measure.throughput import Timing, compare
from ltrp_timm.models.front_end import drop_patches
from ltrp_timm.models.ltrp import LTRPModel
from ltrp_timm.selection.cells import CellGrid
from ltrp_timm.visualize import KEEP_RATIOS, keeping, overview, stack_rows, to_tensor
from ltrp_timm.weights.files import write_atomically

DEFAULT_OUTPUT = "ltrp_demo.png"
VARIANTS = ("no ranking", "pruned", "coarse")
PHOTOS = ("astronaut", "chelsea", "coffee")  # real photos inside the package scikit-image


@dataclass(frozen=True, kw_only=True)
class DemoOptions(ModelOptions):
    """Options of ``ltrp-timm demo``.

    Args:
        image: Photos to show (default: three that scikit-image has).
        keep_ratio: Shares of patches to keep, in (0, 1].
        output: PNG file to write.
        overwrite: Replace an existing ``output``; the default one is always replaced.
        repeats: Number of timed rounds.
        threads: CPU threads (default: torch's choice).
    """

    model: str = "ltrp_vit_base"
    image: Sequence[PathName] | None = None
    keep_ratio: Sequence[float] = KEEP_RATIOS
    output: PathName = DEFAULT_OUTPUT
    overwrite: bool = False
    repeats: Positive = 10
    threads: Positive | None = None


def add_demo(commands: Any) -> None:
    """Add ``ltrp-timm demo``."""
    about = "Show which patches of photos are kept, and measure how much time that saves."
    add_command(commands, "demo", about, _run, DemoOptions)


def _run(**given: Any) -> int:
    options = DemoOptions(**given)
    files = None if options.image is None else list(dict.fromkeys(options.image))
    ratios = list(dict.fromkeys(options.keep_ratio))
    output = options.output
    check_names(options.model, options.ranker)
    check_output(output, (".png",), options.overwrite or output == DEFAULT_OUTPUT, files or ())
    photos = sample_photos() if files is None else _load_photos(files)
    failed = files is not None and len(photos) < len(files)
    if not photos:
        raise ValueError("no photo could be read, nothing was written.")
    model, weights = options.open()
    describe_model(model, options.model, weights, ratios)
    rows, shown = _draw(photos, model, ratios)
    if not rows:
        raise ValueError("no photo could be shown, nothing was written.")
    sheet = stack_rows(rows)
    with output_errors(output):
        write_atomically(behind_links(output), lambda path: sheet.save(path, "PNG", optimize=True))
    say(f"picture     {printable(output)}")
    if weights is not None:
        _print_predictions(shown, model, ratios)
    coarse = _coarse_twin(model)
    say("\nmeasuring the time of the full and the pruned model …")
    times = _measure(next(iter(shown.values())), model, coarse, ratios, options.repeats)
    _print_times(times, ratios, coarse is not None)
    return 2 if failed or len(shown) < len(photos) else 0


def sample_photos(extra: str = "demo") -> dict[str, Image.Image]:
    """Photos that scikit-image has; ``extra`` is what installs it."""
    package = f"'ltrp-timm[{extra}]'" + ", or choose your own with --image" * (extra == "demo")
    data = optional_import("skimage.data", "the sample photos are part of scikit-image", package)
    return {name: Image.fromarray(getattr(data, name)()) for name in PHOTOS}


def _load_photos(paths: Sequence[str]) -> dict[str, Image.Image]:
    """Photos by file, in order; prints an error for each file that cannot be read."""
    photos = {}
    for path in paths:
        try:
            photos[path] = load_image(path)
        except ValueError as error:
            complain(str(error))
    return photos


def _draw(
    photos: dict[str, Image.Image], model: LTRPModel, keep_ratios: Sequence[float]
) -> tuple[list[Image.Image], dict[str, Tensor]]:
    """A row for each photo, and the model's inputs (1, 3, H, W) by name of the photo.

    Prints an error for each photo that the model cannot take.
    """
    rows: list[Image.Image] = []
    shown: dict[str, Tensor] = {}
    with quiet_about_training():
        for name, photo in photos.items():
            try:
                row = overview(photo, model, keep_ratios, captions=not rows, coarse=True)
            except ValueError as error:
                complain(f"{printable(name)}: {error}")
            else:
                rows.append(row)
                shown[name] = to_tensor(photo, model)
    return rows, shown


def _print_predictions(
    shown: dict[str, Tensor], model: LTRPModel, keep_ratios: Sequence[float]
) -> None:
    names = class_names(model)
    if not names:
        say("\ntop-1: this backbone has no ImageNet classifier")
        return
    say("\ntop-1 class of the full and the pruned model")
    with torch.inference_mode(), quiet_about_training():
        for name, x in shown.items():
            say(f"  {printable(name)}")
            for ratio in dict.fromkeys((1.0, *keep_ratios)):
                with keeping(model, ratio):
                    index = int(model(x).argmax())
                which = "full" if ratio == 1.0 else f"keep {ratio:g}"
                say(f"    {which:12}{index} {names[index]}")


def _coarse_twin(model: LTRPModel) -> LTRPModel | None:
    """The same weights with a coarse rest; None if the model has one, or its family cannot."""
    if model.rest == "coarse":
        return None
    try:
        return drop_patches(twin(model).restore(), twin(model.ranker), rest="coarse").eval()
    except TypeError:
        return None


def _measure(
    x: Tensor,
    model: LTRPModel,
    coarse: LTRPModel | None,
    keep_ratios: Sequence[float],
    repeats: int,
) -> dict[str, Timing]:
    """Time the plain model and, at each ratio, given and ranked patches; interleaved."""

    def pruned(net: LTRPModel, ratio: float) -> Any:
        net.keep_ratio = ratio
        return net(x)

    fns: dict[str, Any] = {"full": partial(model.backbone, x)}
    with torch.inference_mode(), quiet_about_training():
        for ratio in keep_ratios:
            with keeping(model, ratio):
                keep = model.keep_indices(x)
            fns[f"no ranking {ratio}"] = partial(model, x, keep_indices=keep)
            fns[f"pruned {ratio}"] = partial(pruned, model, ratio)
            if coarse is not None and CellGrid(coarse.patch_grid).pays(ratio):
                fns[f"coarse {ratio}"] = partial(pruned, coarse, ratio)
        return compare(fns, repeats=repeats)


def _print_times(times: dict[str, Timing], keep_ratios: Sequence[float], coarse: bool) -> None:
    full = times["full"]
    rounds, count = len(full.seconds), torch.get_num_threads()
    say(f"\ntime of one image: CPU, {count} thread(s), float32, median of {rounds} round(s)")
    say(f"  {'keep':<10}{'no ranking':<34}{'pruned':<34}{'coarse rest' if coarse else ''}".rstrip())
    say(f"  {'1 (full)':<10}{1e3 * full.median:.1f} ms")
    for ratio in keep_ratios:
        found = [times.get(f"{kind} {ratio}") for kind in VARIANTS]
        texts = ["" if time is None else f"{time_and_gain(time, full):<34}" for time in found]
        say(f"  {ratio:<10g}{''.join(texts)}".rstrip())
    say("  full: the plain backbone; no ranking: patches are given; pruned: with ranking")
    if coarse:
        say("  coarse rest: with ranking; weak cells of 2x2 patches are tokens of half resolution")
    say("  x: speed-up over the full model (lower to upper quartile)")
