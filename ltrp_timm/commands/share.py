"""``ltrp-timm save`` and ``push``: flags into arguments of ``sharing``."""

import argparse
from typing import Any

from ltrp_timm._text import say
from ltrp_timm.commands._console import CommandError, library_errors
from ltrp_timm.commands._flags import add_card, card_of


def add_save(commands: Any) -> None:
    """Define ``ltrp-timm save``."""
    about = "Write a pruned model with its weights and a model card, in timm's layout."
    parser = commands.add_parser("save", help=about, description=about, allow_abbrev=False)
    parser.set_defaults(run=_run_save)
    add = parser.add_argument
    add("model", metavar="MODEL", help="an ltrp_* name or any timm ViT")
    add("-o", "--output", required=True, metavar="DIR", help="the folder to write")
    add(
        "--pretrained",
        action="store_true",
        help="the weights that timm publishes, and those of --ranker where there are some",
    )
    add("--checkpoint", metavar="FILE", help="weights of the ViT or of the whole pruned model")
    add("--ranker", default="contrast", help="what scores the patches (%(default)s)")
    add("--ranker-weights", metavar="SOURCE", help="folder, file or hf-hub:owner/name[@revision]")
    add("--keep-ratio", type=float, default=0.5, metavar="R", help="in (0, 1] (%(default)s)")
    add("--selection", default="top", help="how scores choose patches (%(default)s)")
    add("--num-classes", type=int, metavar="N", help="classes of the checkpoint")
    add("--img-size", type=int, metavar="PIXELS", help="image side of the checkpoint")
    add("--overwrite", action="store_true", help="replace an earlier save")
    add_card(parser)


def add_push(commands: Any) -> None:
    """Define ``ltrp-timm push``."""
    about = "Put a saved model or ranker on the Hugging Face Hub."
    parser = commands.add_parser("push", help=about, description=about, allow_abbrev=False)
    parser.set_defaults(run=_run_push)
    add = parser.add_argument
    add("directory", metavar="DIR", help="what `ltrp-timm save` or save_pretrained wrote")
    add("--repo-id", required=True, metavar="OWNER/NAME", help="created when missing")
    add("--private", action="store_true", default=None, help="hide a new repository")
    add("--revision", metavar="BRANCH", help="created when missing (main)")
    add("--token", help="with the right to write (HF_TOKEN, or that of `hf auth login`)")
    add("--overwrite", action="store_true", help="replace files that the branch holds")


def _run_save(arguments: argparse.Namespace) -> int:
    from ltrp_timm.models.open_model import open_model
    from ltrp_timm.share.save import CARD_NAME, save_pretrained

    if arguments.pretrained == (arguments.checkpoint is not None):
        raise CommandError("save needs weights: either --pretrained or --checkpoint FILE.")
    told = card_of(arguments)
    if arguments.ranker_weights:
        told.setdefault("ranker", arguments.ranker_weights)
    with library_errors():
        model, weights = open_model(
            arguments.model,
            pretrained=arguments.pretrained,
            checkpoint=arguments.checkpoint,
            ranker=arguments.ranker,
            ranker_weights=arguments.ranker_weights,
            keep_ratio=arguments.keep_ratio,
            selection=arguments.selection,
            num_classes=arguments.num_classes,
            img_size=arguments.img_size,
        )
        origin = model.pretrained_cfg.get("hf_hub_id") if arguments.pretrained else None
        if origin:
            told.setdefault("base_model", origin)
        folder = save_pretrained(model, arguments.output, told, arguments.overwrite)
    say(f"{folder}: config.json, model.safetensors, {CARD_NAME}")
    say(f"backbone weights: {weights}")
    for name in ("license", "training_data"):
        if name not in told:
            say(f"the card states no {name.replace('_', ' ')}: --{name.replace('_', '-')} does")
    return 0


def _run_push(arguments: argparse.Namespace) -> int:
    from ltrp_timm.share.save import push_folder

    with library_errors():
        name = push_folder(
            arguments.directory,
            arguments.repo_id,
            private=arguments.private,
            token=arguments.token,
            revision=arguments.revision,
            overwrite=arguments.overwrite,
        )
    say(name)
    return 0
