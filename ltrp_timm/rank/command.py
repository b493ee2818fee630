"""``ltrp-timm rank``: rank the patches of whole folders, and go on where it was interrupted.

Every part of the images is worked on by one process and written as a whole, so that results do not
depend on how many processes there are or how often they were interrupted.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from ltrp_timm.checkpoints import write_atomically
from ltrp_timm.console import CommandError, complain, say
from ltrp_timm.photos import one_line, printable
from ltrp_timm.rank.images import OVERLAYS, PixelDataset, find_images, fingerprint
from ltrp_timm.rank.parts import PART_SIZE, Parts, failures
from ltrp_timm.rank.processes import (
    first_alone,
    ignore_signals,
    processes,
    stopped_between_batches,
    stopped_by_sigterm,
    wait_for_all,
)
from ltrp_timm.rank.scorer import Scorer, rank_batch, ranker_alone, ranker_hash, ranker_of_model
from ltrp_timm.rankers import ranker_class
from ltrp_timm.visualize import kept_patches, row, score_map

IMG_SIZE, PATCH_SIZE = 224, 16  # without a model


@dataclass(frozen=True)
class RankOptions:
    """What ``ltrp-timm rank`` was asked for; names are those of its flags."""

    inputs: Sequence[str]
    output: str
    ranker: str = "contrast"
    ranker_weights: str | None = None
    ranker_args: str | None = None
    pretrained: bool = False
    keep_ratio: float = 0.5
    selection: str = "top"
    model: str | None = None
    img_size: int | None = None
    patch_size: int | None = None
    format: str = "npz"
    overlays: bool = True
    batch_size: int = 32
    workers: int = 0
    device: str | None = None
    overwrite: bool = False


@dataclass(frozen=True)
class _Job:
    """What every process of a run has before it starts to work."""

    root: Path
    names: list[str]
    missing: list[str]
    scorer: Scorer
    settings: dict[str, Any]
    parts: Parts
    device: str


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
    with stopped_by_sigterm(), processes() as (number, world):
        try:
            job = _prepare(options, number)
            _work(options, job, number, world)
            wait_for_all()
            return _finish(options, job) if number == 0 else 0
        except CommandError:
            if number == 0:
                raise
            return 2  # the first process says it
        except BrokenPipeError:  # of what is said, not of what is written
            raise
        except OSError as error:
            reason = error.strerror or one_line(error)
            raise CommandError(f"{printable(options.output)}: {reason}.") from error


def _prepare(options: RankOptions, number: int) -> _Job:
    device = _device(options.device)
    root, names, missing = find_images(options.inputs, options.output)
    if not names:
        raise CommandError(missing[0] if missing else "no images were found.")
    scorer = _scorer(options, device)
    settings = _settings(options, scorer, fingerprint(root, names))
    parts = Parts(Path(options.output), len(names))
    first_alone(lambda: parts.begin(settings, options.overwrite), number)
    return _Job(root, names, missing, scorer, settings, parts, device)


def _scorer(options: RankOptions, device: str) -> Scorer:
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


def _device(name: str | None) -> str:
    """The device asked for, or a GPU where there is one; of several GPUs each process takes its."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    local = os.environ.get("LOCAL_RANK")
    if name == "cuda" and local is not None and torch.cuda.is_available():
        name = f"cuda:{int(local) % torch.cuda.device_count()}"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch built without a device asserts
        raise CommandError(f"--device {name}: {one_line(error)}") from error
    return name


def _settings(options: RankOptions, scorer: Scorer, images: str) -> dict[str, Any]:
    """All that results depend on; they stand beside the results too."""
    config = scorer.config
    return {
        "ranker": options.ranker,
        "ranker_args": json.dumps(scorer.ranker.config()),
        "ranker_hash": ranker_hash(scorer.ranker),
        "keep_ratio": options.keep_ratio,
        "selection": options.selection,
        "model": options.model,
        "input_size": list(config["input_size"][-2:]),
        "patch_size": list(scorer.patch_size),
        "grid_size": list(scorer.grid_size),
        **{name: config[name] for name in ("interpolation", "crop_pct", "crop_mode")},
        **{name: list(config[name]) for name in ("mean", "std")},
        "overlays": options.overlays,
        "part_size": PART_SIZE,
        "images_hash": images,
    }


def _work(options: RankOptions, job: _Job, number: int, world: int) -> None:
    """Do this process's share of the parts that are not there yet."""
    pending = set(job.parts.pending())
    # the share must not depend on what other processes have written meanwhile
    mine = [part for part in range(number, job.parts.total(), world) if part in pending]
    indices = [index for part in mine for index in job.parts.images(part)]
    done: list[tuple[int, Tensor, Tensor, str]] = []
    quiet = None if number == 0 else True  # None: not where nobody looks
    with (
        stopped_between_batches() as check,
        tqdm(total=len(indices), unit="image", disable=quiet) as bar,
    ):
        for batch in _batches(options, job, indices):
            done += batch
            while mine and len(done) >= len(job.parts.images(mine[0])):
                count = len(job.parts.images(mine[0]))
                job.parts.write(mine.pop(0), _arrays(done[:count]))
                done = done[count:]
            bar.update(len(batch))
            check()


def _batches(
    options: RankOptions, job: _Job, indices: Sequence[int]
) -> Iterator[list[tuple[int, Tensor, Tensor, str]]]:
    """Ranked batches as (index, scores (N,), keep indices (K,), why it is no image or "")."""
    size = tuple(job.settings["input_size"])
    dataset = PixelDataset(job.root, job.names, job.scorer.transform(), size)
    loader = DataLoader(
        dataset,
        batch_size=options.batch_size,
        sampler=indices,
        num_workers=options.workers,
        worker_init_fn=ignore_signals,
    )
    for index, pixels, reasons in loader:
        scores, keep = rank_batch(
            job.scorer, pixels, options.keep_ratio, options.selection, job.device
        )
        results = list(zip(index.tolist(), scores, keep, reasons))
        if options.overlays:
            for picture, result in zip(pixels, results):
                if not result[3]:
                    _draw(Path(options.output), job, picture, *result[:3])
        yield results


def _arrays(results: Sequence[tuple[int, Tensor, Tensor, str]]) -> dict[str, Any]:
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
    output: Path, job: _Job, pixels: Tensor, index: int, scores: Tensor, keep: Tensor
) -> None:
    """The picture, its score map and its kept patches, side by side, as a PNG."""
    (h, w), (rows, cols) = job.scorer.grid_size, job.scorer.patch_size
    photo = Image.fromarray(pixels.permute(1, 2, 0).numpy()).crop((0, 0, w * cols, h * rows))
    panels = [
        (photo, f"{photo.width}x{photo.height}"),
        (score_map(photo, scores, (h, w)), "yellow = keep first"),
        (kept_patches(photo, keep, (h, w)), f"keeps {len(keep)} of {h * w}"),
    ]
    path = output / OVERLAYS / f"{job.names[index]}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet = row(panels)
    write_atomically(path, lambda place: sheet.save(place, "PNG"))


def _finish(options: RankOptions, job: _Job) -> int:
    """Name what could not be read and put the parts together."""
    failed = list(failures(job.parts))
    for line in (*job.missing, *failed):
        complain(line)
    good = len(job.names) - len(failed)
    if good == 0:
        job.parts.remove()
        raise CommandError("no image could be read, nothing was written.")
    path = job.parts.merge(options.format, job.names, job.settings)
    noun = "image" if good == 1 else "images"
    say(f"ranked {good} {noun}, {len(failed) + len(job.missing)} failed: {printable(path)}")
    return 2 if failed or job.missing else 0
