"""``ltrp-timm rank``: rank the patches of whole folders, and go on where it was interrupted.

Every part of the images is worked on by one process and written as a whole, so that results do not
depend on how many processes there are or how often they were interrupted.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ltrp_timm._text import one_line
from ltrp_timm.commands._console import CommandError
from ltrp_timm.data.images import ImageFiles, Images, PixelDataset, find_images
from ltrp_timm.rankers import ranker_class
from ltrp_timm.runtime.world import World
from ltrp_timm.scoring import ranker_hash
from ltrp_timm.scoring.job import Job, RankOptions, Result, name_failures, run_job, say_done
from ltrp_timm.scoring.parts import OVERLAYS, PART_SIZE, Parts
from ltrp_timm.scoring.scorer import Scorer, ranker_alone, ranker_of_model
from ltrp_timm.visualize import kept_patches, row, score_map
from ltrp_timm.weights.files import write_atomically

IMG_SIZE, PATCH_SIZE = 224, 16  # without a model


def rank(options: RankOptions) -> int:
    """Rank images and write scores, kept patches and pictures.

    Args:
        options: what was asked for.

    Returns:
        0, or 2 when some of the files could not be read.

    Raises:
        CommandError: an argument is wrong, there is nothing to rank, or the output holds other
            results.
    """
    return run_job(options, _prepare, str(options.output))


def _prepare(options: RankOptions, world: World) -> Job:
    device, output = find_device(options.device), str(options.output)
    root, names, missing = find_images(options.inputs, (output, os.path.join(output, OVERLAYS)))
    if not names:
        raise CommandError(missing[0] if missing else "no images were found.")
    scorer = make_scorer(options, device)
    settings = {
        **scorer_settings(options, scorer),
        "keep_ratio": options.keep_ratio,
        "selection": options.selection,
        "overlays": options.overlays,
        "part_size": PART_SIZE,
        "images_hash": fingerprint(root, names),
    }
    parts = Parts(Path(output), len(names))
    world.on_main(lambda: parts.begin(settings, options.overwrite))
    size = settings["input_size"]
    images = Images(ImageFiles("", [str(root / name) for name in names]))  # whole paths in messages
    return Job(
        output,
        PixelDataset(images, scorer.transform(), (size[0], size[1])),
        scorer,
        settings,
        parts,
        device,
        _arrays,
        partial(_finish, options, parts, names, missing, settings),
        partial(_draw, Path(output), names, scorer) if options.overlays else None,
    )


def fingerprint(root: Path, names: Sequence[str]) -> str:
    """A digest of the names, sizes and times of files: another one where an image changed."""
    digest = hashlib.sha256()
    for name in names:
        try:
            status = os.stat(root / name)
            state = f"{status.st_size} {status.st_mtime_ns}"
        except OSError:  # reported when it is read
            state = "unreadable"
        digest.update(f"{name}\0{state}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def make_scorer(options: RankOptions, device: str) -> Scorer:
    """What the options ask for.

    Raises:
        CommandError: there is no such thing.
    """
    name, weights = options.ranker, options.pretrained or options.ranker_weights
    try:
        kind = ranker_class(name)
        args = json.loads(options.ranker_args or "{}")
        if not isinstance(args, dict):
            raise ValueError(f"--ranker-args must be a JSON object, got {options.ranker_args}.")
        if kind.learned and not weights:
            raise ValueError(
                f"the {name} ranker is not trained, its choice would mean nothing: "
                "--ranker-weights FILE"
                + (" or --pretrained." if kind.has_published_weights else ".")
            )
        if options.model is not None:
            return ranker_of_model(name, weights, args, options.model, options.img_size, device)
        img_size, patch_size = options.img_size or IMG_SIZE, options.patch_size or PATCH_SIZE
        return ranker_alone(name, weights, args, img_size, patch_size, device)
    except json.JSONDecodeError as error:
        text = options.ranker_args
        raise CommandError(f"--ranker-args is not JSON ({error}), got {text}.") from error
    except Exception as error:  # timm, the Hub's client and file formats: no common type
        raise CommandError(one_line(error)) from error


def find_device(name: str | None) -> str:
    """The device asked for, or a GPU where there is one; of several GPUs each process takes its.

    Raises:
        CommandError: it cannot be used.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    local = os.environ.get("LOCAL_RANK")
    if name == "cuda" and local is not None and torch.cuda.is_available():
        name = f"cuda:{int(local) % torch.cuda.device_count()}"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch built without a device asserts
        raise CommandError(f"--device {name}: {one_line(error)}") from error
    return name


def scorer_settings(options: RankOptions, scorer: Scorer) -> dict[str, Any]:
    """What scores depend on; it stands beside the results too."""
    config = scorer.config
    return {
        "ranker": options.ranker,
        "ranker_args": json.dumps(scorer.ranker.config()),
        "ranker_hash": ranker_hash(scorer.ranker),
        "model": options.model,
        "input_size": list(config["input_size"][-2:]),
        "patch_size": list(scorer.patch_size),
        "grid_size": list(scorer.grid_size),
        **{name: config[name] for name in ("interpolation", "crop_pct", "crop_mode")},
        **{name: list(config[name]) for name in ("mean", "std")},
    }


def _arrays(results: Sequence[Result]) -> dict[str, Any]:
    """The arrays of a part: of n images that could be read, and why others could not."""
    good = [result for result in results if not result[3]]
    bad = [result for result in results if result[3]]
    shape = (-1, len(results[0][1])), (-1, len(results[0][2]))
    return {
        "index": np.array([result[0] for result in good], dtype=np.int64),
        "scores": np.array([r[1].numpy() for r in good], dtype=np.float32).reshape(shape[0]),
        "keep_indices": np.array([r[2].numpy() for r in good], dtype=np.int64).reshape(shape[1]),
        "failed": np.array([result[0] for result in bad], dtype=np.int64),
        "reasons": np.array([result[3] for result in bad], dtype=np.str_),
    }


def _draw(
    output: Path, names: Sequence[str], scorer: Scorer, pixels: Tensor, result: Result
) -> None:
    """The picture, its score map and its kept patches, side by side, as a PNG."""
    index, scores, keep, _ = result
    (h, w), (rows, cols) = scorer.grid_size, scorer.patch_size
    photo = Image.fromarray(pixels.permute(1, 2, 0).numpy()).crop((0, 0, w * cols, h * rows))
    panels = [
        (photo, f"{photo.width}x{photo.height}"),
        (score_map(photo, scores, (h, w)), "yellow = keep first"),
        (kept_patches(photo, keep, (h, w)), f"keeps {len(keep)} of {h * w}"),
    ]
    path = output / OVERLAYS / f"{names[index]}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet = row(panels)
    write_atomically(path, lambda place: sheet.save(place, "PNG"))


def _finish(
    options: RankOptions,
    parts: Parts,
    names: list[str],
    missing: Sequence[str],
    settings: dict[str, Any],
) -> int:
    """Put the parts together."""
    failed = name_failures(parts, missing)
    path = parts.merge(options.format, names, settings)
    return say_done(parts.count - failed, failed + len(missing), path)
