"""``ltrp-timm demo``: real photos, what is kept of them, and how long that takes here."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor

from ltrp_timm._text import complain, printable, say
from ltrp_timm.commands._console import CommandError, behind_links, check_output, output_errors
from ltrp_timm.commands._model import (
    build_model,
    check_names,
    describe_model,
    quiet_about_training,
)
from ltrp_timm.data.photos import load_image
from ltrp_timm.measure.throughput import Timing, compare
from ltrp_timm.measure.throughput import ratio as speed_up
from ltrp_timm.models.ltrp import LTRPModel
from ltrp_timm.visualize import keeping, overview, stack_rows, to_tensor
from ltrp_timm.weights.files import write_atomically

DEFAULT_OUTPUT = "ltrp_demo.png"
PHOTOS = ("astronaut", "chelsea", "coffee")  # real photos that come with scikit-image itself


def demo(
    images: Sequence[str] | None,
    *,
    model_name: str,
    ranker: str | None,
    keep_ratios: Sequence[float],
    output: str,
    overwrite: bool,
    pretrained: bool,
    repeats: int,
) -> int:
    """Rank the patches of photos, draw what is kept, and time full, ideal and pruned.

    Args:
        images: files, all different; None takes the photos of scikit-image.
        model_name: a registered ``ltrp_*`` name, any timm ViT, or ``hf-hub:`` or ``local-dir:``.
        ranker: one of ``list_rankers()``; None takes the model's own, or contrast.
        keep_ratios: shares of patches to keep, all different.
        output: the PNG to write.
        overwrite: replace it where it exists; the default name is ours anyway.
        pretrained: download weights that are not in the cache.
        repeats: timed rounds.

    Returns:
        0, or 2 when some of the files could not be shown.

    Raises:
        CommandError: an argument is wrong, or there is nothing to show.
    """
    check_names(model_name, ranker)
    replace = overwrite or output == DEFAULT_OUTPUT
    check_output(output, (".png",), replace, photos=images or ())
    photos = _sample_photos() if images is None else _load_photos(images)
    failed = images is not None and len(photos) < len(images)
    if not photos:
        raise CommandError("no photo could be read, nothing was written.")
    model, weights = build_model(model_name, ranker=ranker, pretrained=pretrained or None)
    describe_model(model, model_name, weights, keep_ratios)
    rows, shown = _draw(photos, model, keep_ratios)
    if not rows:
        raise CommandError("no photo could be shown, nothing was written.")
    _write_png(rows, output)
    if weights is not None:
        _print_predictions(shown, model, keep_ratios)
    _print_times(_measure(next(iter(shown.values())), model, keep_ratios, repeats), keep_ratios)
    say(f"\npicture     {printable(output)}")
    return 2 if failed or len(shown) < len(photos) else 0


def _write_png(rows: Sequence[Image.Image], output: str) -> None:
    sheet = stack_rows(rows)
    with output_errors(output):
        write_atomically(behind_links(output), lambda path: sheet.save(path, "PNG", optimize=True))


def _sample_photos() -> dict[str, Image.Image]:
    try:
        from skimage import data

        return {name: Image.fromarray(getattr(data, name)()) for name in PHOTOS}
    except ImportError as error:
        raise CommandError(
            "the demo's photos come with scikit-image: pip install 'ltrp-timm[demo]', or name your "
            "own with --image."
        ) from error


def _load_photos(paths: Sequence[str]) -> dict[str, Image.Image]:
    """Photos by file, in their order; a line on stderr for each file that is none."""
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
    """One row for each photo, and what the model gets (1, 3, H, W); a line for what it refuses."""
    rows: list[Image.Image] = []
    shown: dict[str, Tensor] = {}
    with quiet_about_training():
        for name, photo in photos.items():
            try:
                row = overview(photo, model, keep_ratios, captions=not rows)
            except ValueError as error:
                complain(f"{printable(name)}: {error}")
            else:
                rows.append(row)
                shown[name] = to_tensor(photo, model)
    return rows, shown


def _print_predictions(
    shown: dict[str, Tensor], model: LTRPModel, keep_ratios: Sequence[float]
) -> None:

    subset = infer_imagenet_subset(model)
    if subset is None:  # features, or an embedding as CLIP's: its largest value is no class
        say("\ntop-1: this backbone has no ImageNet classifier")
        return
    say("\ntop-1 class of the full and the pruned model")
    classes = ImageNetInfo(subset)
    with torch.inference_mode(), quiet_about_training():
        for name, x in shown.items():
            say(f"  {printable(name)}")
            for ratio in dict.fromkeys((1.0, *keep_ratios)):
                with keeping(model, ratio):
                    index = int(model(x).argmax())
                which = "full" if ratio == 1.0 else f"keep {ratio:g}"
                say(f"    {which:12}{index} {classes.index_to_description(index)}")


def _measure(
    x: Tensor, model: LTRPModel, keep_ratios: Sequence[float], repeats: int
) -> dict[str, Timing]:
    """Time the plain model, and at each ratio the given and the ranked patches, in turns."""

    def pruned(ratio: float) -> Any:
        model.keep_ratio = ratio
        return model(x)

    fns: dict[str, Any] = {"full": partial(model.backbone, x)}
    with torch.inference_mode(), quiet_about_training():
        for ratio in keep_ratios:
            with keeping(model, ratio):
                keep = model.keep_indices(x)
            fns[f"ideal {ratio}"] = partial(model, x, keep_indices=keep)
            fns[f"pruned {ratio}"] = partial(pruned, ratio)
        return compare(fns, repeats=repeats)


def _print_times(times: dict[str, Timing], keep_ratios: Sequence[float]) -> None:
    full = times["full"]
    rounds, threads = len(full.seconds), torch.get_num_threads()
    say(f"\ntime of one image: CPU, {threads} thread(s), float32, median of {rounds} round(s)")
    say(f"  {'keep':<10}{'ideal':<32}pruned")
    say(f"  {'1 (full)':<10}{1e3 * full.median:.1f} ms")
    for ratio in keep_ratios:
        cells = []
        for kind in ("ideal", "pruned"):
            time = times[f"{kind} {ratio}"]
            gain = speed_up(full, time)
            spread = f"({gain.low:.2f} to {gain.high:.2f})"
            cells.append(f"{1e3 * time.median:.1f} ms, {gain.median:.2f}x {spread}")
        say(f"  {ratio:<10g}{cells[0]:<32}{cells[1]}")
    say("  full: the plain backbone; ideal: keep_indices fixed beforehand, no ranker at work;")
    say(
        "  pruned: ranker included; 1.23x: as many times faster than full (lower to upper quartile)"
    )
