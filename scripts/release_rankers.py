r"""Train the reference rankers, measure them, write their cards and push them.

    python scripts/release_rankers.py --data imagenet/train --val-data imagenet/val \
        --output release --repo-id OWNER/ltrp-{ranker} --license apache-2.0 \
        --training-data ImageNet-1k

Flags that are not named here are those of ``ltrp-timm train-ranker``. ``torchrun`` starts it on
several GPUs. The same line again goes on where it stopped; ``--dry-run`` checks everything and
writes nothing. What it costs and what it checks: docs/releasing.md.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub

import ltrp_timm
from ltrp_timm import create_ranker, list_rankers, save_pretrained
from ltrp_timm._text import complain, one_line, say
from ltrp_timm.commands import main as ltrp_timm_command
from ltrp_timm.rankers import ranker_class
from ltrp_timm.runtime.world import join_world
from ltrp_timm.share.save import push_folder
from ltrp_timm.train.folder import CHECKPOINT_NAME, LOG_NAME, read_log, read_state
from ltrp_timm.weights.files import digest
from ltrp_timm.weights.hub import PREFIX, hub_errors, split_repository

RANKERS = ("conv", "vit_small")
WITHOUT_WEIGHTS = [name for name in list_rankers() if not ranker_class(name).learned]
RELEASE = "release"  # what is pushed, in the folder of the run
NOTE = (
    "Agreement with the teacher's order of the visible patches of held-out images, the same lists "
    "for all rows, by the training's last epoch. Whether it finds objects was not measured."
)


def main(argv: Sequence[str] | None = None) -> int:
    """All of it; returns 0, 2 for what the user can put right, or that of a training's end."""
    arguments, flags = make_parser().parse_known_args(argv)
    first = os.environ.get("RANK", "0") == "0"
    try:
        with join_world(arguments.device) as world:  # one for all: a second one in a row may fail
            world.on_main(lambda: check(arguments))
            for name in arguments.rankers:
                code = train(arguments, flags, name)
                if code:
                    return code
        if first and not arguments.dry_run:
            for name in arguments.rankers:
                release(arguments, name)
    except (OSError, ValueError, RuntimeError) as error:
        return complain(one_line(error)) if first else 2
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The flags of this script; all others go to the training."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--data", required=True, metavar="DIR", help="images to train on, as for train-ranker")
    add("--output", required=True, metavar="DIR", help="gets a folder for each ranker")
    add("--rankers", nargs="+", default=list(RANKERS), metavar="NAME", help="(conv vit_small)")
    add("--teacher", default="facebook/vit-mae-base", help="(%(default)s)")
    text = "OWNER/NAME with {ranker} in it; without, nothing is pushed"
    add("--repo-id", metavar="TEMPLATE", help=text)
    add("--license", help="of the weights, for the cards; needed to push")
    add("--training-data", metavar="TEXT", help="what the images are; needed to push")
    add("--device", help="cpu, cuda, … (a GPU when there is one)")
    add("--private", action="store_true", default=None, help="hide new repositories")
    add("--token", help="with the right to write (HF_TOKEN, or that of `hf auth login`)")
    add("--overwrite", action="store_true", help="replace other weights in the repositories")
    add("--dry-run", action="store_true", help="check everything, write and push nothing")
    return parser


def check(arguments: argparse.Namespace) -> None:
    """Say what is wrong before days of work.

    Raises:
        ValueError: a flag that is missing or cannot be.
        FileExistsError: a repository holds other weights, which are not to be replaced.
        OSError: there is no token that the Hub knows, or the Hub does not answer.
    """
    for name in arguments.rankers:
        if name not in list_rankers() or not ranker_class(name).learned:
            raise ValueError(f"--rankers must be rankers that learn, got {name!r}.")
    if arguments.repo_id is None:
        return
    for name in arguments.rankers:
        repository = repository_of(arguments, name)
        if split_repository(repository) is None or "@" in repository:
            raise ValueError(f"--repo-id must give OWNER/NAME, got {repository!r}.")
    if len(set(arguments.rankers)) > 1 and "{ranker}" not in arguments.repo_id:
        raise ValueError(f"--repo-id must hold {{ranker}}, got {arguments.repo_id!r}.")
    missing = [
        f"--{n.replace('_', '-')}"
        for n in ("license", "training_data")
        if not getattr(arguments, n)
    ]
    if missing:
        raise ValueError(f"what is published must state it: {' and '.join(missing)}.")
    token = arguments.token or huggingface_hub.get_token()
    if token is None:
        raise PermissionError("pushing needs a token: set HF_TOKEN or run `hf auth login`.")
    with hub_errors(repository_of(arguments, arguments.rankers[0])):
        huggingface_hub.HfApi(token=token).whoami()
    for name in arguments.rankers:
        check_repository(arguments, name)


def repository_of(arguments: argparse.Namespace, name: str) -> str:
    """Where a ranker goes."""
    return str(arguments.repo_id).replace("{ranker}", name.replace("_", "-"))


def check_repository(arguments: argparse.Namespace, name: str) -> None:
    """Say what lies in the repository of a ranker.

    Raises:
        FileExistsError: other weights, which are not to be replaced.
        OSError: the Hub refuses or does not answer.
    """
    repository, folder = repository_of(arguments, name), run_folder(arguments, name)
    there = pull(arguments, name)
    ours = finished(folder) and there == weights_in(folder, name)
    if there is not None and not ours and not arguments.overwrite:
        raise FileExistsError(f"{repository} holds other weights: --overwrite replaces them.")
    state = "nothing yet" if there is None else "these weights" if ours else "weights to replace"
    say(f"{repository}: {state}")


def run_folder(arguments: argparse.Namespace, name: str) -> Path:
    """The folder of the training of a ranker."""
    return Path(arguments.output) / name


def train(arguments: argparse.Namespace, flags: Sequence[str], name: str) -> int:
    """Train a ranker, or go on with it; returns the exit code of ``ltrp-timm train-ranker``."""
    command = ["train-ranker", "--data", arguments.data, "--ranker", name]
    command += ["--output", str(run_folder(arguments, name)), "--teacher", arguments.teacher]
    command += ["--recipe", "paper", "--resume", "auto", "--compare", *WITHOUT_WEIGHTS, *flags]
    command += ["--device", arguments.device] if arguments.device else []
    return ltrp_timm_command([*command, *(["--dry-run"] if arguments.dry_run else [])])


def finished(folder: Path) -> bool:
    """Whether the training of a folder has reached its last epoch."""
    if not (folder / CHECKPOINT_NAME).is_file():
        return False
    state = read_state(folder / CHECKPOINT_NAME)
    done: bool = state["progress"]["epoch"] >= state["config"]["epochs"]
    return done


def release(arguments: argparse.Namespace, name: str) -> None:
    """Write what is to be pushed, push it, pull it again and compare.

    Raises:
        ValueError: the training is not finished, or nothing was held out.
        RuntimeError: what comes back is not what was sent.
        OSError: the Hub or the disk refuses.
    """
    folder = run_folder(arguments, name)
    if not finished(folder):
        raise ValueError(f"{folder} is not finished: nothing half-trained is released.")
    ours, ranker = weights_in(folder, name), create_ranker(name, pretrained=folder)
    card = make_card(arguments, folder)
    save_pretrained(ranker, folder / RELEASE, card, overwrite=True)
    say(f"{folder / RELEASE}: held-out spearman {card['results']['this ranker']['spearman']}")
    if arguments.repo_id is None:
        return
    repository = repository_of(arguments, name)
    if pull(arguments, name) == ours:
        say(f"{PREFIX}{repository} has these weights already")
        return
    options = {"private": arguments.private, "token": arguments.token}
    pushed = push_folder(folder / RELEASE, repository, overwrite=arguments.overwrite, **options)
    if pull(arguments, name) != ours:
        raise RuntimeError(f"{repository} does not give back what was pushed.")
    say(f"{pushed} pushed, pulled again and compared")


def make_card(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What the card says: how it was trained, and how its order compares.

    Raises:
        ValueError: no image was held out to measure with.
    """
    row, config = read_log(folder / LOG_NAME)[-1], read_state(folder / CHECKPOINT_NAME)["config"]
    if row.get("val_spearman") is None:
        raise ValueError(f"{folder} held no image out: there is nothing to say of its ranker.")
    results = {
        who: {metric: f"{row[f'val_{metric}{part}']:.4f}" for metric in ("spearman", "ndcg")}
        for who, part in (
            ("this ranker", ""),
            *((f"{other} (no weights)", f"_{other}") for other in WITHOUT_WEIGHTS),
        )
    }
    names = ("mask_ratio", "removal", "metric", "aggregate", "loss", "seed", "precision")
    chosen = ", ".join(f"{name} {config[name]}" for name in names)
    card = {
        "license": arguments.license,
        "training_data": arguments.training_data,
        "ranker": f"learned, without labels, the order of the pseudo-scores of {arguments.teacher}",
        "base_model": arguments.teacher if split_repository(arguments.teacher) else None,
        "description": f"Trained for {config['epochs']} epochs, {row['step']:g} updates of "
        f"{config['images_per_update']} images ({chosen}) by ltrp_timm {ltrp_timm.__version__}.",
        "results_note": NOTE,
    }
    return {**{key: text for key, text in card.items() if text}, "results": results}


def weights_in(source: str | Path, name: str, token: str | None = None) -> str:
    """A short name for the weights of a ranker, whatever file they lie in."""
    return digest(create_ranker(name, pretrained=source, token=token).state_dict())


def pull(arguments: argparse.Namespace, name: str) -> str | None:
    """The name of the weights in the repository of a ranker; None when it has none."""
    try:
        source = f"{PREFIX}{repository_of(arguments, name)}"
        return weights_in(source, name, arguments.token)
    except FileNotFoundError:
        return None
    except (ValueError, RuntimeError):
        return "something else"


if __name__ == "__main__":
    sys.exit(main())
