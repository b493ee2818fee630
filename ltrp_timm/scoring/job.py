"""The work of ``ltrp-timm rank``, whatever is written in the end: in parts, shared, resumable.

Every part of the images is worked on by one process and written as a whole, so that results do not
depend on how many processes there are or how often they were interrupted.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ltrp_timm._text import complain, one_line, printable, say
from ltrp_timm.commands._console import CommandError
from ltrp_timm.runtime.stopping import ignore_signals, stop_requests, stopped_by_sigterm
from ltrp_timm.runtime.world import World, join_world
from ltrp_timm.scoring.parts import Parts, failures
from ltrp_timm.scoring.scorer import Scorer, rank_batch


@dataclass(frozen=True)
class RankOptions:
    """What ``ltrp-timm rank`` was asked for; names are those of its flags."""

    inputs: Sequence[str]
    output: str | None = None
    cache: str | None = None
    ranker: str = "contrast"
    ranker_weights: str | None = None
    ranker_args: str | None = None
    pretrained: bool = False
    keep_ratio: float = 0.5
    selection: str = "top"
    model: str | None = None
    img_size: int | None = None
    patch_size: int | None = None
    crop_mode: str | None = None
    split: str = "train"
    data_root: str | None = None
    input_key: str | None = None
    format: str = "npz"
    overlays: bool = True
    batch_size: int = 32
    workers: int = 0
    device: str | None = None
    overwrite: bool = False


Result = tuple[int, Tensor, Tensor, str]  # index, scores (N,), keep indices (K,), why it is none


@dataclass(frozen=True)
class Job:
    """What every process of a run has before it starts to work.

    Attributes:
        output: the folder of the results.
        dataset: (index, pixels (3, H, W) uint8, why it is no image or "") by index.
        scorer: turns pixels into scores.
        settings: all that results depend on.
        parts: results on disk.
        device: where the ranker runs.
        arrays: results of some images -> the arrays of a part.
        finish: puts the parts together; returns the exit code.
        draw: pixels and result -> a picture of it, in a file; or None.
    """

    output: str
    dataset: Dataset[tuple[int, Tensor, str]]
    scorer: Scorer
    settings: dict[str, Any]
    parts: Parts
    device: str
    arrays: Callable[[Sequence[Result]], dict[str, Any]]
    finish: Callable[[], int]
    draw: Callable[[Tensor, Result], None] | None = None


def run_job(options: RankOptions, prepare: Callable[[RankOptions, World], Job], output: str) -> int:
    """Prepare a job in every process, share its work, and let the first one finish it.

    Raises:
        CommandError: an argument is wrong, or the output cannot be written.
    """
    job = None
    with stopped_by_sigterm(), join_world("cpu", patient=True) as world:
        try:
            job = prepare(options, world)
            _work(options, job, world)
            world.barrier()
            return job.finish() if world.main else 0
        except CommandError:
            if world.main:
                raise
            return 2  # the first process reports it
        except BrokenPipeError:  # of what is said, not of what is written
            raise
        except OSError as error:
            if job is None and not world.main:
                return 2
            reason = error.strerror or one_line(error)
            raise CommandError(f"{printable(output)}: {reason}.") from error


def _work(options: RankOptions, job: Job, world: World) -> None:
    """Do this process's share of the parts that are not there yet."""
    pending = set(job.parts.pending())
    # the share must not depend on what other processes have written meanwhile
    mine = [part for part in range(world.rank, job.parts.total(), world.size) if part in pending]
    indices = [index for part in mine for index in job.parts.images(part)]
    done: list[Result] = []
    quiet = None if world.main else True  # None: not where nobody looks
    with (
        stop_requests() as requests,
        tqdm(total=len(indices), unit="image", disable=quiet) as bar,
    ):
        for batch in _batches(options, job, indices):
            done += batch
            while mine and len(done) >= len(job.parts.images(mine[0])):
                count = len(job.parts.images(mine[0]))
                job.parts.write(mine.pop(0), job.arrays(done[:count]))
                done = done[count:]
            bar.update(len(batch))
            requests.check()


def _batches(options: RankOptions, job: Job, indices: Sequence[int]) -> Iterator[list[Result]]:
    """Ranked batches."""
    loader = DataLoader(
        job.dataset,
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
        if job.draw is not None:
            for picture, result in zip(pixels, results):
                if not result[3]:
                    job.draw(picture, result)
        yield results


def name_failures(parts: Parts, missing: Sequence[str] = ()) -> int:
    """Name what is missing and what could not be read; returns how many are the latter.

    Raises:
        CommandError: nothing could be read; the parts are gone then.
    """
    failed = list(failures(parts))
    for line in (*missing, *failed):
        complain(line)
    if len(failed) == parts.count:
        parts.remove()
        raise CommandError("no image could be read, nothing was written.")
    return len(failed)


def say_done(good: int, failed: int, path: Path) -> int:
    """Say what was written; returns the exit code."""
    noun = "image" if good == 1 else "images"
    say(f"ranked {good} {noun}, {failed} failed: {printable(path)}")
    return 2 if failed else 0
