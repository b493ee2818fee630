"""Rank all images of a data set: resumable, and shared among the processes of torchrun.

Images are ranked in fixed batches of neighbours, each by one process, so that the results do not
depend on the number of processes or of interruptions.
"""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset
from tqdm import tqdm

from ltrp_timm.data.images import NAMED, ImageFiles, Images, find_images, open_dataset
from ltrp_timm.data.keyed import KeyedImages, make_loader
from ltrp_timm.runtime.keyed_rng import HELD_OUT
from ltrp_timm.runtime.world import World, join_world, locked, stop_requests, stopped_by_sigterm
from ltrp_timm.scoring.scorer import Scorer, open_scorer
from ltrp_timm.scoring.store import OVERLAYS, ScoreWriter, begin, image_ids
from ltrp_timm.visualize import kept_patches, row, score_map, token_picture
from ltrp_timm.weights.files import PathLike, write_atomically


@dataclass(frozen=True)
class Ranked:
    """The result of a run.

    Attributes:
        ranked: number of images with scores.
        unreadable: one line for each image that could not be read, and for each missing input.
    """

    ranked: int
    unreadable: Sequence[str]


def rank_images(
    data: PathLike | Sequence[PathLike],
    output: PathLike,
    *,
    split: str | None = None,
    data_root: PathLike | None = None,
    input_key: str | None = None,
    keep_ratio: float | None = None,
    selection: str | None = None,
    overlays: bool = False,
    batch_size: int = 32,
    num_workers: int = 0,
    device: str | None = None,
    overwrite: bool = False,
    **scorer_args: Any,
) -> Ranked:
    """Write the scores of all patches of all images into a folder; see ``scoring.store``.

    Args:
        data: Image files and folders, searched recursively; or one data set: a .tar, or ``hfds/…``,
            ``wds/…``, ``torch/…`` as in timm.
        output: Folder of the results; an unfinished run in it is continued.
        split: Split of a data set (default: train).
        data_root: Folder of a named data set.
        input_key: Column of a named data set with the images.
        keep_ratio: Also write keep_indices.npy with this share of the patches, in (0, 1] (default:
            0.5 with ``selection``).
        selection: Also write keep_indices.npy by this rule (default: top with ``keep_ratio``).
        overlays: Also write a picture of each image with its scores and kept patches, the best half
            without ``keep_ratio`` and ``selection``.
        batch_size: Images per batch.
        num_workers: Processes that read images.
        device: Device of the ranker, such as cpu or cuda (default: a GPU if there is one).
        overwrite: Replace existing results.
        **scorer_args: Ranker, model and sizes, see ``open_scorer``.

    Raises:
        ValueError: an argument is out of range, no image can be read, or the folder holds an
            unfinished run with other settings.
        TypeError: patches cannot be dropped from the model, or an argument is unknown.
        FileExistsError: the folder holds results.
        BlockingIOError: another process writes to the folder.
        OSError: something is missing, or the folder cannot be written.

    >>> rank_images("photos", "scores", ranker="pixel_std")  # doctest: +SKIP
    """
    given = [data] if isinstance(data, (str, os.PathLike)) else data
    inputs, output = [os.fspath(path) for path in given], Path(output)
    chooses = keep_ratio is not None or selection is not None
    choice: dict[str, Any] = {"keep_ratio": keep_ratio or 0.5, "selection": selection or "top"}
    with (
        stopped_by_sigterm(),
        join_world(device, patient=True) as world,
        contextlib.ExitStack() as stack,
    ):
        named = {"split": split, "root": data_root, "input_key": input_key}
        images, missing = _open_images(inputs, output, world, named)
        scorer = open_scorer(**scorer_args, **choice, device=str(world.device))
        about = {"model": scorer_args.get("model"), "overlays": overlays}
        if scorer.model.rest == "coarse":
            own = scorer.model.settings()
            about |= {"rest": own["rest"], "scales": list(own["scales"])}
        chosen = choice if chooses else dict.fromkeys(choice)  # None: nothing is kept
        settings = {**scorer.settings(), **about, **chosen}
        n = scorer.grid_size[0] * scorer.grid_size[1]
        k = scorer.num_kept() if chooses else None

        def prepare() -> None:
            stack.enter_context(locked(output))
            begin(output, settings, image_ids(images), n, k, overwrite)

        world.on_main(prepare)
        writer = ScoreWriter(output, keeps=chooses)
        if len(writer) != len(images):
            raise ValueError(f"{output} is for {len(writer)} images, this process found another.")
        pictures = output / OVERLAYS if overlays else None
        failures = _rank(images, scorer, writer, pictures, batch_size, num_workers, world)
        failures = dict(world.gather(list(failures.items())))
        if world.main:
            writer.finish(failures)
        lines = [*missing, *(failures[index] for index in sorted(failures))]
        return Ranked(len(images) - len(failures), lines)


def _open_images(
    inputs: Sequence[str], output: Path, world: World, named: dict[str, Any]
) -> tuple[Images, list[str]]:
    """The images, by ``named`` options of a data set; a line for each input that does not exist."""
    if "" in inputs:  # a path would make it the current folder
        raise ValueError("an input has an empty name.")
    if any(named.values()) or any(map(_is_dataset, inputs)):
        if len(inputs) != 1:
            raise ValueError(f"a data set is ranked alone, got {len(inputs)} inputs.")
        named = {**named, "split": named["split"] or "train"}
        dataset = open_dataset(inputs[0], training=False, **named)
        if isinstance(dataset, IterableDataset):
            raise ValueError(f"{inputs[0]} is a stream; its images have no fixed numbers.")
        missing: list[str] = []
    else:
        # one process looks: another one might find other files
        skipped = (output, output / OVERLAYS)
        root, names, missing = world.on_main(lambda: find_images(inputs, skipped))
        dataset = ImageFiles(root, names)
    if not len(dataset):
        raise ValueError(missing[0] if missing else "no images were found.")
    return Images(dataset), missing


def _is_dataset(name: str) -> bool:
    """Whether this is a data set by name or an archive, not a file or folder of images."""
    if Path(name).exists():
        return name.endswith(".tar")
    return name.partition("/")[0].lower() in NAMED


def _draw(
    folder: Path, name: str, scorer: Scorer, pixels: Tensor, scores: Tensor, keep: Tensor
) -> None:
    """Draw an image, its score map and its kept patches side by side, into a PNG."""
    (h, w), (rows, cols) = scorer.grid_size, scorer.patch_size
    photo = Image.fromarray(pixels.permute(1, 2, 0).numpy()).crop((0, 0, w * cols, h * rows))
    last = (kept_patches(photo, keep, (h, w)), f"keeps {len(keep)} of {h * w}")
    if scorer.model.rest == "coarse":
        layout = scorer.model.select_layout(scores[None], pixels[None])
        last = (token_picture(photo, layout), f"{layout.num_tokens} tokens of {h * w}")
    sheet = row(
        [
            (photo, f"{photo.width}x{photo.height}"),
            (score_map(photo, scores, (h, w)), "yellow = keep first"),
            last,
        ]
    )
    # an entry of an archive may be called ../x
    path = folder / os.path.normpath(f"/{name}.png").lstrip("/")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda place: sheet.save(place, "PNG"))


def _rank(
    images: Images,
    scorer: Scorer,
    writer: ScoreWriter,
    pictures: Path | None,
    batch_size: int,
    num_workers: int,
    world: World,
) -> dict[int, str]:
    """Rank the share of this process; returns why images could not be read, by index."""
    count = len(images)
    failures: dict[int, str] = {}
    starts = range(world.rank * batch_size, count, world.size * batch_size)
    batches = (range(start, min(start + batch_size, count)) for start in starts)
    rows = [row for part in batches if writer.pending(part) for row in part]
    keys = zip(repeat(HELD_OUT), rows)  # made one by one: there may be millions
    shape, dtype = (3, *scorer.img_size), torch.uint8
    keyed = KeyedImages(images, range(count), scorer.transform(), 0, shape, dtype=dtype)
    options: Any = {"batch_size": batch_size, "num_workers": num_workers, "device": world.device}
    quiet = None if world.main else True  # None: silent where stderr is no terminal
    with (
        contextlib.closing(writer),
        stop_requests() as requests,
        tqdm(total=len(rows), unit="image", disable=quiet) as bar,
    ):
        for sample in make_loader(keyed, keys, **options):
            numbers, readable = sample["index"].tolist(), sample["real"].tolist()
            scores, keep = scorer(sample["image"])
            for place, number in enumerate(numbers):
                if not readable[place]:
                    failures[number] = sample["problems"][place]
                elif pictures is not None:
                    one = (sample["image"][place], scores[place], keep[place])
                    _draw(pictures, images.name(number), scorer, *one)
            writer.write(numbers, scores, keep, readable)
            bar.update(len(numbers))
            requests.check()
    return failures
