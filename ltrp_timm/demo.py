"""``ltrp-timm demo``: real photos, what is kept of them, and how long that takes here."""

import contextlib
import difflib
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from PIL import Image
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor

from ltrp_timm.checkpoints import write_atomically
from ltrp_timm.console import CommandError, complain, say
from ltrp_timm.model import LTRPModel
from ltrp_timm.photos import load_image, one_line, printable
from ltrp_timm.rankers import list_rankers, ranker_class
from ltrp_timm.selection import num_keep
from ltrp_timm.throughput import Timing, compare
from ltrp_timm.throughput import ratio as speed_up
from ltrp_timm.visualize import data_config, keeping, overview, stack_rows, to_tensor

DEFAULT_OUTPUT = "ltrp_demo.png"
PHOTOS = ("astronaut", "chelsea", "coffee")  # real photos that come with scikit-image itself


def demo(
    images: Sequence[str] | None,
    *,
    model_name: str,
    ranker: str,
    keep_ratios: Sequence[float],
    output: str,
    overwrite: bool,
    pretrained: bool,
    repeats: int,
) -> int:
    """Rank the patches of photos, draw what is kept, and time full, ideal and pruned.

    Args:
        images: files, all different; None takes the photos of scikit-image.
        model_name: a registered ``ltrp_*`` name, or any timm ViT.
        ranker: one of ``list_rankers()``.
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
    _check_names(model_name, ranker)
    _check_output(output, images or (), overwrite)
    photos = _sample_photos() if images is None else _load_photos(images)
    failed = images is not None and len(photos) < len(images)
    if not photos:
        raise CommandError("no photo could be read, nothing was written.")
    model, weights = _build(model_name, ranker, pretrained)
    _describe(model, model_name, weights, keep_ratios)
    rows, shown = _draw(photos, model, keep_ratios)
    if not rows:
        raise CommandError("no photo could be shown, nothing was written.")
    _write_png(rows, output)
    if weights is not None:
        _print_predictions(shown, model, keep_ratios)
    _print_times(_measure(next(iter(shown.values())), model, keep_ratios, repeats), keep_ratios)
    say(f"\npicture     {printable(output)}")
    return 2 if failed or len(shown) < len(photos) else 0


# What is wrong is said before any long work.


def _check_names(model_name: str, ranker: str) -> None:
    if ranker not in list_rankers():
        raise CommandError(f"--ranker must be one of {', '.join(list_rankers())}, got {ranker!r}.")
    if not timm.is_model(model_name):
        near = difflib.get_close_matches(model_name, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "see timm.list_models('ltrp*')."
        raise CommandError(f"--model {model_name!r} is unknown: {hint}")
    try:
        timm.models.get_pretrained_cfg(model_name)
    except RuntimeError as error:  # a tag that does not exist
        raise CommandError(f"--model {model_name!r}: {error}") from error


def _check_output(output: str, images: Sequence[str], overwrite: bool) -> None:
    name, path = printable(output), Path(output)
    if path.suffix.lower() != ".png":
        raise CommandError(f"--output must end in .png, got {name}.")
    with _output_errors(output):
        if os.path.lexists(path):
            if not path.is_file():
                raise CommandError(f"--output {name} is no regular file.")
            if any(os.path.exists(image) and path.samefile(image) for image in images):
                raise CommandError(f"--output {name} is one of the photos.")
            if not overwrite and output != DEFAULT_OUTPUT:
                raise CommandError(f"--output {name} exists already: --overwrite replaces it.")
        with tempfile.TemporaryFile(dir=_behind_links(output).parent):
            pass  # the folder takes new files


@contextlib.contextmanager
def _output_errors(output: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CommandError(f"--output {printable(output)} cannot be written: {reason}.") from error


def _write_png(rows: Sequence[Image.Image], output: str) -> None:
    sheet = stack_rows(rows)
    with _output_errors(output):
        write_atomically(_behind_links(output), lambda path: sheet.save(path, "PNG", optimize=True))


def _behind_links(output: str) -> Path:
    return Path(os.path.realpath(output))


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


def _build(name: str, ranker: str, pretrained: bool) -> tuple[LTRPModel, str | None]:
    """The model in eval mode, and where its backbone's weights are from; None: they are random."""
    kwargs: dict[str, Any] = {"ranker": ranker, "pretrained": pretrained}
    if pretrained and ranker_class(ranker).has_published_weights:
        kwargs["ranker_weights"] = True
    weights = "downloaded" if pretrained else None
    cached = _cached_weights(name)
    if cached is not None:
        kwargs.update(pretrained=True, pretrained_cfg_overlay={"file": cached})
        weights = "found in the local cache"
    ours = name.startswith("ltrp")
    if not ours:
        kwargs["backbone"] = name
    try:
        return timm.create_model(name if ours else "ltrp", **kwargs).eval(), weights
    except Exception as error:  # timm, the Hub's client and file formats: no common type
        raise CommandError(f"--model {name}: {one_line(error)}") from error


def _cached_weights(name: str) -> str | None:
    """The file with a model's weights in the local Hub cache."""
    repository = getattr(timm.models.get_pretrained_cfg(name), "hf_hub_id", None)
    if not repository:
        return None
    repository, _, revision = repository.partition("@")
    found = try_to_load_from_cache(repository, "model.safetensors", revision=revision or None)
    return found if isinstance(found, str) else None


def _describe(
    model: LTRPModel, name: str, weights: str | None, keep_ratios: Sequence[float]
) -> None:

    size = data_config(model)["input_size"][-2:]
    h, w = model.grid_size(torch.empty(1, 3, *size, device="meta"))
    kept = ", ".join(f"{num_keep(h * w, r)} of {h * w} at {r:g}" for r in keep_ratios)
    say(f"model       {name}, {_millions(model.backbone)}, images of {size[0]}x{size[1]}")
    say(f"ranker      {model.ranker.name}: {_about_ranker(model.ranker)}")
    say(f"patches     keeps {kept}")
    random = "random (not in the cache; --pretrained downloads them)"
    say(f"backbone weights: {weights or random}")


def _about_ranker(ranker: Any) -> str:
    if ranker.name == "random":
        return "a fixed random order, looks at nothing"
    if not ranker.learned:
        return "weight-free, no learning"
    state = "learned" if ranker.trained else "untrained here, so its choice means nothing"
    return f"{_millions(ranker)}, {state}"


def _millions(module: Any) -> str:
    count = sum(parameter.numel() for parameter in module.parameters())
    return f"{count / 1e6:.{1 if count > 1e6 else 2}f} M parameters"


def _draw(
    photos: dict[str, Image.Image], model: LTRPModel, keep_ratios: Sequence[float]
) -> tuple[list[Image.Image], dict[str, Tensor]]:
    """One row for each photo, and what the model gets (1, 3, H, W); a line for what it refuses."""
    rows: list[Image.Image] = []
    shown: dict[str, Tensor] = {}
    with _quiet_about_training():
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
    with torch.inference_mode(), _quiet_about_training():
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
    with torch.inference_mode(), _quiet_about_training():
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


@contextlib.contextmanager
def _quiet_about_training() -> Iterator[None]:
    """The line on the ranker says already what the model's warning would."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the .* ranker has no trained weights")
        yield
