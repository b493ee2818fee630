"""``ltrp-timm save`` and ``ltrp-timm push``: share a model or a ranker."""

from dataclasses import dataclass
from typing import Any

from ltrp_timm._text import say
from ltrp_timm.commands._console import ModelOptions, check_folder
from ltrp_timm.commands._flags import PathName, Words, add_command
from ltrp_timm.models.open_model import is_source
from ltrp_timm.share.save import CARD_NAME, FILES, push_folder, push_to_hub, save_pretrained


@dataclass(frozen=True, kw_only=True)
class SaveOptions(ModelOptions):
    """Options of ``ltrp-timm save``.

    Args:
        output: Folder to write.
        overwrite: Replace an earlier save in ``output``.
        keep_ratio: Share of patches to keep, in (0, 1] (default: the model's own).
        license: Identifier of the licence for the model card, such as apache-2.0.
        training_data: What the model was trained on, for the card.
        ranker_source: Where the ranker's weights come from, for the card.
        base_model: Repository of the model that training started from, for the card.
        description: A sentence for the card.
        evaluation: The evaluate.json that ``ltrp-timm evaluate`` wrote for this model, or its
            folder; the card states its accuracies, and the Hub reads them.
    """

    output: PathName
    overwrite: bool = False
    keep_ratio: float | None = None
    license: Words | None = None
    training_data: Words | None = None
    ranker_source: Words | None = None
    base_model: Words | None = None
    description: Words | None = None
    evaluation: PathName | None = None

    def card(self) -> dict[str, str]:
        """The facts for the model card, as ``save_pretrained`` takes them."""
        facts = {
            "license": self.license,
            "training_data": self.training_data,
            "ranker": self.ranker_source or self.ranker_weights,
            "base_model": self.base_model,
            "description": self.description,
        }
        return {name: text for name, text in facts.items() if text}


def add_save(commands: Any) -> None:
    """Add ``ltrp-timm save``."""
    about = "Write a pruned model with its weights and a model card, in timm's layout."
    add_command(commands, "save", about, _save, SaveOptions, positional=("model",))


def _save(**given: Any) -> int:
    options = SaveOptions(**given)
    check_folder(options.output, FILES, options.overwrite)
    if not (options.pretrained or options.checkpoint or is_source(options.model)):
        raise ValueError("save needs weights: either --pretrained or --checkpoint FILE.")
    model, weights = options.open(keep_ratio=options.keep_ratio)
    card = options.card()
    origin = model.pretrained_cfg.get("hf_hub_id") if options.checkpoint is None else None
    if origin:
        card.setdefault("base_model", origin)
    folder = save_pretrained(model, options.output, card, options.overwrite, options.evaluation)
    say(f"{folder}: config.json, model.safetensors, {CARD_NAME}")
    say(f"backbone weights: {weights}")
    for name in ("license", "training_data"):
        if name not in card:
            words = name.replace("_", " ")
            say(f"The card has no {words}; add it with --{name.replace('_', '-')}.")
    return 0


def add_push(commands: Any) -> None:
    """Add ``ltrp-timm push``."""
    about = "Put a saved model or ranker on the Hugging Face Hub."
    options: dict[str, Any] = {
        "positional": ("directory",),
        "skip": ("model", "model_card", "evaluation"),
    }
    add_command(commands, "push", about, _push, _push, push_to_hub, **options)


def _push(directory: PathName, **given: Any) -> int:
    """Upload a saved folder.

    Args:
        directory: Folder that ``ltrp-timm save`` or ``save_pretrained`` wrote.
        **given: See ``push_to_hub``.
    """
    say(push_folder(directory, **given))
    return 0
