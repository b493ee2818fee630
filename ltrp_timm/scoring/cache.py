"""``ltrp-timm rank --cache``: the order of all patches of all images of a data set, once."""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from ltrp_timm._text import one_line, printable
from ltrp_timm.commands._console import CommandError
from ltrp_timm.data.images import Images, PixelDataset, open_dataset
from ltrp_timm.runtime.world import World
from ltrp_timm.scoring import CACHE_NAME, RANKS_NAME, ImageIds, finish_cache, rank_type, ranks_of
from ltrp_timm.scoring.ids import image_ids
from ltrp_timm.scoring.job import Job, RankOptions, Result, name_failures, run_job, say_done
from ltrp_timm.scoring.parts import PART_SIZE, Parts, stream
from ltrp_timm.scoring.run import find_device, make_scorer, scorer_settings

CROP_MODES = ("center", "squash")


def rank_cache(options: RankOptions) -> int:
    """Write the index cache of a data set.

    Args:
        options: what was asked for; ``cache`` is the folder, ``inputs`` has one data set.

    Returns:
        0, or 2 when some of the images could not be read.

    Raises:
        CommandError: an argument is wrong, there is nothing to rank, or the folder holds another
            cache.
    """
    return run_job(options, _prepare, str(options.cache))


def _prepare(options: RankOptions, world: World) -> Job:
    device, cache = find_device(options.device), Path(str(options.cache))
    if options.ranker == "random":
        raise CommandError("the random ranker looks at nothing: there is nothing to cache.")
    images = _open(options)
    scorer = make_scorer(options, device)
    config = dict(scorer.config)
    if options.crop_mode is not None:
        config["crop_mode"] = options.crop_mode
        if options.crop_mode == "squash":
            config["crop_pct"] = 1.0  # all of every picture
    scorer = dataclasses.replace(scorer, config=config)
    h, w = scorer.grid_size
    try:
        kind = rank_type(h * w)
    except ValueError as error:
        raise CommandError(str(error)) from error
    ids = image_ids(images)
    about = scorer_settings(options, scorer)
    settings = {**about, "part_size": PART_SIZE, "images_hash": _digest(ids)}
    parts = Parts(cache, len(images), (CACHE_NAME,))
    world.on_main(lambda: _begin(parts, settings, options.overwrite))
    size = settings["input_size"]
    return Job(
        str(cache),
        PixelDataset(images, scorer.transform(), (size[0], size[1])),
        scorer,
        settings,
        parts,
        device,
        partial(_arrays, kind),
        partial(_finish, parts, about, ids),
    )


def _open(options: RankOptions) -> Images:
    (data,) = options.inputs
    try:
        dataset = open_dataset(
            data,
            root=options.data_root,
            split=options.split,
            input_key=options.input_key,
            training=False,
        )
        if isinstance(dataset, IterableDataset):
            raise ValueError(f"{data} is a stream: its images cannot be found again.")
        images = Images(dataset)
    except (ValueError, OSError, ImportError) as error:
        raise CommandError(one_line(error)) from error
    if not len(images):
        raise CommandError("no images were found.")
    return images


def _begin(parts: Parts, settings: dict[str, Any], overwrite: bool) -> None:
    """Take up or start a cache; a file of its name that is none of ours stays."""
    ranks = parts.output / RANKS_NAME
    if not overwrite and ranks.exists() and not parts.folder.is_dir():
        name = printable(parts.output)
        raise CommandError(f"{name} holds {RANKS_NAME} already: --overwrite replaces it.")
    parts.begin(settings, overwrite)


def _digest(ids: ImageIds) -> str:
    text = json.dumps([ids.dataset, list(ids.names), list(ids.sizes)])
    return hashlib.sha256(text.encode()).hexdigest()


def _arrays(kind: Any, results: Sequence[Result]) -> dict[str, Any]:
    """The arrays of a part: of n images that could be read, and why others could not."""
    good = [result for result in results if not result[3]]
    bad = [result for result in results if result[3]]
    scores = torch.stack([result[1] for result in results])
    read = torch.tensor([not result[3] for result in results])
    return {
        "index": np.array([result[0] for result in good], dtype=np.int64),
        "ranks": ranks_of(scores[read]).numpy().astype(kind),
        "failed": np.array([result[0] for result in bad], dtype=np.int64),
        "reasons": np.array([result[3] for result in bad], dtype=np.str_),
    }


def _finish(parts: Parts, about: dict[str, Any], ids: ImageIds) -> int:
    """Put the parts together."""
    failed = name_failures(parts)
    rows = [int(index) for part in parts.read("index") for index in part["index"]]

    def write(path: Path) -> None:
        with path.open("wb") as file:
            stream(file, (part["ranks"] for part in parts.read("ranks")), len(rows))

    finish_cache(parts.output, about, ids, rows, write)
    parts.remove()
    return say_done(len(rows), failed, parts.output)
