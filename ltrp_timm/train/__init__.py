"""Training: rankers, their teachers, and models that drop patches; one loop for all."""

from ltrp_timm.train.finetune import finetune
from ltrp_timm.train.loop import NonFiniteLossError, Summary
from ltrp_timm.train.mae import train_teacher
from ltrp_timm.train.ranker import train_ranker
from ltrp_timm.train.recipe import Augmentation, Recipe
from ltrp_timm.train.settings import Settings

__all__ = [
    "Augmentation",
    "NonFiniteLossError",
    "Recipe",
    "Settings",
    "Summary",
    "finetune",
    "train_ranker",
    "train_teacher",
]
