"""``ltrp-timm rank``."""

from typing import Any

from ltrp_timm._text import complain, counted, printable, say
from ltrp_timm.commands._flags import add_command
from ltrp_timm.measure.throughput import NUM_WORKERS
from ltrp_timm.runtime.world import first_process
from ltrp_timm.scoring import rank_images
from ltrp_timm.scoring.scorer import open_scorer


def add_rank(commands: Any) -> None:
    """Add ``ltrp-timm rank``."""
    about = "Score the patches of images: files, folders, or a data set."
    more = (
        "The output folder gets scores.npy (images, patches) and index.json; evaluate and finetune "
        "read both with --index-cache. Run the same command again to continue an interrupted run. "
        "torchrun --nproc-per-node N -m ltrp_timm rank … distributes the images."
    )
    options: dict[str, Any] = {"positional": ("data",), "epilog": more}
    options["defaults"] = {"num_workers": NUM_WORKERS}
    add_command(commands, "rank", about, rank, open_scorer, rank_images, rank, **options)


def rank(pretrained: bool = False, **given: Any) -> int:
    """Rank images and report how many.

    Args:
        pretrained: Use the published weights of the ranker (conv, attention, cam or grad_cam).
        **given: See ``rank_images``.

    Returns:
        0, or 2 if an image could not be read.

    Raises:
        ValueError: An option is wrong; see ``rank_images``.
    """
    if not given["output"]:
        raise ValueError("--output must name a folder, got an empty name.")
    if pretrained:
        if "ranker_weights" in given:
            raise ValueError("--pretrained and --ranker-weights exclude each other.")
        given["ranker_weights"] = True
    ranked = rank_images(**{"num_workers": NUM_WORKERS, **given})
    if not first_process():
        return 0
    for line in ranked.unreadable:
        complain(line)
    count = f"{counted(ranked.ranked, 'image')}, {len(ranked.unreadable)} failed"
    say(f"ranked {count}: {printable(given['output'])}")
    return 2 if ranked.unreadable else 0
